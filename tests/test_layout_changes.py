"""The model changes its memory format while the weights are perturbed: every way back finds the clean weights."""

import copy
import gc

import pytest
import torch
from compare import assert_same, same
from patterns import backends
from steps import perturb
from torch import nn
from two_buckets import values

import flatkern
from flatkern import ASAM, IRE, RWP, SAM

METHODS = {
    "RWP": RWP(sigma=0.1),
    "ARWP": RWP(sigma=0.1, eta=1.0),
    "m-RWP": RWP(sigma=0.1, lam=0.5),
    "SAM": SAM(rho=0.3),
    "ASAM": ASAM(rho=0.6),
    "rolling": RWP(sigma=0.1, rolling=True),
}


def by_module(run):
    """As users do; its parameters' data is exchanged."""
    run.net.to(memory_format=torch.channels_last)


def by_data(run):
    for p in run.net.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def there_and_back(run):
    by_module(run)
    run.net.to(memory_format=torch.contiguous_format)


class Run:
    def __init__(self, method, rule, backend, dtype=torch.float32, start=None, **own):
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2))
        for k, p in enumerate(self.net.parameters()):
            p.data = values(p.shape, k).to(dtype)
        if start is not None:
            start(self)
        self.params, self.seed = list(self.net.parameters()), 0
        own |= {"perturb": METHODS.get(method), "backend": backend}
        if rule == "Wrap":
            self.opt = flatkern.Wrap(torch.optim.SGD(self.params, lr=0.1, momentum=0.9), **own)
        elif rule == "AdamW":
            self.opt = flatkern.AdamW(self.params, lr=0.1, **own)
        else:
            self.opt = flatkern.SGD(self.params, lr=0.1, momentum=0.9, **own)

    def give(self):
        """Gradients in PyTorch's own format, whatever the parameters' is."""
        self.seed += 1
        for k, p in enumerate(self.params):
            p.grad = values(p.shape, 10 * self.seed + k).to(p.dtype)

    def perturb(self):
        """What comes before the forward at perturbed weights."""
        if self.opt.rolling:
            self.opt.train()
            return
        self.opt.zero_grad()
        perturb(self.opt, self.give)

    def step(self):
        self.perturb()
        self.give()
        self.opt.step()
        self.opt.zero_grad()

    def weights(self):
        """In one format, so that bits can be compared."""
        return [p.detach().clone(memory_format=torch.contiguous_format) for p in self.params]


def perturbed(method, rule, backend, steps=1, **own):
    run = Run(method, rule, backend, **own)
    for _ in range(steps):
        run.step()
    run.opt.eval()
    clean = run.weights()
    run.perturb()
    return run, clean


MASTERS = {"dtype": torch.bfloat16, "master_weights": True}
CASES = backends(
    [
        *((m, rule, {}) for m in METHODS for rule in ("SGD", "Wrap")),
        *((m, "AdamW", MASTERS) for m in ("RWP", "rolling")),
    ],
    lambda method, rule, own: rule == "SGD" and method in ("RWP", "SAM", "rolling"),
)
every_case = pytest.mark.parametrize(("backend", "method", "rule", "own"), CASES, indirect=["backend"], ids=str)
every_change = pytest.mark.parametrize("change", [by_module, by_data, there_and_back])


@every_change
@every_case
def test_ways_back(method, rule, own, change, backend):
    """restore() or eval(), a block that is left, an exception in it, loading."""
    for way in ("eval", "eval without a step", "load", "clean", "block", "raising block"):
        if way.endswith("block") and method == "rolling":
            continue
        run, clean = perturbed(method, rule, backend, 0 if way == "eval without a step" else 1, **own)
        noisy = run.weights()
        assert not same(noisy, clean)
        if way.endswith("block"):
            run.opt.eval()
            run.opt.release()
            leave(run, change, way == "raising block")
        else:
            change(run)
            if way == "load":
                run.opt.load_state_dict(Run(method, rule, backend, **own).opt.state_dict())
            elif way == "clean":
                with run.opt.clean():
                    assert_same(run.weights(), clean)
                assert_same(run.weights(), noisy)
                run.opt.eval()
            else:
                run.opt.eval()
        assert_same(run.weights(), clean, way)
        assert not run.opt.is_perturbed


