"""The papers' cosine increase, and the scheduler that sets a group's value from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flatkern
from flatkern import RWP, SAM, SGD
from flatkern.schedules import PerturbationScheduler, cosine_increase

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
