"""Two optimizers on one parameter: while one holds it perturbed no other may perturb it, or restoring would bring back
noise. Every call that perturbs asks, not the constructor alone.
"""

import gc
from itertools import product

import pytest
import steps
import torch
from compare import assert_same, copies
from torch.nn import Parameter
from two_buckets import values
from unchanged import refused

import flatkern
from flatkern import RWP, SAM, SGD, AdamW, Wrap

METHODS = {
    "RWP": RWP(sigma=0.1),
    "m-RWP": RWP(sigma=0.1, lam=0.5),
    "SAM": SAM(rho=0.3),
    "rolling": RWP(sigma=0.1, rolling=True),
}
ANOTHER = "another optimizer"


def make(kind, params, rule="SGD", backend=None, stream=0):
    method = METHODS[kind]
    if isinstance(method, RWP):
        method = RWP(sigma=0.1, lam=method.lam, rolling=method.rolling, stream=stream)
    if rule == "Wrap":
        return Wrap(torch.optim.SGD(params, lr=0.1), method, backend=backend)
    return {"SGD": SGD, "AdamW": AdamW}[rule](params, lr=0.1, perturb=method, backend=backend)


def shared():
    """What both hold, and one more for each."""
    return [Parameter(values(shape, k)) for k, shape in enumerate([(3, 2), (4,), (2, 2)])]


def give(params, seed):
    for k, p in enumerate(params):
        p.grad = values(p.shape, 10 * seed + k)


def perturb(opt, params):
    """Whatever perturbs first in a step."""
    if opt.rolling:
        opt.train()
        return
    for p in params:
        p.grad = None
    steps.perturb(opt, lambda: give(params, 1))


def end(opt):
    opt.eval()
    opt.release()


PAIRS = list(product(METHODS, METHODS))


@pytest.mark.parametrize(("backend", "rule"), [("eager", "SGD"), ("cpp", "Wrap")], indirect=["backend"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_perturb_and_train_ask(first, second, rule, backend):
    """For parameters that are shared in part; when the first has restored, the second may."""
    p, q, r = shared()
    before = copies((p, q, r))
    a, b = make(first, [p, q], rule, backend), make(second, [q, r], "SGD", backend, stream=1)
    perturb(a, [p, q])
    if steps.begins_clean(b):
        give([q, r], 2)
    with refused(RuntimeError, ANOTHER, [p, q, r], b):
        b.train() if b.rolling else b.perturb()
    end(a)
    assert_same([p, q, r], before)
    perturb(b, [q, r])
    assert b.is_perturbed
    end(b)
    assert_same([p, q, r], before)


CALLS = {
    "perturbed": ("RWP", lambda b: b.perturbed().__enter__()),
    "closure": ("RWP", lambda b: b.step(lambda: pytest.fail("the closure ran"))),
    "rolling step": ("rolling", lambda b: b.step()),
    "train(True)": ("rolling", lambda b: b.train(True)),
}


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Wrap"])
@pytest.mark.parametrize("name", CALLS)
def test_other_calls_that_perturb(name, rule, backend):
    """A rolling step from clean weights ends perturbed; it asks before it updates."""
    params = shared()
    kind, call = CALLS[name]
    a, b = make("RWP", params[:2], "SGD", backend), make(kind, params[1:], rule, backend, stream=1)
    a.perturb()
    if name == "rolling step":
        give(params[1:], 3)
    with refused(RuntimeError, ANOTHER, params, b):
        call(b)
    a.restore()
    for p in params:
        p.grad = None
    perturb(b, params[1:])
    end(b)


@pytest.mark.parametrize("inside", ["construct", "perturb", "add_param_group"])
def test_a_perturbation_that_waits_counts(inside, backend):
    """Inside clean() the weights are clean, but the perturbed ones come back when the block is left."""
    params = shared()
    a, b = make("RWP", params[:2], "SGD", backend), make("RWP", params[1:], "SGD", backend, stream=1)
    late = make("RWP", [Parameter(torch.ones(2))], "SGD", backend)
    a.perturb()
    now = copies(params)
    with a.clean(), refused(RuntimeError, ANOTHER, params, b):
        if inside == "construct":
            make("RWP", params[1:], "SGD", backend)
        elif inside == "perturb":
            b.perturb()
        else:
            late.add_param_group({"params": params[:1]})
    assert_same(params, now)
    a.restore()


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
@pytest.mark.parametrize("kind", METHODS)
def test_constructors_and_groups_ask_too(kind, rule, backend):
    params = shared()
    a, b = make(kind, params[:2], rule, backend), make("RWP", params[2:], rule, backend)
    perturb(a, params[:2])
    with refused(RuntimeError, ANOTHER, params, a):
        make("RWP", params[1:], rule, backend)
    with refused(RuntimeError, ANOTHER, params, b):
        b.add_param_group({"params": params[1:2]})
    end(a)
    b.add_param_group({"params": params[1:2]})


def test_disjoint_parameters_are_nobodys_business(backend):
    params = shared()
    before = copies(params)
    a, b = make("RWP", params[:1], "SGD", backend), make("RWP", params[1:], "SGD", backend, stream=1)
    a.perturb()
    b.perturb()
    a.restore()
    b.restore()
    assert_same(params, before)


@pytest.mark.parametrize("frozen_in", ["first", "second"])
def test_parameters_that_are_not_perturbed_are_free(frozen_in, backend):
    """perturb=False excludes a group, and a frozen parameter has no noise."""
    p, q, r = shared()
    q.requires_grad_(frozen_in == "first")
    free = {"params": [q], "perturb": False}
    a = SGD([{"params": [p]}, free if frozen_in == "first" else {"params": [q]}], perturb=RWP(), backend=backend)
    b = SGD([{"params": [q]}, {"params": [r]}], perturb=RWP(stream=1), backend=backend)
    a.perturb()
    b.perturb()
    b.restore()
    a.restore()


@pytest.mark.parametrize("kind", ["RWP", "rolling"])
def test_a_collected_optimizer_holds_nothing(kind, backend):
    params = shared()
    before = copies(params)
    a, b = make(kind, params, "SGD", backend), make(kind, params, "SGD", backend, stream=1)
    perturb(a, params)
    with refused(RuntimeError, ANOTHER, params, b):
        b.train() if b.rolling else b.perturb()
    del a
    gc.collect()
    assert_same(params, before)
    perturb(b, params)
    assert b.is_perturbed
    end(b)


@pytest.mark.parametrize("kind", ["RWP", "rolling"])
def test_loading_lets_go(kind, backend):
    """load_state_dict() ends a perturbation, and what it held."""
    params = shared()
    a, b = make(kind, params, "SGD", backend), make(kind, params, "SGD", backend, stream=1)
    saved = a.state_dict()
    perturb(a, params)
    with refused(RuntimeError, ANOTHER, params, b):
        b.train() if b.rolling else b.perturb()
    a.load_state_dict(saved)
    assert not a.is_perturbed
    perturb(b, params)
    end(b)


def test_taking_turns(backend):
    """GANs and alternating trainers: each step restores before the other begins."""
    params = shared()
    a, b = (flatkern.SGD(params, lr=0.0, perturb=RWP(stream=k), backend=backend) for k in (0, 1))
    before = copies(params)
    for k in range(4):
        opt = (a, b)[k % 2]
        opt.zero_grad()
        opt.perturb()
        give(params, k)
        opt.step()
    assert_same(params, before)
