"""The papers' cosine increase, and the scheduler that sets a group's value from it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LinearLR, LRScheduler, SequentialLR

import flatkern
from flatkern import RWP, SAM, SGD, Wrap
from flatkern.schedules import PerturbationScheduler, cosine_increase, follow_lr

NAN, INF = math.nan, math.inf


def make(method, groups=1):
    return SGD([{"params": [torch.nn.Parameter(torch.ones(3, 2))]} for _ in range(groups)], lr=0.0, perturb=method)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(-1, 20), st.integers(1, 10**6), st.floats(0, 1))
def test_cosine_increase(start, increase, total, share):
    """sigma_t = sigma_0 (1 + increase (1 - cos(pi t / T)) / 2), from sigma_0 to sigma_0 (1 + increase)."""
    value = cosine_increase(start, increase, total)
    t = int(share * total)
    half_angle = math.sin(math.pi * t / total / 2)  # (1 - cos x) / 2 = sin(x / 2)^2
    expected = start * (1 + increase * half_angle**2)
    scale = start * (1 + abs(increase))
    assert abs(value(t) - expected) <= 8 * 2.0**-52 * scale
    assert value(0) == start
    assert abs(value(total) - start * (1 + increase)) <= 4 * 2.0**-52 * scale
    assert value(total + 1) == value(10 * total) == value(total)
    assert value(-3) == start
    assert value(t) >= 0


def test_released_recipe():
    """0.001, increase 10: a factor of 11 over training, half of the increase in the middle."""
    value = cosine_increase(0.001, 10, 1000)
    assert [round(value(t), 9) for t in (0, 250, 500, 750, 1000)] == [0.001, 0.002464466, 0.006, 0.009535534, 0.011]
    assert all(value(t) < value(t + 1) for t in range(1000))


@pytest.mark.parametrize(
    "arguments",
    [(-0.1, 1, 10), (NAN, 1, 10), (INF, 1, 10), (0.1, -1.5, 10), (0.1, NAN, 10), (0.1, INF, 10), (0.1, 1, 0),
     (0.1, 1, -5), (0.1, 1, NAN)],
)  # fmt: skip
def test_cosine_increase_errors(arguments):
    with pytest.raises(ValueError, match=r"cosine_increase: start .* but should be start >= 0, increase >= -1, total_"):
        cosine_increase(*arguments)


@pytest.mark.parametrize(("method", "key"), [(RWP(), "sigma"), (RWP(eta=1.0), "eta"), (SAM(), "rho")])
def test_it_sets_every_group(method, key):
    opt = make(method, groups=3)
    scheduler = PerturbationScheduler(opt, key, lambda t: 0.5 + t)
    for t in range(4):
        assert [g[key] for g in opt.param_groups] == [0.5 + t] * 3
        scheduler.step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    scheduler.step()
    assert [g[key] for g in opt.param_groups] == [5.5] * 4


def test_it_takes_effect(backend):
    """Each perturbation has the size of its step's sigma."""
    opt = SGD([torch.nn.Parameter(torch.ones(64, 64))], lr=0.0, perturb=RWP(), backend=backend)
    scheduler = PerturbationScheduler(opt, "sigma", cosine_increase(0.01, 3.0, 2))
    (p,) = opt.param_groups[0]["params"]
    for sigma in (0.01, 0.025, 0.04, 0.04):
        opt.perturb()
        # The norm of a row of 64 ones is 8; 4096 samples know their deviation to 1.1 %, so 5 % is 4.5 sigma.
        assert abs(float((p.detach() - 1).std()) / (8 * sigma) - 1) < 0.05
        opt.restore()
        scheduler.step()


