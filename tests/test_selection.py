"""The k-th smallest magnitude is that of torch.kthvalue, bit for bit, whatever the sample guessed."""

import pytest
import torch
from compare import assert_same

from flatkern import dispatch, selection
from flatkern.checks import MAGNITUDE_DIGITS
from flatkern.selection import kth_smallest_magnitude, shards_of

SHAPES = [(300, 17), (0,), (5, 3, 3, 3), (), (2050,), (40, 8)]
SUBNORMAL = 2.0**-149


def make(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]
    change = {
        "random": lambda g: g,
        "tied": lambda g: g.mul(2).round(),
        "zero": torch.zeros_like,
        "mostly zero": lambda g: g * (g > 1),
        "minus zero": lambda g: torch.where(g > 0, 0.0, -0.0),
        "subnormal": lambda g: g.mul(30).round() * SUBNORMAL,
        "huge": lambda g: g.sign() * (3e38 - g.abs() * 1e37),
        "many scales": lambda g: g * torch.exp2(torch.randint(-120, 120, g.shape, generator=generator).float()),
    }[kind]
    return [change(g).to(dtype) for g in grads]


def magnitudes(grads):
    return torch.cat([g.float().abs().flatten() for g in grads])


def select(grads, rank, backend, total=None):
    return kth_smallest_magnitude(shards_of(grads), total or sum(g.numel() for g in grads), rank, backend)


def assert_exact(found, grads, rank):
    assert found.dtype == torch.float32 and found.shape == ()
    assert torch.equal(found.view(torch.int32), magnitudes(grads).kthvalue(rank).values.view(torch.int32))


@pytest.fixture
def passes(monkeypatch):
    """How many elements each pass has read."""
    seen = []
    resolve = dispatch.resolve

    def counted(op, device_type, backend):
        def run(counts, grads, prefix):
            seen.append(sum(g.numel() for g in grads))
            resolve(op, device_type, backend)(counts, grads, prefix)

        return run

    monkeypatch.setattr(selection, "resolve", counted)
    return seen


