"""Where the clean weights are while perturbed ones are in the parameters, and every way back.

The only caller of restore_. An optimizer that is collected while its parameters are perturbed leaves clean ones behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dtensor
from ..checks import LayoutError
from ..tables import same_layout
from .buckets import MAX_PARTITIONS, Bucket, Call, Partition
from .layouts import like
from .phase import CLEAN, PERTURBED, SUSPENDED
from .scalars import is_capturing
from .state import State

# Weights that hold a perturbation now. Only a registry can tell an optimizer that another one has changed its
# parameters; it is weak, so it keeps nothing alive.
perturbing: weakref.WeakSet[Weights] = weakref.WeakSet()


class CleanStore(NamedTuple):
    """Where the clean weights of a bucket are: in one of the two, the other is None."""

    backups: list[Tensor] | None
    masters: list[Tensor] | None


Prepare = Callable[[list[CleanStore], bool], list[Call]]


@dataclass
class Held:
    """A perturbed bucket: its clean weights, and its parameters' versions after our write; while it runs, before."""

    bucket: Bucket
    clean: list[Tensor]
    versions: list[int]
    call: Call | None = None  # while it is written: by whom


BITS = {4: torch.int32, 2: torch.int16}


def _written(held: Held) -> list[int]:
    """The positions of the parameters that an interrupted call has written."""
    call, count = held.call, len(held.bucket.params)
    assert call is not None
    if call.progress == "whole":
        return list(range(count)) if call.marks() != held.versions else []
    if call.progress == "versions":
        return [k for k, v in enumerate(held.bucket.versions()) if v != held.versions[k]]
    if held.bucket.has_master:
        return list(range(count))  # from a master a parameter is restored rightly in either case
    # Kernels are launched one after another, and a copy is right only where its kernel has run. The same call on the
    # copies gives what is in the parameters there, bit for bit, and nowhere else.
    again = [c.clone() for c in held.clean]
    call.on(again)
    pairs = zip(dtensor.local_parts(held.bucket.params), again, strict=True)
    return [k for k, (p, a) in enumerate(pairs) if torch.equal(*(t.view(BITS[t.element_size()]) for t in (p, a)))]


