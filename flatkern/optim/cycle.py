"""The state machine behind every optimizer: what is perturbed, which gradients wait, what was consumed.

All state that changes between calls lives in one `Cycle`, made in `__init__` and mutated in place:
wrappers such as Lightning's run the optimizer's methods on a proxy with another `__dict__`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import shards
from ..dispatch import resolve
from ..tables import same_layout
from .capture import OnDevice, is_under_way
from .plan import Bucket, Plan, Plans

# Cycles whose parameters hold a perturbation now. Only a registry can tell a new optimizer that
# another one has changed its parameters; it is weak, so it keeps nothing alive.
_perturbed_cycles: weakref.WeakSet[Cycle] = weakref.WeakSet()


@dataclass(eq=False)
class Cycle:
    """Mutable state of one optimizer between calls."""

    backend: str | None
    owner: weakref.ref[Any]  # the optimizer itself, not a proxy of it
    plan: Plan | None = None  # what is perturbed now; None: weights are clean
    plans: Plans = field(default_factory=Plans)
    backups: dict[Tensor, Tensor] = field(default_factory=dict)  # scratch, kept for the optimizer's life
    master_versions: dict[Tensor, int] = field(default_factory=dict)
    early: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)  # Wrap: state before the base has made its own
    checked: dict[int, list[Any]] = field(default_factory=dict)  # group values that were found right
    created: list[tuple[Tensor, str]] = field(default_factory=list)  # state made by the present call
    on_device: OnDevice | None = None  # capturable: what graphs read
    epoch: int = 0  # counts re-allocations of backups
    rounds: int = 0  # perturbed rounds that restore() completed
    aside: list[Tensor | None] = field(default_factory=list)  # the sum of their gradients, by parameter; or empty
    sum_versions: list[int | None] = field(default_factory=list)  # its versions when it went back to `.grad`
    clean: list[Tensor | None] = field(default_factory=list)  # likewise m-RWP's gradient at clean weights
    squares: dict[Tensor, Tensor] = field(default_factory=dict)  # mix="losses": sums for the history
    consumed: tuple[Any, int] | None = None  # the first gradient that the last call used up: weak reference, version
    zeroed: list[int | None] = field(default_factory=list)  # versions of all gradients after zeroing in place
    ascent_norm: Tensor | None = None
    grad_norm: Tensor | None = None
    skip: Tensor | None = None  # nonzero: a gradient that this step depends on was not finite
    scaler: Any = None  # the GradScaler given to perturb(), and
    scaler_pass: Any = None  # the pass it unscaled; the scaler knows it by id, so it must live on
    steps: int = 0
    ever_perturbed: bool = False
    suspended: bool = False  # inside clean(): weights are clean, a perturbation waits
    in_closure: bool = False
    warned: set[str] = field(default_factory=set)

    # --- gradients -------------------------------------------------------------------------------

    def is_fresh(self, params: Iterable[Tensor]) -> bool:
        """True if `.grad` is there and is not what the last call consumed (told by the first gradient)."""
        for p in params:
            if p.grad is not None:
                return not _is(self.consumed, p.grad) or self._differs_from_zeroed(params)
        self.consumed = None  # whatever comes next is new, even the same tensor put back by hand
        return False

    def _differs_from_zeroed(self, params: Iterable[Tensor]) -> bool:
        """Gradients zeroed in place stay: one that is written since is fresh, even if the first one is not."""
        if not self.zeroed:
            return False
        return any(p.grad is not None and shards.version(p.grad) != v for p, v in zip(params, self.zeroed, strict=True))

    def mark_zeroed(self, params: list[Tensor]) -> None:
        """The gradients were zeroed by their optimizer: dropped, or in place."""
        self.mark_consumed(params)
        if self.consumed is not None:
            self.zeroed = [None if p.grad is None else shards.version(p.grad) for p in params]

    def mark_consumed(self, params: Iterable[Tensor]) -> None:
        self.zeroed = []
        for p in params:
            if p.grad is not None:
                self.consumed = weakref.ref(p.grad), shards.version(p.grad)
                return
        self.consumed = None

    def has_pending(self) -> bool:
        return bool(self.rounds or self.clean or self.squares)

    def drop_pending(self) -> None:
        self.rounds = 0
        self.aside = []
        self.clean = []
        self.squares.clear()
        self.skip = self.scaler = self.scaler_pass = None

    def take_gradients(self, params: list[Tensor]) -> list[Tensor | None]:
        """Empty `.grad` and return what was there: pointers, or copies of views that others overwrite."""
        taken = [p.grad for p in params]
        for p in params:
            p.grad = None
        self.consumed = None
        return [g.clone() if g is not None and g._is_view() else g for g in taken]

    def put_back(self, params: list[Tensor]) -> None:
        """Give the sum of earlier rounds back to `.grad`, so that autograd and DDP accumulate into it."""
        for p, g in zip(params, self.aside, strict=True):
            p.grad = g
        self.sum_versions = [None if g is None else shards.version(g) for g in self.aside]
        self.aside = []
        self.mark_consumed(params)

    def require_finite(self, flag: Tensor) -> None:
        """Skip the coming step where `flag` (0-dim float32) is nonzero."""
        self.skip = flag if self.skip is None else torch.maximum(self.skip, flag.to(self.skip.device))

    # --- weights ---------------------------------------------------------------------------------

    def backups_of(self, bucket: Bucket) -> list[Tensor]:
        """Scratch for the clean copies, laid out like the parameters."""
        if bucket.epoch != self.epoch:
            bucket.backups = [self._backup(p) for p in bucket.params]
            bucket.epoch = self.epoch
        return bucket.backups

    def _backup(self, p: Tensor) -> Tensor:
        saved, part = self.backups.get(p), shards.local(p)
        if saved is None or saved.dtype != p.dtype or saved.device != part.device or not same_layout(saved, part):
            with torch.inference_mode(False):  # it is written in every mode
                new = torch.empty_like(part, memory_format=torch.preserve_format, requires_grad=False)
            if saved is not None:
                self.plans.clear()  # old plans would keep it alive
                if saved.shape == part.shape:
                    new.copy_(saved)  # it may hold the clean weights of a perturbation that is on
            saved = self.backups[p] = new
        return saved

    def clean_copy(self, p: Tensor) -> Tensor:
        """The clean weights of one perturbed parameter."""
        assert self.plan is not None
        return next(c for b in self.plan.buckets for q, c in zip(b.params, b.clean, strict=True) if q is p)

    def release(self) -> None:
        """Free the scratch."""
        self.backups.clear()
        self.plans.clear()
        self.epoch += 1

    def enter(self, plan: Plan) -> None:
        """Weights of `plan` are perturbed now; each bucket knows its clean copies."""
        self.plan = plan
        self.ever_perturbed = True
        for bucket in plan.buckets:
            bucket.versions = bucket.versions_now()
            self.note_masters(bucket)
        _perturbed_cycles.add(self)

    def leave(self) -> None:
        """Weights are clean now."""
        self.plan = None
        _perturbed_cycles.discard(self)

    def put_clean_weights(self, plan: Plan) -> None:
        """Restore every parameter of `plan`."""
        for bucket in plan.buckets:
            self.restore(bucket.params, bucket.clean)
            self.note_masters(bucket)
        torch.clear_autocast_cache()

    def note_masters(self, bucket: Bucket) -> None:
        """A master is valid as long as its parameter is what we wrote."""
        if bucket.masters:
            self.master_versions.update(zip(bucket.params, bucket.versions_now(), strict=True))

    def restore(self, params: list[Tensor], clean: list[Tensor]) -> None:
        """restore_ on parameters of one device."""
        resolve("restore_", params[0].device.type, self.backend)(shards.parts(params), shards.parts(clean))

    def abandon(self) -> None:
        """The optimizer is gone: leave clean weights behind.

        Not inside a capture, which may be of anything: its graph would write these weights at every replay.
        """
        if self.plan is not None and not self.suspended and not is_under_way():
            self.put_clean_weights(self.plan)
        self.leave()

    def end_by_version(self) -> None:
        """End a perturbation, keeping what others wrote into the parameters since; drop what is pending."""
        if self.plan is not None and not self.suspended:
            for bucket in self.plan.buckets:
                ours = [k for k, v in enumerate(bucket.versions_now()) if v == bucket.versions[k]]
                if ours:
                    self.restore([bucket.params[k] for k in ours], [bucket.clean[k] for k in ours])
        self.leave()
        self.drop_pending()


def _is(mark: tuple[Any, int] | None, grad: Tensor) -> bool:
    return mark is not None and mark[0]() is grad and mark[1] == shards.version(grad)


def holders(params: Iterable[Tensor]) -> Iterator[Cycle]:
    """Cycles that hold a perturbation on any of `params`."""
    ids = {id(p) for p in params}
    for cycle in list(_perturbed_cycles):
        if cycle.plan is not None and ids & cycle.plan.members:
            yield cycle
