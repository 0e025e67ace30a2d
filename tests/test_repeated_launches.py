"""A call whose plan is the last call's repeats its launches: with what is new, and only where that is all there is."""

import weakref

import cases
import pytest
import stand_in_driver
import torch

driver = stand_in_driver.driver  # without Triton, nothing below is imported

from flatkern.triton_kernels import cache, devices, launch, signature, update  # noqa: E402
from launching import SHORT, VARIANTS, WORDS, assert_as_a_first_call, forget, launched, make, repeats  # noqa: E402
from triton import knobs  # noqa: E402

from flatkern import dispatch, triton_kernels  # noqa: E402
from flatkern.ops import OPS  # noqa: E402


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is remembered of other tests."""
    forget(monkeypatch)


@pytest.fixture
def repeated(monkeypatch):
    """Of each call that might repeat the last one's launches, whether it did."""
    found, repeat = [], launch.LastCall.repeat

    def asked(*args):
        found.append(repeat(*args))
        return found[-1]

    monkeypatch.setattr(launch.LastCall, "repeat", asked)
    return found


REPEATABLE = [row for row in VARIANTS if "count_magnitudes_" not in str(row)]  # it does more than to launch
NEW = {  # what may be new where launches are repeated: the types of arguments
    "nothing": (),
    "the key": ("noise",),
    "device scalars": ("Tensor", "Tensor?"),
    "tensors": ("Tensor[]", "Tensor[]?"),
    "numbers": ("float[]",),
}


def renew(op, values, types, times):
    """Other values of the arguments of some types; the first list's objects stay, by which a call is found."""
    first = next(a.name for a in op.arguments if a.type == "Tensor[]")
    for a in op.arguments:
        value = values[a.name]
        if value is None or a.name == first:
            continue
        if a.name == "noise":
            if "noise" in types:
                values["noise"] = torch.tensor([2**32 - times, times, 2**31])
        elif a.type in types:
            values[a.name] = copy_of(value) if isinstance(value, torch.Tensor) else [copy_of(x, times) for x in value]


def copy_of(value, times=0):
    """Of a tensor elsewhere, or of a number."""
    if not isinstance(value, torch.Tensor):
        return value + times / 64
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


@pytest.mark.parametrize("op, words", REPEATABLE, ids=lambda x: getattr(x, "name", x))
def test_repeated_launches_have_what_is_new(op, words, driver, repeated, monkeypatch):
    """They are those of a first call, whatever is new and in whatever order, alone and together."""
    values = make(op, SHORT, words)
    launched(driver, op, values)
    for times, types in enumerate((*NEW.values(), sum(NEW.values(), ()), *reversed(NEW.values())), start=1):
        renew(op, values, types, times)
        got = launched(driver, op, values)
        assert_as_a_first_call(driver, op, values, got, monkeypatch)
    assert repeated == [True] * times


@pytest.mark.parametrize("native", [True, False])
def test_without_flatkern_c(native, driver, repeated, monkeypatch):
    """Python's way of reading tensors repeats launches, too."""
    if not native:
        monkeypatch.setattr(signature, "compiled", lambda: None)
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    for types in NEW.values():
        renew(op, values, types, 3)
        assert_as_a_first_call(driver, op, values, launched(driver, op, values), monkeypatch)
    assert repeated == [True] * len(NEW)


