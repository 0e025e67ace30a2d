"""The same methods in other libraries, where those are installed: pytorch_optimizer 4.1 and heavyball 3.2.

    pip install pytorch_optimizer heavyball

Each class is driven by its own two calls, which its step(closure) makes around the second gradient, with the defaults
that a user gets, around torch's fused optimizer. Some compute something else, and times are then not of the same thing:
tables name those, and bench/tests/test_baselines.py checks which they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import BASES, LR, MOMENTUM, WEIGHT_DECAY, Method
from .loops import torch_optimizer

LIBRARIES = "pytorch_optimizer", "heavyball"


def fused(base: str) -> tuple[type[torch.optim.Optimizer], dict]:
    """What their classes make the base optimizer of."""
    common = {"lr": LR[base], "weight_decay": WEIGHT_DECAY[base], "fused": True}
    return (torch.optim.SGD, {**common, "momentum": MOMENTUM}) if base == "sgd" else (torch.optim.AdamW, common)


class TwoSteps:
    """Classes with first_step() and second_step()."""

    def __init__(self, params: list[Tensor], method: Method, base: str, name: str, **numbers) -> None:
        import pytorch_optimizer

        optimizer, common = fused(base)
        self.peer = getattr(pytorch_optimizer, name)(
            params=params, base_optimizer=optimizer, rho=method.rho, **numbers, **common
        )

    def perturb(self) -> None:
        self.peer.first_step(zero_grad=True)

    def step(self) -> None:
        self.peer.second_step()


def mixed_sam(params: list[Tensor], method: Method, base: str) -> TwoSteps:
    return TwoSteps(params, method, base, "WSAM", model=None, gamma=method.lam / (1 + method.lam), decouple=False)


def sam(params: list[Tensor], method: Method, base: str) -> TwoSteps:
    return TwoSteps(params, method, base, "SAM")


def friendly_sam(params: list[Tensor], method: Method, base: str) -> TwoSteps:
    return TwoSteps(params, method, base, "FriendlySAM", sigma=1.0, lmbda=method.decay)


class Look(TwoSteps):
    """Its first_step() has nothing to do in steps between, and is not called there."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        super().__init__(params, method, base, "LookSAM", k=method.every, alpha=method.alpha)


class GuidedBySurrogateGap:
    """GSAM, by the parts of its step(), which wants a model and a loss."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        import pytorch_optimizer

        class Constant:
            def step(self) -> float:
                return method.rho

        self.params, self.alpha = params, method.alpha
        self.base = torch_optimizer(params, base, fused=True)
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


class RollingMomentum:
    """heavyball's Momentum-SAM, eager as the loops beside it."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        import heavyball

        heavyball.utils.compile_mode = None
        numbers = {"lr": LR[base], "weight_decay": WEIGHT_DECAY[base], "sam_step_size": method.rho}
        self.peer = heavyball.MSAMLaProp(params, betas=(0.9, 0.999), compile_step=False, **numbers)

    def step(self) -> None:
        self.peer.step()

    def eval(self) -> None:
        self.peer.eval()


@dataclass(frozen=True)
class Peer:
    """A library's class for a method, and what it computes in place of what flatkern does, if that is not the same."""

    name: str
    build: Callable[[list[Tensor], Method, str], object]
    computes_something_else: str = ""
    also: str = ""  # what is worth knowing beside

    @property
    def title(self) -> str:
        said = [f"something else: {self.computes_something_else}"] * bool(self.computes_something_else) + [self.also]
        return f"{self.name} ({', '.join(filter(None, said))})" if any(said) else self.name


SUBTRACTED = "restores by subtraction"
TORCH_BASES = {
    "sam": Peer("pytorch_optimizer.SAM", sam),
    "mixed": Peer("pytorch_optimizer.WSAM", mixed_sam, also=SUBTRACTED),
    "gsam": Peer("pytorch_optimizer.GSAM", GuidedBySurrogateGap, also=SUBTRACTED),
    "friendly": Peer("pytorch_optimizer.FriendlySAM", friendly_sam),
    "looksam": Peer("pytorch_optimizer.LookSAM", Look, "norms per tensor"),
}
PEERS = {(method, base): peer for base in BASES for method, peer in TORCH_BASES.items()} | {
    ("momentum-rolling", "adamw"): Peer(
        "heavyball.MSAMLaProp", RollingMomentum, "along a mean of scaled gradients, norms per tensor", "eager"
    )
}
