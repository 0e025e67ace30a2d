"""The Triton backend's host side: which tables and arguments reach a launcher, and that nothing stale ever does.

A driver that launches nothing (bench/gpu/silent_driver.py) compiles for sm_90 and keeps what it should launch, so that
tensors are on the CPU and keep their values. What kernels compute is in test_triton.py and test_gpu.py.
"""

import pytest
import stand_in_driver
import torch
from conftest import live
from covering import also

driver = stand_in_driver.driver  # without Triton, nothing below is imported

from flatkern.triton_kernels import devices, launch, launcher, noise, perturb, signature  # noqa: E402
from flatkern.triton_kernels.plan import SEGMENT  # noqa: E402
from launching import (  # noqa: E402
    SHAPES,
    SHORT,
    VARIANTS,
    WORDS,
    assert_as_a_first_call,
    forget,
    launched,
    make,
    repeats,
    seen,
)  # fmt: skip

from flatkern.ops import OPS  # noqa: E402

WALKED = ("params", "backups", "grads", "momentum_buffers")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is remembered of other tests."""
    forget(monkeypatch)


@pytest.fixture(params=["flatkern._C", "guards", "attributes"])
def reader(request, monkeypatch):
    """How tensors are read."""
    if request.param == "flatkern._C":
        live("cpp")
        return
    monkeypatch.setattr(signature, "compiled", lambda: None)
    if request.param == "attributes":
        monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")


@pytest.fixture
def uploads(monkeypatch):
    """Shapes of the tables that are uploaded."""
    shapes, upload = [], devices.upload
    monkeypatch.setattr(devices, "upload", lambda array, *rest: shapes.append(array.shape) or upload(array, *rest))
    return shapes


# Launches.


@pytest.mark.parametrize("op, words", VARIANTS, ids=lambda x: getattr(x, "name", x))
def test_a_repeated_launch_is_what_triton_would_launch(op, words, driver):
    """The same compiled kernel with the very same arguments, in the order of its signature."""
    values = make(op, SHAPES, words)
    launched(driver, op, values)
    for name in ("noise", "grad_scale", "clip", "norm"):
        if values.get(name) is not None:
            values[name] = values[name].clone()
    if values.get("noise") is not None:
        values["noise"][2] = 1  # Triton specializes ones, unless it is told not to
    direct = launched(driver, op, values)
    (last,) = launch._caches[op.name].last_calls.values()
    assert last.bound is not None or op.name == "count_magnitudes_"  # whose function does more than to launch
    for remembered in (last.plan, *last.plan.groups):
        assert remembered.launchers or remembered is last.plan
        remembered.launchers.clear()
    last.launches = None
    by_triton = launched(driver, op, values)
    assert len(direct) == len(by_triton) > 0
    for got, want in zip(direct, by_triton, strict=True):
        assert got[:3] == want[:3]
        pairs = zip(got[3], want[3], strict=True)
        assert all(a.data_ptr() == b.data_ptr() if isinstance(b, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", ["grad_scale", "clip", "found_inf"])
def test_a_scalar_at_another_alignment_has_no_kernel_of_its_own(name, driver, reader):
    """A scalar is read by itself, so a view of a vector, at a multiple of four bytes, does not concern the compiler."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, "momentum_buffers grad_scale clip found_inf")
    aligned, other = torch.ones(()), torch.ones(5)[1]
    for scalar in (aligned, other, other, aligned):
        launches = launched(driver, op, values | {name: scalar})
        assert {x.function for x in launches} == {x.function for x in driver.launches}
        assert all(any(a is scalar for a in x.arguments) for x in launches)
    found = [{x.function for x in launched(driver, op, values | {name: s})} for s in (aligned, other)]
    assert found[0] == found[1]


def test_what_is_no_compiled_kernel_is_launched_by_triton(driver, monkeypatch):
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    want = seen(launched(driver, op, values))
    forget(monkeypatch)
    monkeypatch.setattr(launcher, "CompiledKernel", int)
    for _ in range(2):
        assert seen(launched(driver, op, values)) == want
    assert not repeats(op)


@pytest.mark.parametrize("name", ["perturb_gaussian_", *also("adamw_update_")])
def test_launches_do_not_grow_with_tensors(name, driver):
    words = "backups noise"
    counts = [len(launched(driver, OPS[name], make(OPS[name], SHAPES * n, words))) for n in (1, 40)]
    assert counts[0] == counts[1] > 0


# Tables.


WALKS = {  # op, kernel, first list, whether it goes by rows
    "any order": ("restore_", perturb.restore_kernel, "params", False),
    "by rows": ("fill_normal_", noise.fill_normal_kernel, "outs", True),
}


