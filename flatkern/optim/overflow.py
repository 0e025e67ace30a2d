"""An ascent that is not finite on one rank alone, which all ranks have to know of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradients import Grads
from .hooks import WeakHook
from .phase import PERTURBED
from .weights import Weights


class OverflowOnRank:
    """Tells the other ranks of DDP by the gradient that it averages next.

    In `no_sync()` an ascent follows this rank's own gradient. Where that one is not finite the step is skipped, and
    replicas would part if the others made it. So the gradient of one small parameter is multiplied by what is NaN then
    and else 1, after a backward at the perturbed weights and before DDP takes the mean, which is NaN on every rank.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.carrier: Tensor | None = None  # the parameter; None: no ascent of this rank's own is under way
        self._handle: Any = None
        self._factor: Tensor | None = None

    def tell(self, candidates: list[Tensor], norm: Tensor) -> None:
        """`norm` is that of this rank's ascent, of the gradients of `candidates`."""
        carrier = min(candidates, key=Tensor.numel, default=None)
        if carrier is None:
            return
        if carrier is not self.carrier:
            self.forget()
            self.carrier, self._handle = carrier, carrier.register_post_accumulate_grad_hook(WeakHook(self.mark))
        self._factor = norm.mul(0).add_(1).to(carrier.device)  # 0 times what is not finite is not a number

    @torch.no_grad()
    def mark(self, p: Tensor) -> None:
        """A backward has added to `p.grad`."""
        if p is self.carrier and p.grad is not None and self._weights.phase is PERTURBED:
            p.grad.mul_(self._factor)  # type: ignore[arg-type]

    def heard(self, params: list[Tensor], grads: Grads) -> list[Tensor]:
        """Nonzero where a rank has told; `grads` are the final ones of `params`."""
        found = [g for p, g in zip(params, grads, strict=True) if p is self.carrier and g is not None]
        return [g.float().mul(0).sum().ne_(0) for g in found]

    def forget(self) -> None:
        """The step is over."""
        if self._handle is not None:
            self._handle.remove()
        self.carrier = self._handle = self._factor = None
