"""The state that distributed checkpointing creates by a step with lr 0: a template, and nothing that a run can tell."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as checkpoints
from compare import assert_same_state
from networks import layers
from steps import step
from torch.distributed.checkpoint import state_dict as dcp

import flatkern

METHODS = {
    "Friendly-SAM": flatkern.FriendlySAM(0.1),
    "LookSAM": flatkern.LookSAM(0.1, k=2),
    "SAM at intervals": flatkern.SAM(0.1, interval=2),
}
KEPT = {"Friendly-SAM": "ascent_mean", "LookSAM": "orthogonal"}
BASES = {
    "SGD": lambda params, **own: flatkern.SGD(params, lr=0.1, momentum=0.9, **own),
    "AdamW": lambda params, **own: flatkern.AdamW(params, lr=0.01, **own),
    "Wrap": lambda params, **own: flatkern.Wrap(torch.optim.SGD(params, lr=0.1, momentum=0.9), **own),
}


def made(method, base):
    net = layers(5, 7, 3)
    return net, BASES[base](net.parameters(), perturb=METHODS[method])


def train(net, opt, start, steps):
    def backward(t):
        generator = torch.Generator().manual_seed(t)
        net(torch.randn(4, 5, generator=generator)).square().mean().backward()

    for t in range(start, start + steps):
        step(opt, partial(backward, t))
        opt.zero_grad()


def everything(net, opt):
    state = {f"{k} {key}": v for k, p in enumerate(net.parameters()) for key, v in opt.state[p].items()}
    return {**net.state_dict(), **state}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_keeps_is_in_the_template_and_is_loaded(method, base):
    net, opt = made(method, base)
    train(net, opt, 0, 3)  # the first step after them uses what LookSAM has kept
    weights, saved = copy.deepcopy((net.state_dict(), dcp.get_optimizer_state_dict(net, opt)))
    other, into = made(method, base)
    template = dcp.get_optimizer_state_dict(other, into)
    if method in KEPT:
        assert all(KEPT[method] in entry for entry in template["state"].values())
    assert {name: set(entry) for name, entry in template["state"].items()} == {
        name: set(entry) for name, entry in saved["state"].items()
    }
    other.load_state_dict(weights)
    dcp.set_optimizer_state_dict(other, into, saved)
    for run in ((net, opt), (other, into)):
        train(*run, 3, 3)
    assert_same_state(everything(other, into), everything(net, opt))


ROLLING = {
    "RWP": flatkern.RWP(0.05, rolling=True),
    "ARWP": flatkern.RWP(0.05, eta=0.1, rolling=True, scale="rms"),
    "Momentum-SAM": flatkern.MomentumSAM(0.3, rolling=True),
}


def made_rolling(method, base, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Linear(5, 3)
    opt = BASES[base](net.parameters(), perturb=ROLLING[method])
    opt.follow(net)
    return net, opt


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ROLLING)
def test_a_schedule_does_not_reach_what_is_drawn_already(method, base, tmp_path):
    """The perturbation in force was made with another value than the group has; torch.distributed.checkpoint loads into
    what a new optimizer's checkpoint has."""
    runs = [made_rolling(method, base, seed) for seed in range(2)]

    def step(net, opt, t):
        net(torch.full((2, 5), 1.0 + t)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        for group in opt.param_groups:
            group["rho" if method == "Momentum-SAM" else "sigma"] = 0.05 * (t + 2)

    def state(net, opt):
        return {"net": dcp.get_model_state_dict(net), "opt": dcp.get_optimizer_state_dict(net, opt)}

    for t in range(3):
        step(*runs[0], t)
    checkpoints.save(state(*runs[0]), checkpoint_id=tmp_path, no_dist=True)
    loaded = state(*runs[1])
    checkpoints.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_model_state_dict(runs[1][0], loaded["net"])
    dcp.set_optimizer_state_dict(*runs[1], loaded["opt"])
    for run in runs:
        step(*run, 3)
        run[1].eval()
    assert_same_state(everything(*runs[1]), everything(*runs[0]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ROLLING)
def test_what_was_never_drawn_is_drawn_with_the_present_value(method, base):
    (net, opt), (other, plain) = made_rolling(method, base), made_rolling(method, base)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    key = "rho" if method == "Momentum-SAM" else "sigma"
    for o in (opt, plain):
        o.param_groups[0][key] = 0.2
        o.train()
    assert all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_after_it_is_one_without_it(method, base):
    """The first step is still the first: of the interval, and of the mean, which begins with its gradient."""
    net, opt = made(method, base)
    train(net, opt, 0, 3)
    other, into = made(method, base)
    dcp.get_optimizer_state_dict(other, into)
    assert into.perturb_due and into.param_groups[0].get("perturb_count", 0) == 0
    for entry in into.state.values():
        if torch.is_tensor(entry.get("step")):
            entry["step"].zero_()  # Adam counts that step, as torch's does
    train(other, into, 0, 3)
    assert_same_state(everything(other, into), everything(net, opt))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("in_place", [False, True])
def test_zeros_that_were_loaded_are_a_mean(base, in_place):
    """A loaded mean is one, whatever is in it, also where distributed checkpoints write into the template itself."""
    net, opt = made("Friendly-SAM", base)
    template = dcp.get_optimizer_state_dict(net, opt)
    if in_place:
        for p in net.parameters():
            opt.state[p]["ascent_mean"].copy_(torch.zeros_like(p))
    else:
        dcp.set_optimizer_state_dict(net, opt, copy.deepcopy(template))
    net(torch.ones(1, 5)).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    opt.perturb()
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(opt.state[p]["ascent_mean"], 0.1 * g, rtol=1e-6, atol=0)


def test_a_step_at_lr_zero_counts_where_it_has_a_gradient():
    net = torch.nn.Linear(3, 2)
    opt = flatkern.SGD(net.parameters(), lr=0.0, perturb=flatkern.SAM(0.1, interval=2))
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert opt.param_groups[0]["perturb_count"] == 1
