"""A round that the user gives up leaves nothing behind: no flag, no square, no scale, no half of a sum."""

import pytest
import torch
from torch.nn import Parameter

import flatkern
from flatkern import RWP, SAM


def make(backend, method, *shape, **own):
    params = [Parameter(torch.ones(4, 4)) for _ in range(2)]
    return params, flatkern.SGD(params, lr=1.0, perturb=method, backend=backend, **own)


def add(params, value):
    """A backward whose gradient is `value` everywhere."""
    sum((p * value).sum() for p in params if p.requires_grad).backward()


def moved(params):
    return {round(1 - x.item(), 5) for p in params for x in p.detach().flatten()}


def test_a_scaler_that_was_given_to_a_dropped_round_is_asked_for_again(backend):
    params, opt = make(backend, RWP(0.0, lam=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(params[0].sum()).backward()
    with pytest.raises(ZeroDivisionError), opt.perturbed(scaler):
        raise ZeroDivisionError
    opt.zero_grad()
    scaler.scale(params[0].sum()).backward()
    opt.perturb()
    scaler.scale(params[0].sum()).backward()
    with pytest.raises(RuntimeError, match=r"needs perturb\(scaler=scaler\)"):
        scaler.step(opt)


def test_clearing_what_a_round_has_added_to_is_refused(backend):
    """The sum of rounds 1 and 2 is lost with round 2; the step says so, and what to do."""
    params, opt = make(backend, RWP(0.0))
    opt.perturb()
    add(params, 1.0)
    opt.restore()
    opt.perturb()
    add(params, 100.0)
    for p in params:
        p.grad = None
    add(params, 3.0)
    with pytest.raises(RuntimeError, match=r"cannot be parted again; drop the rounds by restore\(\) and release\(\)"):
        opt.step()
    opt.restore()
    with pytest.raises(RuntimeError, match="cannot be parted again"):
        opt.step()
    opt.perturb()  # a round whose sum is cleared untouched, and could be added again, does not make up for it
    for p in params:
        p.grad = None
    add(params, 3.0)
    opt.restore()
    with pytest.raises(RuntimeError, match="cannot be parted again"):
        opt.step()
    opt.release()
    opt.zero_grad()
    opt.perturb()
    add(params, 0.5)
    opt.step()
    assert moved(params) == {0.5}


@pytest.mark.parametrize("drop", ["restore", "block"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_an_ascent_that_was_not_finite_skips_no_other_step(rounds, drop, backend):
    params, opt = make(backend, SAM(1e-12))
    for _ in range(rounds):
        add(params, 0.5)
        opt.perturb()
        add(params, 0.5)
        opt.restore()
    add(params, float("nan"))
    if drop == "restore":
        opt.perturb()
        opt.restore()
    else:
        with pytest.raises(ZeroDivisionError), opt.perturbed():
            raise ZeroDivisionError
    opt.zero_grad()
    add(params, 0.5)
    opt.perturb()
    add(params, 0.5)
    opt.step()
    assert moved(params) == {0.5}


def test_squares_of_a_dropped_gradient_do_not_enter_the_history(backend):
    params, opt = make(backend, RWP(0.1, lam=0.5, eta=0.1, mix="losses"))
    opt.perturb()
    add(params, 1.0)
    opt.restore()
    opt.zero_grad()
    opt.state_dict()
    add(params, 0.5)
    opt.step()
    assert all(not opt.state[p]["history"].any() for p in params)


def test_an_old_gradient_of_a_frozen_parameter_does_not_speak_for_the_others(backend):
    (frozen, p), opt = make(backend, RWP(0.0))
    opt.perturb()
    add([frozen, p], 0.125)
    opt.step()
    frozen.requires_grad_(False)
    p.grad = None
    for _ in range(3):
        opt.perturb()
        add([p], 0.125)
        opt.step()
        p.grad = None
    assert moved([p]) == {0.5}


def test_a_step_is_refused_while_another_optimizer_holds_the_weights(backend):
    params, opt = make(backend, RWP(0.1))
    plain = flatkern.SGD(params, lr=1.0, backend=backend)
    opt.perturb()
    add(params, 1.0)
    with pytest.raises(RuntimeError, match="step: another optimizer holds these parameters perturbed"):
        plain.step()
    opt.restore()


def test_a_checkpoint_from_before_the_first_draw_forgets_the_last_one(backend):
    opts = [flatkern.SGD([Parameter(torch.ones(4, 4))], lr=0.0, perturb=RWP(s, rolling=True), backend=backend)
            for s in (0.01, 0.05)]  # fmt: skip
    saved = opts[1].state_dict()
    (p,), (q,) = (o.param_groups[0]["params"] for o in opts)
    p.grad = torch.zeros_like(p)
    opts[0].step()
    opts[0].eval()
    opts[0].load_state_dict(saved)
    for opt in opts:
        opt.train()
    assert torch.equal(p, q)
    for opt in opts:
        opt.eval()
