"""Wrap shares no group key with its base, forwards its modes, and checks its own values alone."""

import copy
import pickle
import warnings

import pytest
import torch
from compare import assert_same
from patterns import METHODS, Network, Training, train
from torch import nn

import flatkern
from flatkern import IRE, RWP, SAM, Wrap
from flatkern.schedules import PerturbationScheduler

NAMES = ("sigma", "lam", "eta", "beta", "seed", "stream", "round", "rho", "ascent", "kappa", "sharp_fraction",
         "mask_interval", "mask_age", "largest_lr", "drawn")  # fmt: skip
FOREIGN = {name: f"the base's {name}" for name in NAMES}


class Greedy(torch.optim.SGD):
    """A base whose groups have every name of ours, with values that none of ours could have."""

    def __init__(self, params, in_defaults=True, **options):
        super().__init__(params, **options)
        if in_defaults:
            self.defaults |= FOREIGN
        for group in self.param_groups:
            group |= FOREIGN

    def step(self, closure=None):
        assert all(group[name] == value for group in self.param_groups for name, value in FOREIGN.items())
        return super().step(closure)


def run_of(kind, perturb, backend, enhance=None):
    """Two groups, the second not perturbed."""
    run = Training(None)
    params = list(run.net.parameters())
    groups = [{"params": params[:5]}, {"params": params[5:], "perturb": False}]
    base = kind(groups, lr=0.05, momentum=0.9, weight_decay=0.01)
    run.opt = Wrap(base, perturb, enhance=enhance, backend=backend)
    return run


KINDS = ("RWP", "ARWP", "m-ARWP", "m-ARWP losses", "rolling ARWP", "SAM", "ASAM", "mSAM")


def masked_plain(run, t):
    if run.opt.mask_due:
        run.backward(t + 1)
        run.opt.update_mask()
    run.backward(t)
    run.step()


@pytest.mark.filterwarnings("ignore:.*names are unknown")
@pytest.mark.parametrize("name", [*KINDS, "IRE"])
def test_a_base_that_has_every_name(name, backend):
    """The same weights as around torch's SGD, bit for bit, through checkpoints, copies and pickles; its keys stay."""
    method = METHODS.get(name)
    make, user = (method.make, method.user) if method else (lambda: None, masked_plain)
    enhance = None if method else IRE(2.0, 0.4, interval=2, kappa_follows_lr=True)
    runs = [run_of(kind, make(), backend, enhance) for kind in (torch.optim.SGD, Greedy)]
    plain, run = runs
    for r in runs:
        train(r, user, 3)
        r.opt.eval()
        saved = copy.deepcopy(r.opt.state_dict())
        r.net, r.opt = pickle.loads(pickle.dumps(copy.deepcopy((r.net, r.opt))))
        train(r, user, 2, start=3)
        other = run_of(type(r.opt.base), make(), backend, enhance)
        other.opt.load_state_dict(saved)
        r.resumed = other.opt
        r.opt.eval()
    assert_same(plain.weights(), run.weights())
    ours = [key for key in NAMES if key in plain.opt.param_groups[0]]
    for opts in ((plain.opt, run.opt), (plain.resumed, run.resumed)):
        for a, b in zip(*(opt.param_groups for opt in opts), strict=True):
            assert {key: b[f"perturb_{key}"] for key in ours} == {key: a[key] for key in ours}
            assert {key: b[key] for key in NAMES} == FOREIGN
    assert len(ours) > 2