def test_resume():
    """From its own state, beside the optimizer's or without it: the same values as without stopping."""
    schedule = cosine_increase(0.01, 3.0, 10)
    opt = make(RWP())
    scheduler = PerturbationScheduler(opt, "sigma", schedule)
    for _ in range(4):
        scheduler.step()
    saved = {"opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
    for order in (("opt", "scheduler"), ("scheduler", "opt"), ("scheduler",)):
        other = make(RWP())
        again = PerturbationScheduler(other, "sigma", schedule)
        for name in order:
            {"opt": other, "scheduler": again}[name].load_state_dict(saved[name])
        assert other.param_groups[0]["sigma"] == schedule(4)
        again.step()
        assert other.param_groups[0]["sigma"] == schedule(5)
    assert all(isinstance(value, int) for value in saved["scheduler"].values())


def test_rho_follows_the_learning_rate():
    """GSAM's rule in each group, by its own learning rate; the scheduler of the learning rate steps first."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.4}], lr=0.1, perturb=flatkern.GSAM())
    lrs = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 - 0.25 * t)
    rhos = PerturbationScheduler(opt, "rho", follow_lr(0.02, 0.06, lr_min=0.0, lr_max=0.4))
    for t in range(4):
        for group, lr in zip(opt.param_groups, (0.1, 0.4), strict=True):
            assert group["rho"] == pytest.approx(0.02 + 0.04 * (1 - 0.25 * t) * lr / 0.4, rel=1e-12)
        for p in params:
            p.grad = torch.ones(2)
        opt.step()
        lrs.step()
        rhos.step()


def test_rho_follows_the_largest_learning_rate_so_far():
    """While it warms up the value is high; afterwards it falls with it. A checkpoint continues."""
    opt = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, perturb=SAM())
    (group,) = opt.param_groups
    rhos = PerturbationScheduler(opt, "rho", follow_lr(0.02, 0.06, lr_min=0.05))
    seen = []
    for lr in (0.1, 0.2, 0.45, 0.25, 0.05, 0.01):
        group["lr"] = lr
        rhos.step()
        seen.append(group["rho"])
    assert seen == pytest.approx([0.06, 0.06, 0.06, 0.04, 0.02, 0.02], rel=1e-12)
    other = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, perturb=SAM())
    again = PerturbationScheduler(other, "rho", follow_lr(0.02, 0.06, lr_min=0.05))
    again.load_state_dict(rhos.state_dict())
    other.param_groups[0]["lr"] = 0.25
    again.step()
    assert other.param_groups[0]["rho"] == pytest.approx(0.04, rel=1e-12)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("make", [SGD, lambda params, perturb, lr: Wrap(torch.optim.SGD(params, lr=lr), perturb)])
def test_the_largest_learning_rate_outlives_a_checkpoint(make, optimizer_first):
    """Torch's load_state_dict() replaces the groups, which Wrap shares with its base."""
    runs = []
    for _ in range(2):
        opt = make([torch.nn.Parameter(torch.ones(2))], lr=0.4, perturb=SAM())
        runs.append((opt, PerturbationScheduler(opt, "rho", follow_lr(0.02, 0.06))))
    (opt, rhos), loaded = runs
    opt.param_groups[0]["lr"] = 0.2
    states = [opt.state_dict(), rhos.state_dict()]
    for part, state in list(zip(loaded, states, strict=True))[:: 1 if optimizer_first else -1]:
        part.load_state_dict(copy.deepcopy(state))
    loaded[1].step()
    assert loaded[0].param_groups[0]["rho"] == pytest.approx(0.04, rel=1e-12)
    assert loaded[1].state_dict()["largest"] == [0.4]


def test_a_learning_rate_that_cannot_move_gives_the_high_value():
    group = {"lr": 0.1}
    assert follow_lr(0.02, 0.06, lr_min=0.1, lr_max=0.1).value(group) == 0.06
    assert follow_lr(0.02, 0.06).value({"lr": 0.0}) == 0.06
    assert follow_lr(0.02, 0.06, 0.0, 0.2).value({"lr": torch.tensor(0.1)}) == pytest.approx(0.04)


@pytest.mark.parametrize("values", [(-0.1, 1), (0, float("inf")), (0, 1, -1), (0, 1, 0.5, 0.1), (0, "1"), (None, 1)])
def test_follow_lr_refuses(values):
    with pytest.raises(ValueError, match=r"follow_lr: low .* but should be numbers >= 0 with lr_max >= lr_min"):
        follow_lr(*values)


def test_errors():
    with pytest.raises(
        ValueError, match="PerturbationScheduler: group 0 has no 'sigma'; the optimizer's method does not"
    ):
        PerturbationScheduler(make(SAM()), "sigma", cosine_increase(0.01, 1, 10))
    opt = make(RWP())
    PerturbationScheduler(opt, "sigma", lambda t: -1.0)
    with pytest.raises(ValueError, match="sigma is -1"):
        opt.perturb()
    assert not opt.is_perturbed


def test_it_is_public():
    assert flatkern.schedules.PerturbationScheduler is PerturbationScheduler
    assert flatkern.schedules.cosine_increase is cosine_increase


def test_beside_a_torch_scheduler():
    """Both change the same groups, each its own key."""
    opt = make(RWP())
    sigma = PerturbationScheduler(opt, "sigma", lambda t: 0.1 * (t + 1))
    lr = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (t + 1))
    opt.param_groups[0]["params"][0].grad = torch.zeros(3, 2)
    opt.step()
    sigma.step()
    lr.step()
    assert opt.param_groups[0]["sigma"] == 0.2
    assert opt.param_groups[0]["lr"] == 0.0


