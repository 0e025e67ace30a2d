"""Optimizers on the CUDA backend, emulated: the float64 oracle's trajectories, exact restores, eager's steps."""

import pytest
import test_mask
import torch
import trajectories
from compare import assert_same_values, copies
from emulated import needs_emulation
from test_paper import assert_follows
from trajectories import library_path

import flatkern

pytestmark = needs_emulation


@pytest.mark.covering(1)  # 50 steps each
@pytest.mark.parametrize("method", trajectories.METHODS)
@pytest.mark.parametrize("base", trajectories.BASES)
@pytest.mark.filterwarnings("error")
def test_trajectory(base, method, emulated):
    """As test_paper.py has it for the other backends: 50 steps in three groups, next to the oracle."""
    assert_follows(library_path(flatkern, base, method, backend="cuda"), base, method)


@pytest.mark.parametrize("method", ["m-ARWP", "rolling ARWP", "SAM"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_trajectory_of_wrap(base, method, emulated):
    assert_follows(library_path(flatkern, base, method, backend="cuda", wrapped=True), base, method)


@pytest.mark.parametrize("perturb", [None, flatkern.SAM(0.05)], ids=["alone", "SAM-IRE"])
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "Wrap"])
def test_ire_against_float64(base, perturb, emulated):
    """As test_mask.py has it for the other backends."""
    assert test_mask.trained("cuda", base, perturb=perturb) < 2e-4


RULES = {
    "SGD": lambda params, **own: flatkern.SGD(params, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | own),
    "plain SGD": lambda params, **own: flatkern.SGD(params, **{"lr": 0.05} | own),
    "Adam": lambda params, **own: flatkern.Adam(params, **{"lr": 0.01, "weight_decay": 0.1} | own),
    "AdamW": lambda params, **own: flatkern.AdamW(params, **{"lr": 0.01, "weight_decay": 0.1} | own),
}
METHODS = {
    "plain": {},
    "RWP": dict(perturb=flatkern.RWP(0.02)),
    "ARWP": dict(perturb=flatkern.RWP(0.05, eta=0.1)),
    "m-RWP": dict(perturb=flatkern.RWP(0.02, lam=0.5)),
    "m-ARWP": dict(perturb=flatkern.RWP(0.05, lam=0.5, eta=0.1)),
    "rolling RWP": dict(perturb=flatkern.RWP(0.02, rolling=True)),
    "rolling ARWP": dict(perturb=flatkern.RWP(0.05, eta=0.1, rolling=True)),
    "SAM": dict(perturb=flatkern.SAM(0.5)),
    "ASAM": dict(perturb=flatkern.ASAM(2.0, all_tensors=True)),
}
# The weights' dtype, and what else there is: kernels of their own, and the one of all other types.
KINDS = {
    "float32": dict(),
    "float32, clipped": dict(max_grad_norm=0.1),
    "bfloat16": dict(dtype=torch.bfloat16),
    "bfloat16, masters": dict(dtype=torch.bfloat16, master_weights=True),
    "float16, masters, clipped": dict(dtype=torch.float16, master_weights=True, max_grad_norm=0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Run:
    """A small network in training, with a filter that is longer than a block holds."""

    def __init__(self, rule, method, backend="cuda", dtype=torch.float32, **own):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)
        self.long = torch.nn.Parameter((0.01 * torch.randn(1, 33000)).to(dtype))
        self.params = [*self.net.parameters(), self.long]
        self.x, self.y = torch.randn(8, 6).to(dtype), torch.randint(3, (8,))
        self.opt = rule(self.params, backend=backend, **method, **own)

    def backward(self):
        loss = torch.nn.functional.cross_entropy(self.net(self.x).float(), self.y)
        loss = loss + self.long.float().square().mean()
        self.opt.zero_grad()
        loss.backward()
        return loss

    def step(self, count=1):
        for _ in range(count):
            self.opt.step(self.backward)

    def values(self):
        state = [value for p in self.params for _, value in sorted(self.opt.state[p].items())]
        return copies(t for t in [*self.params, *state] if isinstance(t, torch.Tensor))


def is_rolling(method):
    return getattr(method.get("perturb"), "rolling", False)


def trained(rule, method, kind, backend):
    run = Run(rule, method, backend, **kind)
    if is_rolling(method):
        run.opt.train()
    run.step(3)
    if is_rolling(method):
        run.opt.eval()
    return run.values()


@every_kind
@every_method
@every_rule
def test_three_steps_next_to_eager(rule, method, kind, emulated):
    """Bit for bit where nothing is summed. A sum's last bits may round a bfloat16 weight the other method."""
    got, want = (trained(rule, method, kind, backend) for backend in ("cuda", "eager"))
    if not method and "max_grad_norm" not in kind:
        return assert_same_values(got, want)
    for a, b in zip(got, want, strict=True):
        rough = a.dtype != torch.float32 or kind.get("dtype")  # its gradient passes through weights that were rounded
        torch.testing.assert_close(a, b, rtol=0.01 if rough else 1e-5, atol=2e-3 if rough else 1e-6)


@every_kind
@pytest.mark.parametrize("method", [m for m in METHODS.values() if m], ids=[name for name in METHODS if METHODS[name]])
def test_a_restore_is_exact(method, kind, emulated):
    """Weights are perturbed in between: by noise all tensors are."""
    run = Run(RULES["AdamW"], method, **kind)
    if is_rolling(method):
        run.opt.train()
    run.step(2)
    if is_rolling(method):
        run.opt.eval()
    before = run.values()
    ascends = not isinstance(method["perturb"], flatkern.RWP)
    if ascends:
        run.backward()
    run.opt.train() if is_rolling(method) else run.opt.perturb()
    moved = [(p != old).float().mean() for p, old in zip(run.params, before, strict=False)]
    assert max(moved) > 0 if ascends else min(moved) > 0.2
    run.opt.eval() if is_rolling(method) else run.opt.restore()
    assert_same_values(run.values()[: len(run.params)], before[: len(run.params)])


@every_kind
@every_method
@every_rule
def test_a_rate_of_zero_changes_no_bit(rule, method, kind, emulated):
    run = Run(rule, method, lr=0.0, **kind)
    before = copies(run.params)
    if is_rolling(method):
        run.opt.train()
    run.step(2)
    if is_rolling(method):
        run.opt.eval()
    assert_same_values([p.detach() for p in run.params], before)


def launches_of(emulated, call):
    before = emulated.launch_count()
    call()
    return emulated.launch_count() - before


def test_launches_of_sam_and_ire(emulated):
    """SAM's perturb: the norm and the ascent. A mask: a count for each digit, one of a sample, and the packing."""
    net = torch.nn.Linear(1024, 1100)
    opt = flatkern.SGD(net.parameters(), perturb=flatkern.SAM(), enhance=flatkern.IRE(2.0), backend="cuda")
    loss = lambda: net(torch.ones(2, 1024)).square().sum()  # noqa: E731
    loss().backward()
    assert launches_of(emulated, opt.update_mask) == 4
    loss().backward()
    assert launches_of(emulated, opt.perturb) == 2
    assert launches_of(emulated, opt.restore) == 1


def test_launches_of_a_step(emulated):
    """Perturb and update: one launch each, and one more for the filter that is cut into segments."""
    run = Run(RULES["SGD"], METHODS["RWP"])
    run.step()
    run.opt.perturb()
    run.backward()
    before = emulated.launch_count()
    run.opt.step()
    assert emulated.launch_count() - before == 1
    run.opt.perturb()
    assert emulated.launch_count() - before == 3
    run.opt.restore()
    assert emulated.launch_count() - before == 4
