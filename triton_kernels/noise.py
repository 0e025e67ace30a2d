"""The noise family in Triton: "flatkern normal, version 1". Mirrors flatkern/reference/noise.py line by line.

Words are uint32 from the first operation on: Triton takes a Python integer for int32 or int64 by its value.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import tile
from .arithmetic import fma
from .job import kernel
from .launch import begin_call, repeatable

MINUS_2_LN2 = tl.constexpr(float.fromhex("-0x1.62e43p+0"))
PI_2_15 = tl.constexpr(float.fromhex("0x1.921fb6p-14"))
PI_2_16 = tl.constexpr(float.fromhex("0x1.921fb6p-15"))
HALF_ULP_SHIFT = tl.constexpr(-(128 - 2.0**-17))
# Highest power first.
L6, L5, L4, L3, L2, L1, L0 = (
    tl.constexpr(float.fromhex(c))
    for c in (
        "-0x1.e743bep-3 0x1.7e515ap-2 -0x1.a3c3cep-2 0x1.fe26ccp-2 -0x1.5523fcp-1 0x1.000176p+0 -0x1.00001p+1"
    ).split()
)
S3, S2, S1, S0 = (
    tl.constexpr(float.fromhex(c)) for c in "0x1.5bb08p-19 -0x1.9f4142p-13 0x1.110d6ep-7 -0x1.55553cp-3".split()
)
C4, C3, C2, C1, C0 = (
    tl.constexpr(float.fromhex(c))
    for c in "0x1.847576p-16 -0x1.6b2aa4p-10 0x1.554edep-5 -0x1.ffffcp-2 0x1.fffffep-1".split()
)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011) on uint32."""
    for _ in tl.static_range(10):
        # A product of 64 bits is one instruction; tl.umulhi and a second multiplication are two.
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = second.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = first.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def root_of_radius(t):
    """Correctly rounded for every t that a radius can have, from an estimate that is a few ulp off.

    tl.sqrt_rn would be a call; every t is a normal number of [2^-17, 23], so one Newton step with an exact residual
    does.
    """
    estimate = tl.rsqrt(t)
    s = t * estimate
    return fma(fma(-s, s, t), 0.5 * estimate, s)


@triton.jit
def radius(word):
    """sqrt(-2 ln u) from the low 16 bits k, u = (k + 1/2) / 65536."""
    k = word & 0xFFFF
    u = fma((k | 0x4B000000).to(tl.float32, bitcast=True), 0.0000152587890625, HALF_ULP_SHIFT)
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = fma(f, L6, L5)
    p = fma(p, f, L4)
    p = fma(p, f, L3)
    p = fma(p, f, L2)
    p = fma(p, f, L1)
    p = fma(p, f, L0)
    return root_of_radius(fma(e.to(tl.float32), MINUS_2_LN2, p * f))


@triton.jit
def angle(word):
    """(cos, sin) of the angle in bits 16-31: 15 bits in a half circle, bit 31 mirrors the cosine."""
    h = (word << 1).to(tl.int32, bitcast=True) >> 17
    x = fma(h.to(tl.float32), PI_2_15, PI_2_16)
    q = x * x
    s = fma(q, S3, S2)
    s = fma(s, q, S1)
    s = fma(s, q, S0)
    sin = x * fma(q, s, 1.0)
    c = fma(q, C4, C3)
    c = fma(c, q, C2)
    c = fma(c, q, C1)
    c = fma(c, q, C0)
    cos = (c.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def key_of(noise, seed, stream, round_):
    """(seed, stream, round): from the device where `noise` is there, else as given."""
    if noise is None:
        return seed.to(tl.uint32), stream.to(tl.uint32), round_.to(tl.uint32)
    else:
        return tl.load(noise).to(tl.uint32), tl.load(noise + 1).to(tl.uint32), tl.load(noise + 2).to(tl.uint32)


class Counters(NamedTuple):
    """Where the counters of a tile begin: the parameter's index, the tile's first row, its first eight of columns, and
    at which of the eight it begins."""

    index: tl.tensor
    row: tl.tensor
    eight: tl.tensor
    place: tl.tensor


@triton.jit
def counters_of(tensors, at, SHIFTED: tl.constexpr):
    """The Counters of a tile."""
    index = tile.field(tensors, at.k, tile.INDEX_OF).to(tl.uint32)
    row = tile.field(tensors, at.k, tile.FIRST_ROW_OF) + at.row
    eight = tile.field(tensors, at.k, tile.FIRST_EIGHT_OF)
    if SHIFTED:
        return Counters(index, row, eight, tile.field(tensors, at.k, tile.SHIFT_OF) + at.column)
    else:
        return Counters(index, row, eight + at.column // 8, 0)


@triton.jit
def normals(counters, key, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr):
    """The normals of COLUMNS columns of a tile from its column FIRST on, float32 [ROWS, COLUMNS].

    SHIFTED is a shard that begins inside one of the eights which share a counter. It is rare and short (a piece of a
    vector), and every element then draws a whole counter for itself.
    """
    seed, stream, round_ = key
    rows = (counters.row + tl.arange(0, ROWS)).to(tl.uint32)
    if SHIFTED:
        place = counters.place + FIRST + tl.arange(0, COLUMNS)
        eights = (counters.eight + place // 8).to(tl.uint32)
        zero = tl.zeros([ROWS, COLUMNS], tl.uint32)
    else:
        eights = (counters.eight + FIRST // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
        zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        zero + eights[None, :], zero + rows[:, None], zero + counters.index, zero + round_, seed, stream
    )
    if SHIFTED:
        which = (place % 8).to(tl.int32)[None, :]
        word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
        cos, sin = angle(word)
        return radius(word) * tl.where(which % 2 == 0, cos, sin)
    else:
        # Word 2 a + b of a counter is at [..., a, b]; a cosine's normal is followed by its sine's.
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLUMNS // 2])
        r = radius(word)
        cos, sin = angle(word)
        return tl.reshape(tl.join(r * cos, r * sin), [ROWS, COLUMNS])


@kernel
def fill_normal_kernel(
    tiles, tensors, pointers, noise, seed, stream, round_,
    OUT: tl.constexpr, WIDTH: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists, key = pointers + WIDTH * at.k, key_of(noise, seed, stream, round_)
    counters = counters_of(tensors, at, SHIFTED)
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                z = normals(counters, key, ROWS, tile.first(COLUMNS, i), tile.width(COLUMNS, i), SHIFTED)
                tile.store(lists, 0, OUT, where, EVEN, tile.to_storage(z, OUT), None)


@repeatable
def fill_normal_(outs, noise, *, index, offset):
    """Fill tensors with the standard normals that a perturbation would draw for them."""
    call = begin_call("fill_normal_", locals(), lists="outs", rows=True)
    if call is None:
        return
    for group in call.groups:
        call.launch(
            fill_normal_kernel, group, (group.tiles, call.tensors, call.pointers, *call.key()),
            lambda group=group: dict(OUT=group.types["outs"], WIDTH=call.width, **group.drawing()),
        )  # fmt: skip
