"""What the instructions of SASS do (sass.py), by their names."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from bench.gpu.disassembly import Instruction
from bench.gpu.sass import (
    COMPARISONS,
    JOINS,
    SHARED,
    WARP,
    Array,
    Block,
    Unknown,
    bytes_to_words,
    fused,
    u32,
)

Op = Callable[[Block, list[str], list[str], Array], None]  # block, suffixes, operands, active threads
OPS: dict[str, Op] = {}


def op(*names: str) -> Callable[[Op], Op]:
    def register(function: Op) -> Op:
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


def execute(block: Block, instruction: Instruction, active: Array) -> None:
    base, *suffixes = instruction.name.split(".")
    # The uniform datapath does the same with other registers.
    found = OPS.get(base) or (OPS.get(base[1:]) if base.startswith("U") else None)
    if found is None:
        raise Unknown("no such instruction is known")
    operands = [text.replace(".reuse", "") for text in instruction.operands]
    if active.any():
        found(block, suffixes, operands, active)


def u64(x: Array) -> Array:
    return x.astype(np.uint64)


def low(x: Array) -> Array:
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


# ---- control


@op("BRA")
def bra(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "DIV" in suffixes:  # taken where a warp's threads have parted, to bring them together
        return
    for text in o[:-1]:
        active = active & b.predicate(text)
    b.jump(o[-1], active)


@op("EXIT")
def leave(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.there &= ~active
    b.let_go()


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


@op("LDG", "LDS")
def load(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size, address = size_of(suffixes), b.address(o[-1])[active]
    if "E" in suffixes:
        found = b.memory.bytes[b.memory.at(address, size)]
    else:
        found = b.shared[(address - SHARED)[:, None] + np.arange(size)]
    bank, index = b.number(o[-2])
    for i, word in enumerate(bytes_to_words(found)):
        bank[index + i][active] = word


@op("STG", "STS")
def store(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    size, address = size_of(suffixes), b.address(o[0])[active]
    bank, index = b.number(o[1])
    words = np.stack([bank[index if index == 255 else index + i][active] for i in range(max(1, size // 4))], axis=1)
    values = np.ascontiguousarray(words).view(np.uint8)[:, :size]
    if "E" in suffixes:
        b.memory.bytes[b.memory.at(address, size)] = values
    else:
        b.shared[(address - SHARED)[:, None] + np.arange(size)] = values


@op("ATOMG")
def atomic(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "INC" not in suffixes:
        raise Unknown("no such atomic operation is known")
    address, limit = b.address(o[2]), b.word(o[3])
    for thread in np.flatnonzero(active):
        place = b.memory.at(address[thread : thread + 1], 4)[0]
        old = int(b.memory.bytes[place].view(np.uint32)[0])
        one = np.arange(b.threads) == thread
        b.set(o[1], np.full(b.threads, old, np.uint32), one)
        new = np.array([0 if old >= limit[thread] else old + 1], np.uint32)
        b.memory.bytes[place] = new.view(np.uint8)


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
    b.set_predicate(o[-2], np.repeat(all_ if "ALL" in suffixes else given.any(1), WARP), active)


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


@op("P2R")
def pack_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    bits = sum(b.p[i].astype(np.uint32) << np.uint32(i) for i in range(7))
    mask = b.word(o[3])
    b.set(o[0], (bits & mask) | (b.word(o[2]) & ~mask), active)


@op("R2P")
def unpack_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    value, mask = b.word(o[1]), int(o[2], 0)
    for i in range(7):
        if mask >> i & 1:
            b.set_predicate(f"P{i}", (value >> np.uint32(i) & 1).astype(bool), active)


# ---- integers


def carries(b: Block, o: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates that are written, numbers, predicates that are read."""
    after = next(i for i in range(1, len(o)) if not is_predicate(o[i]))
    end = next((i for i in range(after, len(o)) if is_predicate(o[i])), len(o))
    return o[1:after], o[after:end], o[end:]


def extended(b: Block, text: str) -> Array:
    """A word as a number of 64 bits, so that adding -x carries as adding ~x and 1 does."""
    if re.match(r"-[UR]", text):
        return np.uint64(1 << 32) - u64(b.word(text[1:]))
    return u64(b.word(text))


def set_sum(
    b: Block, suffixes: list[str], target: str, total: Array, predicates: tuple[list[str], list[str]], active: Array
) -> None:
    """A sum of 32 bits, which takes carries in with .X, and the carries that it writes."""
    written, taken = predicates
    if "X" in suffixes:
        for text in taken:
            total = total + u64(b.predicate(text))
    b.set(target, low(total), active)
    for text in written:
        b.set_predicate(text, total >> np.uint64(32) > 0, active)


