"""Wrap around a base whose step() raises: the weights are clean, nothing is mixed twice, step() can be called again."""

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import METHODS, Training, backends, train
from two_buckets import values
from unchanged import frozen

import flatkern
from flatkern import IRE, RWP


class Flaky(torch.optim.SGD):
    """Raises `error` in the next `failures` steps, before it has done anything."""

    failures, error = 0, MemoryError

    def step(self, closure=None):
        if self.failures:
            self.failures -= 1
            raise self.error("the base fails")
        return super().step(closure)


class HalfDone(Flaky):
    """Has updated its first parameters when it fails."""

    def step(self, closure=None):
        if not self.failures:
            return super().step(closure)
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        torch._foreach_sub_(params[:2], 1.0)
        return super().step(closure)


class Wrapped(Training):
    def __init__(self, name, backend, base=Flaky, momentum=0.9, scaled=False, **own):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000) if scaled else None
        super().__init__(None, scaler=scaler)
        self.base = base(self.net.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01)
        self.opt = flatkern.Wrap(self.base, perturb=METHODS[name].make(), backend=backend, **own)
        if "enhance" in own:
            self.backward(0)
            self.opt.update_mask()

    def step(self):
        """With the checks of a failed step around each failure."""
        params = list(self.net.parameters())
        while self.base.failures:
            clean, state = self.clean_weights(), self.state()
            grads = [(p, p.grad, frozen(p.grad)) for p in params if p.grad is not None]
            with pytest.raises(self.base.error, match="the base fails"):
                super().step()
            assert not self.opt.is_perturbed
            assert_same(self.weights(), clean)
            assert_same_state(self.state(), state)
            assert all(p.grad is grad and frozen(grad) == value for p, grad, value in grads)
            assert "found_inf" not in self.opt.__dict__
        super().step()


def ends_in_restore(run, t):
    """Rounds whose last one ends before step(); for every method."""
    for k in (0, 1):
        if isinstance(run.opt.method, flatkern.SAM) or (run.opt.method.lam is not None and k == 0):
            run.backward(2 * t + k)
        run.perturb()
        run.backward(2 * t + k)
        run.opt.restore()
    run.step()


OWN = {"": {}, "clipped": {"max_grad_norm": 0.05}, "IRE": {"enhance": IRE(1.0, 0.5)}, "scaled": {"scaled": True},
       "no momentum": {"momentum": 0.0, "enhance": IRE(1.0, 0.5)}}  # fmt: skip
EXPLICIT = [
    name for name, method in METHODS.items() if not getattr(method.make(), "rolling", False) and name != "RWP block"
]
NAMES = ("RWP rounds", "ARWP", "m-RWP", "m-RWP noisy first", "m-ARWP", "mSAM")


@pytest.mark.parametrize(
    ("backend", "name", "own"),
    backends([*((name, "") for name in EXPLICIT), *((name, own) for name in NAMES for own in OWN if own)],
             lambda name, own: not own or name == "m-ARWP"),
    indirect=["backend"],
)  # fmt: skip
def test_step_can_be_repeated(name, own, backend):
    """Bit for bit what the steps of a base that never failed give."""
    run, untroubled = (Wrapped(name, backend, **OWN[own]) for _ in range(2))
    for t, error in enumerate((None, MemoryError, KeyboardInterrupt)):
        run.base.failures, run.base.error = t, error
        for r in (run, untroubled):
            METHODS[name].user(r, t)
            r.opt.zero_grad()
    assert run.base.failures == 0
    assert_same(run.weights(), untroubled.weights())
    assert_same_state(run.state(), untroubled.state())
    assert frozen(run.opt.state_dict()) == frozen(untroubled.opt.state_dict())


@pytest.mark.parametrize("name", ["RWP", "ARWP", "m-RWP", "m-ARWP", "SAM", "ASAM"])
def test_rounds_that_were_finished(name, backend):
    """Their sum waits outside of `.grad` when the base fails, and still waits afterwards."""
    run, untroubled = (Wrapped(name, backend) for _ in range(2))
    for t in range(2):
        run.base.failures = t
        for r in (run, untroubled):
            ends_in_restore(r, t)
            r.opt.zero_grad()
    assert_same(run.weights(), untroubled.weights())
    assert_same_state(run.state(), untroubled.state())


@pytest.mark.parametrize("name", ["RWP", "ARWP", "m-RWP", "SAM", "mSAM"])
def test_step_can_be_given_up(name, backend):
    """release() and zero_grad() drop it: what follows are the steps of a run that had not begun it."""
    run, untroubled = (Wrapped(name, backend) for _ in range(2))
    train(run, METHODS[name].user, 1)
    train(untroubled, METHODS[name].user, 1)
    run.base.failures = 1
    run.step = run.opt.step
    with pytest.raises(MemoryError):
        METHODS[name].user(run, 1)
    del run.step
    run.opt.restore()
    run.opt.release()
    run.opt.zero_grad()
    assert_same(run.weights(), untroubled.weights())
    assert_same_state(run.state(), untroubled.state())
    run.opt.state_dict()
    for group in untroubled.opt.param_groups:
        if "round" in group:
            group["round"] = run.opt.param_groups[0]["round"]
    for r in (run, untroubled):
        train(r, METHODS[name].user, 2, start=3)
    assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("name", ["RWP", "m-RWP", "SAM"])
def test_inside_a_closure(name, backend):
    """The weights are clean, what the closure left is dropped, and the closure can be run again."""
    run, untroubled = (Wrapped(name, backend) for _ in range(2))
    run.base.failures = 1
    with pytest.raises(MemoryError):
        METHODS[name].closure(run, 0)
    assert not run.opt.is_perturbed
    assert_same(run.weights(), run.start)
    for r in (run, untroubled):
        for group in r.opt.param_groups:
            if "round" in group:
                group["round"] = 5
        METHODS[name].closure(r, 1)
    assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("name", ["RWP", "ARWP", "m-RWP", "SAM", "mSAM"])
def test_base_that_is_half_done(name, backend):
    """Each weight is the clean one or what the base made of it."""
    run = Wrapped(name, backend, base=HalfDone)
    train(run, METHODS[name].user, 1)
    clean = run.clean_weights()
    run.base.failures = 1
    run.step = run.opt.step
    with pytest.raises(MemoryError):
        METHODS[name].user(run, 1)
    assert not run.opt.is_perturbed
    moved = [k for k, (now, before) in enumerate(zip(run.weights(), clean, strict=True)) if not same([now], [before])]
    assert len(moved) == 2
    assert all(torch.equal(run.weights()[k], clean[k] - 1.0) for k in moved)


def test_rolling(backend):
    """Clean or known; the gradient still counts for the step that follows."""
    weights = []
    for failures in (0, 1):
        p = torch.nn.Parameter(values((4, 3), 0))
        base = Flaky([p], lr=0.1, momentum=0.9)
        opt = flatkern.Wrap(base, RWP(sigma=0.1, rolling=True), backend=backend)
        opt.train()
        for k in range(2):
            p.grad = values((4, 3), k + 1)
            opt.step()
        with opt.clean():
            clean = p.detach().clone()
        p.grad = values((4, 3), 5)
        base.failures = failures
        if failures:
            with pytest.raises(MemoryError):
                opt.step()
            opt.eval()
            assert_same([p], [clean])
            assert not opt.is_perturbed
            opt.train()
        opt.step()
        opt.eval()
        assert not same([p], [clean])
        weights.append(p.detach().clone())
    assert_same(*([w] for w in weights))
