"""Captures that fail, by Triton's kernels interpreted and by the CUDA kernels emulated.

A capture runs nothing, so that the weights are where they were; their clean copies are, too, and may be older.
"""

import contextlib

import captures
import compare
import pytest
import torch
from captures import say_that_it_is_captured
from capturing import Tape, Watch, assert_same

from flatkern.optim import buckets

backend, training = captures.backend, captures.training

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@contextlib.contextmanager
def a_capture_that_fails(monkeypatch):
    """Inside nothing runs and nobody waits, and everybody knows of the capture."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError), Tape(patch, runs=False), Watch():
        say_that_it_is_captured(patch)
        yield
        raise ZeroDivisionError


@pytest.fixture
def fails_in(monkeypatch):
    """fails_in(op): its calls end so behind their launches."""

    def fail(op):
        run = buckets.Call.run

        def failing(call):
            run(call)
            if call.op == op:
                raise ZeroDivisionError

        monkeypatch.setattr(buckets.Call, "run", failing)

    return fail


@pytest.mark.parametrize("method", ["RWP", "m-ARWP, losses"])
def test_a_capture_that_fails_between_two_calls(method, monkeypatch, training):
    """The copies are those of an earlier step: restore() finds no noise of theirs, and step() refuses."""
    run, python = (training("SGD", method, True, columns=64).train(1) for _ in range(2))
    with a_capture_that_fails(monkeypatch):
        run.opt.perturb()
    assert run.opt.is_perturbed
    run.opt.zero_grad()
    run.backward()
    with pytest.raises(RuntimeError, match="was perturbed inside a CUDA graph, and does not hold what the last replay"):
        run.opt.step()
    run.opt.zero_grad()  # restore() would keep them as those of a round
    run.opt.restore()
    assert_same(run, python)
    assert_same(run.train(1), python.train(1))


@pytest.mark.parametrize("method", ["RWP", "rolling ARWP"])
def test_a_perturb_that_fails_in_a_capture(method, monkeypatch, training, fails_in):
    """Between two launches, say, or before the first one."""
    run, python = (training("SGD", method, True, columns=64).train(1) for _ in range(2))
    run.opt.eval(), python.opt.eval()
    with a_capture_that_fails(monkeypatch):
        fails_in("perturb_gaussian_")
        run.opt.train() if run.opt.rolling else run.opt.perturb()
    monkeypatch.undo()
    assert not run.opt.is_perturbed
    assert_same(run, python)
    run.opt.train(), python.opt.train()
    assert_same(run.train(1), python.train(1))


@pytest.mark.parametrize("method", ["m-RWP", "rolling ARWP", "SAM"])
def test_a_step_that_fails_in_a_capture(method, monkeypatch, training, fails_in):
    """The perturbation from before it is there as it was, and so are the clean weights."""
    run, python = (training("SGD", method, True, schedule=False, columns=64).train(1) for _ in range(2))
    run.opt.eval(), python.opt.eval()
    run.opt.zero_grad()
    if method == "m-RWP" or "SAM" in method:
        run.backward()
    run.opt.train() if run.opt.rolling else run.opt.perturb()
    before = run.tensors()
    run.backward()
    with a_capture_that_fails(monkeypatch):
        fails_in("sgd_update_")
        run.opt.step()
    monkeypatch.undo()
    compare.assert_same(run.tensors(), before)
    assert run.opt.is_perturbed
    run.opt.eval() if run.opt.rolling else run.opt.restore()
    for a, b in zip(run.net.parameters(), python.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_perturbation_that_was_replayed(monkeypatch, training):
    """Captured, replayed, and restored outside; others have written an element, which stays."""
    run, python = (training("SGD", "RWP", True, schedule=False).train(1) for _ in range(2))
    with monkeypatch.context() as patch, Tape(patch, runs=False) as tape:
        say_that_it_is_captured(patch)
        run.opt.perturb()
    tape.replay()
    python.opt.perturb()
    assert all(map(torch.equal, run.net.parameters(), python.net.parameters()))
    for r in (run, python):
        r.net.long.detach()[0, 5] = 7.0
        r.opt.restore()
    assert run.net.long[0, 5] == 7
    assert all(map(torch.equal, run.net.parameters(), python.net.parameters()))