@pytest.mark.parametrize("name, kernel, first, by_rows", WALKS.values(), ids=WALKS)
def test_every_element_is_in_one_tile(name, kernel, first, by_rows, driver):
    """And where rows do not matter, all but the last seven are moved 16 bytes at a time."""
    lengths = [1, 7, 8, 9, 24, 4095, 4096, 4097, 4104, 8191, 8193, 20003]
    values = make(OPS[name], [(n,) for n in lengths] + [(1, n) for n in lengths] + [(3, 20003), (5, 9)], "")
    for t in values[first][::3]:
        move_by_four_bytes(t)
    times = [torch.zeros(t.shape if by_rows and t.dim() > 1 else (1, t.numel())) for t in values[first]]
    for x in launched(driver, OPS[name], values):
        given = dict(zip(kernel.arg_names, x.arguments, strict=True))
        for k, row, column, end, shape in given["tiles"].tolist():
            rows, columns = given["SHAPES"][shape] if by_rows else (1, SEGMENT)
            stop = min(end, column + columns)
            aligned = k % 3 > 0
            if given["EVEN"]:
                assert aligned and column % 8 == stop % 8 == 0
            elif aligned and not by_rows:
                assert column % 8 == 0 and (stop - column < 8 or values[first][k].numel() < SEGMENT)
            times[k][row : row + rows, column:stop] += 1
    assert all((t == 1).all() for t in times)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["perturb_gaussian_", "sgd_update_", "adamw_update_"])
def test_nothing_is_uploaded_where_nothing_changed(name, driver, reader, uploads):
    op = OPS[name]
    values = make(op, SHAPES, "backups noise momentum_buffers masks")
    launched(driver, op, values)
    uploads.clear()
    before = seen(launched(driver, op, values))
    # Lists are made anew in every step, of the same tensors; and so may numbers be.
    values = {n: list(v) if isinstance(v, list) else v for n, v in values.items()}
    values |= {n: [float(str(x)) for x in values[n]] for n in ("lr", "sigma", "eta") if n in values}
    assert seen(launched(driver, op, values)) == before
    assert uploads == []


def test_two_models_of_one_shape_do_not_evict_each_other(driver, reader, uploads):
    op = OPS["sgd_update_"]
    models = [make(op, SHORT, WORDS) for _ in range(2)]
    first = [seen(launched(driver, op, values)) for values in models]
    uploads.clear()
    assert [seen(launched(driver, op, values)) for values in models] == first
    assert uploads == []


def in_place(change, names=WALKED, at=0):
    """`change` one tensor of each list; the objects stay."""

    def apply(values):
        for name in names:
            change(values[name][at])

    return apply


def move_by_four_bytes(t):
    t.data = torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def put(name, make_value):
    def apply(values):
        values[name] = make_value(values[name])

    return apply


def set_number(name, value):
    def apply(values):
        values[name][0] = value

    return apply


CHANGES = {  # and how many tables they cost at most
    "new gradients": (put("grads", lambda grads: [g.clone() for g in grads]), 1),
    "one new gradient": (put("grads", lambda grads: [grads[0], grads[1].clone()]), 1),
    "other memory": (in_place(lambda t: setattr(t, "data", t.data.clone()), ("params",)), 1),
    "memory at another alignment": (in_place(move_by_four_bytes, ("grads",), at=1), 5),
    "fewer rows": (in_place(lambda t: t.resize_(32, 16)), 5),
    "another shape": (in_place(lambda t: t.set_(t.untyped_storage(), 0, (16, 64), (64, 1))), 5),
    "another rank": (in_place(lambda t: t.unsqueeze_(0)), 5),
    "another dtype": (in_place(lambda t: setattr(t, "data", t.data.view(torch.bfloat16))), 6),
    "other strides of a length of one": (in_place(lambda t: t.set_(t.untyped_storage(), 0, (1, 16), (99, 1))), 5),
    "one number": (set_number("lr", 0.5), 1),
    "one index": (set_number("index", 5), 5),
    "numbers": (put("weight_decay", lambda old: [2 * x for x in old]), 1),
    "an integer for a number": (put("momentum", lambda old: [1 for _ in old]), 1),
    "the round": (put("noise", lambda old: old + torch.tensor([0, 0, -1])), 0),
    "a device scalar": (put("grad_scale", lambda old: old.clone()), 0),
    "no device scalar": (put("grad_scale", lambda old: None), 5),
    "no momentum": (put("momentum_buffers", lambda old: None), 5),
    "fewer tensors": (
        lambda values: values.update({n: v[:1] for n, v in values.items() if isinstance(v, list)}), 5,
    ),
    "another order": (
        lambda values: [values[n].reverse() for n in values if isinstance(values[n], list)], 5,
    ),
}  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("change, most", CHANGES.values(), ids=CHANGES)
def test_what_changed_is_noticed(change, most, driver, reader, uploads, monkeypatch):
    """The launches are those of a first call, and what did not change is not uploaded again."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    for _ in range(2):
        launched(driver, op, values)
    before = seen(driver.launches)
    change(values)
    uploads.clear()
    got = launched(driver, op, values)
    assert len(uploads) <= most
    assert seen(got) != before
    assert_as_a_first_call(driver, op, values, got, monkeypatch)
    uploads.clear()
    assert seen(launched(driver, op, values)) == seen(got)
    assert uploads == []


def test_a_table_that_a_replay_makes_is_not_used_outside(driver, uploads, monkeypatch):
    """In a capture nothing is copied yet. What was uploaded before one serves it, and is kept for its graph."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    (last,) = launch._caches[op.name].last_calls.values()
    before = dict(last.tables)
    # On a GPU every call outside a capture provides these, pinned.
    last.plan.spare = {name: [torch.empty_like(table) for _ in range(2)] for name, table in before.items()}
    with monkeypatch.context() as patch:
        patch.setattr(devices, "capturing", lambda device: True)
        uploads.clear()
        launched(driver, op, values)
        assert last.tables == before and any(table is before["pointers"] for table in last.plan.kept)
        values["grads"] = [g.clone() for g in values["grads"]]
        for _ in range(2):
            launched(driver, op, values)
        # Each of two graphs has its own, as nobody knows which is replayed first.
        assert last.tables == before and uploads == [] and last.plan.spare["pointers"] == []
        captured = last.plan.kept[:]
    got = launched(driver, op, values)
    assert len(uploads) == 1 and not any(last.tables["pointers"] is table for table in captured)
    assert_as_a_first_call(driver, op, values, got, monkeypatch)


