"""What the Triton backend counts and totals, in Triton's interpreter: magnitudes by digit; norms and inner products
over all tensors.

Runs in a process of its own with TRITON_INTERPRET=1 (`make test-triton`).
"""

import numpy as np
import pytest
import torch
from flatkern.triton_kernels import launch, mask, norm
from flatkern.triton_kernels.plan import SEGMENT
from test_selection import assert_exact, make, select

from flatkern import selection, triton_kernels
from flatkern.checks import MAGNITUDE_DIGITS
from flatkern.reference import mask as reference

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A tile and an eight, a tile and a remainder, less than an eight, nothing.
LENGTHS = [SEGMENT + 8, SEGMENT + 5, 3, 0]


def digits(magnitude):
    """All three digits of a number."""
    bits = torch.tensor(magnitude, dtype=torch.float32).view(torch.int32).item()
    return [bits >> sum(MAGNITUDE_DIGITS[k + 1 :]) & (2**width - 1) for k, width in enumerate(MAGNITUDE_DIGITS)]


def count(function, grads, prefix):
    counts = torch.full((2 ** MAGNITUDE_DIGITS[len(prefix)] + 2,), -1)
    function(counts, grads, torch.tensor(prefix, dtype=torch.int64))
    return counts


def assert_counts(grads, prefix):
    got, want = (count(f, grads, prefix) for f in (triton_kernels.count_magnitudes_, reference.count_magnitudes_))
    wrong = (got != want).nonzero().flatten().tolist()
    assert not wrong, [(d, got[d].item(), want[d].item()) for d in wrong[:5]]
    assert got[:-1].sum() <= sum(g.numel() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [-0.0, 1.0, -0.1, 2.0**-24, float("inf")])
def test_elements_that_are_all_equal(value, dtype):
    """In every digit, and beside prefixes that none of them has."""
    grads = [torch.full((n,), value, dtype=dtype) for n in LENGTHS]
    shared = digits(grads[0][0].abs().item())
    for known in range(3):
        assert_counts(grads, shared[:known])
    for other in ([0, 0], [2047]):
        assert_counts(grads, other)


