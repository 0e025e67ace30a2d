"""Every compiled backend does what eager does: cpp; in `make test-triton` Triton's kernels, in its interpreter; in
`make test-cuda` the CUDA kernels, emulated.

What one of them alone has is in test_cpp.py, test_triton.py, test_cuda.py.
"""

import copy

import cases
import pytest
import torch
import walks
from compare import assert_ulp, assert_within, bits
from conftest import BACKENDS, compiled, live
from walks import EVERY_WAY, FEW, grid, richest, rows, variants

from flatkern import checks, dispatch
from flatkern.dispatch import resolve
from flatkern.ops import OPS

PAIRS = [(op, backend) for op in OPS.values() for backend in compiled(op)]
VARIANTS = [(op, backend, words) for op, backend in PAIRS for words in variants(op, backend)]
UPDATES = ["sgd_update_", "adam_update_", "adamw_update_"]
# Infinite and NaN inputs, and the lanes beyond a tensor's end, are arithmetic too; interpreted, NumPy remarks on each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def name_of(value):
    return getattr(value, "name", None)


every_pair = pytest.mark.parametrize("op, backend", PAIRS, ids=name_of, indirect=["backend"])


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


def assert_like_eager(op, backend, case, move=lambda values: values):
    got, want = move(make(op, *case)), make(op, *case)
    assert_within(op, run(op, backend, got), run(op, "eager", want))


# Next to eager.


NAMES = "op", "backend", "words", "shapes", "dtype"
CASES = [(*v, *case) for v in VARIANTS for case in grid(v[1])]


@pytest.mark.covering(each="op")
@pytest.mark.parametrize(NAMES, CASES, ids=name_of)
def test_matches_eager(op, backend, words, shapes, dtype):
    live(backend)
    assert_like_eager(op, backend, (walks.SHAPES[backend][shapes], dtype, words))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_pair
def test_matches_eager_in_one_dtype(op, backend, dtype):
    """What has most arguments."""
    assert_like_eager(op, backend, (FEW, dtype, richest(op)))


LAID_OUT = rows(
    [(op, words, dtype) for op in OPS.values() for words in cases.VARIANTS[op.name] for dtype in cases.DTYPES],
    lambda op, words, dtype: words == cases.VARIANTS[op.name][0] and dtype == "mixed",
)


@pytest.mark.covering(each="op")
@pytest.mark.parametrize("backend, op, words, dtype", LAID_OUT, ids=name_of, indirect=["backend"])
def test_matches_eager_in_other_layouts(op, backend, words, dtype):
    """channels_last everywhere; dim 1 outermost where no filter is walked, and refused where one is."""
    layouts = words + " channels_last transposed"
    shapes = [(8, 3, 5, 5), (17,), (4, 16, 2, 2), (1, 5, 3, 3), (40, 24), (40, 30)]
    if op.name in checks.WALKS_FILTERS or {"noise", "history", "masks"} & set(words.split()):
        values = make(op, shapes, dtype, layouts)
        before = copy.deepcopy(values)
        with pytest.raises(ValueError, match=r"\[4\] .* dim 0 is not outermost .*contiguous\(\)"):
            run(op, backend, values)
        assert_same_bits(op, values, before)
        del shapes[4:]
    assert_like_eager(op, backend, (shapes, dtype, layouts))


def shifted(values, only=None):
    """Tensors of lists, or of the one that is named, moved to where their element size alone divides their address."""

    def move(t):
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        return room[1:].as_strided(t.shape, t.stride()).copy_(t)

    def is_moved(name, value):
        return only in (None, name) and isinstance(value, list) and isinstance(value[0], torch.Tensor)

    return {name: [move(t) for t in value] if is_moved(name, value) else value for name, value in values.items()}


UNALIGNED = rows([(op, dtype) for op in OPS.values() for dtype in cases.DTYPES], lambda op, dtype: dtype == "mixed")


@pytest.mark.parametrize("backend, op, dtype", UNALIGNED, ids=name_of, indirect=["backend"])
def test_unaligned_addresses(op, backend, dtype):
    """Of all lists, and of any one of them: vectors of 16 bytes are then not to be moved."""
    interpreted = backend == "triton"  # where one list decides for all
    case = FEW if interpreted else [*FEW, (1, 8200)], dtype, richest(op)
    names = {argument.name for argument, _ in lists(op, make(op, *case)) if argument.type.startswith("Tensor[]")}
    for only in [None] if interpreted else [None, *sorted(names)]:
        assert_like_eager(op, backend, case, lambda values, only=only: shifted(values, only))


