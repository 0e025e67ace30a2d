"""Which gradients wait, which are new, and what a step applies: pointers, no weights and no operations of ours."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import dtensor

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Final:
    """What a step applies: one entry per parameter in the optimizer's order, None where missing."""

    perturbed: Grads  # of the perturbed pass, or of the only one
    clean: Grads | None = None  # at the clean weights, already unscaled; or what else enters the update beside it
    rounds: float = 1  # what the sum `perturbed` is divided by
    at_perturbed_weights: bool = False  # then ARWP's history sees it
    unscaled: bool = False  # a GradScaler's factor is off already
    from_grad: bool = True  # `perturbed` is what is in `.grad`
    in_copies: bool = False  # rolling: the copies are updated, and the parameters stay as they are for the moment
    squares: dict[Tensor, Tensor] = field(default_factory=dict)  # where not `perturbed`: what ARWP's history takes
    clean_rounds: float = 1  # what the sum `clean` is divided by

    def has(self, k: int) -> bool:
        """True if parameter `k` has a gradient of any pass."""
        return self.perturbed[k] is not None or (self.clean is not None and self.clean[k] is not None)


def gradients_of(params: list[Tensor]) -> Grads:
    """`.grad` of every parameter. One with torch's negative bit is a view whose memory has the wrong sign, and kernels
    read memory: it is replaced by what it means."""
    grads = [p.grad for p in params]
    try:
        negative = any(map(Tensor.is_neg, grads))  # type: ignore[arg-type]
    except TypeError:  # one is None
        negative = any([g is not None and g.is_neg() for g in grads])
    if not negative:
        return grads
    for p in params:
        if p.grad is not None and p.grad.is_neg():
            p.grad = p.grad.resolve_neg()
    return [p.grad for p in params]


def first_grad(params: list[Tensor]) -> Any:
    """The gradient that speaks for all of a pass; None without one. A frozen parameter may keep an old one."""
    return next((p.grad for p in params if p.grad is not None and p.requires_grad), None)


def resolved(grads: Grads) -> Grads:
    """Gradients that waited outside of `.grad`, without the negative bit; see `gradients_of`."""
    return [None if g is None else g.resolve_neg() for g in grads]


def show_unscaled(params: list[Tensor], scaled: Grads, unscaled: Grads) -> None:
    """After a step that unscaled copies: they are what others find in `.grad`, where the scaled ones still are."""
    for p, old, new in zip(params, scaled, unscaled, strict=True):
        if p.grad is old and new is not None:
            p.grad = new


def _is_copy(grad: Tensor, of: Tensor) -> bool:
    a, b = dtensor.local(grad), dtensor.local(of)
    return a.layout == b.layout == torch.strided and torch.equal(a, b)


