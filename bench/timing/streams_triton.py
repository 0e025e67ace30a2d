"""flatkern._C.stream for GPUs: a Triton kernel that moves memory and computes nothing.

A list of tensors is walked as bits: of whole words of four bytes, whatever the dtype, and byte by byte behind them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from flatkern.triton_kernels import devices
from flatkern.triton_kernels.job import kernel
from flatkern.triton_kernels.launcher import first_launch
from torch import Tensor

READ, UPDATE, WRITE = (tl.constexpr(i) for i in range(3))
ENTRY = tl.constexpr(3)  # of the table of tiles: tensor, first element, end
# A sum of bits that does not come about in a benchmark: what is read has to be used, or it would not be loaded.
NEVER = tl.constexpr(0x5EED1E55)
LINE = 128  # bits: whole words are walked up to a multiple of 16 bytes in each list


@kernel
def stream_kernel(
    tiles, pointers, sink, BITS: tl.constexpr, ACCESS: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr
):
    """A tile of SIZE elements of every list; list i has BITS[i] per element. EVEN promises whole lines of 16 bytes."""
    entry = tiles + ENTRY * tl.program_id(0).to(tl.int64)
    k, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    lists, seen = pointers + len(BITS) * k, 0
    for i in tl.static_range(len(BITS)):
        if EVEN:
            base = tl.load(lists + i).to(tl.pointer_type(tl.int32)) + tl.multiple_of(first * BITS[i] // 32, 4)
            count = tl.multiple_of(((end - first) * BITS[i] // 32).to(tl.int32), 4)
            inside = tl.arange(0, SIZE * BITS[i] // 32)
            base = tl.multiple_of(base, 16)
        else:
            base = tl.load(lists + i).to(tl.pointer_type(tl.uint8)) + first * BITS[i] // 8
            count = (((end - first) * BITS[i] + 7) // 8).to(tl.int32)
            inside = tl.arange(0, SIZE * BITS[i] // 8)
        if ACCESS[i] == WRITE:
            tl.store(base + inside, tl.zeros_like(inside), mask=inside < count)
        else:
            x = tl.load(base + inside, mask=inside < count, other=0)
            if ACCESS[i] == READ:
                seen ^= tl.xor_sum(x.to(tl.int32), axis=0)
            else:
                tl.store(base + inside, x, mask=inside < count)
    tl.store(sink, seen, mask=seen == NEVER)


class Variant(NamedTuple):
    """How large a program is. Not measured yet."""

    elements: int
    warps: int


VARIANTS = [Variant(2048, 4), Variant(4096, 4), Variant(4096, 8), Variant(8192, 8)]


def variants() -> dict[str, Variant]:
    """What to try, by name."""
    return {f"{v.elements} elements, {v.warps} warps": v for v in VARIANTS}


def bits_of(t: Tensor) -> int:
    """Of an element; of a mask one."""
    return 1 if t.dtype == torch.uint8 else 8 * t.element_size()


def tiles_of(lengths: list[int], even: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of whole lines, of `even` elements or a multiple, and those of what is behind them."""
    whole = [(k, at, min(at + size, n // even * even)) for k, n in enumerate(lengths)
             for at in range(0, n // even * even, size)]  # fmt: skip
    rest = [(k, n // even * even, n) for k, n in enumerate(lengths) if n % even]
    return tuple(np.array(found, np.int64).reshape(-1, 3) for found in (whole, rest))


class Walk:
    """The launches of a pass over some lists of tensors."""

    def __init__(self, reads: list[list[Tensor]], updates: list[list[Tensor]], writes: list[list[Tensor]],
                 variant: Variant) -> None:  # fmt: skip
        self.lists = [*reads, *updates, *writes]  # keeps them alive
        access = [a.value for a, some in ((READ, reads), (UPDATE, updates), (WRITE, writes)) for _ in some]
        bits = [bits_of(tensors[0]) for tensors in self.lists]
        lengths = [t.numel() for t in self.lists[bits.index(max(bits))]]
        pointers = np.array([[t.data_ptr() for t in tensors] for tensors in self.lists], np.int64).T
        if (pointers % 16).any():
            raise ValueError("a tensor does not begin at a multiple of 16 bytes; allocate it by itself")
        device = self.lists[0][0].device
        self.device = device
        self.pointers, self.sink = devices.upload(pointers, device), torch.zeros(1, dtype=torch.int32, device=device)
        even = LINE // min(bits)
        constants = {"BITS": tuple(bits), "ACCESS": tuple(access)}
        whole, rest = tiles_of(lengths, even, variant.elements)
        self.parts: list[tuple[Tensor, int, dict]] = [
            (devices.upload(tiles, device), warps, {**constants, "SIZE": size, "EVEN": is_even})
            for tiles, warps, size, is_even in ((whole, variant.warps, variant.elements, True), (rest, 1, even, False))
            if len(tiles)
        ]
        self.launchers: list[Callable] = []

    def __call__(self) -> None:
        stream = devices.current_stream(self.device)
        for i, (tiles, warps, constants) in enumerate(self.parts):
            arguments = tiles, self.pointers, self.sink
            if i < len(self.launchers):
                self.launchers[i](stream, arguments)
            else:
                self.launchers.append(first_launch(stream_kernel, len(tiles), warps, arguments, constants))