def test_an_interrupted_call_adds_nothing_to_the_next_one(monkeypatch):
    """Counts stay in memory that the plan keeps; the kernel that sums them leaves zeros there."""
    grads = [torch.linspace(-1, 1, n) for n in LENGTHS]
    assert_counts(grads, [])
    start = launch.Call.start

    def interrupted(call, kernel, *rest):
        if kernel is mask.sum_counts_kernel:
            raise KeyboardInterrupt
        start(call, kernel, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(launch.Call, "start", interrupted)
        assert_counts(grads, [])
    for _ in range(2):
        assert_counts(grads, [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_among_others(dtype):
    """Nobody counts zeros and what is below the known digits one by one: they are what remains."""
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(n, generator=generator).mul(0.01).to(dtype) for n in LENGTHS]
    for g in grads:
        g[::3] = 0.0
        g[1::11] *= 2.0**-20  # subnormal in float16
    median = digits(grads[0].float().abs().median().item())
    for prefix in ([], median[:1], median[:2], [0], [0, 0], [median[0] + 40]):
        assert_counts(grads, prefix)


def test_every_first_digit():
    """Each has a place of its own, the last and the infinite ones too."""
    first = torch.arange(2 ** MAGNITUDE_DIGITS[0], dtype=torch.int32) << sum(MAGNITUDE_DIGITS[1:])
    grads = [torch.cat([first, first + 7]).view(torch.float32)]
    assert_counts(grads, [])
    counts = count(triton_kernels.count_magnitudes_, grads, [])
    assert (counts[:-2] == 2).all()
    assert counts[-1] == 2 * 8, "infinity and NaN have the last eight"


@pytest.mark.parametrize("known", [1, 2])
def test_every_later_digit(known):
    higher, rest = [1016, 513][:known], sum(MAGNITUDE_DIGITS[known + 1 :])
    begin = 0
    for digit, width in zip(higher, MAGNITUDE_DIGITS, strict=False):
        begin = begin << width | digit
    later = begin << MAGNITUDE_DIGITS[known] + rest | torch.arange(2 ** MAGNITUDE_DIGITS[known]) << rest
    around = torch.cat([later, later[:1] - 1, later[-1:] + (1 << rest)])  # the neighbours on both sides do not count
    grads = [around.to(torch.int32).view(torch.float32)]
    assert_counts(grads, higher)
    assert (count(triton_kernels.count_magnitudes_, grads, higher)[:-2] == 1).all()


def test_calls_do_not_add_up():
    """The second call, of other gradients in the same memory, finds nothing of the first."""
    grads = [torch.ones(SEGMENT), torch.ones(7)]
    assert_counts(grads, [])
    for g in grads:
        g.mul_(3.0)
    assert_counts(grads, [])
    assert_counts([], [])
    assert_counts([torch.ones(0)], [1016])


def test_more_tiles_than_copies():
    tiles = mask.COPIES.value + 3
    g = torch.randn(tiles * SEGMENT, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert_counts([g], [])
    assert_counts([g], digits(0.6875)[:1])


def test_gradients_at_any_address():
    """Elements that 16 bytes cannot be loaded of at once; digits that are not next to each other."""
    grads = [torch.randn(SEGMENT + 3)[1:], torch.randn(20).to(torch.float16)[1:18]]
    for known in range(3):
        assert_counts(grads, digits(0.7)[:known])
    counts, known = torch.zeros(1026, dtype=torch.int64), digits(0.7)[:2]
    apart = torch.tensor([known[0], -1, known[1], -1])[::2]
    triton_kernels.count_magnitudes_(counts, grads, apart)
    assert torch.equal(counts, count(reference.count_magnitudes_, grads, known))


@pytest.mark.parametrize(
    ("kind", "dtype", "sampled"),
    [
        ("random", torch.float32, True), ("tied", torch.float16, False), ("mostly zero", torch.bfloat16, True),
        ("subnormal", torch.float32, False), ("many scales", torch.bfloat16, True),
    ],
)  # fmt: skip
def test_the_kth_smallest(kind, dtype, sampled, monkeypatch):
    """As test_selection.py has it for the other backends."""
    monkeypatch.setattr(selection, "SAMPLED", 1000 if sampled else 10**9)
    grads = make(kind, dtype)
    rank = sum(g.numel() for g in grads) * 4 // 5
    assert_exact(select(grads, rank, "triton"), grads, rank)


# Totals.

TURN = norm.LANES.value * norm.UNROLLED.value


def in_lanes(numbers):
    """Their sum, in the order that norm.py says."""
    lanes = np.zeros(norm.LANES.value)
    for i in range(0, len(numbers), len(lanes)):
        part = numbers[i : i + len(lanes)]
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return lanes[0]


@pytest.mark.parametrize("length", [1, norm.LANES.value + 1, TURN, TURN + 1, 2 * TURN + 5])
def test_a_total(length):
    """All numbers, and no other; lane by lane, in float64, whatever the machine."""
    generator = np.random.default_rng(7)
    partials = generator.random(length + 9, dtype=np.float32) ** 8
    partials[length:] = np.nan  # nobody wrote here
    partials[length // 2] = -(2.0**-40)  # a sum of squares that overflowed, times 2^-160
    out = torch.zeros(())
    norm.total_kernel[(1,)](out, torch.from_numpy(partials), length)
    squares = partials[:length].astype(np.float64)
    assert out.item() == np.float32(np.sqrt(in_lanes(np.where(squares < 0, squares * -(2.0**160), squares))))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_total_that_is_not_finite(value):
    partials = torch.ones(TURN + 3)
    partials[TURN + 1] = value
    out = torch.zeros(())
    norm.total_kernel[(1,)](out, partials, TURN + 3)
    assert np.array_equal(out.item(), value, equal_nan=True)


@pytest.mark.parametrize("length", [0, 1, TURN + 1])
def test_totals_of_products(length):
    """As a total, three times; of either sign, and nothing stands for what overflowed."""
    partials = np.random.default_rng(11).standard_normal((3, length))
    out = torch.full((3,), -1.0, dtype=torch.float64)
    memory = torch.from_numpy(np.append(partials.ravel(), np.nan))
    norm.total_products_kernel[(3,)](out, memory, length)
    assert out.tolist() == [in_lanes(row) for row in partials]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_where_float64_is(dtype):
    """Of integers whose sums have 53 bits at most, so that every order gives the same, but no float32 does."""
    bits = {torch.float32: 19, torch.float16: 11, torch.bfloat16: 8}[dtype]
    shapes = [(n,) for n in LENGTHS] + [(3, SEGMENT + 7), (5, 0), ()]
    generator = torch.Generator().manual_seed(3)
    a, g = ([torch.randint(-(2**bits), 2**bits, shape, generator=generator) for shape in shapes] for _ in range(2))
    products = torch.full((3,), -1.0, dtype=torch.float64)
    triton_kernels.gradient_products_(products, [x.to(dtype) for x in g], [x.to(dtype) for x in a])
    sums = [sum(int((x * y).sum()) for x, y in zip(*pair, strict=True)) for pair in ((a, a), (a, g), (g, g))]
    assert max(map(abs, sums)) < 2**53
    assert products.tolist() == sums


def test_what_is_left_beside_a_projection_can_be_told():
    """A millionth of the norm, 10^-12 of its square: <g, g> - <a, g>^2 / <a, a>."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(3 * SEGMENT, generator=generator)
    g = a.clone()
    g[0::2], g[1::2] = a[0::2] - 2.0**-20 * a[1::2], a[1::2] + 2.0**-20 * a[0::2]
    products = torch.zeros(3, dtype=torch.float64)
    triton_kernels.gradient_products_(products, [g], [a])
    clean, both, other = products.tolist()
    x, y = a.double(), g.double()
    left = y - (x @ y) / (x @ x) * x
    # Of each product 12 additions in a segment and 2 above, the second of them twice, and 3 operations here: at most 59
    # roundings of 2^-53 of <g, g>, of which 2^-40 is what is left.
    assert abs(other - both * both / clean - left @ left) < 2.0**-7 * (left @ left)
