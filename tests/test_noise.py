"""The noise, "flatkern normal, version 1": known answers, every radius and angle, statistics, shards.

What is compared with is in this file: Philox in Python integers, fma from exact products, Box-Muller in float64.

Seeds are fixed, so a test that passes once passes always. Statistics are compared at five standard deviations, which
a right generator fails with probability 6e-7 a number; there are 60 numbers, so the seed would be an unlucky choice
with probability 4e-5.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import assert_ulp

from flatkern.dispatch import resolve
from flatkern.reference import noise as reference

KNOWN = [  # Random123's kat_vectors: counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
HALVES = np.arange(65536, dtype=np.uint32)


def numbers(text):
    return [int(word, 16) for word in text.split()]


def philox(counter, key):
    """Philox4x32-10 in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def fill(backend, shape, noise, index=0, offset=0, dtype=torch.float32):
    out = torch.zeros(shape, dtype=dtype)
    resolve("fill_normal_", "cpu", backend)([out], torch.tensor(noise), index=[index], offset=[offset])
    return out


# The words.


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_known_answers(counter, key, answer):
    counter, key, answer = numbers(counter), numbers(key), numbers(answer)
    assert philox(counter, key) == answer
    words = reference.philox4x32([torch.tensor([c]) for c in counter], tuple(torch.tensor([k]) for k in key))
    assert [word.item() for word in words] == answer


