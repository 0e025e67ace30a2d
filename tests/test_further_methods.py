"""What mixed SAM, intervals, GSAM, Friendly-SAM, LookSAM, Momentum-SAM and scales of noise promise, to the bit.

Their equations are compared with float64 in test_paper.py; cycles, closures, scalers, proxies and failures are those of
every method in `patterns.METHODS`.
"""

import copy
from functools import partial

import pytest
import torch
from compare import assert_same, assert_same_state, copies, same
from patterns import METHODS, Training, noise, train, trained
from steps import plain

import flatkern
from flatkern import GSAM, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM

bases = pytest.mark.parametrize("base", ["SGD", "AdamW", "Wrap"])


# --- values at which a method is another one ------------------------------------------------------


@bases
@pytest.mark.parametrize(
    "method", [SAM(0.3, lam=1.0), GSAM(0.3, alpha=0.0), SAM(0.3, interval=1), FriendlySAM(0.3, sigma=0.0)], ids=str
)
def test_it_is_sam(method, base, backend):
    assert_same(trained(method, backend, base=base).weights(), trained(SAM(0.3), backend, base=base).weights())


@pytest.mark.parametrize("rounds", ["mSAM", "GSAM rounds"])
def test_rounds_of_sam_too(rounds, backend):
    run, other = (trained(m, backend, user=rounds) for m in (GSAM(0.3, alpha=0.0), SAM(0.3)))
    assert_same(run.weights(), other.weights())


@bases
@pytest.mark.parametrize("rho", [0.0, 1e-20])
@pytest.mark.parametrize("method", [GSAM, LookSAM])
def test_what_rounding_would_be_all_of_is_left_out(method, rho, base, backend):
    """Without an ascent both gradients are one: GSAM's step is g_p's, LookSAM's between are a's, which is the base."""
    user = "LookSAM" if method is LookSAM else "SAM"
    make = method(rho) if method is GSAM else method(rho, k=2)
    assert_same(
        trained(make, backend, user, base=base).weights(), trained(None, backend, "rolling", base=base).weights()
    )


def parallel(method, backend, scale):
    """A step whose perturbed gradient is `scale` times the clean one but for a part of relative size 1e-7."""
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 64))
    opt = flatkern.SGD([p], lr=1.0, perturb=method, backend=backend)
    a = torch.linspace(1.0, 2.0, 64)
    p.grad = a.clone()
    opt.perturb()
    g = scale * a
    g[0] += 1e-7 * float(g.norm())
    p.grad = g.clone()
    before = torch.linspace(-1.0, 1.0, 64)
    opt.step()
    return p.detach(), before, a, g, opt


def test_gsam_leaves_a_millionth_out(backend):
    p, before, _, g, _ = parallel(GSAM(0.05, alpha=5.0), backend, 3.0)
    assert_same([p], [before - g])


def test_looksam_keeps_no_millionth(backend):
    _, before, a, g, opt = parallel(LookSAM(0.05, k=2), backend, 3.0)
    (parameter,) = opt.param_groups[0]["params"]
    assert not opt.state[parameter]["orthogonal"].any()
    parameter.grad = a.clone()
    opt.step()
    assert_same([parameter.detach()], [(before - g) - a])