KINDS = ["random", "tied", "zero", "mostly zero", "minus zero", "subnormal", "huge", "many scales"]


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_kthvalue(kind, dtype, sampled, backend, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLED", 1000 if sampled else 10**9)
    grads = [g.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max) for g in make(kind, dtype)]
    before = [g.clone() for g in grads]
    total = sum(g.numel() for g in grads)
    for rank in (1, 2, total // 5, total // 2, total * 4 // 5, total - 1, total):
        assert_exact(select(grads, rank, backend), grads, rank)
    assert_same(grads, before)


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampled"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 4])
def test_not_finite(value, at, sampled, backend, monkeypatch):
    """Wherever it is, in the sample or not: there is no threshold."""
    monkeypatch.setattr(selection, "SAMPLED", 1000 if sampled else 10**9)
    grads = make("random")
    grads[at].view(-1)[-1] = value
    for rank in (1, 5000):
        assert select(grads, rank, backend) is None
    grads[at].view(-1)[-1] = 0.0
    assert select(grads, 1, backend) == 0


# What is added to the right first digit, and how many whole passes it takes.
GUESSES = [(0, 2), (1, 4), (-1, 4), (2, 7), (-2, 7), (40, 7), (-40, 7)]
GUESSES_OF = [(kind, *guess) for kind in ("random", "tied", "many scales") for guess in GUESSES]
# Zeros and subnormals have the digit 0, and there is none below.
GUESSES_OF += [(kind, *guess) for kind in ("zero", "mostly zero", "subnormal") for guess in GUESSES if guess[0] >= 0]


@pytest.mark.parametrize(("kind", "wrong_by", "wanted"), GUESSES_OF)
def test_a_guess_only_costs_passes(kind, wrong_by, wanted, backend, monkeypatch, passes):
    grads = make(kind)
    total = sum(g.numel() for g in grads)
    rank = total * 4 // 5
    digit = int(magnitudes(grads).kthvalue(rank).values.view(torch.int32)) >> sum(MAGNITUDE_DIGITS[1:])
    monkeypatch.setattr(selection, "SAMPLED", 1)
    monkeypatch.setattr(selection, "_guess_first_digit", lambda *args: torch.tensor([digit + wrong_by]))
    assert_exact(select(grads, rank, backend), grads, rank)
    assert passes == [total] * wanted


def test_passes(backend, monkeypatch, passes):
    """Three over everything; with a sample of one in 64 that guesses right, two."""
    grads = [torch.randn(1024, 64, generator=torch.Generator().manual_seed(0)), torch.ones(9)]
    total = 1024 * 64 + 9
    assert_exact(select(grads, total * 4 // 5, backend), grads, total * 4 // 5)
    assert passes == [total] * 3
    passes.clear()
    monkeypatch.setattr(selection, "SAMPLED", total)
    assert_exact(select(grads, total * 4 // 5, backend), grads, total * 4 // 5)
    assert passes == [1024, total, total]


WAITS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampled"])
def test_the_host_waits_once(sampled, backend, monkeypatch):
    """All work is queued before it does, and nothing is sent to the device, for which it would wait as well."""
    monkeypatch.setattr(selection, "SAMPLED", 1 if sampled else 10**9)
    events, inside, resolve = [], [], dispatch.resolve

    def marked(op, device_type, backend):
        def run(*given):
            inside.append(op)  # what an operation does on the CPU is its own
            resolve(op, device_type, backend)(*given)
            events.append(inside.pop())

        return run

    def waiting(name):
        true = getattr(torch.Tensor, name)

        def wait(t, *given):
            if not inside:
                events.append(name)
            return true(t, *given)

        return wait

    grads = [torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))]
    monkeypatch.setattr(selection, "resolve", marked)
    with monkeypatch.context() as watched:
        for name in WAITS:
            watched.setattr(torch.Tensor, name, waiting(name))
        watched.setattr(torch, "tensor", lambda *given, **named: pytest.fail("a number is sent to the device"))
        found = select(grads, 1024 * 52, backend)
    assert_exact(found, grads, 1024 * 52)
    assert events == [*3 * ["count_magnitudes_"], "tolist"]


def test_a_sample_leaves_out_what_is_small_beside_the_rest():
    """And takes one cache line in 64 of everything else."""
    grads = [torch.zeros(3000), torch.zeros(1024), torch.ones(200, 1024), torch.zeros(3)]
    (lines,) = selection._sample(grads)
    assert torch.equal(lines, torch.ones(16 * 200)), "a 16th of the mean is 3262 elements"
    (lines,) = selection._sample([torch.arange(4096.0), torch.zeros(0)])
    assert lines.tolist() == [float(i) for start in range(0, 4096, 1024) for i in range(start, start + 16)]


def test_a_sample_of_nothing(backend, monkeypatch):
    """Many small tensors have no whole cache line in 64 of them: the guess is any digit."""
    monkeypatch.setattr(selection, "SAMPLED", 1)
    grads = [torch.randn(10, generator=torch.Generator().manual_seed(k)) for k in range(200)]
    for rank in (1, 700, 2000):
        assert_exact(select(grads, rank, backend), grads, rank)


def test_one_element(backend):
    grads = [torch.tensor(-3.5)]
    assert_exact(select(grads, 1, backend), grads, 1)


def test_shards_keep_positions():
    """By device, in the order of appearance; the tensors themselves, not copies."""
    grads = [torch.ones(2), torch.ones(3, device="meta"), torch.ones(4), torch.ones(5, device="meta")]
    here, there = shards_of(grads)
    assert (here.device.type, there.device.type) == ("cpu", "meta")
    assert (here.at, there.at) == ([0, 2], [1, 3])
    assert here.ranks == there.ranks == ()
    assert here.grads[1] is grads[2] and there.grads[0] is grads[1]


def test_several_shards(backend):
    """Counts of shards are added up: any division gives the same value."""
    grads = make("random")
    (whole,) = shards_of(grads)
    total = sum(g.numel() for g in grads)
    divided = [whole._replace(at=[k], grads=[g]) for k, g in enumerate(grads)]
    for rank in (1, 3000, total):
        assert_exact(kth_smallest_magnitude(divided, total, rank, backend), grads, rank)
