"""follow(model): rolling noise on in training forwards, clean weights in eval forwards and state_dict()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .base import FlatOptimizer


class Handles:
    """Removes the hooks that `follow` registered."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Follower:
    """Holds the optimizer weakly: the model's hooks must not keep a replaced optimizer alive."""

    def __init__(self, opt: FlatOptimizer) -> None:
        self.opt = opt.cycle.owner

    def forward(self, model: torch.nn.Module, *args: Any) -> None:
        opt = self.opt()
        if opt is not None and not opt.cycle.suspended:
            opt.train(model.training)

    def state_dict(self, *args: Any) -> None:
        opt = self.opt()
        if opt is not None and not opt.cycle.suspended:
            opt.eval()

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model is followed by nobody."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.opt = lambda: None  # type: ignore[assignment]


def follow(opt: FlatOptimizer, model: torch.nn.Module) -> Handles:
    if not opt.rolling:
        raise RuntimeError(
            "follow: only a rolling optimizer can follow a model; pass perturb=flatkern.RWP(rolling=True)"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"follow: model is {type(model).__name__}, but should be a torch.nn.Module")
    follower = _Follower(opt)
    return Handles(
        # Before FSDP2's own, which gathers the weights.
        model.register_forward_pre_hook(follower.forward, prepend=True),
        model.register_state_dict_pre_hook(follower.state_dict),
    )
