"""What the integrations share. Imports none of the training libraries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..optim.base import FlatOptimizer


def unwrapped(optimizer: Any) -> Any:
    """The flatkern optimizer inside of Accelerate's wrapper; where there is none, the innermost one."""
    while not isinstance(optimizer, FlatOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def drop_step(opt: FlatOptimizer) -> None:
    """Clean weights, and none of the gradients of the step that has begun."""
    opt.eval()
    opt.release()
    opt.zero_grad()


def replicas_in(model: torch.nn.Module) -> list[DistributedDataParallel]:
    """DDP in a model, inside of what torch.compile makes of it, too."""
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel)]


@contextmanager
def averaging_over_ranks(replicas: Sequence[DistributedDataParallel], wanted: bool) -> Iterator[None]:
    """DDP averages what a backward inside leaves in `.grad`, or leaves it to a later one, whatever the trainer has set
    before."""
    before = [m.require_backward_grad_sync for m in replicas]
    try:
        for m in replicas:
            m.require_backward_grad_sync = wanted  # what no_sync() sets
        yield
    finally:
        for m, value in zip(replicas, before, strict=True):
            m.require_backward_grad_sync = value
