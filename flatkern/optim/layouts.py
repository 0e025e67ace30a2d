"""Memory formats: gradients, state and scratch follow the parameter when the model changes its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import LayoutError
from ..tables import same_layout
from .plan import Bucket

if TYPE_CHECKING:
    from .base import FlatOptimizer


def like(t: Tensor, p: Tensor) -> Tensor:
    """`t` in the memory format of `p`: itself, or a copy."""
    if same_layout(t, p) or t.shape != p.shape:
        return t
    return torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)


def follow_parameters(opt: FlatOptimizer, buckets: Iterable[Bucket]) -> None:
    """Lay out again, once, whatever is walked together with the parameters."""
    cycle = opt.cycle
    for bucket in buckets:
        for p in bucket.params:
            if p.grad is not None:
                p.grad = like(p.grad, p)
            state = opt.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = like(value, p)
    cycle.epoch += 1


def retry(opt: FlatOptimizer, buckets: list[Bucket], call: Callable[[], None]) -> None:
    """Run `call`; where a layout stands in its way, lay out again and run it once more.

    Ops check before they write, so a call that raised LayoutError has changed nothing.
    """
    try:
        call()
    except LayoutError:
        follow_parameters(opt, buckets)
        call()