# --- as torch's own schedulers ---------------------------------------------------------------------


def stepped(opt, *schedulers):
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    opt.step()
    for scheduler in schedulers:
        scheduler.step()


def sigma_of(opt):
    values = {float(group["sigma"]) for group in opt.param_groups}
    assert len(values) == 1
    return values.pop()


@pytest.mark.filterwarnings("error")
def test_it_is_torchs_class_and_no_schedule_of_lr():
    opt = make(RWP(), groups=2)
    opt.param_groups[1]["lr"] = torch.tensor(0.25)
    scheduler = PerturbationScheduler(opt, "sigma", lambda t: 0.1 * (t + 1))
    assert isinstance(scheduler, LRScheduler) and scheduler.optimizer is opt and scheduler.last_epoch == 0
    scheduler.step()  # before opt.step() too, without a word
    stepped(opt, scheduler)
    assert scheduler.get_last_lr() == [0.0, 0.25] and scheduler.get_last_lr()[1] is not opt.param_groups[1]["lr"]
    assert all("initial_lr" not in group for group in opt.param_groups)
    opt.param_groups[0]["lr"] = 0.5
    later = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (t + 1))
    assert later.base_lrs == [0.5, 0.25]
    scheduler.step(7)
    assert sigma_of(opt) == 0.1 * 8
    with pytest.raises(TypeError, match="PerturbationScheduler: optimizer is list, but should be a"):
        PerturbationScheduler([], "sigma", lambda t: 0.1)


