"""A window of gradient accumulation, for loops that are in others' hands between its micro-batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..optim.base import FlatOptimizer
from ..optim.phase import SUSPENDED
from .shared import drop_step


class Window:
    """The micro-batches of a step, and what is set aside between two of them.

    Between two calls others evaluate, save and run backwards of their own: they find clean weights, and `.grad` is
    empty.
    """

    def __init__(self, opt: FlatOptimizer, sharded: Sequence[FSDPModule]) -> None:
        self.opt = opt
        self.index = 0  # of the micro-batch
        self.kind = "one"  # how often each is called, a word of `closures_of`
        self.clean = 0  # how many of them were m-RWP's clean ones
        self._sharded = sharded
        self._grads: dict[Tensor, Tensor] = {}
        self._perturbed: Any = None  # what takes the weights back to the perturbed point; None at clean weights

    def begin_micro_batch(self) -> None:
        """The first one begins without gradients; before another one everything is as the last one has left it."""
        opt = self.opt
        if self.index == 0:
            opt.zero_grad()  # not the prepared optimizer's, which does nothing in the first of several
            return
        for p in self._params():
            p.grad = self._grads.get(p)
        self._grads = {}
        if self._perturbed is not None:
            self.reshard()
            kept, self._perturbed = self._perturbed, None
            opt.cycle.weights.resume(kept)

    def end_micro_batch(self) -> None:
        """Pointers to gradients wait here; views of DDP's buckets, which any backward of the model overwrites, are
        copied."""
        opt = self.opt
        self.index += 1
        for p in self._params():
            if p.grad is not None:
                self._grads[p] = p.grad.clone() if p.grad._is_view() else p.grad
                p.grad = None
        if opt.is_perturbed and not opt.rolling:  # rolling noise follows the model
            self._perturbed = opt.cycle.weights.suspend()

    def reshard(self) -> None:
        """Before noise is drawn: after an evaluation FSDP2's root keeps its whole weights, as they were then."""
        for shards in self._sharded:
            shards.reshard()

    def drop(self) -> None:
        """Clean weights, and nothing of the window is left."""
        opt = self.opt
        if self._perturbed is not None and opt.cycle.phase is SUSPENDED:
            opt.cycle.weights.left()  # they are clean
            opt.refresh_masters()
        self.forget()
        drop_step(opt)

    def drop_open(self) -> None:
        if self.index:
            self.drop()

    def forget(self) -> None:
        """The next micro-batch is a first one."""
        self.index = self.clean = 0
        self._grads, self._perturbed = {}, None

    def check_save(self, folder: str, is_named_by_accelerate: bool) -> None:
        """Refuse a checkpoint that the optimizer would refuse when the weights are written already."""
        if not (self.index and self.opt.cycle.gradients.is_pending):
            return
        if is_named_by_accelerate:
            with contextlib.suppress(OSError):  # a folder that is not empty
                os.rmdir(folder)  # or the next save_state() finds that it exists
        raise RuntimeError(
            f"save_state: {self.opt.perturbation.name} is within a window of micro-batches, whose gradients a "
            "checkpoint does not hold; save where accelerator.sync_gradients is True, or call step.drop_window() "
            "first, with step = passes(...)"
        )

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.opt.param_groups for p in group["params"])
