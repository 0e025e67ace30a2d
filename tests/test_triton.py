"""The Triton backend in Triton's interpreter, on the CPU: eager's bits, launches, tables, refusals.

Runs in a process of its own with TRITON_INTERPRET=1 (`make test-triton`). The interpreter pays by the program, so cases
are few and dense: one list of tensors has every way of walking memory. What a compiler makes of the kernels is in
test_triton_compile.py, what only a GPU can show in test_gpu.py.
"""

import copy
import inspect

import cases
import circle
import foreign_writes
import numpy as np
import pytest
import test_mask
import torch
from capturing import TRAINED
from compare import assert_ulp, assert_within, bits
from flatkern.triton_kernels import cache, devices, launch, update
from patterns import same
from test_noise import COUNTERS, KNOWN, assert_normals_of, numbers, strict_fma, strict_radii

import flatkern
from flatkern import checks, dispatch, triton_kernels
from flatkern.dispatch import resolve
from flatkern.ops import OPS

TRITON = [op for op in OPS.values() if "triton" in op.backends.split()]
VARIANTS = [(op, words) for op in TRITON for words in cases.VARIANTS[op.name]]
every_op = pytest.mark.parametrize("op", TRITON, ids=lambda op: op.name)
every_variant = pytest.mark.parametrize("op, words", VARIANTS, ids=lambda x: getattr(x, "name", x))
# Infinite and NaN inputs, and the lanes beyond a tensor's end, are arithmetic too; NumPy would remark on each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

# Empty, short, odd, a chunk's ends, even and odd rows longer than a program holds, vectors as long.
SHORT = [(3, 5), (0,), (64, 3, 3, 3), (), (33,), (4, 0), (7, 1), (2, 17)]
SHAPES = [*SHORT, (3, 1024), (2, 8200), (1025,), (1, 8203), (8203,)]
FEW = [(3, 16), (17,), (5, 4, 3), (2, 4104)]


def make(op, shapes, dtype, words):
    return getattr(cases, op.name)(shapes, cases.DTYPES[dtype], variant=words)


def run(op, backend, values):
    cases.call(resolve(op.name, "cpu", backend), op, values)
    return values


def assert_same_bits(op, got, want):
    for argument in op.arguments:
        a, b = got[argument.name], want[argument.name]
        if argument.type.startswith("Tensor") and a is not None:
            for k, (x, y) in enumerate(zip(*(v if isinstance(v, list) else [v] for v in (a, b)), strict=True)):
                assert_ulp(f"{op.name}: {argument.name}[{k}]", x, y)


