"""Every compiled backend does what eager does, and the same whatever the threads, the instruction set and the run."""

import copy
import ctypes
import sys

import cases
import pytest
import torch
from compare import assert_ulp, assert_within, ulp_distance
from conftest import compiled, live

from flatkern import checks
from flatkern.dispatch import resolve
from flatkern.ops import OPS

PAIRS = [(op, backend) for op in OPS.values() for backend in compiled(op)]
VARIANTS = [(op, backend, words) for op, backend in PAIRS for words in cases.VARIANTS[op.name]]
# Long rows take most of the time, and what depends on a dtype is the same for them: two of the four dtypes.
GRIDS = [(s, d) for s in cases.SHAPES for d in cases.DTYPES if s != "long rows" or d in ("float32", "mixed")]
# Every way of walking memory in one list, enough of it for three threads.
ALL_WALKS = [shape for name in ("mixed ranks", "short rows", "chunk ends", "long rows") for shape in cases.SHAPES[name]]


def name_of(value):
    return getattr(value, "name", None)


def make(op, shapes, dtype, words):
    return getattr(cases, op.name)(shapes, cases.DTYPES[dtype], variant=words)


def run(op, backend, values):
    cases.call(resolve(op.name, "cpu", backend), op, values)
    return values


def lists(op, values):
    """Name and tensors of every tensor argument that is given."""
    for argument in op.arguments:
        value = values[argument.name]
        if argument.type.startswith("Tensor") and value is not None:
            yield argument, value if argument.type.startswith("Tensor[]") else [value]


def assert_same_bits(op, got, want):
    for (argument, a), (_, b) in zip(lists(op, got), lists(op, want), strict=True):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_ulp(f"{op.name}: {argument.name}[{k}]", x, y)


@pytest.mark.parametrize("shapes, dtype", GRIDS)
@pytest.mark.parametrize("op, backend, words", VARIANTS, ids=name_of)
def test_matches_eager(op, backend, words, shapes, dtype):
    live(backend)
    case = cases.SHAPES[shapes], dtype, words
    assert_within(op, run(op, backend, make(op, *case)), run(op, "eager", make(op, *case)))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op, backend, words", VARIANTS, ids=name_of)
def test_matches_eager_in_other_layouts(op, backend, words, dtype):
    """channels_last everywhere; dim 1 outermost where no filter is walked, and refused where one is."""
    live(backend)
    layouts = words + " channels_last transposed"
    shapes = [(8, 3, 5, 5), (17,), (4, 16, 2, 2), (1, 5, 3, 3), (40, 30)]
    walks_filters = op.name in checks.WALKS_FILTERS or {"noise", "history", "masks"} & set(words.split())
    if walks_filters:
        values = make(op, shapes, dtype, layouts)
        before = copy.deepcopy(values)
        with pytest.raises(ValueError, match=r"\[4\] .* dim 0 is not outermost .*contiguous\(\)"):
            run(op, backend, values)
        assert_same_bits(op, values, before)
        shapes.pop()
    assert_within(
        op, run(op, backend, make(op, shapes, dtype, layouts)), run(op, "eager", make(op, shapes, dtype, layouts))
    )


@pytest.mark.parametrize("op, backend, words", VARIANTS, ids=name_of)
def test_same_bits_however_it_runs(op, backend, words, native, set_threads, set_isa):
    """Again, with more threads, with every instruction set, and with every way of reading tensors."""
    live(backend)
    set_threads(1)
    given = make(op, ALL_WALKS, "mixed", words)
    want = run(op, backend, copy.deepcopy(given))
    assert_same_bits(op, run(op, backend, copy.deepcopy(given)), want)
    for isa in native.isas():
        set_isa(isa)
        assert_same_bits(op, run(op, backend, copy.deepcopy(given)), want)
    for reader in native._readers().split():
        before = native._read_through(reader)
        try:
            assert_same_bits(op, run(op, backend, copy.deepcopy(given)), want)
        finally:
            native._read_through(before)
    for threads in (2, 3):
        set_threads(threads)
        assert_same_bits(op, run(op, backend, copy.deepcopy(given)), want)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("words", ["", "masters", "backups history", "masters history offset"])
