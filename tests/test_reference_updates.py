"""The eager updates against torch.optim in float64, and laws that hold to the bit; as in test_reference.py."""

import math

import pytest
import torch
from compare import assert_same_values, copies
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    U,
    Values,
    assert_close,
    every_dtype,
    examples,
    law,
    noise,
    rows64,
    scalar,
    seeds,
    shapes,
    weights,
)

UPDATES = {
    "sgd_update_": dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=False),
    "adam_update_": dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01),
    "adamw_update_": dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01),
}
every_update = pytest.mark.parametrize("name", UPDATES)


def state_of(name, v, steps=3.0):
    if name == "sgd_update_":
        return dict(momentum_buffers=v.tensors(0.1))
    moments = dict(exp_avgs=v.tensors(0.1), exp_avg_sqs=[t.abs() for t in v.tensors(0.1)])
    return moments | dict(steps=[scalar(steps) for _ in v.shapes])


def copied(lists):
    return {key: copies(tensors) for key, tensors in lists.items()}


def assert_same_state(got, want):
    for key in want:
        assert_same_values(got[key], want[key])


@law(*UPDATES)
@every_update
@every_dtype
@pytest.mark.parametrize("component", [None, torch.tensor([0.8, -0.35])], ids=["plain", "component"])
def test_mixing_in_the_update_is_mixing_before_it(name, dtype, component):
    """update(g, g_clean, scale, clip) = update(mix_gradients_(...)) where the mixed gradient is float32, to the bit."""
    v = Values([(3, 5), (7,), ()], 0, dtype)
    params, state, history = v.tensors(), state_of(name, v), v.history()
    grads, clean = v.tensors(dtype=torch.float32), v.tensors()
    mixing = dict(clean_grads=clean, component=component, grad_scale=scalar(0.3), clip=scalar(0.7))
    mixing |= dict(grad_weight=0.6, clean_weight=0.4)
    inside = copies(params), copied(state), copies(history)
    v.run(name, params=inside[0], **inside[1], history=inside[2], grads=grads, **mixing, beta=0.9, **UPDATES[name])
    v.run("mix_gradients_", grads=grads, history=history, **mixing, beta=0.9)
    v.run(name, params=params, **state, grads=grads, **UPDATES[name])
    assert_same_values(inside[0], params)
    assert_same_values(inside[2], history)
    assert_same_state(inside[1], state)


@law(*UPDATES)
@every_update
@every_dtype
@pytest.mark.parametrize("kept_in", ["backups", "masters"])
def test_the_update_starts_from_the_clean_weights(name, dtype, kept_in):
    """What is in the perturbed weights, NaN here, is in nothing afterwards. Masters advance, backups have served."""
    v = Values([(3, 5), (7,), ()], 0, dtype)
    clean = v.tensors(dtype=torch.float32 if kept_in == "masters" else dtype)
    grads, state = v.tensors(), state_of(name, v)
    before, plain, plain_state = copies(clean), copies(clean), copied(state)
    v.run(name, params=plain, **plain_state, grads=grads, **UPDATES[name])
    perturbed = [torch.full_like(g, math.nan) for g in grads]
    v.run(name, params=perturbed, **state, **{kept_in: clean}, grads=grads, **UPDATES[name])
    assert_same_values(clean, plain if kept_in == "masters" else before)
    assert_same_values(perturbed, [t.to(dtype) for t in plain])
    assert_same_state(state, plain_state)


@law(*UPDATES)
@every_update
@every_dtype
def test_an_update_of_rate_zero_restores_exactly(name, dtype):
    v = Values([(3, 5), (7,), ()], 0, dtype)
    params, backups, state = v.tensors(), v.tensors(), state_of(name, v)
    backups[0][0, 0], backups[1][1] = -0.0, 2.0**-20
    clean = copies(backups)
    rule = UPDATES[name] | dict(lr=0.0, weight_decay=0.0)
    v.run(name, params=params, **state, backups=backups, grads=v.tensors(), **rule)
    assert_same_values(params, clean)
    assert_same_values(backups, clean)


@law(*UPDATES)
@every_update
@every_dtype
@pytest.mark.parametrize("kept_in", ["backups", "masters"])
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("found", [1.0, math.inf])
def test_a_skipped_update_restores_and_changes_nothing_else(name, dtype, kept_in, rolling, found):
    """In rolling mode the weights are perturbed again, from the same clean ones."""
    v = Values([(3, 5), (7,), ()], 0, dtype)
    clean = v.tensors(dtype=torch.float32 if kept_in == "masters" else dtype)
    lists = state_of(name, v) | {"history": v.history(), kept_in: clean}
    grads = [torch.full_like(t, math.inf) for t in v.tensors()]
    before, params = copied(lists), v.tensors()
    given = dict(noise=noise() if rolling else None, found_inf=scalar(found))
    v.run(name, params=params, **lists, grads=grads, **given, beta=0.9, sigma=0.1, eta=0.5, **UPDATES[name])
    assert_same_state(lists, before)
    want = [t.to(dtype, copy=True) for t in clean]
    if rolling:
        masters = clean if kept_in == "masters" else None
        given = dict(masters=masters, history=lists["history"], noise=noise())
        v.run("perturb_gaussian_", params=want, **given, sigma=0.1, eta=0.5)
    assert_same_values(params, want)