def test_one_tensor_in_two_roles(driver, monkeypatch):
    """A later call may have two, so that its launches are not those of the first with another tensor."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, "momentum_buffers grad_scale clip")
    launched(driver, op, values | {"clip": values["grad_scale"]})
    for _ in range(2):
        assert_as_a_first_call(driver, op, values, launched(driver, op, values), monkeypatch)


def test_what_is_made_for_one_call_is_not_repeated(driver, repeated, monkeypatch):
    """As where steps are counted on the host: what follows from them is uploaded in every call."""
    monkeypatch.setattr(update, "advance", update.advance_on_host)
    op = OPS["adamw_update_"]
    values = make(op, SHORT, "")
    before = [step.clone() for step in values["steps"]]
    uploaded, upload = [], devices.upload
    monkeypatch.setattr(update, "upload", lambda array, device: uploaded.append(array) or upload(array, device))
    for times in range(1, 4):
        launched(driver, op, values)
        assert values["steps"] == [step + times for step in before] and len(uploaded) == times
    assert repeated == []


@pytest.mark.parametrize("type_", ["Tensor[]", "float[]"])
def test_an_upload_that_fails_is_made_up_for(type_, driver, monkeypatch):
    """A table that was not uploaded is none that a later call relies on."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    renew(op, values, (type_,), 1)

    def fail(array, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(devices, "upload", fail)
        with pytest.raises(torch.OutOfMemoryError):
            launched(driver, op, values)
    assert driver.launches == []
    for _ in range(2):
        assert_as_a_first_call(driver, op, values, launched(driver, op, values), monkeypatch)


def test_nothing_is_repeated_elsewhere(driver, repeated, monkeypatch):
    """Launches are bound to the stream on which they were made, of a device that was the current one."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    monkeypatch.setattr(devices, "is_ready", lambda device, stream: False)
    launched(driver, op, values)
    assert repeated == [False]


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("stream", [0, 7])
@pytest.mark.parametrize("captured", [True, False])
def test_where_launches_go(elsewhere, stream, captured, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(devices, "is_elsewhere", lambda device: elsewhere)
    monkeypatch.setattr(devices, "current_stream", lambda device: stream)
    monkeypatch.setattr(devices, "capturing", lambda device: captured)
    assert devices.is_ready(torch.device("cuda", 0), 7) == (not elsewhere and stream == 7 and not captured)


def test_a_profiler_hears_of_every_launch(driver, repeated):
    """Repeated launches go past Triton's hooks, so that nothing is repeated where there are any."""
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    hooks, hook = knobs.runtime.launch_enter_hook, lambda metadata: None
    hooks.add(hook)
    try:
        launched(driver, op, values)
    finally:
        hooks.remove(hook)
    launched(driver, op, values)
    assert repeated == [False, True]


@pytest.mark.parametrize("spoil", [lambda v: v.pop("lr"), lambda v: v.update(rate=[1.0])], ids=["missing", "unknown"])
def test_keywords_are_those_of_the_op(spoil, driver):
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    numbers = {a.name: values[a.name] for a in op.arguments if a.keyword_only}
    spoil(numbers)
    with pytest.raises(TypeError):
        triton_kernels.sgd_update_(*[values[a.name] for a in op.arguments if not a.keyword_only], **numbers)


# Others at the same time.


@pytest.mark.parametrize("where", ["bind", "set_table"])
def test_a_call_in_the_middle_of_another_one(where, driver, monkeypatch):
    """Of another thread, or of a signal handler: each writes its own norm, and so do all that follow."""
    op, base = OPS["gradient_norm_"], make(OPS["gradient_norm_"], SHORT, "unit")
    calls = [base | {"norm": torch.tensor(-1.0), "grad_weight": [k + 1.0] * len(SHORT)} for k in range(2)]

    def written(call):
        """Where the norm goes to."""
        driver.launches = []
        cases.call(dispatch.load(op, "triton"), op, call)
        found = [dict(zip(x.signature, x.arguments, strict=True)).get("norm") for x in driver.launches]
        (norm,) = [norm for norm in found if norm is not None]
        return norm if isinstance(norm, int) else norm.data_ptr()

    ours = [call["norm"].data_ptr() for call in calls]
    for call in calls:
        written(call)
    holder = cache if where == "bind" else cache.LastCall
    original, inner = getattr(holder, where), []

    def interrupted(*args):
        monkeypatch.setattr(holder, where, original)
        outer = driver.launches
        inner.append(written(calls[1]))
        driver.launches = outer
        return original(*args)

    monkeypatch.setattr(holder, where, interrupted)
    assert written(calls[0]) == ours[0] and inner == ours[1:]
    assert [written(call) for call in (calls[1], calls[1], *calls)] == [ours[1], ours[1], *ours]


def test_nothing_of_the_caller_is_kept(driver):
    op = OPS["sgd_update_"]
    values = make(op, SHORT, WORDS)
    launched(driver, op, values)
    assert repeats(op)
    kept = weakref.ref(values["grad_scale"])
    values["grad_scale"] = values["grad_scale"].clone()
    launched(driver, op, values)
    driver.launches = None
    assert kept() is None