@op("IADD3", "UIADD3", "IADD", "VIADD")
def add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    total = sum((extended(b, text) for text in numbers), np.zeros(b.threads, np.uint64))
    if "X" in suffixes:
        for text in taken:
            total = total + u64(b.predicate(text))
    b.set(o[0], low(total), active)
    for i, text in enumerate(written):
        b.set_predicate(text, total >> np.uint64(32) > i, active)


@op("IMAD", "UIMAD")
def multiply_add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    first, second, third = numbers
    signed = "U32" not in suffixes
    if "WIDE" in suffixes or "HI" in suffixes:
        if signed:
            product = (b.word(first).view(np.int32).astype(np.int64) * b.word(second).view(np.int32)).view(np.uint64)
        else:
            product = u64(b.word(first)) * u64(b.word(second))
        if "WIDE" in suffixes:
            b.set_pair(o[0], product + b.pair(third), active)
            if written:
                raise Unknown("a carry of a wide product")
        else:
            b.set(o[0], low((product >> np.uint64(32)) + u64(b.word(third))), active)
        return
    total = u64(low(u64(b.word(first)) * u64(b.word(second)))) + extended(b, third)
    set_sum(b, suffixes, o[0], total, (written, taken), active)


@op("LEA", "ULEA")
def shift_add(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    written, numbers, taken = carries(b, o)
    shift = np.uint64(int(numbers[-1], 0))
    first, second = b.word(numbers[0]), extended(b, numbers[1])
    if "HI" in suffixes:
        if "SX32" in suffixes:
            whole = first.view(np.int32).astype(np.int64).view(np.uint64)
        else:
            whole = u64(first) | u64(b.word(numbers[2])) << np.uint64(32)
        total = u64(low((whole << shift) >> np.uint64(32))) + second
    else:
        total = u64(low(u64(first) << shift)) + second
    set_sum(b, suffixes, o[0], total, (written, taken), active)


@op("SHF", "USHF")
def shift_by(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    lower, upper = b.word(o[1]), b.word(o[3])
    wide = "S64" in suffixes or "U64" in suffixes
    amount = b.word(o[2])
    amount = u64(amount % (64 if wide else 32) if "W" in suffixes else np.minimum(amount, 64 if wide else 32))
    whole, signed = u64(lower) | u64(upper) << np.uint64(32), "S32" in suffixes or "S64" in suffixes
    most = np.uint64(63)
    if "L" in suffixes:
        shifted = np.where(amount > most, np.uint64(0), whole << np.minimum(amount, most))
    elif signed:
        shifted = (whole.view(np.int64) >> np.minimum(amount, most).astype(np.int64)).view(np.uint64)
    else:
        shifted = np.where(amount > most, np.uint64(0), whole >> np.minimum(amount, most))
    b.set(o[0], low(shifted >> np.uint64(32)) if "HI" in suffixes else low(shifted), active)


def look_up(table: int, a: Array, c: Array, d: Array) -> Array:
    """Bit by bit, what a table of eight says of three."""
    result = a ^ a
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (c if i & 2 else ~c) & (d if i & 1 else ~d))
    return result


@op("LOP3", "ULOP3")
def logic(b: Block, _: list[str], o: list[str], active: Array) -> None:
    written, numbers, _taken = carries(b, ["", *o] if is_predicate(o[0]) else o)
    target = o[len(written)] if is_predicate(o[0]) else o[0]
    if is_predicate(o[0]):
        numbers = numbers[1:]
    value = look_up(int(numbers[3], 0), *(b.word(text) for text in numbers[:3]))
    b.set(target, value, active)
    for text in written:
        b.set_predicate(text, value != 0, active)


@op("PLOP3", "UPLOP3")
def logic_of_predicates(b: Block, _: list[str], o: list[str], active: Array) -> None:
    value = look_up(int(o[5], 0), *(b.predicate(text) for text in o[2:5]))
    b.set_predicate(o[0], value, active)
    b.set_predicate(o[1], look_up(int(o[6], 0), *(b.predicate(text) for text in o[2:5])), active)


def compare(b: Block, suffixes: list[str], o: list[str], active: Array, x: Array, y: Array) -> None:
    holds, join = COMPARISONS[suffixes[0]](x, y), JOINS[next(s for s in suffixes if s in JOINS)]
    if "EX" in suffixes:  # of two words the upper one; the last predicate is what the lower ones said
        lower = b.predicate(o[5])
        holds = (
            holds & lower
            if suffixes[0] == "EQ"
            else holds | lower
            if suffixes[0] == "NE"
            else np.where(x == y, lower, holds)
        )
    other = b.predicate(o[4])
    b.set_predicate(o[0], join(holds, other), active)
    b.set_predicate(o[1], join(~holds, other), active)


@op("ISETP", "UISETP")
def compare_integers(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    x, y = b.word(o[2]), b.word(o[3])
    if "U32" not in suffixes:
        x, y = x.view(np.int32), y.view(np.int32)
    compare(b, suffixes, o, active, x, y)


@op("VIMNMX", "VIADDMNMX")
def least(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    words = [b.word(text) for text in o[1:-1]]
    if len(words) == 3:
        words = [words[0] + words[1], words[2]]
    if "U32" not in suffixes:
        words = [word.view(np.int32) for word in words]
    value = np.where(b.predicate(o[-1]), np.minimum(*words), np.maximum(*words))
    b.set(o[0], value.view(np.uint32), active)


# ---- numbers


@op("FFMA")
def fused_multiply_add(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set(o[0], u32(fused(*(b.single(text) for text in o[1:4]))), active)


@op("FMUL")
def multiply(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set(o[0], u32(b.single(o[1]) * b.single(o[2])), active)


@op("FADD")
def add_numbers(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set(o[0], u32(b.single(o[1]) + b.single(o[2])), active)


@op("FSETP")
def compare_numbers(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    compare(b, suffixes, o, active, b.single(o[2]), b.single(o[3]))


@op("DSETP")
def compare_doubles(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    compare(b, suffixes, o, active, b.double(o[2]), b.double(o[3]))


@op("DADD")
def add_doubles(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set_pair(o[0], b.double(o[1]) + b.double(o[2]), active)


@op("DMUL")
def multiply_doubles(b: Block, _: list[str], o: list[str], active: Array) -> None:
    b.set_pair(o[0], b.double(o[1]) * b.double(o[2]), active)


@op("DFMA")
def fused_multiply_add_doubles(b: Block, _: list[str], o: list[str], active: Array) -> None:
    x, y, z = (b.double(text).astype(np.longdouble) for text in o[1:4])
    b.set_pair(o[0], (x * y + z).astype(np.float64), active)  # of 64 bits instead of all, which is hardly ever seen


@op("MUFU")
def estimate(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    name = suffixes[0]
    if name.endswith("64H"):  # the upper word of a double
        x = (u64(b.word(o[1])) << np.uint64(32)).view(np.float64)
        value = 1.0 / x if name == "RCP64H" else 1.0 / np.sqrt(x)
        return b.set(o[0], low(value.view(np.uint64) >> np.uint64(32)), active)
    x = b.single(o[1])
    value = {"RCP": lambda: 1 / x, "RSQ": lambda: 1 / np.sqrt(x), "SQRT": lambda: np.sqrt(x)}[name]()
    b.set(o[0], u32(value), active)


@op("I2FP", "I2F")
def from_integer(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    word = b.word(o[1])
    b.set(o[0], u32((word.view(np.int32) if "S32" in suffixes else word).astype(np.float32)), active)


@op("F2F")
def convert(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if suffixes[:2] == ["F64", "F32"]:
        return b.set_pair(o[0], b.single(o[1]).astype(np.float64), active)
    if suffixes[:2] == ["F32", "F64"]:
        return b.set(o[0], u32(b.double(o[1]).astype(np.float32)), active)
    raise Unknown("no such conversion is known")


def bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16)


@op("F2FP")
def pack(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    upper, lower = b.single(o[1]), b.single(o[2])
    if suffixes[0] == "BF16":
        value = bfloat16(upper) << np.uint32(16) | bfloat16(lower)
    else:
        halves = [x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (upper, lower)]
        value = halves[0] << np.uint32(16) | halves[1]
    b.set(o[0], value, active)


@op("HADD2")
def from_half(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    if "F32" not in suffixes or o[1] != "-RZ":
        raise Unknown("arithmetic of float16")
    word = b.word(o[2].split(".")[0]) >> np.uint32(16 if "H1" in o[2] else 0)
    b.set(o[0], u32(word.astype(np.uint16).view(np.float16).astype(np.float32)), active)


@op("HFMA2")
def constant(b: Block, suffixes: list[str], o: list[str], active: Array) -> None:
    """A constant of two halves, which is moved so."""
    if o[1] != "-RZ" or o[2] != "RZ":
        raise Unknown("arithmetic of float16")
    bits = [int(np.float16(float(text.replace("QNAN", "nan"))).view(np.uint16)) for text in o[3:5]]
    b.set(o[0], np.full(b.threads, bits[0] << 16 | bits[1], np.uint32), active)
