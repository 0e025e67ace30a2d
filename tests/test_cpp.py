"""The cpp backend: what it alone has, threads, instruction sets, ways of reading tensors; and it allocates nothing."""

import copy
import ctypes
import sys

import cases
import pytest
import torch
from compare import assert_within, ulp_distance
from conftest import live
from test_backends import assert_same_bits, lists, make, name_of, run, shifted
from walks import EVERY_WAY

from flatkern.ops import OPS

OF_CPP = [op for op in OPS.values() if "cpp" in op.backends.split()]
VARIANTS = [(op, words) for op in OF_CPP for words in cases.VARIANTS[op.name]]


@pytest.mark.covering(1)
@pytest.mark.parametrize("op, words", VARIANTS, ids=name_of)
def test_same_bits_however_it_runs(op, words, native, set_threads, set_isa):
    """Again, with more threads, with every instruction set, and with every way of reading tensors."""
    set_threads(1)
    given = make(op, EVERY_WAY["cpp"], "mixed", words)
    want = run(op, "cpp", copy.deepcopy(given))
    assert_same_bits(op, run(op, "cpp", copy.deepcopy(given)), want)
    for isa in native.isas():
        set_isa(isa)
        assert_same_bits(op, run(op, "cpp", copy.deepcopy(given)), want)
    for reader in native._readers().split():
        before = native._read_through(reader)
        try:
            assert_same_bits(op, run(op, "cpp", copy.deepcopy(given)), want)
        finally:
            native._read_through(before)
    for threads in (2, 3):
        set_threads(threads)
        assert_same_bits(op, run(op, "cpp", copy.deepcopy(given)), want)


# More elements than any cache keeps, with odd rows and ends: what is written goes around the caches, by lines; and of
# float32 a tile is walked at two places in turn.
LARGE = [(1500, 1001), (1 << 20,), (3, 600001), (33,)]
AROUND = [
    ("perturb_ascent_", "backups new_means means", False),
    ("mix_gradients_", "outs clean_grads component", True),
    ("sgd_update_", "backups", True),
    ("restore_", "", True),
]


@pytest.mark.parametrize("dtype", ["mixed", "float32"])
@pytest.mark.parametrize("name, words, moved", AROUND)
def test_large_lists_match_eager(name, words, moved, dtype, native, set_threads):
    set_threads(2)
    op = OPS[name]
    got, want = (make(op, LARGE, dtype, words) for _ in range(2))
    if moved:
        got, want = shifted(got), shifted(want)
    assert_within(op, run(op, "cpp", got), run(op, "eager", want))


# Rows up to this length have their normals drawn beside the rule's loop, while longer ones draw them when they are
# added: kDrawnAhead of csrc/cpu/apply.h.
DRAWN_AHEAD = 16384


@pytest.mark.parametrize("name", ["sgd_update_", "adamw_update_"])
@pytest.mark.parametrize("words", ["backups noise", "masters noise history grad_scale offset"])
def test_rolling_updates_of_rows_around_the_longest_that_is_drawn_ahead(name, words, native):
    """Matrices' rows, and vectors, whose first normal may be inside of a draw."""
    op, shapes = OPS[name], [s for n in (DRAWN_AHEAD, DRAWN_AHEAD + 1) for s in ((2, n), (n,))]
    got, want = (make(op, shapes, "mixed", words) for _ in range(2))
    assert_within(op, run(op, "cpp", got), run(op, "eager", want))


# A row whose float32 sum is as far off as was found: 63 lanes begin near 1, and each later square is just less than
# half an ulp of that, so 15 additions are lost in every lane; the digits make the folds of the lanes lose too.
WORST_ROW = "2031212103230012203200023003130031102011133031123322133320032331"


def worst_row():
    row = torch.full((16, 64), torch.nextafter(torch.tensor(2.0**-12), torch.tensor(0.0)).item())
    row[0] = 1 + torch.tensor([int(digit) for digit in WORST_ROW]) * 2.0**-23
    row[:, 21] = 0
    return row.reshape(1, -1)


def test_a_norm_is_within_its_bound_where_sums_are_worst():
    live("cpp")
    op = OPS["filter_norms_"]
    got, want = (run(op, name, dict(norms=[torch.zeros(1)], params=[worst_row()])) for name in ("cpp", "eager"))
    assert ulp_distance(got["norms"][0], want["norms"][0]) >= 2, "this row is no longer a hard one"
    assert_within(op, got, want)


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@pytest.fixture
def heap():
    """A function: the bytes that malloc has handed out and not got back."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        pytest.skip("only glibc 2.33 and later can say how large its heap is")
    ask.restype = Mallinfo2

    def used():
        now = ask()
        return now.uordblks + now.hblkhd

    return used


@pytest.mark.parametrize("op", OF_CPP, ids=name_of)
def test_makes_no_tensor_and_keeps_nothing(op, heap):
    """torch allocates nothing; references and the heap are afterwards what they were."""
    live("cpp")
    values = make(op, [(3, 5), (300, 3), (66000,), ()], "mixed", " ".join(cases.VARIANTS[op.name]))
    for _ in range(20):
        run(op, "cpp", values)
    tensors = [t for _, given in lists(op, values) for t in given]
    pointers, counts = [t.data_ptr() for t in tensors], [sys.getrefcount(t) for t in tensors]

    grown = []
    for _ in range(3):  # other threads may allocate meanwhile, but not each time
        used = heap()
        for _ in range(200):
            run(op, "cpp", values)
        grown.append(heap() - used)
    assert min(grown) < 200 * 16
    assert [t.data_ptr() for t in tensors] == pointers
    assert [sys.getrefcount(t) for t in tensors] == counts

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(op, "cpp", values)
    assert [e.name for e in profile.events() if e.name == "[memory]" or e.name.startswith("aten::")] == []