@every_pair
def test_no_tensors_at_all(op, backend):
    assert_like_eager(op, backend, ([], "float32", ""))


@pytest.mark.parametrize("backend, name", rows([(name,) for name in UPDATES], lambda name: name != "adamw_update_"))
def test_moved_tensors_are_found(name, backend):
    """New gradients, weights whose memory was exchanged, another round: every call looks again."""
    op = OPS[name]
    got, want = (make(op, FEW, "float32", "backups noise") for _ in range(2))
    for step in range(3):
        for values, by in ((got, backend), (want, "eager")):
            run(op, by, values)
            values["grads"] = [g.clone() + step for g in values["grads"]]
            for p in (*values["params"], *values["backups"]):
                p.data = p.data.clone()
            values["noise"] = values["noise"] + torch.tensor([0, 0, 1 - 2 * (step == 1)])
        assert_within(op, got, want)
        for argument, tensors in lists(op, got):
            if argument.mutated:
                for p, q in zip(tensors, want[argument.name], strict=True):
                    p.copy_(q)


@pytest.fixture
def in_every_isa(request, backend):
    """Runs a function with every instruction set that a backend can be told to use."""
    if backend != "cpp":
        return lambda function: function()
    native, set_isa = (request.getfixturevalue(name) for name in ("native", "set_isa"))

    def in_each(function):
        for isa in native.isas():
            set_isa(isa)
            function()

    return in_each


LARGE = rows(
    [
        (op, words, largest)
        for op in (OPS["ascent_norm_"], OPS["gradient_norm_"])
        for words in cases.VARIANTS[op.name]
        for largest in (1e30, -3e38, float("inf"), float("nan"))
        if "specials" not in words
    ],
    lambda op, words, largest: words in ("", "unit") and largest != -3e38,
)


@pytest.mark.parametrize("backend, op, words, largest", LARGE, ids=name_of, indirect=["backend"])
def test_norms_of_large_gradients(op, backend, words, largest, in_every_isa):
    """As finite as the gradients are; infinity and NaN stay."""
    case = cases.enlarge_gradients(make(op, EVERY_WAY[backend], "float32", words), largest)
    want = run(op, "eager", copy.deepcopy(case))
    if words == "":
        exact = torch.cat([g.double().flatten() for g in case["grads"]]).norm()
        assert torch.allclose(want["norm"].double(), exact, rtol=1e-6, equal_nan=True)
    assert want["norm"].isfinite() or not abs(largest) < 1e38
    in_every_isa(lambda: assert_within(op, run(op, backend, copy.deepcopy(case)), want))


BESIDE = [OPS["gradient_products_"]]
BESIDE = [(op, backend) for op in BESIDE for backend in BACKENDS if backend == "eager" or backend in compiled(op)]


@pytest.mark.parametrize("op, backend", BESIDE, ids=name_of, indirect=["backend"])
def test_what_is_left_beside_a_projection(op, backend, in_every_isa):
    """Of g = a + 1e-5 of another one. Its square is 1e-10 of g's: sums in float32 know nothing of it, and the products'
    bound lets it be off by 5e-4."""
    generator = torch.Generator().manual_seed(0)
    clean, other = ([torch.randn(s, generator=generator) for s in EVERY_WAY[backend]] for _ in range(2))
    values = dict(grads=[a + 1e-5 * x for a, x in zip(clean, other, strict=True)], clean_grads=clean)
    values["products"] = torch.zeros(3, dtype=torch.float64)
    g, a = (torch.cat([t.double().flatten() for t in values[name]]) for name in ("grads", "clean_grads"))
    exact = (g - (a @ g) / (a @ a) * a).norm().item()

    def check():
        clean_clean, clean_grad, grad_grad = run(op, backend, values)["products"].tolist()
        assert (grad_grad - clean_grad**2 / clean_clean) ** 0.5 == pytest.approx(exact, rel=1e-3)

    in_every_isa(check)


# Operations that are two others in one.

