"""Where the clean weights are while perturbed ones are in the parameters, and every way back.

The only caller of restore_. An optimizer that is collected while its parameters are perturbed leaves clean ones behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dtensor
from ..checks import STORAGE_DTYPES, LayoutError
from ..tables import same_layout
from .buckets import MAX_PARTITIONS, Bucket, Call, CleanStore, Partition
from .errors import refuse_captured_perturbation, refuse_lost_write, refuse_unseen_write, warn_left_as_written
from .external_writes import (
    REPEATABLE,
    ascent_kept,
    differ_from_draw,
    draw_again,
    end_element_by_element,
    is_as_drawn,
    is_laid_out_as_drawn,
    take_over,
    untouched,
    written_by_interrupted,
)
from .groups import Setup
from .layouts import like
from .phase import CLEAN, PERTURBED, SUSPENDED
from .scalars import is_capturing
from .state import State

# Weights that hold a perturbation now. Only a registry can tell an optimizer that another one has changed its
# parameters; it is weak, so it keeps nothing alive.
perturbing: weakref.WeakSet[Weights] = weakref.WeakSet()


Prepare = Callable[[list[CleanStore], bool], list[Call]]


@dataclass
class Held:
    """A perturbed bucket: its clean weights, and its parameters' versions after our write."""

    bucket: Bucket
    clean: list[Tensor]
    versions: list[int]  # while it runs: see `Call.marks`
    call: Call | None = None  # that perturbed it; None where it cannot be repeated
    running: bool = False
    ours: bool = False  # nobody else has written: its clean weights are put back without a look

    def written(self) -> list[int]:
        """The positions of the parameters that its call has written, which was interrupted."""
        return written_by_interrupted(self.call, self.clean, self.versions)


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies, whatever the dtype, device and layout; not where others have put a tensor of another shape."""
    for p, value in zip(map(dtensor.local, into), map(dtensor.local, values), strict=True):
        if p.shape == value.shape:
            p.copy_(value)


class Weights:
    """Which weights of one optimizer are perturbed."""

    def __init__(self, state: State, setup: Setup) -> None:
        self.partition: Partition | None = None  # of the perturbed parameters; None: all weights are clean
        self.phase = CLEAN
        self.ever_perturbed = False
        self.unfinished = False  # some weights are perturbed, some are not: a call was interrupted, and its undoing
        self.backups: dict[Tensor, Tensor] = {}  # scratch, kept for the optimizer's life
        self._state, self._setup = state, setup
        self._held: list[Held] = []
        self._dropping: set[Tensor] = set()  # parameters whose foreign writes go with the perturbation
        self._looks = 0  # at values, by a rolling eval()
        self._captured = False  # perturbed inside a capture: the weights have not moved before a replay
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
            elif self.partition is not None and id(p) in self.partition.members:
                saved = dtensor.local(self._clean_copy(p))  # a master: the model has become float32 since
            if saved is not None and saved.shape == part.shape:
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
        self._captured = self._setup.capturable and is_capturing()
        try:
            try:
                return self._run(partition, prepare, again=False)
            except LayoutError:
                # A memory format stands in the way of a bucket. Everything follows the parameters, once.
                self.put_back()
                self.lay_out(partition.buckets)
                return self._run(partition, prepare, again=True)
        except BaseException:
            self.put_back()
            raise

    def _run(self, partition: Partition, prepare: Prepare, again: bool) -> list[Call]:
        ahead = self.partition is partition  # of the weights, which are perturbed, their clean copies are
        stores = [CleanStore(None, s.backups) if ahead else s for s in map(self.store, partition.buckets)]
        calls = prepare(stores, again)
        if len(calls) > 1:
            for call in calls:
                call.check()  # an op checks before it writes, but the last one would come after the first has written
        self._execute(partition, calls, stores)
        return calls

    def _execute(self, partition: Partition, calls: list[Call], stores: list[CleanStore]) -> None:
        # The weights count as perturbed from before the first write, so that whatever comes between leaves weights that
        # are known: restore() puts back what was written, and no more.
        held = [
            Held(c.bucket, s.masters or s.backups or [], c.marks(), c, running=True)
            for c, s in zip(calls, stores, strict=True)
        ]
        self.unfinished, self._held = True, held
        self.partition, self.phase = partition, PERTURBED
        perturbing.add(self)
        for call in calls:
            call.run()
        self.perturbed_by(partition, [(c.bucket, s, c) for c, s in zip(calls, stores, strict=True)])

    def perturbed_by(self, partition: Partition, parts: Iterable[tuple[Bucket, CleanStore, Call | None]]) -> None:
        """The weights of `partition` are perturbed now: buckets, their clean weights, and calls that have returned."""
        self._held = [
            Held(b, s.masters or s.backups or [], b.versions(), c if c is not None and c.op == REPEATABLE else None)
            for b, s, c in parts
        ]
        self.unfinished = False
        self.partition, self.phase = partition, PERTURBED
        self.ever_perturbed = True
        for held in self._held:
            if held.bucket.has_master:
                self._state.note_masters(held.bucket.params, held.versions)
        perturbing.add(self)
        torch.clear_autocast_cache()

    # --- what others write -----------------------------------------------------------------------

    def drop_writes(self, params: Iterable[Tensor]) -> None:
        """What others write to these parameters while they are perturbed goes with the perturbation."""
        self._dropping.update(params)

    def _dropped(self, bucket: Bucket) -> list[bool]:
        """For each parameter, whether what others write goes with the perturbation."""
        drops = bucket.values("drops writes", lambda group: group["writes"] == "drop")
        return [by_group or p in self._dropping for p, by_group in zip(bucket.params, drops, strict=True)]

    def _moved(self, held: Held) -> list[int]:
        """Positions that others have written since, without those whose writes are dropped."""
        now = held.bucket.versions()
        if self._captured and held.call is not None and not held.bucket.has_master and not is_capturing():
            return list(range(len(now)))  # a capture that failed or waits for a replay has written no clean copy
        if held.ours or now == held.versions:
            return []
        triples = zip(now, held.versions, self._dropped(held.bucket), strict=True)
        return [k for k, (a, b, dropped) in enumerate(triples) if a != b and not dropped]

    def check_writes(self) -> None:
        """Refuse a step that would undo what others wrote. A write that changed nothing is none.

        Raises:
            RuntimeError: nothing has changed.
        """
        for held in self._held:
            if self._captured or held.bucket.versions() != held.versions:
                moved = self._moved(held)
                if held.call is not None:
                    moved = [
                        k for k in moved
                        if not is_as_drawn(held.bucket.params[k], draw_again(held.call, held.clean, [k])[0])
                    ]  # fmt: skip
                if moved:
                    refuse = refuse_captured_perturbation if self._captured else refuse_lost_write
                    refuse([held.bucket.name(k) for k in moved])
                held.versions = held.bucket.versions()

    def note_captured_writes(self) -> None:
        """A call inside a capture has moved versions, and written nothing."""
        for held in self._held:
            held.versions = held.bucket.versions()

    # --- PERTURBED -> CLEAN ----------------------------------------------------------------------

    def restore(self) -> None:
        """Put every clean weight back that was overwritten, and keep what others wrote since.

        Where a parameter's version has moved, elements that are as drawn become clean, and all others stay. An ascent
        cannot be drawn again; such a parameter stays as it is, with a warning. Where it was interrupted or failed it
        may be repeated.
        """
        left = [name for held in self._held for name in self._end(held)]
        self.left()
        if left:
            warn_left_as_written(left)

    def _end(self, held: Held) -> list[str]:
        """Clean weights in one bucket; returns the names of parameters that stay as others wrote them."""
        bucket = held.bucket
        moved = [] if held.running else self._moved(held)
        if not moved:
            self._put(bucket, held.clean, held.written() if held.running else None)
            held.ours = True  # what has changed since, we have
            return []
        self._put(bucket, held.clean, [k for k in range(len(bucket.params)) if k not in set(moved)])
        if held.call is None:
            return [bucket.name(k) for k in moved]
        for k in moved:
            noisy = draw_again(held.call, held.clean, [k])[0]
            end_element_by_element(bucket.params[k], held.clean[k], noisy, bucket.has_master)
            if bucket.has_master:
                self._state.note_masters([bucket.params[k]], [dtensor.version(bucket.params[k])])
        return []

    def put_back(self) -> None:
        """Put every clean weight back; nobody else can have written since. In a capture they have not moved."""
        if is_capturing():
            return self.left() if self._captured else None
        for held in self._held:
            held.ours = True
        self.restore()

    def restore_checked(self) -> None:
        """`restore`, after a look at values: a write to `p.data` moves no version.

        Raises:
            RuntimeError: a parameter holds what was not drawn. The perturbation has ended, and what was written stays.
        """
        written = []
        if not is_capturing():
            for held in self._held:
                if held.call is not None and not held.running:
                    written += [held.bucket.name(k) for k in self._differing(held)]
            self._looks += 1
        if written:
            for held in self._held:
                held.versions = [-1] * len(held.versions)  # every element is compared
        self.restore()
        if written:
            refuse_unseen_write(written)

    def _differing(self, held: Held) -> list[int]:
        """Positions whose values are not as drawn, though their version has not moved."""
        now, dropped, call = held.bucket.versions(), self._dropped(held.bucket), held.call
        assert call is not None
        differing = differ_from_draw(call, held.bucket.params, held.clean, self._looks)
        return [k for k in differing if now[k] == held.versions[k] and not dropped[k]]

    def restore_untouched(self, unknown: frozenset[int]) -> None:
        """Put clean weights back where an interrupted update has not written new ones, and where that is unknown.

        Arguments:
            unknown: ids of parameters whose versions do not tell.
        """
        for held in self._held:
            which = held.written() if held.running else untouched(held.bucket, held.versions, unknown)
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
            _copy(params, values)  # the model has changed memory format, dtype or device since
        if bucket.has_master:
            self._state.note_masters(params, list(map(dtensor.version, params)))

    # --- clean weights for a while ---------------------------------------------------------------

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Clean weights inside, which others may write by any means; then the perturbation is put on what is there.

        Noise is drawn again, of the same round. An ascent cannot be: its perturbed values are kept.
        """
        if self.phase is SUSPENDED:  # inside another clean()
            yield
            return
        if self.phase is CLEAN:
            try:
                self.phase = SUSPENDED  # or a training forward of a followed model would put the noise on
                yield
            finally:
                self.phase = CLEAN
                self._state.forget_masters()  # others may have written to p.data, which moves no version
            return
        kept = self.suspend()
        try:
            yield
        finally:
            self.resume(kept)

    @torch.no_grad()
    def suspend(self) -> list[list[Tensor | None]]:
        """PERTURBED -> SUSPENDED; returns the perturbed values of an ascent, None where they stay as they are."""
        kept: list[list[Tensor | None]] = []
        left: list[str] = []
        self.unfinished = True
        for held in self._held:
            if held.call is None:
                moved = set(self._moved(held))
                params = enumerate(dtensor.local_parts(held.bucket.params))
                kept.append([None if k in moved else p.clone() for k, p in params])
            left += self._end(held)
        self.unfinished = False
        self.phase = SUSPENDED
        torch.clear_autocast_cache()
        if left:
            warn_left_as_written(left)
        return kept

    @torch.no_grad()
    def resume(self, kept: list[list[Tensor | None]]) -> None:
        """SUSPENDED -> PERTURBED, around the weights that are there now; nothing where the perturbation has ended."""
        if self.phase is not SUSPENDED:
            return
        partition, parts = self.partition, self._held
        assert partition is not None
        values: list[list[Tensor]] | None = None
        try:
            for held in (h for h in parts if h.bucket.has_master):
                for p, master in zip(held.bucket.params, held.clean, strict=True):
                    take_over(dtensor.local(master), dtensor.local(p))
            if not all(h.call is not None and is_laid_out_as_drawn(h.bucket, h.clean) for h in parts):
                self._stores.clear()
                values = [self._values_again(h, kept.pop(0) if h.call is None else []) for h in parts]
            stores = [self.store(held.bucket) for held in parts] if values is None else []
            calls = [h.call.with_clean(*s) for h, s in zip(parts, stores, strict=False) if h.call is not None]
            for call in calls:
                call.check()
        except BaseException:
            self.left()  # what is there are clean weights
            raise
        try:
            if values is None:
                self._execute(partition, calls, stores)
            else:
                self._write_again(partition, values)
        except BaseException:
            if self._held is parts and not self.unfinished:
                self.left()  # nothing is written, and the copies may be older than what others wrote
            else:
                self.put_back()
            raise

    def _values_again(self, held: Held, kept: list[Tensor | None]) -> list[Tensor]:
        """What a bucket will hold, where its call cannot simply be repeated; what it holds now are the clean weights.

        Noise goes by the order in memory, so that it is drawn in the layout that it was drawn in first.

        Raises:
            TypeError: a parameter has a dtype now in which nothing can be drawn.
        """
        bucket, call = held.bucket, held.call
        if call is None:
            values = [ascent_kept(*each) for each in zip(bucket.params, kept, held.clean, strict=True)]
            store = self.store(bucket)
            held.clean = store.masters or store.backups or []
        else:
            for k, p in enumerate(bucket.params):
                if p.dtype not in STORAGE_DTYPES:
                    raise TypeError(f"clean: {bucket.name(k)} has become {p.dtype} inside, which no kernel perturbs")
        if not bucket.has_master:
            _copy(held.clean, bucket.params)
        return values if call is None else draw_again(call, held.clean, range(len(bucket.params)))

    def _write_again(self, partition: Partition, values: list[list[Tensor]]) -> None:
        self.unfinished = True
        for held in self._held:
            held.ours = True
        for held, new in zip(self._held, values, strict=True):
            _copy(held.bucket.params, new)
        stores = [CleanStore(None, h.clean) if h.bucket.has_master else CleanStore(h.clean, None) for h in self._held]
        self.perturbed_by(partition, [(h.bucket, s, h.call) for h, s in zip(self._held, stores, strict=True)])

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
