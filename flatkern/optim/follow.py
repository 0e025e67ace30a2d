"""follow(model): rolling noise on in training forwards, clean weights in eval forwards and state_dict()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .cycle import Cycle
from .phase import SUSPENDED


class Switch(Protocol):
    """What is switched: a rolling optimizer."""

    cycle: Cycle

    def train(self, mode: bool = True) -> None: ...

    def eval(self) -> None: ...


class Handles:
    """Removes the hooks that `follow` registered."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Follower:
    """Holds the optimizer weakly: the model's hooks must not keep a replaced optimizer alive."""

    def __init__(self, switch: Callable[[], Switch | None]) -> None:
        self.switch = switch

    def forward(self, model: torch.nn.Module, *args: Any) -> None:
        opt = self.switch()
        if opt is not None and opt.cycle.phase is not SUSPENDED:
            opt.train(model.training)

    def state_dict(self, *args: Any) -> None:
        opt = self.switch()
        if opt is not None and opt.cycle.phase is not SUSPENDED:
            opt.eval()

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model is followed by no optimizer."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.switch = lambda: None


def follow(switch: Callable[[], Any], model: torch.nn.Module) -> Handles:
    """Register the hooks.

    Arguments:
        switch: a weak reference to the optimizer itself, not to a proxy of it.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"follow: model is {type(model).__name__}, but should be a torch.nn.Module")
    follower = _Follower(switch)
    return Handles(
        # Before FSDP2's own, which gathers the weights.
        model.register_forward_pre_hook(follower.forward, prepend=True),
        model.register_state_dict_pre_hook(follower.state_dict),
    )
