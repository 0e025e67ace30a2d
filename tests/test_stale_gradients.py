"""Which gradient is new: when others zero what the last step used, and when parameters come and go."""

import pytest
import torch
from compare import assert_same
from patterns import METHODS, Training
from torch import nn
from two_buckets import Run, assert_same_run, values

from flatkern import IRE


def module(run):
    for p in run.params:
        if p.grad is not None:
            p.grad.requires_grad_(False)
            p.grad.zero_()


def one_call(run):
    torch._foreach_zero_([p.grad for p in run.params if p.grad is not None])


def some(run):
    run.params[1].grad.zero_()


def mixed(run):
    """One in place, the others dropped."""
    run.params[0].grad.zero_()
    for p in run.params[1:]:
        p.grad = None


def twice(run):
    one_call(run)
    one_call(run)


def nobody(run):
    """What the last step used is still there."""


ZEROED_BY = (module, one_call, some, mixed, twice, nobody)
every_rule = pytest.mark.parametrize(
    ("backend", "rule"), [("eager", "SGD"), ("cpp", "SGD"), ("cpp", "Wrap")], indirect=["backend"]
)


def used(kind, rule, backend, zeroed_by):
    """After a step whose gradients are there no more, or zeros."""
    run = Run(kind, rule, backend).run(KIND_STEPS[kind])
    zeroed_by(run)
    return run


KIND_STEPS = {"RWP": "perturb b step", "ARWP": "perturb b step", "m-RWP": "b perturb b step", "SAM": "b perturb b step",
              "ARWP losses": "perturb b restore b step"}  # fmt: skip


@pytest.mark.parametrize("zeroed_by", ZEROED_BY)
@pytest.mark.parametrize("kind", ["RWP", "ARWP"])
@every_rule
def test_zeros_are_not_new(kind, zeroed_by, rule, backend):
    """RWP perturbs, and the step is that of a run whose gradients were dropped."""
    run, other = used(kind, rule, backend, zeroed_by), used(kind, rule, backend, lambda run: run.opt.zero_grad())
    run.run("perturb")
    other.run("perturb")
    assert run.opt.is_perturbed
    run.opt.restore()
    other.opt.restore()
    for r in (run, other):
        r.opt.zero_grad()
        r.opt.release()
        r.run("perturb b step zero").train(1)
    assert_same_run(run, other)


@pytest.mark.parametrize("zeroed_by", [module, one_call, twice])
@pytest.mark.parametrize("kind", ["RWP", "ARWP", "m-RWP", "ARWP losses", "SAM"])
@every_rule
def test_loops_that_zero_in_place(kind, zeroed_by, rule, backend):
    """Every step begins with zeroed gradients, as `model.zero_grad(set_to_none=False)` leaves them."""
    run, other = Run(kind, rule, backend), Run(kind, rule, backend)
    for _ in range(3):
        zeroed_by(run) if run.params[0].grad is not None else None
        run.run(KIND_STEPS[kind])
        other.run("zero " + KIND_STEPS[kind])
    assert_same_run(run, other)


@pytest.mark.parametrize("zeroed_by", [module, one_call, some, mixed])
@every_rule
def test_zeros_are_not_the_clean_gradient(zeroed_by, rule, backend):
    """m-RWP begins with the noisy pass then, and still needs its clean gradient."""
    run, other = (used("m-RWP", rule, backend, zeroed_by) for _ in range(2))
    other.opt.zero_grad()
    run.run("perturb")
    other.run("perturb")
    for r in (run, other):
        for p in r.params:
            p.grad = None
        r.run("b")
        with r.refused(RuntimeError, r"clean.*restore\(\)"):
            r.opt.step()
        r.run("restore b step zero")
    assert_same_run(run, other)


@pytest.mark.parametrize("zeroed_by", ZEROED_BY)
@every_rule
def test_zeros_are_no_ascent(zeroed_by, rule, backend):
    run = used("SAM", rule, backend, zeroed_by)
    with run.refused(RuntimeError, "backward"):
        run.opt.perturb()
    run.run("zero").train(1)


@pytest.mark.parametrize("zeroed_by", ZEROED_BY)
@every_rule
def test_a_new_gradient_is_still_refused(zeroed_by, rule, backend):
    """RWP would lose it."""
    run = used("RWP", rule, backend, zeroed_by)
    run.backward()
    with run.refused(RuntimeError, "zero_grad"):
        run.opt.perturb()
    run.run("zero").train(1)


@every_rule
def test_a_new_gradient_of_one_parameter(rule, backend):
    """The last one; all others were zeroed by their optimizer and not touched since."""
    run = Run("RWP", rule, backend).run("perturb b step zeros")
    run.params[2].sum().backward()
    with run.refused(RuntimeError, "zero_grad"):
        run.opt.perturb()
    run.run("zeros").train(1)


@pytest.mark.parametrize("zeroed_by", [module, one_call, some, nobody])
@pytest.mark.parametrize("name", ["RWP", "m-RWP", "SAM", "ASAM", "rolling"])
def test_closures_after_zeros(name, zeroed_by, backend):
    """step(closure) meets zeros, or what the last step used: neither is a gradient that was there on entry."""
    run, other = (Training(METHODS[name].make(), backend=backend) for _ in range(2))
    for r in (run, other):
        r.params = [p for p in r.net.parameters() if p.requires_grad and p is not r.net.unused]
    for t in range(3):
        METHODS[name].closure(other, 3 * t)
        METHODS[name].closure(run, 3 * t)
        other.opt.zero_grad()
        if all(p.grad is not None for p in run.params[:2]):
            zeroed_by(run)
    for r in (run, other):
        r.opt.eval()
    assert_same(run.weights(), other.weights())