def test_norms_measured_inside_are_those_of_filter_norms(backend, words, dtype):
    """perturb(norms=None) = perturb(norms=filter_norms_(w)), to the bit."""
    op, norms_op = OPS["perturb_gaussian_"], OPS["filter_norms_"]
    inside, given = make(op, ALL_WALKS, dtype, words), make(op, ALL_WALKS, dtype, words + " norms")
    given |= {name: copy.deepcopy(inside[name]) for name in ("params", "backups", "masters", "history")}
    run(norms_op, backend, dict(norms=given["norms"], params=given["masters"] or given["params"]))
    run(op, backend, inside)
    run(op, backend, given)
    assert_same_bits(op, inside, inside | {"params": given["params"], "backups": given["backups"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("words", ["", "masters", "backups", "backups history", "masters history offset skip"])
@pytest.mark.parametrize("name", ["sgd_update_", "adam_update_", "adamw_update_"])
def test_a_rolling_update_is_an_update_and_a_perturbation(backend, name, words, dtype):
    """update(noise) = update(), then perturb_gaussian_ of the weights that it stored, to the bit, backups included."""
    op, perturb = OPS[name], OPS["perturb_gaussian_"]
    shapes = cases.SHAPES["mixed ranks"] if backend == "eager" else ALL_WALKS
    fused, steps = (make(op, shapes, dtype, words + " noise") for _ in range(2))
    run(op, backend, fused)
    noise, steps["noise"] = steps["noise"], None
    run(op, backend, steps)
    scalars = {key: steps[key] for key in ("sigma", "eta", "index", "offset")}
    lists_ = {key: steps[key] for key in ("params", "backups", "masters", "history", "sigmas")}
    run(perturb, backend, dict(**lists_, norms=None, noise=noise, **scalars))
    assert_same_bits(op, fused, steps | {"noise": noise})


# A row whose float32 sum is as far off as was found: 63 lanes begin near 1, and each later square is just less than
# half an ulp of that, so 15 additions are lost in every lane; the digits make the folds of the lanes lose too.
WORST_ROW = "2031212103230012203200023003130031102011133031123322133320032331"


def worst_row():
    row = torch.full((16, 64), torch.nextafter(torch.tensor(2.0**-12), torch.tensor(0.0)).item())
    row[0] = 1 + torch.tensor([int(digit) for digit in WORST_ROW]) * 2.0**-23
    row[:, 21] = 0
    return row.reshape(1, -1)


@pytest.mark.parametrize("op, backend", [pair for pair in PAIRS if pair[0].name == "filter_norms_"], ids=name_of)
def test_a_norm_is_within_its_bound_where_sums_are_worst(op, backend):
    live(backend)
    got, want = (run(op, name, dict(norms=[torch.zeros(1)], params=[worst_row()])) for name in (backend, "eager"))
    assert ulp_distance(got["norms"][0], want["norms"][0]) >= 2, "this row is no longer a hard one"
    assert_within(op, got, want)


@pytest.mark.parametrize("largest", [1e30, -3e38, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "op, backend, words",
    [v for v in VARIANTS if v[0].name in ("ascent_norm_", "gradient_norm_") and "specials" not in v[2]],
    ids=name_of,
)
def test_norms_of_large_gradients(op, backend, words, largest, set_isa, native):
    """As finite as the gradients are; infinity and NaN stay."""
    live(backend)
    case = cases.enlarge_gradients(make(op, ALL_WALKS, "float32", words), largest)
    want = run(op, "eager", copy.deepcopy(case))
    if words == "":
        exact = torch.cat([g.double().flatten() for g in case["grads"]]).norm()
        assert torch.allclose(want["norm"].double(), exact, rtol=1e-6, equal_nan=True)
    assert want["norm"].isfinite() or not abs(largest) < 1e38
    for isa in native.isas():
        set_isa(isa)
        assert_within(op, run(op, backend, copy.deepcopy(case)), want)


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_autograd_sees_what_is_written(backend, op):
    """Versions of weights, gradients and outputs move where they are written, and only there."""
    values = make(op, cases.SHAPES["mixed ranks"], "float32", " ".join(cases.VARIANTS[op.name]).replace("skip", ""))
    before = {argument.name: [t._version for t in tensors] for argument, tensors in lists(op, values)}
    run(op, backend, values)
    for argument, tensors in lists(op, values):
        for t, version in zip(tensors, before[argument.name], strict=True):
            if argument.mutated and argument.name in ("params", "grads", "outs"):
                assert t._version > version, argument.name
            elif not argument.mutated:
                assert t._version == version, argument.name


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


@pytest.mark.parametrize("op, backend", PAIRS, ids=name_of)
def test_makes_no_tensor_and_keeps_nothing(op, backend, heap):
    """torch allocates nothing; references and the heap are afterwards what they were."""
    live(backend)
    values = make(op, [(3, 5), (300, 3), (66000,), ()], "mixed", " ".join(cases.VARIANTS[op.name]))
    for _ in range(20):
        run(op, backend, values)
    tensors = [t for _, given in lists(op, values) for t in given]
    pointers, counts = [t.data_ptr() for t in tensors], [sys.getrefcount(t) for t in tensors]

    grown = []
    for _ in range(3):  # other threads may allocate meanwhile, but not each time
        used = heap()
        for _ in range(200):
            run(op, backend, values)
        grown.append(heap() - used)
    assert min(grown) < 200 * 16
    assert [t.data_ptr() for t in tensors] == pointers
    assert [sys.getrefcount(t) for t in tensors] == counts

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(op, backend, values)
    assert [e.name for e in profile.events() if e.name == "[memory]" or e.name.startswith("aten::")] == []
