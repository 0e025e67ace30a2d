"""What a call of the Triton backend launches, as machine code for sm_90 that is executed on the CPU (sass.py).

A driver that launches nothing (silent_driver.py) compiles the kernels and keeps their arguments: tables and pointers
of tensors on the CPU, so that a program can be executed on them. Programs whose tiles are alike take the same, and one
of each kind is executed.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flatkern.triton_kernels.plan import SEGMENT

from bench.gpu import sass, silent_driver
from bench.gpu.disassembly import Code, read

PACKED = {"i1": "B", "i8": "b", "i16": "h", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}
# Of an H100 and an H200: what a multiprocessor has for its blocks.
REGISTERS, MOST_WARPS, MOST_BLOCKS, SHARED = 65536, 64, 32, 228 << 10
SHARED_OF_A_BLOCK = 1 << 10  # that the system keeps


@dataclass(frozen=True)
class Kind:
    """Programs of a launch that take the same."""

    index: int  # the first of them
    programs: int
    elements: int  # that one of them has
    tensor: int | None = None  # where those are, for programs that have a tile
    start: int = 0
    rest: tuple[int, ...] = ()  # what the table says of their tiles besides


class Launch:
    """One launch: the compiled kernel with its arguments."""

    def __init__(self, launch: silent_driver.Launch) -> None:
        self.arguments = dict(zip(launch.signature, launch.arguments, strict=True))
        self.name, self.grid, self.warps = launch.function.name, launch.grid[0], launch.warps
        self.shared = launch.function.shared
        self.code = disassembled(launch.function.binary)
        # Behind the arguments stand two pointers of Triton's own, which are used by no kernel here.
        self.parameters = packed(launch.signature.values(), launch.arguments)

    def run(self, memory: sass.Memory, index: int, trace: bool = False) -> sass.Block:
        """Executes a program."""
        block = sass.Block(self.code, memory, self.parameters, self.warps * sass.WARP, index, max(1024, self.shared))
        block.trace = [] if trace else None
        block.run()
        return block

    @property
    def registers(self) -> int:
        return self.code.used["REG"]

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        registers = -(-self.registers // 8) * 8 * sass.WARP * self.warps
        return min(
            REGISTERS // registers, MOST_WARPS // self.warps, MOST_BLOCKS, SHARED // (self.shared + SHARED_OF_A_BLOCK)
        )

    @property
    def occupancy(self) -> float:
        return self.resident * self.warps / MOST_WARPS

    def lanes(self, kind: Kind) -> int:
        """Elements for which a program has room; 0 for one that has no tile."""
        if kind.tensor is None:
            return 0
        return prod(self.arguments.get("SHAPES", ((1, SEGMENT),))[self.arguments["tiles"][kind.index, 4]])

    def kinds(self) -> list[Kind]:
        if "tiles" in self.arguments:
            return list(alike(self.arguments["tiles"].numpy(), self.arguments["tensors"].numpy()))
        # Of what walks a table, the last program may have less; the first one stands for the others.
        return [Kind(0, self.grid - 1, 0)] * (self.grid > 1) + [Kind(self.grid - 1, 1, 0)]


@cache
def disassembled(binary: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        (code,) = read(cubin).values()
    return code


def packed(types: Any, arguments: Any) -> bytes:
    """Arguments as a kernel finds them: each at a multiple of its size, constants left out."""
    found = b""
    for type_, given in zip(types, arguments, strict=True):
        if type_ == "constexpr":
            continue
        if isinstance(type_, tuple):
            if any(inner != "constexpr" for inner in type_):
                raise TypeError(f"a tuple of arguments: {type_}")
            continue
        if type_.startswith("*"):
            given = given.data_ptr() if isinstance(given, torch.Tensor) else given
        form = "<" + ("Q" if type_.startswith("*") else PACKED[type_])
        found += bytes(-len(found) % struct.calcsize(form)) + struct.pack(form, given)
    return found + bytes(-len(found) % 8 + 16)


def alike(tiles: Any, tensors: Any) -> Iterator[Kind]:
    """Programs by what they have: the size of the tile, and the length of its rows where it has several.

    A tile is (tensor, first row, first column, end of the columns, its shape), and a tensor
    begins with the length of a row and the number of rows. How far a tile goes is where the next one of that tensor
    begins.
    """
    k, row, column, end = (tiles[:, i] for i in range(4))
    length, rows = tensors[k, 0], tensors[k, 1]
    others = np.unique(tiles[:, 4:], axis=0, return_inverse=True)[1].reshape(-1) if tiles.shape[1] > 4 else 0 * k
    order = np.lexsort((column, row, end, others, k))
    part = np.stack([k, others, end], axis=1)[order]
    same = np.append((part[1:] == part[:-1]).all(axis=1), False)
    there = row[order]
    along = same & np.append(there[1:] == there[:-1], False)
    until = np.where(along, np.append(column[order][1:], 0), end[order])
    columns = np.minimum(until, length[order]) - column[order]
    below = rows[order]  # the first row of the tile beneath; of the last ones, where the tensor ends
    for i in range(len(order) - 2, -1, -1):
        if same[i]:
            below[i] = below[i + 1] if there[i] == there[i + 1] else there[i + 1]
    high = below - there
    key = np.stack([others[order], high, columns, np.where(high > 1, length[order], 0)], axis=1)
    _, firsts, counts = np.unique(key, axis=0, return_index=True, return_counts=True)
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        at = order[first]
        yield Kind(
            int(at), count, int(high[first] * columns[first]), int(k[at]), int(row[at] * length[at] + column[at]),
            tuple(tiles[at, 4:].tolist()),
        )  # fmt: skip


def launches(driver: silent_driver.Driver, call: Callable[[], None]) -> list[Launch]:
    """What a call launches."""
    driver.launches = []
    try:
        call()
        return [Launch(launch) for launch in driver.launches]
    finally:
        driver.launches = None
