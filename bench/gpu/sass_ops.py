"""What the instructions of SASS do that move and compare nothing but bits (sass.py): control, memory, threads."""

from __future__ import annotations

import re

import numpy as np

from bench.gpu.sass import SHARED, WARP, Array, Block, Unknown, bytes_to_words, op

INSTRUCTION = 16  # bytes

# ---- control


@op("BRA")
def bra(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "DIV" in suffixes:  # taken where a warp's threads have parted, to bring them together
        return
    for text in o[:-1]:
        active = active & b.predicate(text)
    b.jump(o[-1], active)


@op("BRX")
def jump_by_table(b: Block, _: list[str], o: list[str], active: Array) -> None:
    register, further = o[0].split()[:2]  # from behind this instruction
    b.pc[active] += (b.word(register).view(np.int32)[active] + int(further, 0)) // INSTRUCTION


@op("EXIT")
def leave(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.there &= ~active
    b.let_go()


@op("CALL")
def call(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    b.jump(o[-1], active)  # where to return to is in a register


@op("RET")
def come_back(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "REL" not in suffixes:
        raise Unknown("a return to an absolute address")
    b.pc[active] = b.word(o[0].split()[0])[active] // INSTRUCTION


@op("BSSY")
def join(b: Block, _: list[str], o: list[str], active: Array) -> None:
    np.copyto(b.joined[int(o[0][1:])], active, where=b.whole_warps(active))


@op("BREAK")
def part(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.joined[int(o[-1][1:])] &= ~active
    b.let_go()


@op("BSYNC")
def meet(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.wait(int(o[0][1:]), active)


@op("BAR")
def barrier(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    b.wait(99, active)


@op("NOP", "YIELD", "WARPSYNC", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "ACQBULK")
def nothing(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "COLLECTIVE" in suffixes:
        raise Unknown("threads have parted")


# ---- moving


@op("MOV", "UMOV")
def mov(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set(o[0], b.word(o[1]), active)


@op("S2R", "S2UR", "CS2R")
def special(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    values = {
        "SR_TID.X": np.arange(b.threads), "SR_CTAID.X": np.full(b.threads, b.index), "SR_CgaCtaId": np.zeros(b.threads),
        "SRZ": np.zeros(b.threads), "SR_LANEID": np.arange(b.threads) % WARP,
    }  # fmt: skip
    value = values[o[1]].astype(np.uint32)
    b.set(o[0], value, active)
    if o[1] == "SRZ" and "32" not in suffixes:
        b.set(o[0], value, active, True)


@op("R2UR")
def to_uniform(b: Block, _: list[str], o: list[str], active: Array) -> None:
    value = b.word(o[-1])
    # Of the first thread that takes part.
    first = np.argmax(active.reshape(-1, WARP), axis=1) + np.arange(0, b.threads, WARP)
    b.set(o[-2], np.repeat(value[first], WARP), active)


@op("LDC", "ULDC")
def load_constant(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size = {"64": 8, "U8": 1, "U16": 2, "128": 16}.get(suffixes[0] if suffixes else "", 4)
    bank, index = b.number(o[0])
    for i, value in enumerate([b.constant(o[1], min(size, 4), at) for at in range(0, size, 4)]):
        np.copyto(bank[index + i], value, where=b.whole_warps(active) if bank is b.ur else active)


def size_of(suffixes: list[str]) -> int:
    return next((int(s) // 8 if s.isdigit() else int(s[1:]) // 8 for s in suffixes if re.fullmatch(r"[US]?\d+", s)), 4)


@op("LDL")
def load_local(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    """What a thread has spilled, from memory of its own."""
    size, (bank, index) = size_of(suffixes), b.number(o[0])
    places = b.address(o[1])[active, None] + np.arange(size)
    for i, word in enumerate(bytes_to_words(b.local[np.flatnonzero(active)[:, None], places])):
        bank[index + i][active] = word


@op("STL")
def store_local(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size, address = size_of(suffixes), b.address(o[0])[active]
    b.local[np.flatnonzero(active)[:, None], address[:, None] + np.arange(size)] = stored(b, o[1], size, active)


def stored(b: Block, text: str, size: int, active: Array) -> Array:
    """The bytes of a register, or of those behind it, too."""
    bank, index = b.number(text)
    words = np.stack([bank[index if index == 255 else index + i][active] for i in range(max(1, size // 4))], axis=1)
    return np.ascontiguousarray(words).view(np.uint8)[:, :size]


@op("LDG", "LDS")
def load(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size, address = size_of(suffixes), b.address(o[-1])[active]
    if "E" in suffixes:
        found = b.memory.bytes[b.touch(b.read, address, size)]
    else:
        found = b.shared[b.in_shared(address, size, active)[:, None] + np.arange(size)]
    if {"S8", "S16"} & set(suffixes):
        found = np.ascontiguousarray(found).view(f"i{size}").astype(np.int32).view(np.uint8)
    bank, index = b.number(o[-2])
    for i, word in enumerate(bytes_to_words(found)):
        bank[index + i][active] = word


@op("STG", "STS")
def store(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size, address = size_of(suffixes), b.address(o[0])[active]
    values = stored(b, o[1], size, active)
    if "E" in suffixes:
        b.memory.bytes[b.touch(b.written, address, size)] = values
    else:
        b.shared[b.in_shared(address, size, active)[:, None] + np.arange(size)] = values


@op("ATOMG", "RED", "REDG")
def atomic(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    target, at, given = ("RZ", o[0], o[1]) if len(o) == 2 else o[1:4]
    wide = "64" in suffixes
    address, numbers = b.address(at), b.pair(given) if wide else b.word(given)
    for thread in np.flatnonzero(active):
        place = b.touch(b.written, address[thread : thread + 1], numbers.itemsize)[0]
        old, number = b.memory.bytes[place].view(numbers.dtype), numbers[thread : thread + 1]
        if "INC" in suffixes:
            new = np.where(old >= number, 0, old + 1).astype(numbers.dtype)
        elif "ADD" in suffixes:
            new = old + number
        else:
            raise Unknown("no such atomic operation is known")
        if target != "RZ":
            one = np.arange(b.threads) == thread
            (b.set_pair if wide else b.set)(target, np.repeat(old, b.threads), one)
        b.memory.bytes[place] = new.view(np.uint8)


@op("ATOMS")
def atomic_in_shared(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if o[0] != "RZ" or not {"ADD", "INC"} & set(suffixes) or "64" in suffixes:
        raise Unknown("no such atomic operation is known")
    # .POPC.INC adds one for each thread that is there, for those with one address together.
    numbers = np.ones(b.threads, np.uint32) if "POPC" in suffixes else b.word(o[2])
    if "INC" in suffixes and "POPC" not in suffixes:
        raise Unknown("no such atomic operation is known")
    places = b.in_shared(b.address(o[1])[active], 4, active, one_by_one="POPC" not in suffixes)
    np.add.at(b.shared.view(np.uint32), places // 4, numbers[active])


def matrices(b: Block, suffixes: list[str], text: str) -> Array:
    """Where the words of 8x8 matrices of 16 bits are: [matrix, thread] in shared memory.

    Thread 8 i + j knows where row j of matrix i is, and has two elements of row thread / 4 of each.
    """
    if "M88" not in suffixes or b.threads % WARP:
        raise Unknown("no such matrix is known")
    count = next((int(s) for s in suffixes if s in ("2", "4")), 1)
    rows = (b.address(text) - SHARED).reshape(-1, WARP)
    lane = np.arange(WARP)
    return np.stack([(rows[:, 8 * i + lane // 4] + 4 * (lane % 4)).reshape(-1) for i in range(count)])


@op("LDSM")
def load_matrices(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    bank, index = b.number(o[0])
    for i, places in enumerate(matrices(b, suffixes, o[1])):
        bank[index + i][active] = b.shared.view(np.uint32)[places[active] // 4]


@op("STSM")
def store_matrices(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    bank, index = b.number(o[1])
    for i, places in enumerate(matrices(b, suffixes, o[0])):
        b.shared.view(np.uint32)[places[active] // 4] = bank[index + i][active]


@op("SHFL")
def shuffle(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    value, lane = b.word(o[2]).reshape(-1, WARP), np.arange(WARP)
    other = b.word(o[3]).reshape(-1, WARP).astype(np.int64)
    places = {"BFLY": lane ^ other, "IDX": other % WARP, "DOWN": lane + other, "UP": lane - other}[suffixes[0]]
    inside = (places >= 0) & (places < WARP)
    taken = np.take_along_axis(value, np.where(inside, places, lane), axis=1)
    b.set(o[1], taken.reshape(-1), active)
    b.set_predicate(o[0], inside.reshape(-1), active)


@op("VOTEU", "VOTE")
def vote(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    given = (b.predicate(o[-1]) & active).reshape(-1, WARP)
    all_ = (b.predicate(o[-1]) | ~active).reshape(-1, WARP).all(1)
    if len(o) == 3:
        ballot = (given.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        b.set(o[0], np.repeat(ballot, WARP), active)
    b.set_predicate(o[-2], np.repeat(all_ if "ALL" in suffixes else given.any(1), WARP), active)


@op("REDUX")
def reduce(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if suffixes[0] != "SUM":
        raise Unknown("no such reduction is known")
    total = np.where(active, b.word(o[1]), 0).reshape(-1, WARP).sum(axis=1, dtype=np.uint32)
    b.set(o[0], np.repeat(total, WARP), active)


@op("SEL", "FSEL", "USEL")
def select(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set(o[0], np.where(b.predicate(o[3]), b.word(o[1], "f"), b.word(o[2], "f")), active)


@op("PRMT")
def permute(b: Block, _: list[str], o: list[str], active: Array) -> None:
    pool = np.concatenate([b.word(o[1])[:, None], b.word(o[3])[:, None]], axis=1).copy().view(np.uint8)
    selector, result = b.word(o[2]), np.zeros((b.threads, 4), np.uint8)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(0xF)
        byte = np.take_along_axis(pool, (nibble & 7).astype(np.int64)[:, None], axis=1)[:, 0]
        result[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    b.set(o[0], result.view(np.uint32)[:, 0], active)


@op("P2R", "UP2UR")
def pack_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    bank, mask = b.up if o[1] == "UPR" else b.p, b.word(o[3])
    bits = sum(bank[i].astype(np.uint32) << np.uint32(i) for i in range(7))
    b.set(o[0], (bits & mask) | (b.word(o[2]) & ~mask), active)


@op("R2P", "UR2UP")
def unpack_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    value, mask, kind = b.word(o[1]), int(o[2], 0), "UP" if o[0] == "UPR" else "P"
    for i in range(7):
        if mask >> i & 1:
            b.set_predicate(f"{kind}{i}", (value >> np.uint32(i) & 1).astype(bool), active)