def test_what_is_kept_is_orthogonal_and_of_one_length(backend):
    p = torch.nn.Parameter(torch.randn(40, 7, generator=torch.Generator().manual_seed(0)))
    opt = flatkern.SGD([p], lr=0.0, perturb=LookSAM(0.05), backend=backend)
    a, g = (torch.randn(40, 7, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    p.grad = a.clone()
    opt.perturb()
    p.grad = g.clone()
    opt.step()
    kept = opt.state[p]["orthogonal"].double()
    # Elements are rounded to float32, by at most 2^-24 of the largest term each.
    assert abs(float(kept.norm()) / 1024 - 1) < 1e-6
    assert abs(float((kept * a.double()).sum() / (kept.norm() * a.double().norm()))) < 1e-6


def test_what_is_kept_is_of_the_last_ascent_alone(backend):
    """A parameter that an ascent does not reach keeps nothing of an earlier one."""
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    opt = flatkern.SGD([p, q], lr=0.1, perturb=LookSAM(0.05, k=1), backend=backend)
    for reached in ((p, q), (p,)):
        opt.zero_grad()
        for each in reached:
            each.grad = torch.randn(5, generator=torch.Generator().manual_seed(len(reached)))
        opt.perturb()
        for each in reached:
            each.grad = torch.randn(5, generator=torch.Generator().manual_seed(7))
        opt.step()
        assert bool(opt.state[q]["orthogonal"].any()) is (len(reached) == 2)


# --- intervals ------------------------------------------------------------------------------------


def test_which_steps_are_due(backend):
    run = Training(SAM(0.3, interval=3), backend=backend)
    due = []
    for t in range(7):
        due.append(run.opt.perturb_due)
        METHODS["SAM at intervals"].user(run, t)
        run.opt.zero_grad()
    assert due == [True, False, False, True, False, False, True]
    run.opt.param_groups[0]["perturb_interval"] = 7  # seven steps are made
    assert run.opt.perturb_due


def test_other_methods_are_always_due_and_the_base_never():
    assert [Training(m).opt.perturb_due for m in (RWP(), SAM(), GSAM(), MomentumSAM())] == [True] * 4
    assert not Training(None).opt.perturb_due
    assert not Training(RWP(rolling=True)).opt.perturb_due


def test_perturb_refuses_a_step_between(backend):
    run = trained(SAM(0.3, interval=3), backend, "SAM at intervals", steps=1)
    run.backward(1)
    before, state = run.weights(), run.state()
    with pytest.raises(RuntimeError, match=r"perturb: SAM ascends in every 3-th step, and step 1 is none.*perturb_due"):
        run.opt.perturb()
    assert_same(run.weights(), before)
    assert_same_state(run.state(), state)
    run.opt.step()


@pytest.mark.parametrize("method", [SAM(0.3, interval=2), LookSAM(0.3, k=2)], ids=str)
def test_a_due_step_may_be_a_plain_one(method, backend):
    run, base = Training(method, backend=backend), Training(None, backend=backend)
    for r in (run, base):
        train(r, plain, 4)
    assert_same(run.weights(), base.weights())
    assert run.opt.param_groups[0]["perturb_count"] == 4


@pytest.mark.parametrize("rounds", ["mean", "sum"])
def test_shards_between_ascents(rounds, backend):
    """A list of closures: each once, and their gradients averaged or summed up as rounds are."""
    run, base = Training(SAM(0.3, rounds, interval=9), backend=backend), Training(None, backend=backend)
    for r in (run, base):
        r.opt.step(r.closure(0)) if r is base else None
    run = Training(SAM(0.3, rounds, interval=9), backend=backend)
    base = Training(None, backend=backend)
    run.opt.param_groups[0]["perturb_count"] = 1
    loss = run.opt.step([run.closure(k) for k in range(4)])
    losses = [base.backward(k) for k in range(4)]
    for p in base.net.parameters():
        if p.grad is not None and rounds == "mean":
            p.grad /= 4
    base.opt.step()
    assert torch.allclose(loss, sum(losses) / (4 if rounds == "mean" else 1), rtol=1e-6)
    for a, b in zip(run.weights(), base.weights(), strict=True):  # sums in another order: 4 roundings of a gradient
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_groups_share_one_interval(backend):
    def groups(first, second):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        return [{"params": p, "perturb_interval": k} for p, k in zip(params, (first, second), strict=True)]

    with pytest.raises(
        ValueError, match="SGD: perturb_interval is 2 in group 0 and 3 in group 1, but all groups share"
    ):
        flatkern.SGD(groups(2, 3), perturb=SAM(), backend=backend)
    opt = flatkern.SGD(groups(2, 2), perturb=SAM(), backend=backend)
    opt.param_groups[1]["perturb_interval"] = 3
    with pytest.raises(ValueError, match="perturb_due: perturb_interval is 2 in group 0 and 3"):
        opt.perturb_due  # noqa: B018
    for p in (p for group in opt.param_groups for p in group["params"]):
        p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="SGD: perturb_interval is 2 in group 0 and 3"):
        opt.step()  # of the base's own, too
    assert all((p == 1).all() for group in opt.param_groups for p in group["params"])


def test_a_skipped_step_is_no_step(backend):
    """On the CPU, where the host knows."""
    run = Training(SAM(0.3, interval=2), backend=backend)
    run.overflow = {1}
    METHODS["SAM at intervals"].user(run, 0)  # the perturbed gradient is infinite, and the update takes it
    assert run.opt.param_groups[0]["perturb_count"] == 1
    run = Training(SAM(0.3, interval=2), backend=backend)
    run.overflow = {0}
    METHODS["SAM at intervals"].user(run, 0)  # the ascent is infinite, and the step is skipped
    assert run.opt.param_groups[0]["perturb_count"] == 0
    assert int(run.opt.skipped_steps) == 1


# --- Friendly-SAM's mean --------------------------------------------------------------------------


def means(run):
    return {key: value for key, value in run.state().items() if "ascent_mean" in key}


def test_an_ascent_without_a_gradient_leaves_the_mean(backend):
    run = trained(FriendlySAM(0.3), backend, steps=2)
    before = means(run)
    run.backward(5)
    run.opt.perturb()
    run.opt.restore()
    assert_same_state(means(run), before)
    first = Training(FriendlySAM(0.3), backend=backend)
    first.backward(0)
    first.opt.perturb()
    first.opt.restore()
    assert not means(first)  # and the next ascent is the first


def test_an_ascent_that_is_not_finite_leaves_the_mean(backend):
    """The first ascent after it is as if it had not been: the first mean is the first gradient."""
    run, other = (Training(FriendlySAM(0.3), backend=backend) for _ in range(2))
    run.overflow = {0}
    METHODS["SAM"].user(run, 0)
    run.opt.zero_grad()
    assert not means(run)
    for r in (run, other):
        train(r, METHODS["SAM"].user, 2, start=1)
    assert_same(run.weights(), other.weights())
    assert_same_state(means(run), means(other))
    run.overflow = {run.passes}
    before = means(run)
    METHODS["SAM"].user(run, 3)
    assert_same_state(means(run), before)


def test_a_step_that_is_skipped_leaves_the_mean(backend):
    """On the CPU, where the host knows: the second gradient is infinite under a scaler."""
    run = Training(FriendlySAM(0.3), backend=backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    train(run, METHODS["SAM"].user, 2)
    before = means(run)
    run.overflow = {run.passes + 1}
    METHODS["SAM"].user(run, 2)
    assert_same_state(means(run), before)


def test_means_are_of_unscaled_gradients(backend):
    plain_run = trained(FriendlySAM(0.3), backend, steps=3)
    scaled = Training(FriendlySAM(0.3), backend=backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    train(scaled, METHODS["SAM"].user, 3)
    assert_same_state(means(scaled), means(plain_run))  # 8 is a power of two


def test_release_frees_the_second_mean(backend):
    run = trained(FriendlySAM(0.3), backend)
    run.opt.release()
    other = trained(FriendlySAM(0.3), backend)
    for r in (run, other):
        r.opt.zero_grad()
        train(r, METHODS["SAM"].user, 2, start=4)
    assert_same(run.weights(), other.weights())


# --- methods that need both gradients -------------------------------------------------------------


@pytest.mark.parametrize("method", [SAM(0.3, lam=0.5), GSAM(0.3), FriendlySAM(0.3), LookSAM(0.3)], ids=str)
def test_a_scaler_has_to_be_given_to_perturb(method, backend):
    run = Training(method, backend=backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    run.backward(0)
    run.opt.perturb()  # without it
    run.backward(0)
    with pytest.raises(RuntimeError, match=rf"step: {type(method).__name__} under a GradScaler needs perturb\(scaler"):
        run.scaler.step(run.opt)
    run.opt.restore()
    assert_same(run.weights(), run.start)


@pytest.mark.parametrize("method", [SAM(0.3, lam=0.5), GSAM(0.3), LookSAM(0.3, k=1)], ids=str)
def test_the_clean_gradient_survives_a_failed_step(method, backend, monkeypatch):
    """A step that fails and is repeated is the step."""
    run, other = (Training(method, backend=backend) for _ in range(2))
    for r in (run, other):
        r.backward(0)
        r.opt.perturb()
        r.backward(0)
    from flatkern.optim.buckets import Call

    original = Call.run

    def failing(self):
        if self.op == "sgd_update_":
            raise OSError("no")
        original(self)

    monkeypatch.setattr(Call, "run", failing)
    with pytest.raises(OSError, match="no"):
        run.opt.step()
    monkeypatch.setattr(Call, "run", original)
    assert_same(run.weights(), run.start)
    run.opt.step()
    other.opt.step()
    assert_same(run.weights(), other.weights())


def test_excluded_groups_take_the_perturbed_gradient(backend):
    """GSAM's and LookSAM's sums and corrections are of perturbed parameters; what a group without has, is g_p."""
    for method in (GSAM(0.3, alpha=0.9), LookSAM(0.3, k=1)):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "perturb": False}]
        opt = flatkern.SGD(groups, lr=1.0, perturb=method, backend=backend)
        before = params[1].detach().clone()
        for k in range(2):
            for p in params:
                p.grad = torch.randn(6, generator=torch.Generator().manual_seed(k))
            if k == 0:
                opt.perturb()
        opt.step()
        assert_same([params[1].detach()], [before - torch.randn(6, generator=torch.Generator().manual_seed(1))])


# --- Momentum-SAM ---------------------------------------------------------------------------------


@bases
def test_rolling_is_explicit(base, backend):
    """The same trajectory, whose first step has no momentum to follow yet."""
    explicit = trained(MomentumSAM(0.3), backend, "MomentumSAM", base=base)
    rolling = trained(MomentumSAM(0.3, rolling=True), backend, "rolling", base=base)
    assert not same(rolling.weights(), rolling.clean_weights())
    rolling.opt.eval()
    assert_same(rolling.weights(), explicit.weights())


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize("own", [{}, {"dtype": torch.bfloat16, "master_weights": True}, {"dtype": torch.bfloat16}])
def test_evaluations_change_no_rolling_trajectory(own, backend):
    """Also where a schedule has moved rho since the step."""
    runs = [Training(MomentumSAM(0.3, rolling=True), backend=backend, **own) for _ in range(2)]
    for t in range(5):
        for run in runs:
            run.opt.train()
            plain(run, t)
            run.opt.param_groups[0]["rho"] = 0.3 + 0.1 * t
            if run is runs[0]:
                run.opt.eval()
                saved = copy.deepcopy(run.opt.state_dict())
                run.opt.load_state_dict(saved)
                run.opt.train()
            run.opt.zero_grad()
    for run in runs:
        run.opt.eval()
    assert_same(runs[0].weights(), runs[1].weights())


def test_a_base_without_momentum_is_refused():
    params = [torch.nn.Parameter(torch.ones(3))]
    for make in (
        partial(flatkern.SGD, params, perturb=MomentumSAM()),
        lambda: flatkern.Wrap(torch.optim.RMSprop(params), MomentumSAM()),
        lambda: flatkern.Wrap(torch.optim.Adagrad(params), MomentumSAM(rolling=True)),
    ):
        with pytest.raises(ValueError, match="MomentumSAM goes along the base's momentum, but a group has momentum"):
            make()
    opt = flatkern.SGD(params, momentum=0.9, perturb=MomentumSAM())
    opt.param_groups[0]["momentum"] = 0
    with pytest.raises(ValueError, match="goes along the base's momentum"):
        opt.perturb()
    assert not opt.is_perturbed


class Nameless(torch.optim.Optimizer):
    """Says that it has betas, and keeps its momentum under another name."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"], self.state[p]["m"] = 1, p.grad.clone()


def test_a_base_that_keeps_no_known_momentum_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = flatkern.Wrap(Nameless([p]), MomentumSAM(), backend=backend)
    opt.perturb()
    p.grad = torch.ones(3)
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="parameter 0 has neither momentum_buffer nor exp_avg"):
        opt.perturb()
    assert not opt.is_perturbed


@pytest.mark.parametrize("rolling", [False, True])
def test_what_rounds_away_is_told_of_the_first_ascent_that_moves(rolling, backend):
    """The first one of a training goes along no momentum."""
    run = Training(MomentumSAM(30.0, rolling=rolling), backend=backend, dtype=torch.bfloat16)
    user = METHODS["rolling" if rolling else "RWP"].user
    if rolling:
        run.opt.train()
    else:
        train(run, user, 1)
    with pytest.warns(UserWarning, match=r"MomentumSAM ascends on bfloat16 weights: [1-9]\d*% of"):
        train(run, user, 1, start=1)


# --- scales of noise ------------------------------------------------------------------------------

SHAPES = [(6, 8), (4, 3, 2, 2), (5,), ()]


def drawn(method, backend, values=1.0):
    params = [torch.nn.Parameter(torch.full(shape, values)) for shape in SHAPES]
    opt = flatkern.SGD(params, lr=0.0, perturb=method, backend=backend)
    opt.perturb()
    found = copies(params)
    opt.restore()
    assert_same([p.detach() for p in params], [torch.full(shape, values) for shape in SHAPES])
    return found


def test_rms_is_the_norm_over_the_root_of_the_length(backend):
    """Of ones the root mean square is 1: within rounding the noise is sigma z, whatever the length."""
    rms, absolute = (drawn(noise(sigma=0.5, scale=scale), backend) for scale in ("rms", "absolute"))
    for a, b in zip(rms, absolute, strict=True):
        # sigma / sqrt(n), the norm and their product are rounded, and the sum: 4 roundings of numbers up to 4.
        assert torch.allclose(a, b, rtol=0, atol=4 * 4 * 2.0**-24)


def test_absolute_noise_does_not_see_the_weights(backend):
    """Neither zeros nor what is not finite elsewhere in a filter."""
    zeros, ones = (drawn(noise(sigma=0.5, scale="absolute"), backend, values) for values in (0.0, 1.0))
    for z, o in zip(zeros, ones, strict=True):
        assert z.abs().min() > 0
        assert torch.allclose(1 + z, o, rtol=0, atol=2.0**-22)
    p = torch.nn.Parameter(torch.tensor([[1.0, float("inf")]]))
    opt = flatkern.SGD([p], perturb=noise(sigma=0.5, scale="absolute"), backend=backend)
    opt.perturb()
    assert p[0, 0].isfinite()


def test_rolling_absolute_noise_is_explicit(backend):
    explicit, rolling = (
        Training(noise(sigma=0.1, scale="absolute", rolling=r), backend=backend) for r in (False, True)
    )
    rolling.opt.train()
    for t in range(4):
        METHODS["RWP"].user(explicit, t)
        plain(rolling, t)
        for run in (explicit, rolling):
            run.opt.zero_grad()
    rolling.opt.eval()
    assert_same(explicit.weights(), rolling.weights())


def test_scales_differ_by_group(backend):
    """Every group as an optimizer of its own would draw it; a rolling step, too."""
    for rolling in (False, True):
        params = [torch.nn.Parameter(torch.full((4, 6), 2.0)) for _ in range(3)]
        groups = [{"params": [p], "scale": s} for p, s in zip(params, flatkern.methods.rwp.SCALES, strict=True)]
        opt = flatkern.SGD(groups, lr=0.0, perturb=noise(sigma=0.1, rolling=rolling), backend=backend)
        if rolling:
            for p in params:
                p.grad = torch.zeros(4, 6)
            opt.train()
            opt.step()
        else:
            opt.perturb()
        round_ = int(rolling)
        for k, (p, s) in enumerate(zip(params, (1.0, 6**-0.5, 1.0), strict=True)):
            expected = torch.full((4, 6), 2.0)
            norms = [torch.ones(4)] if k == 2 else None
            others = [torch.zeros(0) for _ in range(k)]  # the index of a parameter is its place in the list
            flatkern.perturb_(
                [*others, expected], 0.1 * s, seed=7, stream=3, round=round_, backend=backend,
                norms=None if norms is None else [torch.zeros(1) for _ in others] + norms,
            )  # fmt: skip
            assert_same([p], [expected], f"rolling={rolling}, position {k}, tensor")
