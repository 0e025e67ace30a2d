"""Executes the machine code of a kernel (SASS, of sm_90) for one block, and counts its instructions.

All threads of a block are one array for each register. Threads at the lowest address go first, so that those that have
parted meet again; what waits at a barrier is let go when all are there. A warp's instruction counts once, whichever of
its threads take part. Global memory is that of this process. Instructions are those that the kernels of csrc/cuda
and those of Triton are made of; any other one is an error when it is reached.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.gpu.disassembly import Code, Instruction

WARP = 32
SHARED = 0x400  # where the shared memory of a block begins,
STACK, PARAMETERS = 0x28, 0x210  # and in the constant bank where its stack is, and the parameters of a kernel
Array = np.ndarray[Any, Any]


class Unknown(Exception):
    """An instruction, or an operand, that is not executed here."""


def f32(x: Array) -> Array:
    return x.view(np.float32)


def u32(x: Array) -> Array:
    """The bits of float32 numbers, or the low half of integers."""
    return x.astype(np.float32, copy=False).view(np.uint32) if x.dtype.kind == "f" else x.astype(np.uint32)


def to_odd(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32 numbers in float64, rounded to odd: a second rounding, to float32, is then the only one."""
    product, other = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + other
    back = total - product
    error = (product - (total - back)) + (other - back)
    odd = (total.view(np.int64) & 1) == 1
    toward = np.where((error > 0) == (total > 0), 1, -1)
    bits = total.view(np.int64) + np.where((error != 0) & ~odd & np.isfinite(total), toward, 0)
    return bits.view(np.float64)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "NE": np.not_equal, "NEU": np.not_equal, "EQ": np.equal, "GE": np.greater_equal, "GT": np.greater,
    "LE": np.less_equal, "LT": np.less,
    "GEU": lambda a, b: ~(a < b), "GTU": lambda a, b: ~(a <= b), "LEU": lambda a, b: ~(a > b),
    "LTU": lambda a, b: ~(a >= b), "NAN": lambda a, b: np.isnan(a) | np.isnan(b),
    "NUM": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
JOINS: dict[str, Callable[[Array, Array], Array]] = {
    "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor,
}  # fmt: skip


Op = Callable[["Block", list[str], list[str], Array], None]  # block, suffixes, operands, active threads
OPS: dict[str, Op] = {}  # by the names of instructions, without suffixes; of sass_ops.py and sass_numbers.py


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


