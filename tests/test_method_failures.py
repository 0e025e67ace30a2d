"""The further methods where something goes wrong or changes: failures, other checkpoints, layouts, frozen weights."""

import copy
import re

import pytest
import torch
from compare import assert_same, assert_same_state
from patterns import METHODS, Training, train, trained

import flatkern
from flatkern import ASAM, GSAM, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM


def means(run):
    return {key: value for key, value in run.state().items() if "ascent_mean" in key}


# --- Friendly-SAM's mean --------------------------------------------------------------------------


def in_a_block(run):
    run.backward(5)
    with run.opt.perturbed():
        run.backward(5)
        raise OSError("no")


def in_a_closure(run):
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no")
        run.opt.zero_grad()
        return run.backward(5)

    run.opt.step(closure)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("fail", [in_a_block, in_a_closure])
def test_a_round_that_fails_leaves_the_mean(fail, steps, backend):
    """Its batch trains as if it came for the first time, also where it was the first ascent of all."""
    run, untroubled = (trained(FriendlySAM(0.3), backend, steps=steps) for _ in range(2))
    before = run.state()
    with pytest.raises(OSError, match="no"):
        fail(run)
    assert_same_state(run.state(), before)
    assert len(run.opt.state) == len(untroubled.opt.state)
    for r in (run, untroubled):
        r.opt.zero_grad()
        train(r, METHODS["SAM"].user, 2, start=5)
    assert_same(run.weights(), untroubled.weights())
    assert_same_state(means(run), means(untroubled))


def test_release_forgets_the_round_that_is_pending(backend):
    run = trained(FriendlySAM(0.3), backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    run.backward(5)
    run.perturb()
    run.backward(5)
    run.opt.restore()
    run.opt.release()
    run.opt.zero_grad()
    run.overflow = {run.passes}
    run.backward(6)
    run.step()  # skipped
    assert int(run.opt.skipped_steps) == 1


@pytest.mark.parametrize("changed", [False, True], ids=["of gradients", "of the model"])
def test_another_memory_format_renews_the_mean_once(changed, backend):
    """Calls are prepared a second time, for tensors that follow their parameters."""

    def run(strided):
        p = torch.nn.Parameter(torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)))
        opt = flatkern.SGD([p], lr=0.1, perturb=FriendlySAM(0.3), backend=backend)
        for t in range(4):
            if changed and strided and t == 2:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
            for k in range(2):
                g = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(10 * t + k))
                p.grad = g.contiguous(memory_format=torch.channels_last) if strided and not changed else g
                opt.perturb() if k == 0 else opt.step()
        return p.detach().contiguous(), opt.state[p]["ascent_mean"].contiguous()

    other, plain = run(True), run(False)
    # Norms are summed in the order of memory, in another one after a change.
    for a, b in zip(other, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


# --- checkpoints ----------------------------------------------------------------------------------

OTHERS = {
    "SAM": SAM(0.3), "mixed SAM": SAM(0.2, lam=0.7), "every 4": SAM(0.1, interval=4), "ASAM": ASAM(0.5),
    "GSAM": GSAM(0.3, alpha=0.9), "FriendlySAM": FriendlySAM(0.3, momentum=0.5), "LookSAM": LookSAM(0.3, k=6),
    "MomentumSAM": MomentumSAM(0.2), "m-RWP": RWP(0.02, lam=0.5), "absolute": RWP(0.075, scale="absolute"),
}  # fmt: skip
SAME_VALUES = {("SAM", "every 4"), ("every 4", "SAM")}  # values of one method, which a checkpoint brings along


@pytest.mark.parametrize("saved", OTHERS)
def test_values_of_another_method_stay_as_they_are(saved):
    """Whatever a method's values are called, those of another one are not taken for them."""
    source = Training(OTHERS[saved]).opt
    source.param_groups[0]["perturb_count"] = 3
    for name, method in OTHERS.items():
        opt = Training(method).opt
        opt.load_state_dict(copy.deepcopy(source.state_dict()))
        if name != saved and (saved, name) not in SAME_VALUES:
            (group,) = opt.param_groups
            assert {key: group[key] for key in method.defaults} == method.defaults, name


def test_noise_of_a_checkpoint_from_before_scales(backend):
    """Its sigma was relative to the norm."""
    saved = trained(RWP(0.01), backend, "RWP").opt.state_dict()
    del saved["param_groups"][0]["scale"]
    opt = Training(RWP(0.5, scale="absolute"), backend=backend).opt
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["sigma"], opt.param_groups[0]["scale"]) == (0.01, "norm")


# --- Momentum-SAM ---------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """With betas and state, and a momentum under no name that torch knows."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["z"] = p.grad.clone()
            p -= 0.1 * p.grad


def test_rolling_refuses_an_unknown_momentum_before_it_steps(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = flatkern.Wrap(Averaging([p]), MomentumSAM(rolling=True), backend=backend)
    p.grad = torch.ones(3)
    opt.step()  # what the base keeps is known from here on
    opt.eval()
    before = p.detach().clone()
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"neither momentum_buffer nor exp_avg \(z\)"):
        opt.step()
    assert_same([p.detach()], [before])
    with pytest.raises(RuntimeError, match="neither momentum_buffer nor exp_avg"):
        opt.train()
    assert_same([p.detach()], [before])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SAM(lam=0.5), GSAM(), FriendlySAM(), LookSAM()], ids=str)
def test_float16_under_a_scaler_is_refused_by_name(method, backend):
    run = Training(method, dtype=torch.float16, backend=backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    run.backward(0)
    message = f"scaler.unscale_() refuses float16 gradients, which {type(method).__name__} needs; keep float32 weights"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run.perturb()
    assert_same(run.weights(), run.start)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_perturb_due_refuses_what_is_no_interval(value):
    opt = Training(SAM(interval=2)).opt
    opt.param_groups[0]["perturb_interval"] = value
    with pytest.raises(ValueError, match="perturb_due: perturb_interval is"):
        opt.perturb_due  # noqa: B018


@pytest.mark.parametrize("name", ["mixed SAM", "GSAM", "LookSAM", "SAM"])
def test_a_weight_that_is_frozen_after_the_ascent_stays(name, backend):
    run = trained(METHODS[name].make(), backend, name, steps=2)
    clean = run.net.hidden.detach().clone()
    run.backward(2)
    run.opt.perturb()
    run.net.hidden.requires_grad_(False)
    run.net.hidden.grad = None
    run.backward(2)
    run.opt.step()
    assert_same([run.net.hidden.detach()], [clean])


def test_a_step_without_gradients_is_no_step_of_an_interval():
    opt = Training(SAM(interval=3)).opt
    opt.step()
    assert opt.perturb_due