# --- the set of parameters changes ----------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("kind", ["RWP", "m-RWP", "ARWP losses", "SAM"])
@every_rule
def test_a_group_added_after_zeroing(kind, with_gradient, rule, backend):
    """zero_grad() in place noted every gradient there was; the new parameters' are none of those."""
    runs = []
    for set_to_none in (False, True):
        run = Run(kind, rule, backend).run(KIND_STEPS[kind])
        run.opt.zero_grad(set_to_none=set_to_none)
        run.params.append(nn.Parameter(values((3,), 7)))
        if with_gradient and not set_to_none:
            run.params[3].grad = torch.zeros(3)
        run.opt.add_param_group({"params": run.params[3:]})
        if with_gradient and not set_to_none:
            run.opt.zero_grad(set_to_none=False)
        run.run(KIND_STEPS[kind] + " zero").train(1)
        runs.append(run)
    assert_same_run(*runs)


@pytest.mark.parametrize("kind", ["RWP", "m-RWP", "SAM"])
def test_a_new_parameter_with_a_new_gradient(kind, backend):
    """In the added group alone: RWP refuses to lose it, the others take it for this step's."""
    run = Run(kind, backend=backend).run(KIND_STEPS[kind] + " zeros")
    late = nn.Parameter(values((3,), 7))
    run.opt.add_param_group({"params": [late]})
    late.sum().backward()
    if kind == "RWP":
        with run.refused(RuntimeError, "zero_grad"):
            run.opt.perturb()
    else:
        run.opt.perturb()
        assert run.opt.is_perturbed
        run.opt.restore()


@pytest.mark.parametrize("kind", ["RWP", "m-RWP", "SAM"])
@pytest.mark.parametrize("how", ["frozen", "unfrozen"])
def test_frozen_after_zeroing(how, kind, backend):
    """Freezing and unfreezing between steps moves no other parameter's gradient."""
    runs = []
    for set_to_none in (False, True):
        run = Run(kind, backend=backend)
        p = run.params[1]
        p.requires_grad_(how == "frozen")
        run.run(KIND_STEPS[kind])
        run.opt.zero_grad(set_to_none=set_to_none)
        p.requires_grad_(how != "frozen")
        p.grad = None
        run.run(KIND_STEPS[kind] + " zero").train(1)
        runs.append(run)
    assert_same(runs[0].weights(), runs[1].weights())


# --- masks ----------------------------------------------------------------------------------------


def mask_of(run, p):
    return run.opt.state_dict()["state"][[id(q) for q in run.params].index(id(p))]["mask"]


@pytest.mark.parametrize("why", ["frozen", "no gradient", "enhance=False"])
@every_rule
def test_a_parameter_that_an_update_left_out_has_no_mask(why, rule, backend):
    """Frozen, without a gradient, or in a group that was switched off: its old mask does not come back."""
    run = Run("plain", rule, backend, enhance=IRE(2.0, 0.5)).run("b mask b step zero")
    left_out = run.opt.param_groups[1]
    assert mask_of(run, run.params[2]).any()
    for p in run.params:
        p.requires_grad_(why != "frozen" or p is run.params[0])
    left_out["enhance"] = why != "enhance=False"
    (run.params[0] * values((3, 2), 5)).sum().backward()
    if why == "enhance=False":
        run.params[1].grad = run.params[2].grad = None
    run.opt.update_mask()
    for p in run.params:
        p.requires_grad_(True)
    left_out["enhance"] = True
    assert mask_of(run, run.params[0]).any()
    other = Run("plain", rule, backend, enhance=IRE(2.0, 0.5)).run("b mask b step zero")
    other.opt.param_groups[1]["enhance"] = False
    for r in (run, other):
        r.passes = 4
        r.run("b step")
    # Amplified by nothing: what a group without masks does.
    assert_same(run.params[1:], other.params[1:])
    assert not mask_of(run, run.params[1]).any()
    assert not mask_of(run, run.params[2]).any()


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
def test_frozen_at_the_first_update(rule, backend):
    """There is no mask yet; unfrozen, the parameter trains like the base's."""
    run, other = (Run("plain", rule, backend, enhance=IRE(2.0, 0.5)) for _ in range(2))
    other.opt.param_groups[1]["enhance"] = False
    for r in (run, other):
        for p in r.params[1:]:
            p.requires_grad_(False)
        (r.params[0] * values((3, 2), 5)).sum().backward()
        r.opt.update_mask()
        for p in r.params[1:]:
            p.requires_grad_(True)
        r.train(2)
    assert_same(run.params[1:], other.params[1:])


@pytest.mark.parametrize("name", ["RWP", "SAM"])
def test_masks_with_a_perturbation(name, backend):
    """The mask of a frozen parameter goes whatever runs around it."""
    run = Run(name, backend=backend, enhance=IRE(2.0, 0.5)).run("b mask").train(1)
    run.params[2].requires_grad_(False)
    run.run("b mask")
    run.params[2].requires_grad_(True)
    run.train(1)
    assert not mask_of(run, run.params[2]).any()
    assert mask_of(run, run.params[1]).any()