class Ledger:
    """The gradients between calls.

    A gradient is *new* unless the last call used it up, which is told by the first one: the same tensor at the same
    version. Sums of earlier rounds are set aside by restore(), and go back to `.grad` in the next perturb(), because
    autograd, DDP and scalers accumulate and look nowhere else.
    """

    def __init__(self) -> None:
        self.rounds = 0  # perturbed rounds that restore() completed
        self.accumulated_grads: Grads = []  # the sum of their gradients, by parameter; empty without rounds
        self.clean: Grads = []  # m-RWP's gradient at clean weights, by parameter; or empty
        self.ascent: Grads = []  # that this round went along, where it enters the update; or empty
        self.ascents: Grads = []  # the sum of those of finished rounds; or empty
        self.lost = False  # somebody else has cleared the sum when a round had added to it
        self.squares: dict[Tensor, Tensor] = {}  # mix="losses": what ARWP's history will take of the perturbed pass
        self.own: dict[Tensor, Tensor] = {}  # mix="ranks": norms of this rank's gradients, before other ranks' joined
        self.fired: dict[Tensor, Any] = {}  # which backward passes have added to `.grad`, where that is counted
        self._returned_at: list[int | None] | None = None  # versions of the sum when it went back to `.grad`
        self._noisy: Any = None  # rolling: the first gradient of a pass whose noise eval() has taken away since; weakly
        self._last_used: tuple[Any, int] | None = None  # the first gradient that was used up: weak reference, version
        self._zeroed_at: dict[Tensor, int] = {}  # versions of all gradients after they were zeroed in place

    # --- new or used -----------------------------------------------------------------------------

    def is_new(self, params: list[Tensor]) -> bool:
        """True if `.grad` holds a gradient that the last call did not use up."""
        for p in params:
            grad = p.grad
            if grad is not None and p.requires_grad:  # a frozen parameter may keep an old one
                mark = self._last_used
                if mark is None or mark[0]() is not grad or mark[1] != dtensor.version(grad):
                    return True
                # Gradients that were zeroed in place stay: one written since is new, even if the first one is not.
                known = self._zeroed_at
                return bool(known) and any(
                    p.grad is not None and dtensor.version(p.grad) != known.get(p) for p in params
                )
        self._last_used = None  # whatever comes next is new, even the same tensor put back by hand
        return False

    def was_given(self, params: list[Tensor]) -> bool:
        """`is_new`, but that gradients of the last step which somebody else has zeroed in place are used ones.

        On a GPU the host would have to wait to know, and they count as new.
        """
        if not self.is_new(params):
            return False
        first = first_grad(params)
        if not (first.is_cpu and self.holds_zeros_only(params)):
            return True
        self.mark_zeroed(params)
        return False

    def holds_zeros_only(self, params: list[Tensor]) -> bool:
        """True if the gradients are tensors of the last step that somebody else has zeroed in place."""
        first = first_grad(params)
        known = first is not None and self._last_used is not None and self._last_used[0]() is first
        return known and not any(bool(dtensor.local(p.grad).any()) for p in params if p.grad is not None)

    def note_noisy(self, params: list[Tensor]) -> None:
        """Rolling: the noise goes, and a new gradient in `.grad` was taken under it."""
        if self.is_new(params):
            self._noisy = weakref.ref(first_grad(params))

    def is_noisy(self, params: list[Tensor]) -> bool:
        """True if `.grad` holds the gradient that `note_noisy` saw; it may have been clipped or unscaled since."""
        first = first_grad(params)
        return first is not None and self._noisy is not None and self._noisy() is first

    def mark_used(self, params: list[Tensor]) -> None:
        self._zeroed_at, self._noisy = {}, None
        self.fired.clear()
        for p in params:
            grad = p.grad
            if grad is not None and p.requires_grad:
                version = grad._version if type(grad) in dtensor.PLAIN else dtensor.version(grad)
                self._last_used = weakref.ref(grad), version
                return
        self._last_used = None

    def mark_zeroed(self, params: list[Tensor]) -> None:
        """The gradients were zeroed by their optimizer: dropped, or in place."""
        self.mark_used(params)
        if not self.rounds:
            self.own = {}
        if self._last_used is not None:
            self._zeroed_at = {p: dtensor.version(p.grad) for p in params if p.grad is not None}

    def forget_used(self) -> None:
        """Whatever is in `.grad` from now on is new."""
        self._last_used = self._noisy = None

    def clear(self, params: list[Tensor]) -> None:
        """Empty `.grad`; whatever comes there is new."""
        self.fired.clear()
        for p in params:
            p.grad = None
        self._last_used = None

    # --- rounds ----------------------------------------------------------------------------------

    @property
    def is_pending(self) -> bool:
        """True if a step has begun that is not finished."""
        return bool(self.rounds or self.clean or self.squares)

    def has_new_since_perturb(self, params: list[Tensor]) -> bool:
        """True if a backward has added to `.grad` since perturb()."""
        if self._returned_at is None:
            return self.is_new(params)
        # Any parameter may be the one that this round has added to.
        sums = zip(params, self.accumulated_grads, self._returned_at, strict=True)
        return any(p.grad is not None and (p.grad is not s or dtensor.version(s) != v) for p, s, v in sums)

    def sum_was_replaced(self, grads: Grads) -> bool:
        """True if other tensors are where the sum of earlier rounds was put."""
        return self._returned_at is not None and not all(map(is_, grads, self.accumulated_grads))

    def sum_was_cleared(self, params: list[Tensor]) -> bool:
        """True if somebody else has taken the sum of earlier rounds out of `.grad`, as it was."""
        return bool(self._taken_out(params, after_adding=False))

    def sum_is_lost(self, params: list[Tensor]) -> bool:
        """True if somebody else has taken it out after this round had added to it: nothing can part the two again."""
        return bool(self._taken_out(params, after_adding=True))

    def _taken_out(self, params: list[Tensor], after_adding: bool) -> list[tuple[Tensor, Tensor]]:
        """Parameters whose `.grad` has lost its sum, with that sum; those that this round had added to, or the others.

        Autograd adds to the sum in place. Then DDP may copy it into a bucket's view, or others into a tensor of theirs,
        which takes its place in `.grad`; with those that this round did not reach, where the copy is the sum. Under
        create_graph autograd adds out of place, and the result requires grad.
        """
        sums = zip(self.accumulated_grads, self._returned_at or (), strict=True)
        added = [s is not None and dtensor.version(s) != v for s, v in sums]
        reached, found = any(added), []
        for p, s, was_added_to in zip(params, self.accumulated_grads, added, strict=True):
            g = p.grad
            if s is None or g is s or was_added_to is not after_adding:
                continue
            if g is None or not (g.requires_grad or (reached and (g._is_view() or _is_copy(g, s)))):
                found.append((p, s))
        return found

    def add_cleared_sum(self, params: list[Tensor]) -> None:
        """Put the sum of earlier rounds back where somebody else has taken it out, with what was added since.

        As autograd would have added it, so no bit depends on who cleared what.
        """
        for p, s in self._taken_out(params, after_adding=False):
            if p.grad is not None:
                s.add_(p.grad)
            p.grad = s

    def set_aside(self, params: list[Tensor], counted: bool) -> None:
        """The end of a round: its gradients join the sum, outside of `.grad`."""
        grads = [p.grad for p in params]
        if self.sum_was_replaced(grads):
            self.lost |= self.sum_is_lost(params)
            self.add_cleared_sum(params)
            grads = [p.grad for p in params]
        taken = self.take(params, grads)
        self.accumulated_grads, self.rounds, self._returned_at = taken, self.rounds + counted, None

    def ascents_with(self, counted: bool) -> Grads:
        """The sum of the ascents' gradients, that of this round too if it counts."""
        if not (counted and self.ascent):
            return self.ascents
        return added(self.ascents, self.ascent) if self.ascents else self.ascent

    def end_ascent(self, counted: bool) -> None:
        """A round has ended, with a gradient at its perturbed weights if it is `counted`."""
        self.ascents, self.ascent = self.ascents_with(counted), []

    def keep_round(self, params: list[Tensor]) -> None:
        """A step has failed: its round is finished, and the sum stays in `.grad`, so that the step can be repeated."""
        counted = self.has_new_since_perturb(params)
        self.accumulated_grads = [p.grad for p in params]
        self._note_returned()
        self.rounds += counted
        self.mark_used(params)

    def give_back(self, params: list[Tensor]) -> None:
        """The sum of earlier rounds returns to `.grad`."""
        self._note_returned()
        for p, g in zip(params, self.accumulated_grads, strict=True):
            p.grad = g
        self.mark_used(params)

    def _note_returned(self) -> None:
        self._returned_at = [None if g is None else dtensor.version(g) for g in self.accumulated_grads]

    @property
    def holds_sum_in_grad(self) -> bool:
        """True if the sum of earlier rounds is in `.grad`."""
        return self._returned_at is not None

    def show_sum(self, params: list[Tensor]) -> None:
        """After a step that took the sum from outside of `.grad`: it is what others find there."""
        for p, g in zip(params, self.accumulated_grads, strict=False):
            if p.grad is None:
                p.grad = g

    def take(self, params: list[Tensor], grads: Grads) -> Grads:
        """Empty `.grad` of `grads`, and return them: pointers, or copies of views that others overwrite (DDP's)."""
        self.clear(params)
        return [g.clone() if g is not None and g._is_view() else g for g in grads]

    def drop_round(self, params: list[Tensor]) -> None:
        """After an exception: this round's gradients are dropped, and what m-RWP waits with; earlier rounds stay."""
        if self._returned_at is not None:
            # Autograd may have added to the sum in place, and what it added cannot be taken out again.
            sums = zip(self.accumulated_grads, self._returned_at, strict=True)
            if any(s is not None and dtensor.version(s) != v for s, v in sums):
                self.rounds = 0
            self._returned_at = None
        self.clear(params)
        self.clean = []
        self.ascent = []
        if not self.rounds:
            self.drop()

    def drop(self) -> None:
        """Forget what is pending."""
        self.rounds = 0
        self.accumulated_grads = []
        self.clean = []
        self.ascent = []
        self.ascents = []
        self.squares = {}
        self.own = {}
        self.lost = False
        self._returned_at = None


def added(first: Grads, second: Grads) -> Grads:
    """The sums of two gradients of each parameter; where one is missing, the other."""
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


def mean_is_over_ranks() -> bool:
    """True if other ranks take the mean of gradients with this one."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