def leave(run, change, raising):
    if isinstance(run.opt.method, SAM):
        run.give()
    try:
        with run.opt.perturbed():
            change(run)
            if raising:
                raise ZeroDivisionError
            run.give()
    except ZeroDivisionError:
        assert raising


@pytest.mark.parametrize("method", ["RWP", "SAM", "rolling"])
def test_a_collected_optimizer(method, backend):
    run, clean = perturbed(method, "SGD", backend)
    by_module(run)
    run.opt = None
    gc.collect()
    assert_same(run.weights(), clean)


@every_change
@every_case
def test_steps(method, rule, own, change, backend):
    """The update is element by element, so it is bit for bit that of a run whose format never changed."""
    run, clean = perturbed(method, rule, backend, **own)
    other, _ = perturbed(method, rule, backend, **own)
    change(run)
    for r in (run, other):
        r.give()
        r.opt.step()
        r.opt.eval()
    if method != "ARWP":  # sums over filters depend on the order in memory
        assert_same(run.weights(), other.weights())
    assert not same(run.weights(), clean)
    run.opt.zero_grad()
    run.step()
    run.opt.eval()
    assert all(p.isfinite().all() for p in run.params)


@pytest.mark.parametrize("method", ["RWP", "SAM", "rolling"])
def test_what_is_refused_meanwhile(method, backend):
    """The perturbation is still known: saving names the way back, and saves afterwards."""
    run, clean = perturbed(method, "SGD", backend)
    by_module(run)
    for call in (run.opt.state_dict, run.opt.release, lambda: copy.deepcopy(run.opt)):
        with pytest.raises(RuntimeError, match=r"restore\(\)|eval\(\)"):
            call()
    run.opt.eval()
    run.opt.release()
    run.opt.state_dict()
    assert_same(run.weights(), clean)


@pytest.mark.parametrize("method", ["RWP", "m-RWP", "SAM"])
def test_rounds(method, backend):
    """Changed in the first of two rounds; the sum that waits is in the old format."""
    runs = [perturbed(method, "SGD", backend)[0] for _ in range(2)]
    by_module(runs[0])
    for run in runs:
        run.give()
        run.opt.restore()
        run.opt.zero_grad()
        if method == "SAM":
            run.give()
        run.opt.perturb()
        for k, p in enumerate(run.params):
            p.grad.add_(values(p.shape, 7 + k))
        run.opt.step()
    # The noise of the second round is that of another memory order, but the gradients are given.
    assert_same(runs[0].weights(), runs[1].weights())


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
def test_masks(rule, backend):
    """IRE's are laid out by rows of the parameter, and follow it."""
    runs = []
    for change in (None, by_module):
        run = Run("RWP", rule, backend, enhance=IRE(1.0, 0.5))
        run.give()
        run.opt.update_mask()
        run.step()
        run.perturb()
        if change is not None:
            change(run)
        run.give()
        run.opt.step()
        runs.append(run)
    assert all(p.isfinite().all() for p in runs[1].params)
    assert_same(runs[0].weights()[1:], runs[1].weights()[1:])


@pytest.mark.parametrize("method", ["RWP", "SAM", "rolling"])
def test_the_format_stays_the_models(method, backend):
    """No way back changes it, and no parameter's memory is exchanged once more."""
    run, clean = perturbed(method, "SGD", backend)
    by_module(run)
    conv, memory = run.net[0].weight, [p.data_ptr() for p in run.params]
    run.opt.eval()
    run.step()
    run.opt.eval()
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert [p.data_ptr() for p in run.params] == memory
    assert not same(run.weights(), clean)
