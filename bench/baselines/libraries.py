"""The same methods in other libraries, where those are installed: pytorch_optimizer 4.1 and heavyball 3.2.

    pip install 'flatkern[rivals]'

Each class is driven by its own two calls, which its step(closure) makes around the second gradient, with the defaults
that a user gets. Around torch's fused optimizer, as every other candidate is; "documented" candidates take the base
optimizer as the libraries' pages show it, by name alone, which on the CPU is a loop over tensors. Some compute
something else: before a race equal.py compares, and no speed-up over them is printed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import BASES, LR, MOMENTUM, WEIGHT_DECAY, Method
from .loops import torch_optimizer

LIBRARIES = "pytorch_optimizer", "heavyball"


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def base_of(base: str, fused: bool) -> tuple[type[torch.optim.Optimizer], dict]:
    """What their classes make the base optimizer of."""
    common = {"lr": LR[base], "weight_decay": WEIGHT_DECAY[base], **({"fused": True} if fused else {})}
    return (torch.optim.SGD, {**common, "momentum": MOMENTUM}) if base == "sgd" else (torch.optim.AdamW, common)


class TwoSteps:
    """Classes with first_step() and second_step()."""

    def __init__(self, params: list[Tensor], method: Method, base: str, fused: bool, name: str, **numbers) -> None:
        import pytorch_optimizer

        optimizer, common = base_of(base, fused)
        self.peer = getattr(pytorch_optimizer, name)(
            params=params, base_optimizer=optimizer, rho=method.rho, **numbers, **common
        )

    def perturb(self) -> None:
        self.peer.first_step(zero_grad=True)

    def step(self) -> None:
        self.peer.second_step()


def mixed_sam(params: list[Tensor], method: Method, base: str, fused: bool = True) -> TwoSteps:
    gamma = method.lam / (1 + method.lam)
    return TwoSteps(params, method, base, fused, "WSAM", model=None, gamma=gamma, decouple=False)


def sam(params: list[Tensor], method: Method, base: str, fused: bool = True) -> TwoSteps:
    return TwoSteps(params, method, base, fused, "SAM")


def adaptive_sam(params: list[Tensor], method: Method, base: str, fused: bool = True) -> TwoSteps:
    return TwoSteps(params, method, base, fused, "SAM", adaptive=True)


def friendly_sam(params: list[Tensor], method: Method, base: str, fused: bool = True) -> TwoSteps:
    return TwoSteps(params, method, base, fused, "FriendlySAM", sigma=1.0, lmbda=method.decay)


def looksam(params: list[Tensor], method: Method, base: str, fused: bool = True) -> TwoSteps:
    """Its first_step() has nothing to do in steps between, and is not called there."""
    return TwoSteps(params, method, base, fused, "LookSAM", k=method.every, alpha=method.alpha)


class GuidedBySurrogateGap:
    """GSAM, by the parts of its step(), which wants a model and a loss."""

    def __init__(self, params: list[Tensor], method: Method, base: str, fused: bool = True) -> None:
        import pytorch_optimizer

        class Constant:
            def step(self) -> float:
                return method.rho

        self.params, self.alpha = params, method.alpha
        self.base = torch_optimizer(params, base, **({"fused": True} if fused else {}))
        self.peer = pytorch_optimizer.GSAM(params, self.base, None, Constant(), method.alpha)

    @torch.no_grad()
    def perturb(self) -> None:
        self.peer.perturb_weights(self.peer.rho_t)
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.peer.gradient_decompose(self.alpha)
        self.peer.un_perturb()
        self.base.step()


def eager_heavyball():
    """The library without torch.compile, as the loops beside it."""
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball


class RollingMomentum:
    """heavyball's Momentum-SAM."""

    def __init__(self, params: list[Tensor], method: Method, base: str, fused: bool = True) -> None:
        numbers = {"lr": LR[base], "weight_decay": WEIGHT_DECAY[base], "sam_step_size": method.rho}
        self.peer = eager_heavyball().MSAMLaProp(params, betas=(0.9, 0.999), compile_step=False, **numbers)

    def step(self) -> None:
        self.peer.step()

    def eval(self) -> None:
        self.peer.eval()


class Wrapped:
    """heavyball's SAM, which takes closures: they hand the two gradients over, and nothing else is in them."""

    def __init__(self, params: list[Tensor], method: Method, base: str, fused: bool = True) -> None:
        heavyball = eager_heavyball()
        numbers = {"lr": LR[base], "weight_decay": WEIGHT_DECAY[base], "compile_step": False}
        inner = (
            heavyball.SGD(params, beta=MOMENTUM, **numbers)
            if base == "sgd"
            else heavyball.AdamW(params, betas=(0.9, 0.999), **numbers)
        )
        self.params, self.peer = params, heavyball.SAMWrapper(params, inner, ball=method.rho)

    def perturb(self) -> None:
        self.clean = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        arriving = iter((self.clean, [p.grad for p in self.params]))

        def closure() -> None:
            for p, grad in zip(self.params, next(arriving), strict=True):
                p.grad = grad

        self.peer.step(closure)


@dataclass(frozen=True)
class Peer:
    """A library's class for a method, and what it computes in place of what flatkern does, if that is not the same."""

    name: str
    build: Callable[..., object]  # of parameters, method, base; fused=False: the base optimizer by name alone
    computes_something_else: str = ""
    also: str = ""  # what is worth knowing beside

    @property
    def title(self) -> str:
        said = [f"something else: {self.computes_something_else}"] * bool(self.computes_something_else) + [self.also]
        return f"{self.name} ({', '.join(filter(None, said))})" if any(said) else self.name


SUBTRACTED = "restores by subtraction"
TORCH_BASES = {
    "sam": Peer("pytorch_optimizer.SAM", sam),
    "asam": Peer("pytorch_optimizer.SAM, adaptive", adaptive_sam, "biases scaled too, no floor"),
    "mixed": Peer("pytorch_optimizer.WSAM", mixed_sam, also=SUBTRACTED),
    "gsam": Peer("pytorch_optimizer.GSAM", GuidedBySurrogateGap, also=SUBTRACTED),
    "friendly": Peer("pytorch_optimizer.FriendlySAM", friendly_sam),
    "looksam": Peer("pytorch_optimizer.LookSAM", looksam, "norms per tensor"),
}
# By method, base and library.
PEERS = {(method, base, "pytorch_optimizer"): peer for base in BASES for method, peer in TORCH_BASES.items()}
PEERS |= {
    ("sam", base, "heavyball"): Peer("heavyball.SAMWrapper", Wrapped, "an ascent scaled by squared weights", "eager")
    for base in BASES
}
PEERS["momentum-rolling", "adamw", "heavyball"] = Peer(
    "heavyball.MSAMLaProp", RollingMomentum, "along a mean of scaled gradients, norms per tensor", "eager"
)


def libraries_of(method: str, base: str) -> list[str]:
    """Who has a class for a method."""
    return [library for library in LIBRARIES if (method, base, library) in PEERS]
