"""An ascent that is not finite on one rank alone, which all ranks have to know of."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .gradients import Grads
from .hooks import WeakHook, remove_all
from .phase import PERTURBED
from .weights import Weights


class OverflowOnRank:
    """Tells the other ranks of DDP by the gradient that it averages next.

    In `no_sync()` an ascent follows this rank's own gradient. Where that one is not finite the step is skipped, and
    replicas would part if the others made it. So one element of a gradient is multiplied by NaN then and else by 1,
    after a backward at the perturbed weights and before DDP takes the mean: the first element of the first gradient
    that comes, since ranks may use other parameters. All ranks look at the first elements of the means, which are the
    same everywhere, and none of them at its own ascent.
    """

    def __init__(self, weights: Weights) -> None:
        self.is_watching = False  # the coming step depends on an ascent of this rank's own
        self._weights = weights
        self._factor: Tensor | None = None  # that no gradient has taken yet
        self._hooks: dict[Tensor, Any] = {}  # with the handle that removes it
        weakref.finalize(self, remove_all, self._hooks).atexit = False

    def tell(self, params: list[Tensor], norm: Tensor) -> None:
        """`norm` is that of this rank's ascent; one of `params` will have a gradient at the perturbed weights."""
        self.is_watching = True
        self._factor = norm.mul(0).add_(1)  # 0 times what is not finite is not a number
        for p in params:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(WeakHook(self.mark))

    @torch.no_grad()
    def mark(self, p: Tensor) -> None:
        """A backward has added to `p.grad`."""
        grad, factor = p.grad, self._factor
        if factor is None or grad is None or not grad.numel() or self._weights.phase is not PERTURBED:
            return
        _first(grad).mul_(factor.to(grad.device))
        self._factor = None

    def heard(self, grads: Grads) -> list[Tensor]:
        """Nonzero where a rank has told; `grads` are the final ones."""
        found: dict[Any, list[Tensor]] = {}
        for g in grads:
            if g is not None and g.numel():
                found.setdefault((g.device, g.dtype), []).append(_first(g))
        return [torch.stack(each).float().mul_(0).sum().ne_(0) for each in found.values()]

    def forget(self) -> None:
        """The step is over."""
        self.is_watching, self._factor = False, None


def _first(t: Tensor) -> Tensor:
    """The first element, as a view."""
    return t.as_strided((), (), t.storage_offset())