COUNTERS = [  # that a tensor can reach: vectors have row 0, and matrices of a reasonable size few columns
    [0, 0, 0, 0],
    [0x243F6A88, 0, 0x13198A2E, 0x03707344],
    [0, 0x85A308D3, 0x13198A2E, 0x03707344],
    [2, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
    [0xFFFFFFFF, 0, 0xFFFFFFFF, 0xFFFFFFFF],
]


def assert_normals_of(backend, counter, key):
    """Key (seed, stream), counter (column // 8, row, index, round); word j gives columns 2j and 2j + 1."""
    words = torch.tensor(philox(counter, key))
    r, (cos, sin) = reference.radius(words), reference.angle(words)
    want = torch.stack([r * cos, r * sin], dim=1).flatten()
    column, row, index, round_ = counter
    if row:
        got = fill(backend, (1, 8 * column + 8), [*key, round_], index, row)[0, 8 * column :]
    else:
        got = fill(backend, (8,), [*key, round_], index, 8 * column)
    assert_ulp("normals", got, want)


@pytest.mark.parametrize("key", [numbers(key) for _, key, _ in KNOWN], ids="{0[0]:08x}".format)
@pytest.mark.parametrize("counter", COUNTERS, ids="{0[0]:x} {0[1]:x}".format)
def test_which_normals_a_counter_gives(backend, counter, key):
    assert_normals_of(backend, counter, key)


# From words to normals: 65536 radii, 65536 angles.


def strict_fma(a, b, c):
    """a b + c of float32 arrays as IEEE rounds it.

    The product of two float32 is exact in float64. The sum is rounded to odd: with two bits more than float32 needs,
    that rounds to float32 as the exact sum does (Boldo and Melquiond 2008).
    """
    a, b, c = np.broadcast_arrays(np.float32(a), np.float32(b), np.float32(c))
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # the rounding error of the sum, exactly (Knuth)
    even = total.view(np.int64) % 2 == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def test_strict_fma_is_exact():
    """Against fractions, where it is hard: sums that cancel, and sums next to a tie."""
    generator = np.random.default_rng(1)
    a, b = (1 + generator.integers(0, 2**23, (2, 4000)) / 2**23).astype(np.float32)
    tail = np.ldexp(generator.choice([-1.0, -0.5, 0.5, 1.0], 4000), generator.integers(-70, 4, 4000))
    c = np.where(generator.random(4000) < 0.5, -a * b, 0).astype(np.float32) + tail.astype(np.float32)
    for x, y, z, got in zip(a, b, c, strict_fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        off = abs(Fraction(float(got)) - exact)
        for toward in (-np.inf, np.inf):
            other = abs(Fraction(float(np.nextafter(got, np.float32(toward)))) - exact)
            assert off < other or (off == other and got.view(np.int32) % 2 == 0)


LOG = "-0x1.e743bep-3 0x1.7e515ap-2 -0x1.a3c3cep-2 0x1.fe26ccp-2 -0x1.5523fcp-1 0x1.000176p+0 -0x1.00001p+1"
SIN = "0x1.5bb08p-19 -0x1.9f4142p-13 0x1.110d6ep-7 -0x1.55553cp-3"
COS = "0x1.847576p-16 -0x1.6b2aa4p-10 0x1.554edep-5 -0x1.ffffcp-2 0x1.fffffep-1"


def strict_horner(x, coefficients):
    """Highest power first, one fma a coefficient."""
    first, *rest = (float.fromhex(coefficient) for coefficient in coefficients.split())
    result = np.full_like(x, first)
    for coefficient in rest:
        result = strict_fma(result, x, coefficient)
    return result


def strict_radii():
    """The radius of each low half of a word, as the definition says, every fma rounded once."""
    u = strict_fma((HALVES | 0x4B000000).view(np.float32), 2.0**-16, -(128 - 2.0**-17))
    assert (u == (HALVES + 0.5) / 65536).all()
    bits = u.view(np.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(np.float32) - np.float32(1)
    return np.sqrt(strict_fma(e, float.fromhex("-0x1.62e43p+0"), strict_horner(f, LOG) * f))


def strict_angles():
    """Cosine and sine of each high half of a word."""
    h = (HALVES << 17).view(np.int32) >> 17
    x = strict_fma(h, float.fromhex("0x1.921fb6p-14"), float.fromhex("0x1.921fb6p-15"))
    q = x * x
    sin, cos = x * strict_fma(q, strict_horner(q, SIN), 1), strict_horner(q, COS)
    return np.where(HALVES >> 15, -cos, cos), sin


def test_every_radius_and_angle_is_as_with_a_fused_fma():
    """Eager's fma rounds twice; for the arguments that exist it makes no difference."""
    words = torch.from_numpy(HALVES.astype(np.int64))
    cos, sin = reference.angle(words << 16)
    for name, got, want in zip(
        ("r", "cos", "sin"), (reference.radius(words), cos, sin), (strict_radii(), *strict_angles()), strict=True
    ):
        assert_ulp(name, got, torch.from_numpy(want))


def exact_tables():
    """Ideal Box-Muller in float64: radius of every low half, cosine and sine of every high half."""
    u = (HALVES + 0.5) / 65536
    h = np.where(HALVES & 0x4000, (HALVES & 0x7FFF) - 32768.0, HALVES & 0x7FFF)
    angle = (h + 0.5) * np.pi / 32768
    return np.sqrt(-2 * np.log(u)), np.where(HALVES >= 32768, -1, 1) * np.cos(angle), np.sin(angle)


def test_every_normal_is_close_to_box_muller():
    """Within 1.5e-6 and below 4.855, over all 2^32 words, without visiting each.

    |r c - R C| <= |r - R| |c| + R |c - C| is at most its maximum over radii and over those angles of which no other
    has both a larger |c| and a larger |c - C|.
    """
    ideal, *ideal_angles = exact_tables()
    words = torch.from_numpy(HALVES.astype(np.int64))
    r = reference.radius(words).double().numpy()
    assert np.abs(r - ideal).max() < 6e-7
    for circle, want in zip(reference.angle(words << 16), ideal_angles, strict=True):
        c = circle.double().numpy()
        order = np.argsort(-np.abs(c), kind="stable")
        error = np.abs(c - want)[order]
        front = order[error == np.maximum.accumulate(error)]
        worst = max((np.abs(r - ideal) * abs(c[i]) + ideal * abs(c[i] - want[i])).max() for i in front)
        assert worst + 4.855 * 2**-24 < 1.5e-6  # the product is rounded too
        assert r.max() * np.abs(c).max() < 4.855


DRAWN = (1500, 2000)  # 1.5 million words: all 65536 halves occur but for a probability of 65536 exp(-23) = 7e-6
KEY = [20240400357 % 2**32, 7, 3]


@pytest.fixture(scope="module")
def words():
    """The words behind DRAWN in their order, by the eager Philox, which has been checked above."""
    n_rows, n_cols = DRAWN
    c, row = torch.arange(n_cols // 8)[None, :], torch.arange(n_rows)[:, None]
    zero = torch.zeros(n_rows, n_cols // 8, dtype=torch.int64)
    found = reference.philox4x32([c + zero, row + zero, zero, zero + KEY[2]], (KEY[0], KEY[1]))
    return torch.stack(found, dim=-1).reshape(n_rows, n_cols // 2).numpy()


def test_backends_agree_on_every_radius_and_angle(backend, words):
    assert len(np.unique(words & 0xFFFF)) == len(np.unique(words >> 16)) == 65536
    radii, (cos, sin) = strict_radii(), strict_angles()
    r = radii[words & 0xFFFF]
    want = np.stack([r * cos[words >> 16], r * sin[words >> 16]], axis=-1).reshape(DRAWN)
    assert_ulp("normals", fill(backend, DRAWN, KEY), torch.from_numpy(want))


# Statistics, of what eager draws: the other backends draw the same bits.

SAMPLE = (2048, 2048)
SEED, STREAM, ROUND, INDEX = 12345, 0, 0, 0


def sample(seed=SEED, stream=STREAM, round=ROUND, index=INDEX, offset=0):
    return fill("eager", SAMPLE, [seed, stream, round], index, offset).double().numpy()


@pytest.fixture(scope="module")
def z():
    return sample()


@pytest.fixture(scope="module")
def tables():
    """The distribution as it is: r c and r s, with r one of 65536 radii, and (c, s) one of 65536 angles."""
    return tuple(table.astype(np.float64) for table in (strict_radii(), *strict_angles()))


def exact_tail(tables, threshold):
    """P(|z| > threshold) of a cosine's and of a sine's normal."""
    radii = np.sort(tables[0])
    above = [65536 - np.searchsorted(radii, threshold / np.abs(c), side="right") for c in tables[1:]]
    return [counts.mean() / 65536 for counts in above]


def test_the_distribution_is_nearly_normal(tables):
    """Mean, variance, fourth moment and tails of all 2^32 words, against the normal distribution."""
    r, *circle = tables
    for c in circle:
        moments = [np.mean(r**k) * np.mean(c**k) for k in (1, 2, 3, 4)]
        assert np.abs(np.array(moments) - [0, 1, 0, 3]).max() < 5e-4
        assert abs(moments[0]) < 1e-5 and abs(moments[1] - 1) < 1e-5
    for threshold, relative in ((1, 1e-4), (2, 1e-4), (3, 1e-3), (3.5, 5e-3), (4, 0.03)):
        normal = math.erfc(threshold / math.sqrt(2))
        for tail in exact_tail(tables, threshold):
            assert abs(tail / normal - 1) < relative, threshold


def test_moments(z, tables):
    for values, c in zip((z[:, 0::2], z[:, 1::2]), tables[1:], strict=True):
        exact = [np.mean(tables[0] ** k) * np.mean(c**k) for k in range(9)]
        for k in (1, 2, 3, 4):
            deviation = math.sqrt((exact[2 * k] - exact[k] ** 2) / values.size)
            assert abs(np.mean(values**k) - exact[k]) < 5 * deviation, k


@pytest.mark.parametrize("threshold", [1, 2, 3, 3.5, 4])
def test_tails(z, tables, threshold):
    p = np.mean(exact_tail(tables, threshold))
    assert abs(np.mean(np.abs(z) > threshold) - p) < 5 * math.sqrt(p * (1 - p) / z.size)


def test_kolmogorov_smirnov(z):
    """sqrt(n) sup |F_n - Phi| < 2.5, which n normals exceed with probability 2 exp(-2 x 2.5^2) = 7e-6."""
    ordered = np.sort(z, axis=None)
    phi = torch.special.ndtr(torch.from_numpy(ordered)).numpy()
    steps = np.arange(z.size + 1) / z.size
    statistic = max(np.abs(phi - steps[1:]).max(), np.abs(phi - steps[:-1]).max())
    assert statistic * math.sqrt(z.size) < 2.5


def assert_uncorrelated(a, b, what):
    """a, b and their squares: the mean of a product of n pairs has a standard deviation of 1 / sqrt(n)."""
    n = math.sqrt(a.size)
    assert abs(np.mean(a * b)) * n < 5, what
    assert abs(np.mean((a * a - 1) * (b * b - 1)) / 2) * n < 5, f"squares: {what}"


@pytest.mark.parametrize("lag", [*range(1, 13), 64])
def test_columns_are_uncorrelated(z, lag):
    """Of one word, of one Philox draw, of neighbouring ones."""
    assert_uncorrelated(z[:, :-lag], z[:, lag:], f"lag {lag}")


OTHERS = {
    "next seed": dict(seed=SEED + 1),
    "next stream": dict(stream=STREAM + 1),
    "next round": dict(round=ROUND + 1),
    "next index": dict(index=INDEX + 1),
    "seed and stream exchanged": dict(seed=STREAM, stream=SEED),
    "highest bit of the seed": dict(seed=SEED + 2**31),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_keys_are_uncorrelated(z, other):
    assert_uncorrelated(z, sample(**other), other)


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_rows_are_uncorrelated(z, lag):
    assert_uncorrelated(z[:-lag], z[lag:], f"rows {lag} apart")


@pytest.mark.parametrize("shift", [0, 16], ids=["radius", "angle"])
def test_words_are_uniform(words, shift):
    """Pearson's statistic of 65536 classes has mean 65535 and variance 2 x 65535."""
    expected = words.size / 65536
    statistic = np.sum((np.bincount((words >> shift).ravel() & 0xFFFF, minlength=65536) - expected) ** 2) / expected
    assert abs(statistic - 65535) < 5 * math.sqrt(2 * 65535)


# Shards: what an element draws depends on where it is in the unsharded tensor.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_draw_slices_of_the_whole(backend, dtype):
    """Rows of a matrix at any row; pieces of a vector at any element, of any length."""
    matrix, vector = (fill(backend, shape, KEY, 9, 0, dtype) for shape in ((50, 4, 7), (5000,)))
    for start, stop in ((0, 20), (20, 49), (49, 50), (3, 3)):
        assert_ulp("rows", fill(backend, (stop - start, 4, 7), KEY, 9, start, dtype), matrix[start:stop])
    for start, stop in ((0, 13), (13, 14), (14, 31), (31, 1500), (1500, 5000), (8, 16), (5, 5)):
        assert_ulp("elements", fill(backend, (stop - start,), KEY, 9, start, dtype), vector[start:stop])


def test_half_types_round_the_same_normals(backend):
    exact = fill(backend, (300,), KEY)
    for dtype in (torch.bfloat16, torch.float16):
        assert_ulp(str(dtype), fill(backend, (300,), KEY, dtype=dtype), exact.to(dtype))


def test_normals_follow_memory_order(backend):
    """A channels_last tensor draws, in the order in which it is stored, what a contiguous one draws."""
    out = torch.zeros(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    resolve("fill_normal_", "cpu", backend)([out], torch.tensor(KEY), index=[2], offset=[0])
    assert_ulp("stored order", out.permute(0, 2, 3, 1).reshape(4, -1), fill(backend, (4, 90), KEY, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_perturbed_shard_of_rows_is_a_slice(backend, dtype):
    """Norms measured inside belong to whole rows, so every bit is the unsharded tensor's."""
    whole = torch.randn(40, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    halves = [whole[:17].clone(), whole[17:].clone()]
    perturb, scalars = resolve("perturb_gaussian_", "cpu", backend), dict(sigma=[0.1], eta=[0.0], index=[4])
    for tensor, offset in ((whole, 0), (halves[0], 0), (halves[1], 17)):
        perturb([tensor], None, None, None, None, None, torch.tensor(KEY), **scalars, offset=[offset])
    assert_ulp("rows", torch.cat(halves), whole)


def test_a_perturbed_piece_of_a_vector_is_a_slice(backend):
    """With the norm of the whole vector, which no piece can measure."""
    whole = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    norm, cuts = [whole.norm().reshape(1)], (0, 13, 1499, 5000)
    pieces = [whole[a:b].clone() for a, b in itertools.pairwise(cuts)]
    perturb, scalars = resolve("perturb_gaussian_", "cpu", backend), dict(sigma=[0.1], eta=[0.0], index=[4])
    for tensor, offset in zip((whole, *pieces), (0, *cuts), strict=False):
        perturb([tensor], None, None, norm, None, None, torch.tensor(KEY), **scalars, offset=[offset])
    assert_ulp("elements", torch.cat(pieces), whole)
