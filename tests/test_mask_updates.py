"""IRE's group values, kappa that follows the learning rate, and when update_mask() may be called."""

import math
import warnings

import pytest
import torch
from compare import assert_same
from test_mask import fill, make, masked
from unchanged import refused

import flatkern


def lengthened(opt, p, lr):
    """By how much a step of gradients of ones is longer than the base's."""
    opt.param_groups[0]["lr"] = lr
    p.data.zero_()
    p.grad = torch.ones_like(p)
    opt.step()
    return float(-p.detach()[0] / lr - 1)


def following(p, backend, **options):
    opt = flatkern.SGD([p], lr=0.5, enhance=flatkern.IRE(2.0, kappa_follows_lr=True), backend=backend, **options)
    p.grad = torch.ones_like(p)
    opt.update_mask()
    return opt


def test_kappa_follows_the_learning_rate(backend):
    """kappa min(1, lr / the largest lr so far): whole while the lr rises, never more, and the same after a resume."""
    p, q = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt, again = following(p, backend), following(q, backend)
    for lr, kappa in ((0.0625, 2.0), (0.5, 2.0), (0.125, 0.5), (0.25, 1.0), (1.0, 2.0), (0.25, 0.5)):
        assert lengthened(opt, p, lr) == kappa
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["largest_lr"] == 1.0
    assert lengthened(again, q, 0.5) == lengthened(opt, p, 0.5) == 1.0
    old = again.state_dict()
    del old["param_groups"][0]["largest_lr"]
    old["param_groups"][0]["initial_lr"] = 4.0
    again.load_state_dict(old)
    assert lengthened(again, q, 1.0) == 0.5, "a checkpoint of before compared with the initial lr"
    assert "largest_lr" not in flatkern.SGD([p], enhance=flatkern.IRE(2.0)).param_groups[0]


def test_a_skipped_step_is_not_the_largest(backend):
    p = torch.nn.Parameter(torch.zeros(4))
    opt = following(p, backend)
    lengthened(opt, p, 0.5)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    opt.param_groups[0]["lr"] = 8.0
    p.grad = torch.ones_like(p)
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert opt.param_groups[0]["largest_lr"] == 0.5
    assert lengthened(opt, p, 0.25) == 1.0


def test_fraction_and_interval_change_at_any_step(backend):
    """They are values of the groups, the same in all of them."""
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(2)]
    opt = flatkern.SGD([{"params": [p]} for p in params], lr=0.1, enhance=flatkern.IRE(1.0, 0.2, 2), backend=backend)

    def update():
        for k, p in enumerate(params):
            p.grad = torch.arange(1.0, 11) + 10 * k
        opt.update_mask()
        return int(sum(mask.sum() for mask in masked(params, opt)))

    def step():
        fill(params)
        opt.step()
        opt.zero_grad()

    assert [(g["sharp_fraction"], g["mask_interval"]) for g in opt.param_groups] == [(0.2, 2)] * 2
    assert update() == 16
    step()
    assert not opt.mask_due
    for group in opt.param_groups:
        group |= {"sharp_fraction": 0.6, "mask_interval": 1}
    assert opt.mask_due and update() == 8
    opt.param_groups[1]["mask_interval"] = 5
    with pytest.raises(
        ValueError, match="mask_due: mask_interval is 1 in group 0 and 5 in group 1, but all groups share"
    ):
        opt.mask_due  # noqa: B018
    opt.param_groups[1] |= {"mask_interval": 1, "sharp_fraction": 0.5}
    before = [m.clone() for m in masked(params, opt)]
    with pytest.raises(ValueError, match=r"update_mask: sharp_fraction is 0\.6 in group 0 and 0\.5 in group 1, but"):
        update()
    assert_same(masked(params, opt), before)
    assert all(p.grad is not None for p in params)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "2", True, None], ids=repr)
def test_an_interval_is_a_count(bad):
    with pytest.raises(ValueError, match=r"SGD: mask_interval is .*, but should be"):
        flatkern.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "mask_interval": bad}], enhance=flatkern.IRE(1.0))


def test_different_values_are_refused_at_once():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "sharp_fraction": 0.5}]
    with pytest.raises(ValueError, match=r"SGD: sharp_fraction is 0\.2 in group 0 and 0\.5 in group 1"):
        flatkern.SGD(groups, enhance=flatkern.IRE(1.0))
    opt = flatkern.SGD(params[:1], enhance=flatkern.IRE(1.0))
    with pytest.raises(ValueError, match="mask_interval is 10 in group 0 and 3 in group 1"):
        opt.add_param_group({"params": params[2:], "mask_interval": 3})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", ["SGD", "Wrap"])
def test_gradients_of_the_last_step_make_no_mask(name, backend):
    """Nobody has zeroed them, or they are zeros: refused, with nothing changed, until a backward has been."""
    params = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    enhance = flatkern.IRE(1.0, 0.5)
    if name == "Wrap":
        opt = flatkern.Wrap(torch.optim.SGD(params, lr=0.1), enhance=enhance, backend=backend)
    else:
        opt = flatkern.SGD(params, lr=0.1, enhance=enhance, backend=backend)
    fill(params)
    opt.step()
    kept = [p.grad for p in params]
    text = r"update_mask: the gradients in .grad are those of the last step, or zeros.*zero_grad\(\)"
    for how in ("kept", "ours to zeros", "others' to zeros"):
        if how == "ours to zeros":
            opt.zero_grad(set_to_none=False)
        elif how == "others' to zeros":
            opt.step()
            for p in params:
                p.grad.zero_()
        with refused(RuntimeError, text, params, opt):
            opt.update_mask()
        assert all(p.grad is g for p, g in zip(params, kept, strict=True)) and opt.mask_due
    for p in params:
        p.grad += torch.randn(p.shape)  # as autograd accumulates
    opt.update_mask()
    assert not opt.mask_due
    fill(params)
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        opt.update_mask()


def test_a_scaler_between(backend):
    """Gradients that scaler.step() has used are used ones, a skipped step's too; scaled new ones are new."""
    p = torch.nn.Parameter(torch.randn(3, 5))
    opt, scaler = flatkern.SGD([p], lr=0.1, enhance=flatkern.IRE(1.0), backend=backend), torch.amp.GradScaler("cpu")
    for bad in (1.0, math.inf):
        opt.zero_grad()
        scaler.scale(p.square().sum() * bad).backward()
        scaler.step(opt)
        scaler.update()
        with pytest.raises(RuntimeError, match="of the last step"):
            opt.update_mask(scaler)
    opt.zero_grad(set_to_none=False)
    scaler.scale(p.square().sum()).backward()
    opt.update_mask(scaler)
    assert not opt.mask_due


def test_a_mask_that_is_never_updated_is_warned_of_once(backend):
    params = [torch.nn.Parameter(torch.randn(3, 5))]

    def steps(opt, count):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(count):
                fill(params)
                opt.step()
        return [w for w in seen if "IRE" in str(w.message)]

    (said,) = steps(make(backend, params), 25)
    assert "AdamW has IRE, but its mask was not updated in the first 10 steps" in str(said.message)
    assert "if opt.mask_due: flatkern.sampled_label_loss(model(x)).backward(); opt.update_mask()" in str(said.message)
    assert said.filename == __file__
    updated, neutral = make(backend, params), flatkern.SGD(params, lr=0.1, enhance=flatkern.IRE(0.0))
    assert not steps(updated, 5)
    fill(params)
    updated.update_mask()
    assert not steps(updated, 15) and not steps(neutral, 15)