def test_names_in_groups_alone_are_the_bases_and_said(backend):
    """Nobody knows whether they were meant for us, so a warning names our key."""
    p = nn.Parameter(torch.ones(3, 2))
    base = torch.optim.SGD([{"params": [p], "sigma": 0.3}], lr=0.1)
    with pytest.warns(UserWarning, match="groups have sigma, so these are the base's values; ours are perturb_sigma"):
        opt = Wrap(base, RWP(0.1), backend=backend)
    assert (opt.param_groups[0]["sigma"], opt.param_groups[0]["perturb_sigma"]) == (0.3, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Wrap(torch.optim.Adadelta([p]), SAM(), backend=backend)
        groups = [{"params": [p], "sigma": 0.3, "perturb_sigma": 0.2}]
        opt = Wrap(torch.optim.SGD(groups, lr=0.1), RWP(0.1), backend=backend)
    assert opt.param_groups[0]["perturb_sigma"] == 0.2


def moved(p, opt):
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.perturb()
    found = float((p.detach() - before).norm())
    opt.restore()
    opt.release()
    p.grad = None
    return found


def test_ours_under_the_prefix_overrides(backend):
    """Whether the base has the name or not, and whenever it is put there."""
    p = nn.Parameter(torch.randn(4, 3))
    for base in (torch.optim.SGD([p], lr=0.1), torch.optim.Adadelta([p])):
        opt = Wrap(base, SAM(0.05), backend=backend)
        assert moved(p, opt) == pytest.approx(0.05, rel=1e-4)
        opt.param_groups[0]["perturb_rho"] = 0.2
        assert moved(p, opt) == pytest.approx(0.2, rel=1e-4)
        opt.param_groups[0]["perturb_rho"] = -1.0
        with pytest.raises(ValueError, match=r"Wrap: perturb_rho is -1\.0, but should be a number >= 0"):
            moved(p, opt)


def test_the_bases_values_are_its_own():
    """Values that would be refused as ours, in the groups it has and in a new one."""
    p, q = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    base = Greedy([p], lr=0.1)
    base.param_groups[0] |= {"lr": -1.0, "momentum": float("nan"), "eps": "none"}
    opt = Wrap(base, SAM())
    opt.add_param_group({"params": [q], "weight_decay": -3.0, "rho": "2", "perturb_rho": 0.5})
    assert [g["perturb_rho"] for g in opt.param_groups] == [0.05, 0.5]
    assert [g["rho"] for g in opt.param_groups] == [FOREIGN["rho"], "2"]
    with pytest.raises(ValueError, match="perturb_rho is -1"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "perturb_rho": -1.0})
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize("rolling", [False, True])
def test_a_group_that_joins_draws_the_round_of_the_others(rolling, backend):
    run = run_of(Greedy, RWP(0.1, rolling=rolling), backend)
    user = METHODS["rolling" if rolling else "RWP"].user
    train(run, user, 2)
    run.opt.eval()
    run.opt.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))]})
    rounds = {g["perturb_round"] for g in run.opt.param_groups}
    assert len(rounds) == 1 and rounds.pop() > 0
    assert all(g["round"] == FOREIGN["round"] for g in run.opt.param_groups)
    train(run, user, 1)


def test_a_key_that_the_base_adds_later_is_no_concern():
    """Ours are where they were when the base was wrapped."""
    p = nn.Parameter(torch.randn(4, 3))
    opt = Wrap(torch.optim.Adadelta([p]), SAM(0.05))
    opt.base.param_groups[0]["beta"] = "added by the base"
    assert moved(p, opt) == pytest.approx(0.05, rel=1e-4)


def test_checkpoints_of_before():
    """When keys were shared, a saved rho was the base's; nothing of ours is taken from it."""
    p = nn.Parameter(torch.randn(4, 3))
    opt = Wrap(torch.optim.Adadelta([p]), SAM(0.05))
    saved = opt.state_dict()
    group = saved["param_groups"][0]
    for key in ("perturb_rho", "eta", "adaptive", "ascent"):
        del group[key]
    group["rho"] = 0.8
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.8 and moved(p, opt) == pytest.approx(0.05, rel=1e-4)
    plain = Wrap(torch.optim.SGD([p], lr=0.1), SAM(0.05))
    old = plain.state_dict()
    for key in ("eta", "adaptive", "ascent"):
        del old["param_groups"][0][key]
    old["param_groups"][0]["rho"] = 0.3
    plain.load_state_dict(old)
    assert moved(p, plain) == pytest.approx(0.3, rel=1e-4)


def test_a_refused_base_has_no_keys_of_ours():
    p = nn.Parameter(torch.randn(4, 3))
    base = Greedy([{"params": [p], "perturb_rho": -1.0}], lr=0.1)
    before = dict(base.param_groups[0])
    with pytest.raises(ValueError, match="perturb_rho is -1"):
        Wrap(base, SAM())
    assert base.param_groups[0] == before