# The base rules against torch.optim in float64. A float32 step may be off by its own roundings: of every term, at most
# twelve, relative to the largest one.


def torch_steps(optimizer, clean, grads, steps, **options):
    """Weights in float64 after each of `steps` of torch's rule, with the same gradients every time, times 1, 2, ..."""
    params = [torch.nn.Parameter(w.double()) for w in clean]
    optimizer = optimizer(params, **options)
    for step in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = (step + 1) * g.double()
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


rates = st.floats(1e-4, 1.0)
decays = st.sampled_from([0.0, 1e-4, 0.1])
BETAS = [(0.9, 0.999, 1e-8), (0.0, 0.9, 1e-3), (0.5, 0.999, 1e-3)]  # and eps
MOMENTA = [(0.0, 0.0, False), (0.9, 0.0, False), (0.5, 0.3, False), (0.9, 0.0, True)]  # and dampening, nesterov


@law("sgd_update_")
@examples
@given(shapes=shapes, seed=seeds, lr=rates, weight_decay=decays, options=st.sampled_from(MOMENTA))
def test_sgd_is_torchs(shapes, seed, lr, weight_decay, options):
    """Three steps; a fresh buffer is zero and takes dampening 0, which is torch's first step."""
    v = Values(shapes, seed)
    params, grads = v.tensors(), v.tensors()
    options = dict(zip(("momentum", "dampening", "nesterov"), options, strict=True))
    options |= dict(lr=lr, weight_decay=weight_decay)
    want, state = torch_steps(torch.optim.SGD, params, grads, 3, **options)
    momentum, dampening = options["momentum"], options["dampening"]
    buffers = [torch.zeros_like(p) for p in params] if momentum else None
    for step in range(3):
        options["dampening"] = dampening if step else 0.0
        now = [g * (step + 1) for g in grads]
        v.run("sgd_update_", params=params, momentum_buffers=buffers, grads=now, **options)
    for k, (p, w) in enumerate(zip(params, want, strict=True)):
        size = 2 + w.detach().abs() + 20 * lr * grads[k].double().abs() * 3
        assert_close(p, w.detach(), 12, size)
        if momentum:
            assert_close(buffers[k], state[k]["momentum_buffer"], 12, size + 20 * grads[k].abs())


@law("adam_update_", "adamw_update_")
@pytest.mark.parametrize("name, rule", [("adam_update_", torch.optim.Adam), ("adamw_update_", torch.optim.AdamW)])
@examples
@given(shapes=shapes, seed=seeds, lr=rates, weight_decay=decays, options=st.sampled_from(BETAS))
def test_adam_is_torchs(name, rule, shapes, seed, lr, weight_decay, options):
    v = Values(shapes, seed)
    params, grads = v.tensors(), v.tensors()
    beta1, beta2, eps = options
    want, state = torch_steps(rule, params, grads, 3, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    lists = dict(exp_avgs=[torch.zeros_like(p) for p in params], exp_avg_sqs=[torch.zeros_like(p) for p in params])
    lists["steps"] = [scalar(0.0) for _ in params]
    options = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    for step in range(3):
        v.run(name, params=params, **lists, grads=[g * (step + 1) for g in grads], **options)
    for k, (p, w) in enumerate(zip(params, want, strict=True)):
        assert lists["steps"][k] == 3
        size = 1 + w.detach().abs() + 3 * lr
        # Adam divides by a root: a gradient that weight decay nearly cancels keeps few digits, so its rounding counts.
        noise_of_g = 16 * U * (grads[k].double().abs() + 2) / (state[k]["exp_avg_sq"].sqrt() + eps)
        assert ((p.double() - w.detach()).abs() <= 16 * U * size + 10 * lr * noise_of_g).all()
        for key, lists_key in (("exp_avg", "exp_avgs"), ("exp_avg_sq", "exp_avg_sqs")):
            size = 16 * (1 + grads[k].double().abs()) ** (2 if key == "exp_avg_sq" else 1)
            assert_close(lists[lists_key][k], state[k][key], 8, size)


@law(*UPDATES)
@every_update
@examples
@given(shapes=shapes, seed=seeds, scale=weights, beta=st.floats(0.0, 0.999))
def test_the_history_of_an_update(name, shapes, seed, scale, beta):
    """F = beta F + sum_f (scale g)^2 of the perturbed gradient: unmixed, not clipped, without weight decay."""
    v = Values(shapes, seed)
    history, grads = v.history(), v.tensors()
    before = copies(history)
    mixing = dict(
        clean_grads=v.tensors(), grad_scale=scalar(scale), clip=scalar(0.1), grad_weight=0.5, clean_weight=0.5
    )
    v.run(name, params=v.tensors(), **state_of(name, v), history=history, grads=grads, **mixing, beta=beta,
          **UPDATES[name])  # fmt: skip
    for f, old, g in zip(history, before, grads, strict=True):
        squares = (scale * rows64(g)) ** 2
        assert_close(f, beta * old.double().numpy() + (squares.sum(axis=1) if g.dim() > 1 else squares[0]), 8)
