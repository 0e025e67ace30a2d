"""The noise of flatkern in eager PyTorch: "flatkern normal, version 1".

A normal depends only on (seed, stream, round, parameter index, row, column of the unsharded tensor),
so every backend, tiling, thread count and sharding draws the same bits. From the random words on,
only integers, IEEE float32 fma, mul, add and a correctly rounded square root are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables import columns, filters, rows

MASK32 = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


# Highest power first; csrc/math/noise.h holds the same numbers in the same order.
def _hex(*coefficients: str) -> tuple[float, ...]:
    return tuple(float.fromhex(c) for c in coefficients)


LOG = _hex(
    "-0x1.e743bep-3",
    "0x1.7e515ap-2",
    "-0x1.a3c3cep-2",
    "0x1.fe26ccp-2",
    "-0x1.5523fcp-1",
    "0x1.000176p+0",
    "-0x1.00001p+1",
)
SIN = _hex("0x1.5bb08p-19", "-0x1.9f4142p-13", "0x1.110d6ep-7", "-0x1.55553cp-3")
COS = _hex("0x1.847576p-16", "-0x1.6b2aa4p-10", "0x1.554edep-5", "-0x1.ffffcp-2", "0x1.fffffep-1")
MINUS_2_LN2 = float.fromhex("-0x1.62e43p+0")
PI_2_15 = float.fromhex("0x1.921fb6p-14")
PI_2_16 = float.fromhex("0x1.921fb6p-15")


def philox4x32(counter: list[Tensor], key: tuple[Tensor | int, Tensor | int]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK32, (k1 + KEY_STEPS[1]) & MASK32
    return [c0, c1, c2, c3]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, whose 64 bits are right where int64 takes it for negative, too."""
    product = a * b
    return (product >> 32) & MASK32, product & MASK32


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 fma: the product is exact in float64. The sum rounds twice; over the 65536 radii and
    65536 angles that exist the result is the same, which a test checks for every one of them."""
    return (a.double() * b + c).float()


def horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result, x64 = torch.full_like(x, coefficients[0]), x.double()
    for c in coefficients[1:]:
        result = fma(result, x64, c)
    return result


def radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) from the low 16 bits k, u = (k + 1/2) / 65536; float32."""
    k = (word & 0xFFFF).to(torch.int32)
    u = fma((k | 0x4B000000).view(torch.float32), 2.0**-16, -(128 - 2.0**-17))
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1
    t = fma(e.float(), MINUS_2_LN2, horner(f, LOG) * f)
    return t.double().sqrt().float()


def angle(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle in bits 16-31: 15 bits in a half circle, bit 31 mirrors the cosine; float32."""
    h = ((word >> 16) & 0x7FFF).to(torch.int32)
    h = h - ((h & 0x4000) << 1)
    x = fma(h.float(), PI_2_15, PI_2_16)
    q = x * x
    sin = x * fma(q, horner(q, SIN).double(), 1.0)
    cos = horner(q, COS)
    return torch.where(word >> 31 != 0, -cos, cos), sin


def normals(shape: tuple[int, int], noise: Tensor, index: int, offset: tuple[int, int], device: torch.device) -> Tensor:
    """The normals of `shape` = (rows, columns) of parameter `index`, from (row, column) `offset` on; float32."""
    n_rows, n_cols = shape
    seed, stream, round_ = noise.tolist() if noise.device.type == "cpu" else noise.to(device)
    row = offset[0] + torch.arange(n_rows, device=device)
    first, last = offset[1] // 8, (offset[1] + n_cols + 7) // 8
    c = torch.arange(first, last, device=device)

    zero = torch.zeros(n_rows, len(c), dtype=torch.int64, device=device)
    words = philox4x32([c + zero, row[:, None] + zero, index + zero, round_ + zero], (seed, stream))
    word = torch.stack(words, dim=-1)  # (rows, draws, 4): word j gives columns 2j and 2j + 1 of its eight
    r, (cos, sin) = radius(word), angle(word)
    eights = torch.stack([r * cos, r * sin], dim=-1).flatten(1)
    start = offset[1] - 8 * first
    return eights[:, start : start + n_cols]


def normals_like(t: Tensor, noise: Tensor, index: int, offset: int) -> Tensor:
    """The normals that belong to the elements of `t`, as (filters, columns) in memory order; float32."""
    start = (offset, 0) if t.dim() >= 2 else (0, offset)
    return normals((filters(t), columns(t)), noise, index, start, t.device)


def fill_normal_(outs, noise, *, index, offset) -> None:
    """Fill tensors with the standard normals that a perturbation would draw for them.

        z = sqrt(-2 ln u) (cos, sin)(angle)        one Philox4x32-10 word gives two normals

    Key (seed, stream); counter (column // 8, row, parameter index, round). Deviates from ideal
    Box-Muller by at most 1.5e-6; |z| < 4.86.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """
    for out, i, start in zip(outs, index, offset, strict=True):
        rows(out).copy_(normals_like(out, noise, i, start))