def test_numbers_that_are_tensors_are_read_every_time(driver, monkeypatch):
    """They can change in place, which no comparison with a copy of the list would show."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    values["lr"] = [torch.tensor(0.5) for _ in SHORT]
    launched(driver, op, values)
    values["lr"][0].fill_(0.25)
    assert_as_a_first_call(driver, op, values, launched(driver, op, values), monkeypatch)


REFUSED = {
    "fewer rows of one": in_place(lambda t: t.resize_(32, 16), ("params",)),
    "one transposed": in_place(lambda t: t.set_(t.untyped_storage(), 0, (64, 16), (1, 64)), ("grads",)),
    "gaps": in_place(lambda t: t.set_(t.untyped_storage(), 0, (64, 8), (16, 1))),
    "one of another dtype": in_place(lambda t: setattr(t, "data", t.data.view(torch.int32)), ("grads",)),
    "no memory": in_place(lambda t: t.untyped_storage().resize_(0), ("params",)),
    "one tensor too few": lambda values: values["grads"].pop(),
    "a number too few": lambda values: values["lr"].pop(),
    "a number that is NaN": set_number("lr", float("nan")),
    "a round out of range": put("noise", lambda old: old + torch.tensor([0, 0, 2**32])),
    "a scalar of another dtype": put("grad_scale", lambda old: old.double()),
    "no tensor": set_number("grads", None),
}


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED)
def test_what_became_wrong_is_refused_before_a_launch(spoil, driver, reader):
    """Though the tensors are the same objects, at the same addresses where that is possible."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    for _ in range(2):
        launched(driver, op, values)
    spoil(values)
    with pytest.raises((TypeError, ValueError), match=r"^sgd_update_: "):
        launched(driver, op, values)
    assert driver.launches == []


def test_readers_agree(driver, monkeypatch, native):
    """The table of pointers is the same, entry by entry, whoever reads the tensors."""
    op = OPS["adamw_update_"]
    values = make(op, [*SHAPES, (0,), (), (4, 0)], "masters noise masks grad_scale")
    found = []
    for compiled in (native, None):
        monkeypatch.setattr(signature, "compiled", lambda compiled=compiled: compiled)
        tensors = values["params"], None, values["noise"], values["grads"], values["steps"], None, values["grad_scale"]
        reading = signature.read(tensors)
        again = signature.read(tuple(list(x) if isinstance(x, list) else x for x in tensors), reading)
        assert all(a is b for a, b in zip(again, reading, strict=True))
        found.append(signature.table(reading[0], [0, None, 1, 2], len(values["params"])).tolist())
        assert signature.integers(reading[1]) == [values["noise"].data_ptr(), values["grad_scale"].data_ptr()]
    assert found[0] == found[1]
    given = zip(values["params"], values["grads"], values["steps"], strict=True)
    assert found[0] == [[p.data_ptr(), 0, g.data_ptr(), step.data_ptr()] for p, g, step in given]
