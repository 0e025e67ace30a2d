"""How many backward passes are in a gradient: rounds="sum" of m-RWP needs the number of clean and of noisy ones."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..values import check_uint32
from .hooks import WeakHook, remove_all

Pair = tuple[int, int]


def checked_passes(value: Any) -> Pair | None:
    """What `opt.passes` is set to; None takes it back.

    Raises:
        TypeError, ValueError: it is not a pair of integers >= 1.
    """
    if value is None:
        return None
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"passes: it is set to {value!r}, but should be (n1, n2), numbers of clean and of noisy passes")
    pair = check_uint32("passes", "n1", value[0]), check_uint32("passes", "n2", value[1])
    if 0 in pair:
        raise ValueError(f"passes: it is set to {value!r}, but a step of m-RWP has a clean and a noisy pass at least")
    return pair


class Fired:
    """The backward passes that have added to one gradient, as the ids of autograd's graph tasks."""

    __slots__ = ("grad", "tasks", "version", "written")

    def __init__(self, grad: Tensor) -> None:
        self.grad = weakref.ref(grad)
        self.tasks: list[int] = []
        self.version = 0
        # By somebody else, between two passes. Under create_graph autograd adds up in new tensors, and tells nobody.
        self.written = grad.requires_grad

    def is_of(self, grad: Tensor) -> bool:
        """True if `grad` is what the passes have added to. DDP replaces it by a view of its bucket."""
        return self.grad() is grad or (grad._is_view() and _in_process_group())


class Passes:
    """Counts the backward passes of a step: a hook on every parameter notes which pass has added to its gradient.

    What is counted is what is in `.grad` now: a gradient that somebody has dropped takes its passes along. The count is
    certain where one parameter at least has seen every pass that any has seen. It is not, and the step refuses, where
    a pass is several graph tasks (reentrant checkpointing), where no parameter is in all passes, where gradients are
    assigned instead of accumulated, or written between two passes, or where parameters are sharded: FSDP2 adds
    unsynchronized passes up outside of `.grad`.
    """

    def __init__(self, fired: dict[Tensor, Fired]) -> None:
        """
        Arguments:
            fired: by parameter, of the gradients in `.grad`; whoever uses those up empties it.
        """
        self.given: Pair | None = None  # by the user, for the coming step
        self.clean: int | None = 0  # of the gradient that m-RWP waits with; None: not certain
        self.noisy: int | None = 0  # of the rounds that are set aside
        self.is_counting = False
        self._fired = fired
        self._handles: dict[Tensor, Any] = {}
        weakref.finalize(self, remove_all, self._handles).atexit = False

    def watch(self, params: list[Tensor]) -> None:
        """Count what reaches `params` from now on. The hooks go with the optimizer."""
        self.is_counting = True
        for p in params:
            if p.requires_grad and p not in self._handles:
                self._handles[p] = p.register_post_accumulate_grad_hook(WeakHook(self.note))

    def note(self, p: Tensor) -> None:
        """A backward pass has added to the gradient of `p`."""
        grad = p.grad
        if grad is None:
            return
        entry = self._fired.get(p)
        if entry is None or not entry.is_of(grad):
            entry = self._fired[p] = Fired(grad)
        elif grad._version != entry.version + 1 and not _in_process_group():  # DDP writes the mean over ranks
            entry.written = True
        entry.version = grad._version
        entry.tasks.append(torch._C._current_graph_task_id())

    def in_grad(self, params: list[Tensor]) -> int | None:
        """The number of passes whose gradients are in `.grad`; None where it is not certain."""
        tasks: list[list[int]] = []
        for p in params:
            grad = p.grad
            if grad is None or not p.requires_grad:
                continue
            entry = self._fired.get(p)
            if dtensor.is_sharded(p) or (entry is not None and entry.written):
                return None
            if entry is not None and entry.is_of(grad):
                tasks.append(entry.tasks)
        most = max(map(len, tasks), default=0)
        return most if most and len(set().union(*tasks)) == most else None

    def end_round(self, params: list[Tensor]) -> None:
        """The passes in `.grad` join those of earlier noisy rounds."""
        self.noisy = _sum(self.noisy, self.in_grad(params))

    def of_step(self, clean: int | None, noisy: int | None) -> Pair:
        """(n1, n2) of the coming step, as counted where nothing is given.

        Arguments:
            clean: passes in the clean gradient.
            noisy: passes of the round in `.grad`, which has not ended; 0 without one.

        Raises:
            RuntimeError: neither is known.
        """
        if self.given is not None:
            return self.given
        noisy = _sum(self.noisy, noisy)
        if not clean or not noisy:
            which = "noisy" if clean else "clean"
            raise RuntimeError(
                f'step: m-RWP with rounds="sum" weighs by numbers of passes, but the {which} ones cannot be counted '
                "(sharded parameters, reentrant checkpointing, no parameter in every pass, gradients that are assigned "
                "or written between two passes); set opt.passes = (n1, n2), of clean and of noisy passes, before step()"
            )
        return clean, noisy

    def forget(self) -> None:
        """The step is over, or dropped."""
        self.given, self.clean, self.noisy = None, 0, 0


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _in_process_group() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
