"""Tensors that no kernel can walk, in the second bucket, and what a GradScaler asks: refused before the first bucket is
served, and put right, training goes on as if nobody had tried.
"""

import pytest
import torch
from compare import assert_same, same
from patterns import backends
from two_buckets import Run, assert_same_run

from flatkern import IRE

ERRORS = (TypeError, ValueError)


def in_sgd(kind, rule, *_):
    """Rows that eager runs too: what surrounds the kernels is the same code for every rule."""
    return rule == "SGD"


# --- gradients ------------------------------------------------------------------------------------


def make_sparse(p):
    p.grad = p.grad.to_sparse()


def make_float64(p):
    p.grad.data = p.grad.double()


def make_flat(p):
    p.grad.data = p.grad.flatten()


def make_dense(p, good):
    """What it was; autograd owns a gradient's type, so a sparse one is replaced."""
    if p.grad.layout == torch.strided:
        p.grad.data = good
    else:
        p.grad = good


GRADIENTS = [  # method, rule, what came before, the first call that reads the gradient
    *(("plain", rule, "b", "step") for rule in ("SGD", "Adam", "AdamW")),
    *(("clipped", rule, "b", "step") for rule in ("SGD", "Wrap")),
    *(("RWP", rule, "perturb b", "step") for rule in ("SGD", "AdamW")),
    *(("ARWP", rule, "perturb b", "step") for rule in ("SGD", "Wrap")),
    *(("m-RWP", rule, "b perturb b", "step") for rule in ("SGD", "AdamW", "Wrap")),
    *(("m-RWP", rule, "perturb b restore b", "step") for rule in ("SGD", "Wrap")),
    *(("SAM", rule, "b", "perturb") for rule in ("SGD", "Wrap")),
    *(("SAM", rule, "b perturb b", "step") for rule in ("SGD", "AdamW")),
    *(("mSAM", rule, "b perturb b restore b", "perturb") for rule in ("SGD", "Wrap")),
    ("ASAM", "SGD", "b", "perturb"),
    *(("rolling", rule, "b", "step") for rule in ("SGD", "AdamW")),
    ("rolling ARWP", "SGD", "b", "step"),
    *(("plain", rule, "b", "mask") for rule in ("SGD", "Wrap")),
]
REST = {"mask": "mask b step", "perturb": "perturb b step", "step": "step"}


@pytest.mark.parametrize(
    ("backend", "kind", "rule", "before", "name"), backends(GRADIENTS, in_sgd), indirect=["backend"]
)
def test_gradient(kind, rule, before, name, backend):
    own = {"clipped": {"max_grad_norm": 0.5}}.get(kind, {}) | ({"enhance": IRE(1.0, 0.5)} if name == "mask" else {})
    kind = {"clipped": "plain", "mSAM": "SAM"}.get(kind, kind)
    run, untroubled = (Run(kind, rule, backend, **own).train(1).run(before) for _ in range(2))
    p = run.params[2]
    good = p.grad.clone()
    for spoil in (make_sparse, make_float64, make_flat):
        spoil(p)
        with run.refused((*ERRORS, RuntimeError), "grad"):  # torch's own, where it looks first
            run.run(name)
        make_dense(p, good.clone())
    for r in (run, untroubled):
        r.run(REST[name] + " zero").train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