class Memory:
    """Everything that this process can read and write."""

    BASE = 1 << 16

    def __init__(self) -> None:
        size = (1 << 47) - self.BASE
        whole = (ctypes.c_uint8 * size).from_address(self.BASE)
        self.bytes = np.frombuffer(whole, np.uint8)
        self.ranges: list[tuple[int, int]] = []

    def look(self) -> None:
        """Find out what there is: after all has been allocated that a kernel uses."""
        self.ranges.clear()
        with open("/proc/self/maps") as maps:
            for line in maps:
                begin, end, rights = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
                if rights.startswith("r") and int(end, 16) < 1 << 47:  # above is the kernel's
                    self.ranges.append((int(begin, 16), int(end, 16)))

    def read(self, address: int, size: int) -> bytes:
        return self.bytes[address - self.BASE :][:size].tobytes()

    def at(self, addresses: Array, size: int) -> Array:
        """The bytes at some addresses, as places of `bytes`."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        inside = [any(begin <= a < end for begin, end in self.ranges) for a in (low, high - 1)]
        if not all(inside):
            raise IndexError(f"memory at {low:#x} to {high:#x} is not there")
        if (addresses % size != 0).any():
            raise IndexError(f"an address is no multiple of {size}")
        return (addresses.astype(np.int64) - self.BASE)[:, None] + np.arange(size)


class Block:
    """One block of a launch."""

    def __init__(
        self, code: Code, memory: Memory, parameters: bytes, threads: int, index: int, shared: int = 64 << 10,
        grid: int = 1,
    ) -> None:  # fmt: skip
        self.code, self.memory, self.threads, self.index = code, memory, threads, index
        before = bytearray(PARAMETERS)
        before[:24] = struct.pack("<6I", threads, 1, 1, grid, 1, 1)
        before[STACK : STACK + 4] = code.used["STACK"].to_bytes(
            4, "little"
        )  # whose top is the end of a thread's memory
        self.constants = np.frombuffer(bytes(before) + parameters + bytes(16), np.uint8)
        self.shared = np.full(shared, 0xFF, np.uint8)
        self.local = np.zeros((threads, code.used["STACK"]), np.uint8)
        shape = (256, threads)
        self.r, self.ur = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
        self.p, self.up = np.zeros((8, threads), bool), np.zeros((8, threads), bool)
        self.p[7] = self.up[7] = True
        self.pc = np.zeros(threads, np.int64)
        self.at = 0  # the instruction that is executed
        self.there = np.ones(threads, bool)
        self.joined = np.zeros((16, threads), bool)  # threads of a convergence barrier
        self.waits = np.full(threads, -1)  # for which one; 99: for the block
        self.read: set[int] = set()  # sectors of 32 bytes of global memory,
        self.written: set[int] = set()  # by their places
        self.trace: list[tuple[int, Array]] | None = None  # if it is a list: instructions, and which warps issued them
        self.passes = np.zeros(len(code.instructions), np.int64)  # over shared memory, by instruction
        self.counts = np.zeros((len(code.instructions), threads // WARP), np.int64)

    # ---- operands

    def predicate(self, text: str) -> Array:
        text, negated = text.removeprefix("!"), text.startswith("!")
        bank = self.up if text.startswith("U") else self.p
        name = text.removeprefix("U")
        value = bank[7 if name == "PT" else int(name[1:])]
        return ~value if negated else value

    def number(self, text: str) -> tuple[Array, int]:
        """The bank and the index of a register."""
        text = text.split(".")[0]
        if text in ("RZ", "SRZ"):
            return self.r, 255
        if text == "URZ":
            return self.ur, 255
        if found := re.fullmatch(r"(U?)R(\d+)", text):
            return (self.ur if found[1] else self.r), int(found[2])
        raise Unknown(f"operand {text}")

    def word(self, text: str, kind: str = "u", high: bool = False) -> Array:
        """32 bits of an operand; `kind` f: an immediate number is float32. `high`: the second word of a pair."""
        if re.match(r"[-+]?(\d|INF|QNAN)", text):
            if kind == "f" and not text.startswith(("0x", "-0x")):
                bits = int(np.float32(float(text.replace("QNAN", "nan"))).view(np.uint32))
            elif kind == "d":
                bits = int(np.float64(float(text.replace("QNAN", "nan"))).view(np.uint64)) >> (32 if high else 0)
            else:
                value = int(text, 0)
                bits = (0xFFFFFFFF if value < 0 else 0) if high else value
            return np.full(self.threads, bits & 0xFFFFFFFF, np.uint32)
        negative, text = text.startswith("-"), text.removeprefix("-")
        inverse, text = text.startswith("~"), text.removeprefix("~")
        absolute, text = text.startswith("|"), text.strip("|")
        if text.startswith("c["):
            value = self.constant(text, 4, 4 if high else 0)
        else:
            bank, index = self.number(text)
            value = bank[index if index == 255 or not high else index + 1]
        if kind in "fd":
            if kind == "f" or high:
                value = value & 0x7FFFFFFF if absolute else value
                value = value ^ 0x80000000 if negative else value
            return value.astype(np.uint32, copy=False)
        value = ~value if inverse else value
        return (~value + np.uint32(1)) if negative else value

    def single(self, text: str) -> Array:
        return f32(np.ascontiguousarray(self.word(text, "f")))

    def pair(self, text: str, kind: str = "u") -> Array:
        """64 bits: of two registers, or of a number that is extended with its sign."""
        low, high = self.word(text, kind), self.word(text, kind, True)
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def double(self, text: str) -> Array:
        return self.pair(text, "d").view(np.float64)

    def constant(self, text: str, size: int, further: int = 0) -> Array:
        """From a constant bank: c[0x0][R3+0x210]."""
        found = re.match(r"c\[0x([02])\]\[(?:(U?R\w+)(?:\.\w+)?)?\+?(-?0x\w+)?\]", text)
        if found is None:
            raise Unknown(f"operand {text}")
        bank = self.constants if found[1] == "0" else np.frombuffer(self.code.numbers, np.uint8)
        at = np.full(self.threads, int(found[3] or "0", 0) + further, np.int64)
        if found[2]:
            at = at + self.word(found[2]).view(np.int32)
        if (at < 0).any() or (at + size > len(bank)).any():
            at = np.clip(at, 0, len(bank) - size)  # of threads that take no part
        return bytes_to_words(bank[at[:, None] + np.arange(size)])[0]

    def address(self, text: str) -> Array:
        """desc[UR6][R12.64+UR4+0x10], or [R3+0x10] of shared memory."""
        inside = text[text.rindex("[") + 1 : -1]
        total = np.zeros(self.threads, np.int64)
        for part in inside.replace("+-", "+ -").split("+"):
            part = part.strip()
            if re.match(r"-?0x", part):
                total += int(part, 0)
            else:
                total += (self.pair(part) if ".64" in part else self.word(part)).astype(np.int64)
        return total

    def set(self, text: str, value: Array, active: Array, high: bool = False) -> None:
        bank, index = self.number(text)
        if index == 255:
            return
        if bank is self.ur:
            active = self.whole_warps(active)
        np.copyto(bank[index + high], value.astype(np.uint32, copy=False), where=active)

    def set_pair(self, text: str, value: Array, active: Array) -> None:
        bits = value.view(np.uint64)
        self.set(text, (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), active)
        self.set(text, (bits >> np.uint64(32)).astype(np.uint32), active, True)

    def set_predicate(self, text: str, value: Array, active: Array) -> None:
        name = text.removeprefix("U")
        if name == "PT":
            return
        bank = self.up if text.startswith("U") else self.p
        np.copyto(bank[int(name[1:])], value, where=self.whole_warps(active) if text.startswith("U") else active)

    def whole_warps(self, active: Array) -> Array:
        return np.repeat(active.reshape(-1, WARP).any(1), WARP)

    # ---- control

    def run(self, most: int = 1_000_000) -> Array:
        """Executes the block; how often each instruction was issued, by warp."""
        from bench.gpu import sass_numbers, sass_ops  # noqa: F401  (they fill OPS)

        for _ in range(most):
            runnable = self.there & (self.waits < 0)
            if not runnable.any():
                if not self.there.any():
                    return self.counts
                raise Unknown("all threads wait")
            at = self.at = int(self.pc[runnable].min())
            active = runnable & (self.pc == at)
            warps = active.reshape(-1, WARP).any(1)
            self.counts[at] += warps
            if self.trace is not None:
                self.trace.append((at, np.flatnonzero(warps)))
            instruction = self.code.instructions[at]
            self.pc[active] += 1
            guarded = active & self.predicate(instruction.guard) if instruction.guard else active
            try:
                with np.errstate(all="ignore"):
                    execute(self, instruction, guarded)
            except (Unknown, IndexError, ValueError, KeyError) as error:
                raise Unknown(f"{instruction}: {type(error).__name__}: {error}") from error
        raise Unknown(f"more than {most} instructions")

    def jump(self, label: str, active: Array) -> None:
        self.pc[active] = self.code.labels[label.strip("`()")]

    def touch(self, sectors: set[int], addresses: Array, size: int) -> Array:
        """Global memory that is read or written, as places of its bytes."""
        sectors.update((addresses >> 5).tolist())
        return self.memory.at(addresses, size)

    def in_shared(self, addresses: Array, size: int, active: Array, one_by_one: bool = False) -> Array:
        """Places in shared memory; counts how often the 32 banks are asked, once where no two threads meet in one.

        Accesses of 8 and 16 bytes are of a half and of a quarter of a warp at a time. Threads that ask a bank for the
        same word are served together, unless they have to come one by one.
        """
        threads = np.flatnonzero(active)
        words = np.repeat(addresses // 4, max(1, size // 4)) + np.tile(np.arange(max(1, size // 4)), len(addresses))
        group = np.repeat(threads // (WARP // max(1, size // 4)), max(1, size // 4))
        if not one_by_one:
            group, words = np.unique(np.stack([group, words]), axis=1)
        found, times = np.unique(group * WARP + words % WARP, return_counts=True)
        most = np.zeros(self.threads, np.int64)
        np.maximum.at(most, found // WARP, times)
        self.passes[self.at] += most.sum()
        return addresses - SHARED

    def wait(self, barrier: int, active: Array) -> None:
        self.waits[active] = barrier
        self.let_go()

    def let_go(self) -> None:
        """Those who wait, where all are there who should be."""
        for barrier in set(self.waits[self.there & (self.waits >= 0)].tolist()):
            waiting = self.waits == barrier
            if barrier == 99:
                if (waiting | ~self.there).all():
                    self.waits[waiting] = -1
                continue
            missing = self.joined[barrier] & self.there & ~waiting
            free = waiting & ~self.whole_warps(missing)
            self.waits[free] = -1


def bytes_to_words(found: Array) -> list[Array]:
    """Little-endian words of 32 bits from bytes of threads."""
    size = found.shape[1]
    if size < 4:
        found = np.concatenate([found, np.zeros((len(found), 4 - size), np.uint8)], axis=1)
    words = np.ascontiguousarray(found).view(np.uint32)
    return [words[:, i].copy() for i in range(words.shape[1])]
