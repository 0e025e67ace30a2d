"""The Triton backend in Triton's interpreter, on the CPU: what it alone has, its sums, launches, tables, captures.

Runs in a process of its own with TRITON_INTERPRET=1 (`make test-triton`), as test_backends.py does there: eager's bits,
refusals. What a compiler makes of the kernels is in test_triton_compile.py, what only a GPU can show in test_gpu.py.
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
from compare import assert_same, copies
from covering import also
from flatkern.triton_kernels import cache, devices, launch
from test_backends import FEW, make, name_of, run
from test_noise import strict_fma, strict_radii

import flatkern
from flatkern import dispatch, triton_kernels
from flatkern.ops import OPS

TRITON = [op for op in OPS.values() if "triton" in op.backends.split()]
every_op = pytest.mark.parametrize("op", TRITON, ids=name_of)
# Infinite and NaN inputs, and the lanes beyond a tensor's end, are arithmetic too; NumPy would remark on each.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


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
    assert len(uploads) == 1 and uploads[0] == (len(FEW), 11)
    values["lr"] = [2 * lr for lr in values["lr"]]
    run(op, "triton", values)
    assert len(uploads) == 2


def test_plans_do_not_accumulate():
    for size in range(cache.MOST_PLANS + 5):
        triton_kernels.restore_([torch.zeros(size + 1)], [torch.ones(size + 1)])
    assert len(launch._caches["restore_"].plans.found) == cache.MOST_PLANS


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


# How it is found.


@every_op
def test_arguments_are_those_of_the_table(op):
    parameters = inspect.signature(getattr(triton_kernels, op.name)).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters] == [(a.name, a.keyword_only) for a in op.arguments]


def test_it_is_never_preferred_on_the_cpu():
    assert flatkern.backends()["triton"]["live"]
    assert "triton" not in dispatch.PREFERENCE["cpu"]


@pytest.mark.parametrize("base", ["Wrap", *also("SGD", "Adam", "AdamW")])
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
        results.append(copies(model.parameters()))
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
    assert_same(run.values(), foreign_writes.expected(clean, spots))