def chain(opt, *, tail=2):
    """0, 1, 2, then 10, 11, ..."""
    parts = [PerturbationScheduler(opt, "sigma", lambda t, k=k: 10.0 * k + t) for k in range(tail)]
    return SequentialLR(opt, parts, [3 * k for k in range(1, tail)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warming", [False, True], ids=["alone", "beside LinearLR"])
def test_sequential(warming):
    """Ours alone: no lr is set back to what it was before its own schedule began, and no initial_lr is left behind."""
    opt = make(RWP(), groups=2)
    for group in opt.param_groups:
        group["lr"] = 1.0
    lr = LinearLR(opt, 0.1, total_iters=5) if warming else None
    before = [{k: g.get(k) for k in ("lr", "initial_lr")} for g in opt.param_groups]
    scheduler = chain(opt, tail=3)
    assert [{k: g.get(k) for k in ("lr", "initial_lr")} for g in opt.param_groups] == before
    assert warming or "initial_lr" not in opt.param_groups[0]
    for t in range(9):
        assert sigma_of(opt) == 10 * (t // 3) + t % 3
        assert scheduler.get_last_lr() == [g["lr"] for g in opt.param_groups] or t == 0 or warming
        stepped(opt, *([lr] if warming else []), scheduler)
        if warming:
            assert opt.param_groups[0]["lr"] == pytest.approx(min(0.1 + 0.18 * (t + 1), 1.0))


def test_sequential_that_is_refused_leaves_the_groups():
    opt = make(RWP())
    parts = [PerturbationScheduler(opt, "sigma", lambda t: 0.1) for _ in range(2)]
    with pytest.raises(ValueError, match="milestone"):
        SequentialLR(opt, parts, [1, 2])
    assert "initial_lr" not in opt.param_groups[0]


def test_sequential_with_a_schedule_of_lr():
    """sigma first, then the lr: the lr is torch's to set."""
    opt = make(RWP())
    opt.param_groups[0]["lr"] = 1.0
    parts = [PerturbationScheduler(opt, "sigma", lambda t: 1.0 + t), ConstantLR(opt, 0.5, total_iters=100)]
    scheduler, seen = SequentialLR(opt, parts, [2]), []
    for _ in range(4):
        seen.append((sigma_of(opt), opt.param_groups[0]["lr"]))
        stepped(opt, scheduler)
    assert seen == [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5), (2.0, 0.5)]


@pytest.mark.filterwarnings("error")
def test_chained():
    opt = make(RWP())
    opt.param_groups[0]["lr"] = 1.0
    parts = [PerturbationScheduler(opt, "sigma", lambda t: 1.0 + t), ExponentialLR(opt, 0.5),
             PerturbationScheduler(opt, "eta", lambda t: 3.0 - t)]  # fmt: skip
    scheduler = ChainedScheduler(parts)
    for t in range(3):
        assert [opt.param_groups[0][key] for key in ("sigma", "lr", "eta")] == [1.0 + t, 0.5**t, 3.0 - t]
        stepped(opt, scheduler)
    assert scheduler.get_last_lr() == [0.125]


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(
    "make_scheduler",
    [
        chain,
        lambda opt: ChainedScheduler([PerturbationScheduler(opt, "sigma", lambda t: 1.0 + t), ExponentialLR(opt, 0.5)]),
    ],
    ids=["sequential", "chained"],
)
def test_resume_inside_of_others(make_scheduler, steps, tmp_path):  # fmt: skip
    opt = make(RWP())
    scheduler = make_scheduler(opt)
    for _ in range(steps):
        stepped(opt, scheduler)
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")  # a lambda in it could not be saved
    other = make(RWP())
    again = make_scheduler(other)
    again.load_state_dict(torch.load(tmp_path / "scheduler.pt"))
    assert sigma_of(other) == sigma_of(opt)
    for _ in range(4):
        stepped(opt, scheduler)
        stepped(other, again)
        assert sigma_of(other) == sigma_of(opt)


def test_state_of_before():
    opt = make(RWP())
    scheduler = PerturbationScheduler(opt, "sigma", lambda t: 1.0 + t)
    scheduler.load_state_dict({"last_step": 4})
    assert sigma_of(opt) == 5.0
    scheduler.step()
    assert sigma_of(opt) == 6.0 and scheduler.last_epoch == 5
    assert PerturbationScheduler(opt, "sigma", lambda t: 1.0 + t, last_epoch=6).last_epoch == 7
    assert sigma_of(opt) == 8.0


def test_tensors_are_filled_in_place():
    """As with capturable=True, where a graph reads them; they are checked when set, since nobody does it later."""
    opt = make(RWP())
    sigma = opt.param_groups[0]["sigma"] = torch.tensor(0.5, dtype=torch.float64)
    scheduler = PerturbationScheduler(opt, "sigma", lambda t: 0.25 * (t + 1) if t < 3 else -1.0)
    scheduler.step()
    assert opt.param_groups[0]["sigma"] is sigma and float(sigma) == 0.5
    scheduler.step()
    with pytest.raises(ValueError, match="PerturbationScheduler: sigma is -1"):
        scheduler.step()
    assert float(sigma) == 0.75


@pytest.mark.parametrize("first", ["opt", "scheduler"])
def test_rolling_order(first, backend):
    """The noise of the next forward is drawn in opt.step(), by the value that is there then."""
    p = torch.nn.Parameter(torch.ones(64, 64))
    opt = SGD([p], lr=0.0, perturb=RWP(rolling=True), backend=backend)
    scheduler = PerturbationScheduler(opt, "sigma", lambda t: 0.01 * (t + 1))
    opt.train()
    for t in range(3):
        # Rows of norm 8; see test_it_takes_effect.
        steps = t if first == "scheduler" else max(t - 1, 0)
        assert abs(float((p.detach() - 1).std()) / (8 * 0.01 * (steps + 1)) - 1) < 0.05
        p.grad = torch.zeros_like(p)
        for call in (scheduler.step, opt.step) if first == "scheduler" else (opt.step, scheduler.step):
            call()