INSIDE = rows(
    [
        (words, dtype)
        for words in ("", "masters", "backups history", "masters history offset")
        for dtype in cases.DTYPES
    ],
    lambda words, dtype: words in ("", "masters history offset") and dtype == "mixed",
)


@pytest.mark.parametrize("backend, words, dtype", INSIDE, indirect=["backend"])
def test_norms_measured_inside_are_those_of_filter_norms(backend, words, dtype):
    """perturb(norms=None) = perturb(norms=filter_norms_(w)), to the bit."""
    op, shapes = OPS["perturb_gaussian_"], EVERY_WAY[backend]
    inside, given = make(op, shapes, dtype, words), make(op, shapes, dtype, words + " norms")
    given |= {name: copy.deepcopy(inside[name]) for name in ("params", "backups", "masters", "history")}
    run(OPS["filter_norms_"], backend, dict(norms=given["norms"], params=given["masters"] or given["params"]))
    assert_same_bits(op, run(op, backend, inside), run(op, backend, given) | {"norms": None})


ROLLING = rows(
    [
        (name, words, dtype)
        for name in UPDATES
        for words in (
            *("", "masters", "backups", "backups history", "masters history offset skip"),
            *("backups grad_scale clip", "backups masks"),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ],
    lambda name, words, dtype: (name, words, dtype) == ("sgd_update_", "backups history", "bfloat16"),
)


@pytest.mark.parametrize("backend, name, words, dtype", ROLLING, indirect=["backend"])
def test_a_rolling_update_is_an_update_and_a_perturbation(backend, name, words, dtype):
    """update(noise) = update(), then perturb_gaussian_ of the weights that it stored, to the bit, backups included."""
    op, perturb = OPS[name], OPS["perturb_gaussian_"]
    shapes = cases.SHAPES["mixed ranks"] if backend == "eager" else EVERY_WAY[backend]
    fused, steps = (make(op, shapes, dtype, words + " noise momentum_buffers") for _ in range(2))
    run(op, backend, fused)
    noise, steps["noise"] = steps["noise"], None
    run(op, backend, steps)
    run(perturb, backend, {a.name: steps.get(a.name) for a in perturb.arguments} | {"noise": noise, "norms": None})
    assert_same_bits(op, fused, steps | {"noise": noise})


# What a call leaves alone.

SKIPPED = rows(
    [
        (name, words, dtype)
        for name in UPDATES
        for words in ("", "backups", "masters", "masters history masks", "backups noise history")
        for dtype in cases.DTYPES
    ],
    lambda name, words, dtype: words == "masters history masks" and dtype == "mixed",
)


@pytest.mark.parametrize("backend, name, words, dtype", SKIPPED, indirect=["backend"])
def test_a_step_that_is_skipped_restores_and_changes_nothing(backend, name, words, dtype):
    op, shapes = OPS[name], EVERY_WAY[backend] if backend == "cuda" else FEW
    values = make(op, shapes, dtype, f"{words} momentum_buffers skip specials")
    clean = values["masters"] or values["backups"] or values["params"]
    want = copy.deepcopy(values)
    if values["noise"] is None:
        want["params"] = [w.to(p.dtype) for w, p in zip(clean, values["params"], strict=True)]
    run(op, backend, values)
    assert_same_bits(op, values | ({"params": want["params"]} if values["noise"] is not None else {}), want)


@every_pair
def test_what_others_own_is_left_alone(op, backend):
    """Memory in front of and behind every tensor."""
    values = make(op, FEW if backend == "triton" else EVERY_WAY[backend], "mixed", richest(op))
    rooms = []

    def move(t):
        room = torch.full((t.numel() + 32,), 77, dtype=t.dtype)
        rooms.append((room, t.numel()))
        return room[16 : 16 + t.numel()].view_as(t).copy_(t)

    for argument, tensors in lists(op, values):
        if argument.type.startswith("Tensor[]"):
            values[argument.name] = [move(t) for t in tensors]
    run(op, backend, values)
    for room, count in rooms:
        assert room[:16].eq(77).all() and room[16 + count :].eq(77).all()


@pytest.mark.parametrize(
    "op, backend", [(op, b) for op in OPS.values() for b in BACKENDS if b == "eager" or b in compiled(op)], ids=name_of,
    indirect=["backend"],
)  # fmt: skip
def test_autograd_sees_what_is_written(backend, op):
    """Versions of weights, gradients and outputs move where they are written, and only there."""
    words = " ".join(cases.VARIANTS[op.name]).replace("skip", "")
    values = make(op, FEW[:3], "float32", words)
    before = {argument.name: [t._version for t in tensors] for argument, tensors in lists(op, values)}
    run(op, backend, values)
    for argument, tensors in lists(op, values):
        for t, version in zip(tensors, before[argument.name], strict=True):
            if argument.name == "grads" and values.get("outs"):
                assert t._version == version, "grads"
            elif argument.mutated and argument.name in ("params", "grads", "outs"):
                assert t._version > version, argument.name
            elif not argument.mutated:
                assert t._version == version, argument.name


# What is refused, in eager's words.

BAD = {
    "a list too short": lambda v: v | {"grads": v["grads"][:-1]},
    "a scalar too few": lambda v: v | {"lr": v["lr"][:-1]},
    "a scalar that is NaN": lambda v: v | {"lr": [float("nan")] * len(v["lr"])},
    "no tensor": lambda v: v | {"params": [*v["params"][:-1], "weights"]},
    "another shape": lambda v: v | {"grads": [*v["grads"][:-1], torch.zeros(3)]},
    "another layout": lambda v: v | {"grads": [torch.zeros(16, 3).t(), *v["grads"][1:]]},
    "gaps": lambda v: v | {"params": [torch.zeros(3, 32)[:, ::2], *v["params"][1:]]},
    "float64": lambda v: v | {"params": [p.double() for p in v["params"]]},
    "sparse": lambda v: v | {"grads": [v["grads"][0].to_sparse(), *v["grads"][1:]]},
    "masters in half precision": lambda v: v | {"masters": [p.half() for p in v["params"]]},
    "a scalar tensor with a dimension": lambda v: v | {"clip": torch.ones(1)},
    "an integer scalar tensor": lambda v: v | {"grad_scale": torch.tensor(1)},
    "a component of three numbers": lambda v: v | {"clean_grads": v["backups"], "component": torch.ones(3)},
    "a component with gaps": lambda v: v | {"clean_grads": v["backups"], "component": torch.ones(4)[::2]},
    "a component elsewhere": lambda v: v | {
        "clean_grads": v["backups"], "component": torch.ones(2, device="meta"),
    },
    "a component of no clean gradient": lambda v: v | {"component": torch.ones(2)},
    "a round out of range": lambda v: v | {"noise": torch.tensor([0, 0, 2**32])},
    "two words": lambda v: v | {"noise": torch.tensor([0, 0])},
    "a negative index": lambda v: v | {"noise": torch.tensor([0, 0, 0]), "index": [-1] * len(v["index"])},
    "no gradients": lambda v: v | {"grads": None},
    "dim 0 not outermost": lambda v: v | {
        "noise": torch.tensor([0, 0, 0]),
        "params": [v["params"][0].t().contiguous().t(), *v["params"][1:]],
        "grads": [v["grads"][0].t().contiguous().t(), *v["grads"][1:]],
    },
}  # fmt: skip


@pytest.fixture
def launch_count(request, backend):
    """A function: how many kernels were launched."""
    if backend == "cuda":
        return dispatch.compiled_module("cuda").launch_count
    names = request.getfixturevalue("launches") if backend == "triton" else []
    return lambda: len(names)


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_bad_input_is_refused_as_everywhere(spoil, backend, launch_count):
    """After a good call of the same shapes, so that tables exist; nothing is written, nothing launched."""
    op = OPS["sgd_update_"]
    good = make(op, FEW[:3], "float32", "backups")
    run(op, backend, good)
    before, count = copy.deepcopy(good), launch_count()
    values = spoil(good)
    with pytest.raises((TypeError, ValueError)) as want:
        run(op, "eager", values)
    with pytest.raises(type(want.value)) as got:
        run(op, backend, values)
    assert str(got.value) == str(want.value)
    assert launch_count() == count
    for (argument, tensors), (_, old) in zip(lists(op, good), lists(op, before), strict=True):
        assert all(bits(p).equal(bits(q)) for p, q in zip(tensors, old, strict=True)), argument.name