@pytest.mark.parametrize("spoil", [make_sparse, make_float64, make_flat])
def test_clean_gradient(spoil, rule, backend):
    """m-RWP's, which waits between perturb() and step(): either refuses it, and restore() leads back."""
    run = Run("m-RWP", rule, backend).train(1)
    clean = run.weights()
    run.backward()
    spoil(run.params[2])
    try:
        with run.refused(ERRORS, "grad"):
            run.perturb()
    except pytest.fail.Exception:
        run.backward()
        with run.refused(ERRORS, "grad"):
            run.step()
    run.opt.restore()
    assert_same(run.weights(), clean)
    run.opt.release()
    run.run("zero").train(1)
    assert not same(run.weights(), clean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_mask_of_a_gradient_that_is_not_finite(value, backend):
    run, untroubled = (Run("plain", backend=backend, enhance=IRE(1.0, 0.5)).run("b mask b step zero b") for _ in "ab")
    good = run.params[2].grad[1, 1].item()
    run.params[2].grad[1, 1] = value
    with run.refused(RuntimeError, "finite"):
        run.run("mask")
    run.params[2].grad[1, 1] = good
    for r in (run, untroubled):
        r.run("mask b step zero").train(1)
    assert_same_run(run, untroubled)


# --- state that somebody has damaged --------------------------------------------------------------

SPOILED = {
    "shape": lambda t: t.new_zeros(t.numel() + 1),
    "dtype": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "type": lambda t: "a string",
}
STATE = [  # method, rule, what came before, the call, the key, and what else the optimizer is given
    *((kind, "SGD", before, "step", "momentum_buffer", {})
      for kind, before in (("plain", "b"), ("RWP", "perturb b"), ("m-RWP", "b perturb b"), ("SAM", "b perturb b"),
                           ("mSAM", "b perturb b restore"), ("rolling", "b"), ("rolling", "eval b"))),
    *((kind, rule, before, "step", key, {}) for key in ("step", "exp_avg", "exp_avg_sq")
      for kind, rule, before in (("plain", "Adam", "b"), ("RWP", "AdamW", "perturb b"), ("rolling", "AdamW", "b"))),
    *(("ARWP", rule, "", "perturb", "history", {}) for rule in ("SGD", "Wrap")),
    *(("ARWP", rule, "perturb b", "step", "history", {}) for rule in ("SGD", "AdamW", "Wrap")),
    *(("rolling ARWP", rule, "b", "step", "history", {}) for rule in ("SGD", "Wrap")),
    *((kind, rule, before, "step", "mask", {"enhance": IRE(1.0, 0.5)})
      for rule in ("SGD", "AdamW", "Wrap") for kind, before in (("plain", "b"), ("SAM", "b perturb b"))),
    *((kind, rule, before, name, "master", {"masters": True}) for rule in ("SGD", "AdamW")
      for kind, before, name in (("plain", "b", "step"), ("RWP", "", "perturb"), ("m-RWP", "b", "perturb"))),
    *((kind, "SGD", before, name, "momentum_buffer", {"masters": True})
      for kind, before, name in (("plain", "b", "step"), ("RWP", "perturb b", "step"), ("rolling", "b", "step"))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(
    ("backend", "kind", "rule", "before", "name", "key", "own"), backends(STATE, in_sgd), indirect=["backend"], ids=str
)
def test_state(kind, rule, before, name, key, own, backend):
    kind = {"mSAM": "SAM"}.get(kind, kind)
    runs = [Run(kind, rule, backend, **own) for _ in range(2)]
    for r in runs:
        if key == "mask":
            r.run("b mask")
        r.train(2).run(before)
    run, untroubled = runs
    state = run.opt.state[run.params[2]]
    good = state[key]
    for how, spoil in SPOILED.items():
        if (key, how) != ("step", "meta"):  # a count may be on any device
            state[key] = spoil(good)
            with run.refused(ERRORS, key):
                run.run(name)
            state[key] = good
    for r in runs:
        r.run(REST[name] + " zero").train(1)
    assert_same_run(run, untroubled)


# --- a GradScaler ---------------------------------------------------------------------------------


def scaled(kind, rule, backend, dtype=torch.float32, **own):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    run = Run(kind, rule, backend, scaler=scaler, **own)
    if dtype != torch.float32:
        for p in run.params:
            p.data = p.data.to(dtype)
    return run


def perturb_unscaled(run):
    run.opt.perturb()


def step_with_a_closure(run):
    run.scaler.step(run.opt, lambda: pytest.fail("the closure ran"))


def again(words):
    """What a user does who begins the step anew."""
    return f"restore release zero {words} zero"


SCALED = [  # method, what came before, the call, what the message names, the way out
    ("m-RWP", "b unscaled b", "step", r"perturb\(scaler=scaler\)", again("b perturb b step")),
    ("m-ARWP", "unscaled b restore b", "step", r"perturb\(scaler=scaler\)", again("b perturb b step")),
    ("ARWP losses", "unscaled b restore b", "step", r"perturb\(scaler=scaler\)", again("perturb b restore b step")),
    ("RWP", "perturb b restore", "step", r"step\(\)", "perturb b step zero"),
    ("SAM", "b perturb b restore", "step", r"step\(\)", "b perturb b step zero"),
    ("m-RWP", "perturb b restore", "perturb", "noisy", "b step zero"),
    *((kind, "b unscale", "perturb", r"unscale_", "zero update b perturb b step zero")
      for kind in ("m-RWP", "m-ARWP", "losses", "SAM", "ASAM")),
    *((kind, before, step_with_a_closure, "closure", "step zero")
      for kind, before in (("plain", "b"), ("RWP", "perturb b"), ("SAM", "b perturb b"), ("rolling", "b"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "rule"), [("eager", "SGD"), ("cpp", "AdamW"), ("cpp", "Wrap")], indirect=["backend"]
)
@pytest.mark.parametrize(("kind", "before", "call", "message", "rest"), SCALED)
def test_scaler(kind, before, call, message, rest, rule, backend):
    runs = [scaled(kind, rule, backend) for _ in range(2)]
    for r in runs:
        r.words |= {"unscaled": lambda r=r: perturb_unscaled(r), "update": r.scaler.update}
        r.train(1).run(before)
    run, untroubled = runs
    with run.refused(RuntimeError, message):
        call(run) if callable(call) else run.run(call)
    for r in runs:
        r.run(rest).train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize(("rule", "masters"), [("SGD", False), ("SGD", True), ("AdamW", True), ("Wrap", False)])
@pytest.mark.parametrize(("kind", "before"), [("m-RWP", "b"), ("m-ARWP", "b"), ("m-RWP", "")])
def test_float16_gradients_are_not_unscaled(kind, before, rule, masters, backend):
    """m-RWP's first gradient would have to be, and torch refuses: before the weights move, not after."""
    own = {"master_weights": True} if masters else {}
    runs = [scaled(kind, rule, backend, torch.float16, **own).run(before) for _ in range(2)]
    run, untroubled = runs
    with run.refused((ValueError, RuntimeError), "(?i)fp16|float16"):
        run.perturb()
    assert not run.opt.is_perturbed
    for r in runs:
        r.scaler = None
        r.run("zero").train(2)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
def test_one_float16_gradient_among_others(rule, backend):
    """In the last parameter: those before it are not unscaled either."""
    runs = [scaled("m-RWP", rule, backend) for _ in range(2)]
    for r in runs:
        r.params[2].data = r.params[2].data.half()
        r.run("b")
    run, untroubled = runs
    with run.refused((ValueError, RuntimeError), "(?i)fp16|float16"):
        run.perturb()
    for r in runs:
        r.scaler = None
        r.run("zero").train(2)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("kind", ["RWP", "SAM", "rolling", "losses"])
@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
def test_float16_where_nothing_is_unscaled(kind, rule, backend):
    """The others need no gradient unscaled before step(), and train."""
    run = scaled(kind, rule, backend, torch.float16)
    before = run.weights()
    run.train(2).run("eval")
    assert not same(run.weights(), before)
    assert all(p.isfinite().all() for p in run.params)