class Weights:
    """Which weights of one optimizer are perturbed."""

    def __init__(self, state: State) -> None:
        self.partition: Partition | None = None  # of the perturbed parameters; None: all weights are clean
        self.phase = CLEAN
        self.ever_perturbed = False
        self.unfinished = (
            False  # some weights are perturbed and some are not: a call was interrupted, and its undoing too
        )
        self.backups: dict[Tensor, Tensor] = {}  # scratch, kept for the optimizer's life
        self._state = state
        self._held: list[Held] = []
        self._stores: dict[Bucket, CleanStore] = {}  # of buckets without masters

    # --- where clean weights are -----------------------------------------------------------------

    def store(self, bucket: Bucket) -> CleanStore:
        """Where the clean weights of a bucket are, or will be."""
        found = self._stores.get(bucket)
        if found is None:
            if bucket.has_master:
                held = frozenset() if self.partition is None else self.partition.members
                return CleanStore(None, self._state.masters(bucket.params, held, self._clean_copy))
            found = CleanStore([self._backup(p) for p in bucket.params], None)
            if len(self._stores) >= MAX_PARTITIONS:
                self._stores.clear()
            self._stores[bucket] = found
        return found

    def _backup(self, p: Tensor) -> Tensor:
        saved, part = self.backups.get(p), dtensor.local(p)
        if saved is None or saved.dtype != p.dtype or saved.device != part.device or not same_layout(saved, part):
            with torch.inference_mode(False):  # it is written in every mode
                new = torch.empty_like(part, memory_format=torch.preserve_format, requires_grad=False)
            if saved is not None:
                self._stores.clear()  # they would keep the old one alive
                if saved.shape == part.shape:
                    new.copy_(saved)  # it may hold the clean weights of a perturbation that is on
            saved = self.backups[p] = new
        return saved

    def _clean_copy(self, p: Tensor) -> Tensor:
        return next(c for h in self._held for q, c in zip(h.bucket.params, h.clean, strict=True) if q is p)

    def lay_out(self, buckets: list[Bucket]) -> None:
        """Give gradients, state and scratch of some buckets their parameters' memory format, once."""
        for bucket in buckets:
            self._state.lay_out(bucket.params)
            for p in bucket.params:
                if p.grad is not None:
                    p.grad = like(p.grad, p)
        self._stores.clear()

    def check_alone(self, call: str, params: Iterable[Tensor]) -> None:
        """Refuse parameters that another optimizer holds perturbed: it would put its clean weights over ours."""
        if not len(perturbing):
            return
        others = [w for w in list(perturbing) if w is not self and w.partition is not None]
        if any(id(p) in w.partition.members for w in others for p in params):  # type: ignore[union-attr]
            raise RuntimeError(
                f"{call}: another optimizer holds these parameters perturbed; call its restore(), eval() or step()"
            )

    # --- CLEAN -> PERTURBED ----------------------------------------------------------------------

    def perturb(self, partition: Partition, prepare: Prepare) -> list[Call]:
        """Perturb the weights of `partition` by one call per bucket.

        Arguments:
            prepare: makes the calls, given where each bucket's clean weights go, and whether it is called again because
                the parameters have another memory format.

        Returns:
            The calls, which have run.
        """
        try:
            try:
                return self._run(partition, prepare, again=False)
            except LayoutError:
                # A memory format stands in the way of a bucket. Everything follows the parameters, once.
                self.restore()
                self.lay_out(partition.buckets)
                return self._run(partition, prepare, again=True)
        except BaseException:
            self.restore()
            raise

    def _run(self, partition: Partition, prepare: Prepare, again: bool) -> list[Call]:
        stores = [self.store(bucket) for bucket in partition.buckets]
        calls = prepare(stores, again)
        if len(calls) > 1:
            for call in calls:
                call.check()  # an op checks before it writes, but the last one would come after the first has written
        # The weights count as perturbed from before the first write, so that whatever comes between leaves weights that
        # are known: restore() puts back what was written, and no more.
        self.unfinished = True
        self._held = [
            Held(c.bucket, s.masters or s.backups or [], c.marks(), c) for c, s in zip(calls, stores, strict=True)
        ]
        self.partition, self.phase = partition, PERTURBED
        perturbing.add(self)
        for call in calls:
            call.run()
        self.redrawn(partition, stores)
        return calls

    def redrawn(self, partition: Partition, stores: list[CleanStore]) -> None:
        """The weights of `partition` are perturbed now, by calls that have all returned."""
        pairs = zip(partition.buckets, stores, strict=True)
        self._held = [Held(b, s.masters or s.backups or [], b.versions()) for b, s in pairs]
        self.unfinished = False
        self.partition, self.phase = partition, PERTURBED
        self.ever_perturbed = True
        for bucket in partition.buckets:
            if bucket.has_master:
                self._state.note_masters(bucket)
        perturbing.add(self)
        torch.clear_autocast_cache()

    # --- PERTURBED -> CLEAN ----------------------------------------------------------------------

    def restore(self) -> None:
        """Put every clean weight back that was overwritten. Where it was interrupted or failed it may be repeated."""
        for held in self._held:
            self._put(held.bucket, held.clean, None if held.call is None else _written(held))
        self.left()

    def restore_untouched(self) -> None:
        """Put clean weights back where nothing else has been written: an interrupted update, or others."""
        for held in self._held:
            if held.call is None:
                which = [k for k, v in enumerate(held.bucket.versions()) if v == held.versions[k]]
            else:
                which = _written(held)
            self._put(held.bucket, held.clean, which)
        self.left()

    def left(self) -> None:
        """All weights are clean now."""
        if self.partition is not None:
            self.partition, self.phase = None, CLEAN
            self._held = []
            self.unfinished = False
            perturbing.discard(self)
        torch.clear_autocast_cache()

    def restore_bucket(self, bucket: Bucket) -> CleanStore:
        """Put back a part of what is perturbed, whose bookkeeping follows."""
        store = self.store(bucket)
        self._put(bucket, store.masters or store.backups or [])
        return store

    def save(self, bucket: Bucket) -> list[Tensor]:
        """Copies of clean weights, for a difference that is taken after the step."""
        backups = self.store(bucket).backups or []
        bucket.op("restore_")(backups, bucket.params)
        return backups

    def _put(self, bucket: Bucket, values: list[Tensor], which: list[int] | None = None) -> None:
        """restore_ on a bucket, or on some of its parameters."""
        params = bucket.params
        if which is not None and len(which) < len(params):
            params, values = [params[k] for k in which], [values[k] for k in which]
        if not params:
            return
        try:
            bucket.op("restore_")(params, values)
        except (LayoutError, TypeError, ValueError):
            # The model has changed memory format, dtype or device since.
            with torch.no_grad():
                for p, value in zip(params, values, strict=True):
                    dtensor.local(p).copy_(dtensor.local(value))
        if bucket.has_master:
            self._state.note_masters(bucket)

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Exchange perturbed for clean weights and back; the perturbed values are kept, not drawn again."""
        partition = self.partition
        if self.phase is not PERTURBED:
            yield
            return
        with torch.no_grad():
            kept = [[p.detach().clone() for p in held.bucket.params] for held in self._held]
            for held in self._held:
                self._put(held.bucket, held.clean)
            torch.clear_autocast_cache()
        self.phase = SUSPENDED
        try:
            yield
        finally:
            if self.partition is partition and self.phase is SUSPENDED:
                self.phase = PERTURBED
                with torch.no_grad():
                    for held, values in zip(self._held, kept, strict=True):
                        self._put(held.bucket, values)
                        held.versions = held.bucket.versions()
                torch.clear_autocast_cache()

    def drop_writes(self, params: Iterable[Tensor]) -> None: ...

    def end_keeping_external_writes(self) -> None:
        """End a perturbation; parameters that others have written since keep what was written."""
        if self.phase is SUSPENDED:
            self.left()
        elif self.phase is PERTURBED:
            self.restore_untouched()

    def abandon(self) -> None:
        """The optimizer is gone: leave clean weights behind.

        Not inside a capture, which may be of anything: its graph would write these weights at every replay.
        """
        if self.phase is PERTURBED and not is_capturing():
            self.restore()
        self.left()

    def release(self) -> None:
        """Free the scratch."""
        self.backups.clear()
        self._stores.clear()

    def rounded_away(self) -> tuple[int, int]:
        """Of the perturbed bfloat16 weights: how many differ from their clean value, and how many there are."""
        moved = total = 0
        for held in self._held:
            if not any(group["rho"] > 0 for group in held.bucket.groups):
                continue
            pairs = zip(dtensor.local_parts(held.bucket.params), dtensor.local_parts(held.clean), strict=True)
            for p, clean in pairs:
                if p.dtype == torch.bfloat16:
                    moved += int((p != clean.to(p.dtype)).sum())
                    total += p.numel()
        return moved, total
