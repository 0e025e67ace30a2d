"""Trainings on the CPU whose launches reach Triton, with the stand-in driver of test_host.py: it compiles, and launches
nothing. Used by test_jobs.py and test_warm_up.py, which take the fixtures by name."""

import functools
import itertools

import pytest
import stand_in_driver
import torch

# Without Triton, nothing below is imported.
driver, triton = stand_in_driver.driver, stand_in_driver.triton

from flatkern.triton_kernels import job, launch, mask, noise, norm, perturb, update  # noqa: E402

import flatkern  # noqa: E402
from bench.models import MODELS  # noqa: E402, F401
from flatkern import dispatch  # noqa: E402
from flatkern.ops import OPS  # noqa: E402

KERNELS = [
    value
    for module in (mask, noise, norm, perturb, update)
    for name, value in vars(module).items()
    if name.endswith("_kernel")
]
RWP, SAM, ASAM, IRE = flatkern.RWP, flatkern.SAM, flatkern.ASAM, flatkern.IRE


class Loads:
    """Counts what Triton loads on the stand-in: each kernel that it has compiled."""

    def __init__(self, load):
        self.names, self.load = [], load

    def __call__(self, name, *rest):
        self.names.append(name)
        return self.load(name, *rest)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Triton serves the CPU too; nothing is remembered of other tests, neither by us nor by Triton."""
    monkeypatch.setitem(dispatch.DEVICES, "triton", ["cuda", "cpu"])
    monkeypatch.setattr(launch, "_caches", {op.name: launch.OpCache(op) for op in OPS.values()})
    for kernel in KERNELS:
        kernel.device_caches.clear()
    job.announce.cache_clear()
    dispatch.resolve.cache_clear()
    yield
    dispatch.resolve.cache_clear()


@pytest.fixture
def loads(driver, monkeypatch):
    counted = Loads(driver.utils.load_binary)
    monkeypatch.setattr(driver.utils, "load_binary", counted)
    return counted.names


SHAPES = [
    (64, 16), (6, 24), (5, 9), (3, 3, 7, 7), (40, 500), (7, 1027), (2, 8208), (3, 8201), (1, 8192), (900, 9), (512, 8),
    (24,), (7,), (2048,), (2049,), (5000,), (8200,), (9001,), (), (4096,), (4097,), (1, 4096),
]  # fmt: skip
FEW = [(64, 16), (24,)]


def move_by_an_element(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def parameters(shapes, dtypes=(torch.float32,), spread=False):
    dtype = itertools.cycle(dtypes)
    made = [torch.full(shape, 0.5, dtype=next(dtype)) for shape in shapes]
    if spread:
        made[::3] = map(move_by_an_element, made[::3])
    return [torch.nn.Parameter(t) for t in made]


BASES = {
    "SGD": functools.partial(flatkern.SGD, lr=0.1),
    "SGD, momentum": functools.partial(flatkern.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": functools.partial(flatkern.Adam, lr=0.1),
    "AdamW": functools.partial(flatkern.AdamW, lr=0.1),
    "Wrap": lambda params, **ours: flatkern.Wrap(torch.optim.RMSprop(params, lr=0.1), **ours),
}
METHODS = {
    "plain": {},
    "RWP": dict(perturb=RWP()),
    "ARWP": dict(perturb=RWP(eta=0.1)),
    "m-RWP": dict(perturb=RWP(lam=0.5)),
    "m-ARWP": dict(perturb=RWP(lam=0.5, eta=0.1)),
    "m-RWP, losses": dict(perturb=RWP(lam=0.5, mix="losses")),
    "m-ARWP, losses": dict(perturb=RWP(lam=0.5, eta=0.1, mix="losses")),
    "rolling RWP": dict(perturb=RWP(rolling=True)),
    "rolling ARWP": dict(perturb=RWP(rolling=True, eta=0.1)),
    "SAM": dict(perturb=SAM()),
    "ASAM": dict(perturb=ASAM()),
    "IRE": dict(enhance=IRE(2.0)),
    "IRE, rolling RWP": dict(enhance=IRE(2.0), perturb=RWP(rolling=True)),
    "IRE, SAM": dict(enhance=IRE(2.0), perturb=SAM()),
}
# With fewer bases, since what they have of their own is little.
FURTHER = {
    "mixed SAM": dict(perturb=SAM(lam=0.5)),
    "GSAM": dict(perturb=flatkern.GSAM()),
    "FriendlySAM": dict(perturb=flatkern.FriendlySAM()),
    "LookSAM": dict(perturb=flatkern.LookSAM(k=2)),
    "MomentumSAM": dict(perturb=flatkern.MomentumSAM()),
    "rolling MomentumSAM": dict(perturb=flatkern.MomentumSAM(rolling=True)),
    "rolling RWP, absolute": dict(perturb=RWP(rolling=True, scale="absolute")),
    "RWP, rms": dict(perturb=RWP(scale="rms")),
}
METHODS |= FURTHER


def ways(method, scaled):
    """How a step may come about: at the perturbed weights, after restore(), or with the clean pass last."""
    perturb = method.get("perturb")
    found = ["step"]
    if perturb is not None and not getattr(perturb, "rolling", False) and not scaled:
        found.append("restored")  # a scaler has to find the gradients of the last round in `.grad`
    return found + ["noisy first"] * (isinstance(perturb, RWP) and perturb.lam is not None)


def backward(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.grad = torch.ones_like(p, requires_grad=False) if p.grad is None else p.grad.add_(1)


def train(opt, scaled=False, rounds=1, way="step", steps=2):
    """A training as README has them, with gradients that nobody computes."""
    method, two = opt.method, isinstance(opt.method, RWP) and opt.method.lam is not None
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.zeros(()))
    losses = getattr(method, "mix", "") == "losses"
    noisy_first = two and (way == "noisy first" or (losses and method.eta > 0))
    opt.train()
    for step in range(steps):
        opt.zero_grad()
        if opt.mask_due:
            opt.eval()
            backward(opt)
            opt.update_mask(scaler)
            opt.train()
        for k in range(rounds if opt.perturb_due or not opt.perturbation.has_interval else 0):
            if opt.perturbation.ascends or (two and k == 0 and not noisy_first):
                backward(opt)
            if method is not None and not opt.rolling:
                opt.perturb(scaler)
            backward(opt)
            if k < rounds - 1 or way != "step" or noisy_first:
                opt.restore()
        if noisy_first or (opt.perturbation.has_interval and not opt.perturb_due):
            backward(opt)
        if scaled and step:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step == 0:
            opt.eval()
            opt.train()
    opt.eval()


def make(base, method, shapes=SHAPES, half=(), spread=False, clip=False, masters=False, capturable=False, **rest):
    params = parameters(shapes, half or (torch.float32,), spread)
    ours = dict(METHODS[method], max_grad_norm=1.0 if clip else None)
    if base != "Wrap":
        ours |= dict(master_weights=masters, capturable=capturable)
    return BASES[base](params, backend="triton", **ours)


def keys(jobs):
    return {j.key: j.name for j in jobs}
