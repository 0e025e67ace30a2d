"""Ctrl-C and alarms in the middle of a call: the weights are clean, or is_perturbed is True and the way back is exact.

The handler of an alarm raises at several moments of a call on a million weights. test_interrupted_calls.py does the
same line by line, without a clock.
"""

import signal
import threading
import time

import pytest
import torch
from compare import copies, same
from interrupting import interrupt
from torch.nn import Parameter

import flatkern
from flatkern import RWP, SAM

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here"),
    pytest.mark.skipif(
        threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread"
    ),
]
SIZES = {"cpp": (600, 1000), "eager": (20, 1000)}  # of each parameter; a call takes some milliseconds
MOMENTS = (0.05, 0.3, 0.5, 0.7, 0.95)  # of the time that the call takes undisturbed


class Run:
    """Two parameters, and gradients that depend on nothing."""

    def __init__(self, method, rule, backend):
        generator = torch.Generator().manual_seed(0)
        self.params = [Parameter(torch.randn(SIZES[backend], generator=generator)) for _ in range(2)]
        self.grads = [p.detach().sin() for p in self.params]
        own = {"perturb": method, "backend": backend}
        if rule == "Wrap":
            self.opt = flatkern.Wrap(torch.optim.SGD(self.params, lr=0.1), **own)
        else:
            self.opt = flatkern.SGD(self.params, lr=0.1, momentum=0.9, **own)

    def b(self):
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()

    def run(self, words):
        for word in words.split():
            self.b() if word == "b" else getattr(self.opt, word)()

    def weights(self):
        return copies(self.params)

    def closure(self):
        def call():
            self.opt.zero_grad()
            self.b()

        self.opt.step(call)

    def perturbed(self):
        with self.opt.perturbed():
            self.b()


METHODS = {
    "plain": None,
    "RWP": RWP(sigma=0.1),
    "m-RWP": RWP(sigma=0.1, lam=0.5),
    "SAM": SAM(rho=10.0),
    "rolling": RWP(sigma=0.1, rolling=True),
}
CALLS = [  # method, rule, what came before, the call, how the run is brought back for the next interruption
    ("RWP", "SGD", "", "perturb"),
    ("m-RWP", "SGD", "b", "perturb"),
    ("SAM", "SGD", "b", "perturb"),
    ("RWP", "SGD", "perturb", "restore"),
    ("RWP", "SGD", "", "perturbed"),
    ("SAM", "Wrap", "b", "perturbed"),
    ("RWP", "SGD", "", "closure"),
    ("m-RWP", "SGD", "", "closure"),
    ("SAM", "SGD", "", "closure"),
    ("rolling", "SGD", "eval", "train"),
    ("rolling", "SGD", "train", "eval"),
    ("plain", "SGD", "b", "step"),
    ("RWP", "SGD", "perturb b", "step"),
    ("m-RWP", "SGD", "b perturb b", "step"),
    ("SAM", "Wrap", "b perturb b", "step"),
    ("rolling", "SGD", "train b", "step"),
    ("rolling", "Wrap", "train b", "step"),
]


def prepared(run, before):
    """Clean weights, nothing pending, then what comes before the call; returns the clean weights."""
    run.opt.eval()
    run.opt.release()
    run.opt.zero_grad()
    clean = run.weights()
    run.run(before)
    return clean


@pytest.mark.parametrize(("kind", "rule", "before", "name"), CALLS)
def test_interrupted(kind, rule, before, name, backend):
    run = Run(METHODS[kind], rule, backend)
    call = getattr(run, name, None) or getattr(run.opt, name)
    updates = name in ("step", "closure")
    for _ in range(2):  # the first call allocates, the second is timed
        clean = prepared(run, before)
        start = time.perf_counter()
        call()
        duration = time.perf_counter() - start
    run.opt.eval()
    step = [new - old for new, old in zip(run.weights(), clean, strict=True)]
    for moment in MOMENTS:
        clean = prepared(run, before)
        interrupt(call, moment * duration)
        if not run.opt.is_perturbed:
            assert_clean(run, clean, step if updates else None)
        else:
            with pytest.raises(RuntimeError):
                run.opt.state_dict()
        run.opt.eval()
        assert not run.opt.is_perturbed
        assert_clean(run, clean, step if updates else None)
    run.opt.release()
    run.opt.zero_grad()
    run.run({"plain": "b", "RWP": "perturb b", "rolling": "train b"}.get(kind, "b perturb b") + " step eval")
    assert not any(same([a], [b]) for a, b in zip(run.weights(), clean, strict=True))


def assert_clean(run, clean, step):
    """Bit for bit what they were, or, if the call updates them, one step further: with momentum about as far as the
    last step, and in any case much nearer than the perturbed weights.
    """
    for k, (now, before) in enumerate(zip(run.weights(), clean, strict=True)):
        if not same([now], [before]):
            assert step is not None, "the weights are perturbed"
            assert (now - before).norm() < 3 * step[k].norm()
            assert (now - before).sign().eq((step[k]).sign()).float().mean() > 0.99, "noise is left in the weights"


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_an_alarm_interrupts_in_the_middle(backend):
    """The tests above would show nothing if the alarms came too late."""
    run = Run(METHODS["RWP"], "SGD", backend)
    hits = []
    for _ in range(5):
        prepared(run, "")
        hits.append(interrupt(run.opt.perturb, 1e-4))
        run.opt.eval()
    assert sum(hits) >= 3
