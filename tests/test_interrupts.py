"""An exception that a signal's handler raises finds every tensor that is written with a new version."""

import time

import cases
import pytest
import torch
from conftest import live
from interrupting import interrupt

from flatkern.dispatch import resolve
from flatkern.ops import OPS

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def seen_by_autograd(op):
    """What a call with `arguments` writes that autograd may have saved: with outs, the gradients stay as they are."""
    names = [name for name in ("outs", "params", "grads") if name in op.writes]
    return names[:1]


def arguments(op):
    words = " ".join(cases.VARIANTS[op.name]).replace("skip", "").replace("specials", "")
    return getattr(cases, op.name)(cases.SHAPES["mixed ranks"], torch.float32, variant=words)


def versions(values):
    """Of every tensor of every argument."""
    lists = {name: v if isinstance(v, (list, tuple)) else [v] for name, v in values.items()}
    return {name: [t._version for t in v if isinstance(t, torch.Tensor)] for name, v in lists.items()}


# The compiled backend. Python runs no handler before a call has returned, and then runs it at once.

LONG = {  # what is written, its value before, the other arguments; some ten milliseconds each
    "fill_normal_": (0.0, lambda t: ([t], torch.tensor([1, 2, 3])), dict(index=[0], offset=[0])),
    "restore_": (0.0, lambda t: ([t], [torch.ones_like(t)]), {}),
    "mix_gradients_": (
        1.0,
        lambda t: ([t], None, None, None, None, None, None, None),
        dict(grad_weight=[0.5], clean_weight=[0.0], beta=[0.0]),
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_written_tensor_has_a_new_version_when_the_exception_arrives(name):
    value, make, numbers = LONG[name]
    op, t = resolve(name, "cpu", live("cpp")), torch.empty(20_000_000)
    args = make(t)

    def call():
        op(*args, **numbers)

    call()
    start = time.perf_counter()
    call()
    half = (time.perf_counter() - start) / 2
    for _ in range(50):
        t.fill_(value)
        version = t._version
        was_interrupted = interrupt(call, half)
        is_written = t[-1].item() != value
        assert t._version - version == is_written
        if was_interrupted and is_written:
            return
    pytest.fail("no alarm of 50 went off during the call")


@pytest.mark.parametrize("type_", [list, tuple])
@every_op
def test_a_call_moves_each_version_by_one(op, type_):
    run = resolve(op.name, "cpu", live("cpp"))
    values = {name: type_(v) if isinstance(v, list) else v for name, v in arguments(op).items()}
    before = versions(values)
    cases.call(run, op, values)
    moved = {name: [v + (name in seen_by_autograd(op)) for v in before[name]] for name in before}
    assert versions(values) == moved


@every_op
def test_arguments_by_name_move_versions_too(op, native):
    values = arguments(op)
    before = versions(values)
    getattr(native, op.name)(**values)
    for name in seen_by_autograd(op):
        assert versions(values)[name] == [v + 1 for v in before[name]]


@pytest.mark.parametrize("op", [op for op in OPS.values() if seen_by_autograd(op)], ids=lambda op: op.name)
def test_a_refused_call_moves_no_version(op, native):
    values = arguments(op)
    last = [name for name, v in values.items() if isinstance(v, list)][-1]
    values[last] = values[last][:-1]
    before = versions(values)
    for function in (getattr(native, op.name), resolve(op.name, "cpu", "cpp")):
        with pytest.raises(ValueError, match=last):
            cases.call(function, op, values)
    assert versions(values) == before


def test_inference_tensors_are_written():
    """They have no version; whether that is an error is torch's to say."""
    run = resolve("fill_normal_", "cpu", live("cpp"))
    with torch.inference_mode():
        outs = [torch.zeros(100)]

    def outcome(call):
        try:
            call()
        except RuntimeError as error:
            return str(error)

    of_torch = outcome(lambda: torch._C._increment_version(outs))
    assert outcome(lambda: run(outs, torch.tensor([1, 2, 3]), index=[0], offset=[0])) == of_torch
    assert outs[0].all()