@every_variant
def test_matches_eager(op, words):
    got, want = make(op, SHAPES, "mixed", words), make(op, SHAPES, "mixed", words)
    assert_within(op, run(op, "triton", got), run(op, "eager", want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_op
def test_matches_eager_in_one_dtype(op, dtype):
    """The variant with most arguments."""
    words = max(cases.VARIANTS[op.name], key=lambda words: (len(words.split()), words))
    got, want = make(op, FEW, dtype, words), make(op, FEW, dtype, words)
    assert_within(op, run(op, "triton", got), run(op, "eager", want))


def unaligned(values):
    """Every tensor of a list moved to where nothing but its own element size divides its address."""

    def move(t):
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        return room[1:].as_strided(t.shape, t.stride()).copy_(t)

    return {
        name: [move(t) for t in value] if isinstance(value, list) and isinstance(value[0], torch.Tensor) else value
        for name, value in values.items()
    }


@every_op
def test_other_layouts_and_alignments(op):
    """channels_last; dim 1 outermost where no filter is walked; addresses that are no multiples of 16."""
    words = cases.VARIANTS[op.name][0] + " channels_last transposed"
    shapes = [(8, 3, 5, 5), (17,), (4, 16, 2, 2), (40, 24)]
    if op.name in checks.WALKS_FILTERS:
        shapes.pop()
    got, want = unaligned(make(op, shapes, "mixed", words)), make(op, shapes, "mixed", words)
    assert_within(op, run(op, "triton", got), run(op, "eager", want))


# The noise.


def test_every_radius_and_angle():
    circle.assert_every_radius_and_angle("cpu", 65536)


def test_the_root_of_a_radius_needs_no_exact_estimate():
    """A GPU's rsqrt is an approximation. Over all radii, and up to 4 ulp off, two fma make of it the IEEE root."""
    want = strict_radii()
    t = (want.astype(np.float64) ** 2).astype(np.float32)
    t = np.unique(np.concatenate([np.nextafter(t, np.float32(0)), t, np.nextafter(t, np.float32(99))]))
    exact = (1 / np.sqrt(t.astype(np.float64))).astype(np.float32)
    for off in range(-4, 5):
        estimate = (exact.view(np.int32) + off).view(np.float32)
        s = t * estimate
        got = strict_fma(strict_fma(-s, s, t), np.float32(0.5) * estimate, s)
        assert (got == np.sqrt(t)).all(), off


@pytest.mark.parametrize("key", [numbers(key) for _, key, _ in KNOWN], ids="{0[0]:08x}".format)
def test_which_normals_a_counter_gives(key):
    """Those of Philox in Python integers, at every counter of test_noise.py."""
    for counter in COUNTERS:
        assert_normals_of("triton", counter, key)


@pytest.mark.parametrize("name", ["fill_normal_", "perturb_gaussian_", "sgd_update_"])
def test_noise_read_on_the_device(name, monkeypatch):
    """As under a captured graph: the kernel reads the words, and the host does not look at them."""
    op, words = OPS[name], "backups noise norms"
    want = run(op, "triton", make(op, FEW, "mixed", words))
    monkeypatch.setattr(launch.Call, "key", lambda call: (call.noise, 0, 0, 0))
    assert_same_bits(op, run(op, "triton", make(op, FEW, "mixed", words)), want)


# Norms.


def test_a_norm_is_a_tree_over_its_row():
    """As norm.py says: neighbours first, whatever the length of the row and the pieces that it is cut into."""
    generator = np.random.default_rng(3)
    for length in (1, 5, 24, 768, 1000, 1600, 4608, 5630, 8192):
        row = generator.standard_normal(length, dtype=np.float32)
        tree = np.zeros(1 << (length - 1).bit_length(), np.float32)
        tree[:length] = row * row
        while len(tree) > 1:
            tree = tree[0::2] + tree[1::2]
        for shape in ((1, length), (length,)):  # a matrix and a vector have tiles of different widths
            norms = [torch.zeros(1)]
            triton_kernels.filter_norms_(norms, [torch.from_numpy(row).view(shape)])
            assert norms[0].item() == np.sqrt(tree[0]), shape


@pytest.mark.parametrize("largest", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["ascent_norm_", "gradient_norm_"])
def test_norms_of_large_gradients(name, largest):
    """As finite as the gradients are; infinity and NaN stay."""
    op = OPS[name]
    case = cases.enlarge_gradients(make(op, SHAPES, "float32", ""), largest)
    want = run(op, "eager", copy.deepcopy(case))
    assert want["norm"].isfinite() or not abs(largest) < 1e38
    assert_within(op, run(op, "triton", copy.deepcopy(case)), want)


@pytest.mark.parametrize("words", ["", "masters history offset"])
def test_norms_measured_inside_are_those_of_filter_norms(words):
    op = OPS["perturb_gaussian_"]
    inside, given = make(op, SHAPES, "mixed", words), make(op, SHAPES, "mixed", words + " norms")
    given |= {name: copy.deepcopy(inside[name]) for name in ("params", "masters", "history")}
    run(OPS["filter_norms_"], "triton", dict(norms=given["norms"], params=given["masters"] or given["params"]))
    assert_same_bits(op, run(op, "triton", inside) | {"norms": None}, run(op, "triton", given) | {"norms": None})


def test_a_rolling_update_is_an_update_and_a_perturbation():
    """Its norm is that of the new weights: the same bits in one pass or two, rows resident or not."""
    op, words = OPS["sgd_update_"], "backups noise momentum_buffers"
    rolling, apart = make(op, SHAPES, "mixed", words), make(op, SHAPES, "mixed", words)
    run(op, "triton", rolling)
    run(op, "triton", apart | {"params": apart["backups"], "backups": None, "noise": None})
    for p, clean in zip(apart["params"], apart["backups"], strict=True):
        p.copy_(clean)
    perturb = {a.name: apart.get(a.name) for a in OPS["perturb_gaussian_"].arguments}
    masters = [b.float() for b in apart["backups"]]
    run(OPS["perturb_gaussian_"], "triton", perturb | {"backups": None, "masters": masters})
    assert_same_bits(op, rolling, apart)


# Tables and launches.


@every_op
def test_launches_do_not_grow_with_tensors(op, launches):
    words = max(cases.VARIANTS[op.name], key=len).replace("offset", "")
    shapes = [(3, 16), (2, 8208), (24,)]
    counts = []
    for times in (1, 3):
        launches.clear()
        run(op, "triton", make(op, shapes * times, "float32", words))
        counts.append(len(launches))
    assert counts[0] == counts[1] > 0
    assert counts[0] <= 2 * len(shapes) + 2


def test_tables_are_made_once_and_uploaded_where_they_changed(monkeypatch):
    """The same tensors: nothing. New gradients: the pointers. Another learning rate: the scalars."""
    op, uploads, upload = OPS["adamw_update_"], [], devices.upload
    monkeypatch.setattr(devices, "upload", lambda array, *rest: uploads.append(array.shape) or upload(array, *rest))
    values = make(op, FEW, "mixed", "backups")
    run(op, "triton", values)
    uploads.clear()
    run(op, "triton", values)
    assert uploads == []
    values["grads"] = [g.clone() for g in values["grads"]]
    run(op, "triton", values)
    assert len(uploads) == 1 and uploads[0] == (4, 11)
    values["lr"] = [2 * lr for lr in values["lr"]]
    run(op, "triton", values)
    assert len(uploads) == 2


@pytest.mark.parametrize("name", ["sgd_update_", "adam_update_"])
def test_moved_tensors_are_found(name):
    """New gradients, weights whose memory was exchanged, another round: every call looks again."""
    op = OPS[name]
    got, want = (make(op, FEW, "float32", "backups noise") for _ in range(2))
    for step in range(3):
        for values, backend in ((got, "triton"), (want, "eager")):
            run(op, backend, values)
            values["grads"] = [g.clone() + step for g in values["grads"]]
            for p in (*values["params"], *values["backups"]):
                p.data = p.data.clone()
            values["noise"] = values["noise"] + torch.tensor([0, 0, 1 - 2 * (step == 1)])
        assert_within(op, got, want)
        for p, q in zip(got["params"], want["params"], strict=True):
            p.copy_(q)
        for name_ in ("params", "backups", "momentum_buffers", "exp_avgs", "exp_avg_sqs"):
            for p, q in zip(got.get(name_) or [], want.get(name_) or [], strict=True):
                p.copy_(q)


def test_steps_that_are_kept_on_the_host(monkeypatch):
    """The bias corrections that a kernel would compute, to the bit."""
    op = OPS["adam_update_"]
    want = run(op, "triton", make(op, FEW, "mixed", ""))
    monkeypatch.setattr(update, "advance", update.advance_on_host)
    assert_same_bits(op, run(op, "triton", make(op, FEW, "mixed", "")), want)


def test_plans_do_not_accumulate():
    for size in range(cache.MOST_PLANS + 5):
        triton_kernels.restore_([torch.zeros(size + 1)], [torch.ones(size + 1)])
    assert len(launch._caches["restore_"].plans.found) == cache.MOST_PLANS


def test_no_tensors_at_all():
    for op in TRITON:
        got, want = make(op, [], "float32", ""), make(op, [], "float32", "")
        assert_same_bits(op, run(op, "triton", got), run(op, "eager", want))


# Tables under a captured graph.


@pytest.fixture
def captured(monkeypatch):
    """Switches captures on and off; memory of the host stands for pinned memory."""
    monkeypatch.setattr(devices, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(launch, "_caches", {name: cache.OpCache(OPS[name]) for name in launch._caches})
    return lambda on: monkeypatch.setattr(devices, "capturing", lambda device: on)


def restore(size):
    pair = [torch.zeros(size)], [torch.ones(size)]
    triton_kernels.restore_(*pair)
    return pair


def test_a_capture_needs_a_warm_up(captured):
    """Nothing can be uploaded inside, so the call is refused, before anything is launched."""
    captured(True)
    with pytest.raises(RuntimeError, match="captures a call whose tables are not on the device yet; run the same"):
        restore(5)
    captured(False)
    restore(5)
    captured(True)
    with pytest.raises(RuntimeError, match="run such a step without a graph before the next capture"):
        restore(5)  # other memory, and nothing is set aside on a CPU


def test_what_a_capture_uploads_is_its_own(captured):
    """No call outside takes a table that only a replay will fill, and what replays read stays."""
    captured(False)
    kept = restore(5)
    (last,) = launch._caches["restore_"].last_calls.values()
    plan, outside = last.plan, dict(last.tables)
    devices.set_aside(plan, last.tables, torch.device("cuda"))
    assert len(plan.spare["pointers"]) == devices.SPARE
    captured(True)
    pairs = [restore(5) for _ in range(devices.SPARE)]
    assert last.tables == outside and not plan.spare["pointers"]
    hosts = list(plan.kept)
    with pytest.raises(RuntimeError, match=f"captured {devices.SPARE} calls of one operation on the same shapes"):
        restore(5)
    captured(False)
    addresses = [[t.data_ptr() for (t,) in pair] for pair in pairs]
    assert all(any(t.tolist() == [row] for t in hosts) for row in addresses)
    for size in range(6, 6 + 2 * cache.MOST_PLANS):
        restore(size)
    assert plan in launch._caches["restore_"].plans.found.values()
    del kept


def test_a_capture_finds_the_tables_of_another_stream():
    """A graph has its own stream; outside of captures streams share nothing."""
    key = cache.Key(True, (), (), 1)
    plans = cache.Plans()
    warm = launch.build([torch.ones(3)], ("params",), [(None,)], [True], True, [0], [0], torch.as_tensor)
    plans.get(key, lambda: warm, False)
    warm.scratch["norms"] = torch.ones(1)
    there = plans.get(key._replace(stream=2), lambda: pytest.fail("a new plan"), True)
    assert there is not warm and there.groups is warm.groups and there.spare is warm.spare
    assert there.launchers is warm.launchers and there.scratch == {}
    made = plans.get(key._replace(stream=3), lambda: copy.copy(warm), False)
    assert made.scratch == warm.scratch and made.spare is warm.spare
    assert plans.get(key, None, False) is warm


# What is refused, in the words of the other backends.

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


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_bad_input_is_refused_as_everywhere(spoil):
    """After a good call of the same shapes, so that tables exist; nothing is written."""
    op = OPS["sgd_update_"]
    good = make(op, FEW, "float32", "")
    run(op, "triton", good)
    values = spoil(good)
    before = {n: copy.deepcopy(v) for n, v in values.items() if n != "grads"}
    with pytest.raises((TypeError, ValueError)) as want:
        run(op, "eager", values)
    with pytest.raises(type(want.value)) as got:
        run(op, "triton", values)
    assert str(got.value) == str(want.value)
    assert all(bits(p).equal(bits(q)) for p, q in zip(values["params"], before["params"], strict=True) if p is not q)


# How it is found.


@every_op
def test_arguments_are_those_of_the_table(op):
    parameters = inspect.signature(getattr(triton_kernels, op.name)).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters] == [(a.name, a.keyword_only) for a in op.arguments]


@every_op
def test_versions_move_where_something_is_written(op):
    values = make(op, FEW, "float32", "")
    before = {a.name: [t._version for t in values[a.name]] for a in op.arguments if a.type == "Tensor[]"}
    run(op, "triton", values)
    for argument in op.arguments:
        if argument.name in ("params", "grads", "outs") and values[argument.name] is not None:
            moved = [t._version > old for t, old in zip(values[argument.name], before[argument.name], strict=True)]
            assert all(moved) if argument.mutated else not any(moved)


def test_it_is_never_preferred_on_the_cpu():
    assert flatkern.backends()["triton"]["live"]
    assert "triton" not in dispatch.PREFERENCE["cpu"]


@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "Wrap"])
def test_ire_over_fifty_steps_against_float64(base):
    """As test_mask.py has it for the other backends, masks refreshed five times."""
    assert test_mask.trained("triton", base) < 2e-4


@pytest.mark.parametrize("method", TRAINED.values(), ids=TRAINED)
def test_an_optimizer_runs_on_it(method):
    """Three steps of a small network, next to eager's."""
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        opt = flatkern.AdamW(model.parameters(), lr=0.01, perturb=method, backend=backend, max_grad_norm=1.0)

        def closure(model=model, opt=opt, x=x, y=y):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.train()
        for _ in range(3):
            opt.step(closure)
        opt.eval()
        results.append([p.detach().clone() for p in model.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", foreign_writes.PRECISIONS)
def test_a_draw_can_be_repeated(precision):
    """On some rows, too: what others wrote to perturbed weights is told from the noise so, and nothing else is."""
    run = foreign_writes.Run("rolling ARWP", precision, "triton")
    run.into_perturbed()
    for _ in range(3):
        run.opt.train()
        run.opt.eval()
    run.opt.train()
    with run.opt.clean():
        clean = run.values()
    spots = foreign_writes.write(run.params)
    run.opt.eval()
    assert same(run.values(), foreign_writes.expected(clean, spots))