def test_the_scheduler_means_ours():
    p = nn.Parameter(torch.randn(4, 3))
    opt = Wrap(torch.optim.Adadelta([p]), SAM())
    scheduler = PerturbationScheduler(opt, "rho", lambda t: 0.1 * (t + 1))
    for t in range(3):
        assert moved(p, opt) == pytest.approx(0.1 * (t + 1), rel=1e-4)
        scheduler.step()
    assert opt.param_groups[0]["rho"] == 0.9


def test_cost_knows_ours():
    run = run_of(Greedy, RWP(0.1, eta=1.0), None)
    plain = run_of(torch.optim.SGD, RWP(0.1, eta=1.0), None)
    assert flatkern.cost(run.opt) == flatkern.cost(plain.opt)


# --- modes -----------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """As schedule-free optimizers: trains at y, is evaluated at x = y + 1, and steps in train mode only."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.mode, self.calls = "eval", []

    @torch.no_grad()
    def switch(self, mode, by):
        self.calls.append(mode)
        if self.mode != mode:
            self.mode = mode
            for p in (p for group in self.param_groups for p in group["params"]):
                p.add_(by)

    def train(self):
        self.switch("train", -1.0)

    def eval(self):
        self.switch("eval", 1.0)

    def step(self, closure=None):
        if self.mode != "train":
            raise RuntimeError("not in train mode")
        return super().step(closure)


def modes(perturb, backend, base=ScheduleFree):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3))
    return p, Wrap(base([p], lr=0.5), perturb, backend=backend)


def test_rolling_modes(backend):
    """eval(): restore, then x; train(): y, then the noise of this round; a rolling step in eval mode goes to train."""
    p, opt = modes(RWP(0.1, rolling=True), backend)
    x = p.detach().clone()
    opt.train()
    noisy = p.detach().clone()
    expected = [x - 1.0]
    flatkern.perturb_(expected, 0.1, seed=0, round=0, backend=backend)
    assert torch.equal(noisy, expected[0])
    opt.train()
    with opt.clean():
        assert torch.equal(p, x - 1.0)
        opt.train()
        assert torch.equal(p, x - 1.0) and opt.base.calls == ["train"]
    opt.eval()
    assert torch.equal(p, x - 1.0 + 1.0)
    for _ in range(2):  # what a trainer does that calls nothing but step(), between evaluations
        opt.eval()
        y = p.detach() - 1.0
        p.grad = torch.ones_like(p)
        opt.step()
        expected = [y - 0.5]
        flatkern.perturb_(expected, 0.1, seed=0, round=opt.param_groups[0]["round"], backend=backend)
        assert torch.equal(p, expected[0]) and opt.base.mode == "train"


def test_a_refused_train_has_not_switched_the_base(backend):
    p, opt = modes(RWP(0.1, rolling=True), backend)
    x = p.detach().clone()
    opt.param_groups[0]["sigma"] = -1.0
    with pytest.raises(ValueError, match="sigma is -1"):
        opt.train()
    assert torch.equal(p, x) and opt.base.calls == []


def test_explicit_modes(backend):
    p, opt = modes(SAM(0.1), backend)
    opt.train()
    y = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.perturb()
    opt.train()  # between the two passes nothing moves
    opt.train(False)
    assert torch.equal(p, y + 1.0) and opt.base.mode == "eval"
    with pytest.raises(RuntimeError, match="not in train mode"):
        p.grad = torch.ones_like(p)
        opt.perturb()
        p.grad = torch.ones_like(p)
        opt.step()
    assert not opt.is_perturbed


def test_a_followed_model_switches_the_base(backend):
    torch.manual_seed(0)
    net = Network()
    opt = Wrap(ScheduleFree(net.parameters(), lr=0.1), RWP(0.1, rolling=True), backend=backend)
    opt.follow(net)
    for t in range(2):
        net.train()
        net(t).backward()
        assert opt.base.mode == "train"
        opt.step()
        opt.zero_grad()
        net.eval()
        net(t)
        assert opt.base.mode == "eval" and not opt.is_perturbed


def test_bases_without_modes(backend):
    _, opt = modes(RWP(0.1, rolling=True), backend, torch.optim.SGD)
    opt.train()
    assert opt.is_perturbed
    opt.eval()
    assert not opt.is_perturbed
