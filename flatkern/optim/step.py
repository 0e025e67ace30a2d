"""One step in two phases: *prepare* every call (reads, checks, creates state, may refuse), then *commit* (writes).

Nothing is written before the calls of all buckets are prepared, so a refused step has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import dtensor
from ..checks import LayoutError
from .amp import NO_AMP, Amp
from .buckets import IN_PLACE, Bucket, Call, CleanStore, Partition, SharedArguments, global_norm
from .cycle import Cycle
from .draw import SCALE, drawn_with, noise_call, perturbed_partition, relative, sigmas_on_device
from .external_writes import REPEATABLE
from .gradients import Final, Grads, gradients_of, show_unscaled
from .groups import Group
from .ire import Mask
from .perturbation import NoPerturbation, StaysPerturbed
from .scalars import is_capturing
from .weights import perturbing

DRAWN_WITH = ("sigma", "eta", "index", "offset")
SIGMA = {"sigma": lambda group: float(group["sigma"]), "scale": SCALE}
SIGNED = {"grad_weight": lambda group: -1.0 if group["maximize"] else 1.0, "clean_weight": lambda group: 0.0}


@cache
def signed(read: Callable[[Group], float]) -> Callable[[Group], float]:
    """maximize negates both gradients on their way in, as in torch."""
    return lambda group: -read(group) if group["maximize"] else read(group)


class Prepared(NamedTuple):
    """The part of a step that falls to one bucket."""

    bucket: Bucket
    shared: SharedArguments
    call: Call | None


class Rule(Protocol):
    """A base rule: one call a bucket, and what is left when all of them have run."""

    finishes: bool  # `finish` has something to do
    updates_copies: bool  # clean weights may be updated where they are kept; the parameters follow
    negates: bool  # gradients are negated in our ops where a group says maximize; a base does it itself

    @property
    def split_by(self) -> Callable[[Group], Hashable]:
        """What splits parameters into different op calls, besides device and masters."""

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call | None:
        """The call of one bucket. Creates state, and writes nothing."""

    def finish(self, work: list[Prepared]) -> None:
        """What follows the calls, those of `SharedArguments.keep` too."""


@dataclass
class Step:
    """What a step is made of."""

    rule: Rule
    perturbation: NoPerturbation
    mask: Mask
    cycle: Cycle
    amp: Amp
    grad_norm: Tensor | None = None  # of the final gradient, before clipping
    complete: bool = False  # no parameter is without a gradient
    updated: bool = False  # every parameter that has a gradient has its new value
    creates_state: bool = False  # and is no step of a training

    def run(self) -> None:
        """Restore, form the final gradient, update; rolling: draw new noise.

        Raises:
            RuntimeError, ValueError, TypeError: the step is refused, and nothing has changed.
        """
        cycle = self.cycle
        params = cycle.groups.params()
        if len(perturbing) > (cycle.weights.partition is not None):
            cycle.weights.check_alone("step", params)
        if cycle.weights.partition is not None:
            cycle.weights.check_writes()
        grads = gradients_of(params)
        final = self.perturbation.final(cycle, params, grads, self.amp)
        if final is not None and cycle.overflow.is_watching:
            cycle.skip_if(cycle.overflow.heard(final.perturbed))
        if final is None:
            restore(self.perturbation, cycle)
        elif isinstance(self.perturbation, StaysPerturbed):
            self._run_rolling(self.perturbation, params, final)
        else:
            if self.perturbation.has_interval or self.perturbation.state_key is not None:
                self.creates_state = not final.at_perturbed_weights and self._creates_state() and _are_zero(grads)
            self._update(params, final)
            if self.creates_state:
                self.perturbation.create_state(cycle)
            if final.unscaled and final.clean is not None:
                show_unscaled(params, grads, final.clean)
            if self.perturbation.moves:
                if final.clean is None and not final.from_grad:
                    cycle.gradients.show_sum(params)
                cycle.drop_pending()
        cycle.gradients.mark_used(params)

    def _run_rolling(self, perturbation: StaysPerturbed, params: list[Tensor], final: Final) -> None:
        cycle, weights = self.cycle, self.cycle.weights
        if not perturbation.renews_inside:
            perturbation.check_step(cycle)
        partition = weights.partition
        of_this_round = partition is None and cycle.gradients.is_noisy(params)  # eval() came after the backward
        if partition is None and not of_this_round:
            self.creates_state = self._creates_state()
            self._update(params, final)
            if not self.creates_state:
                perturbation.put_on_after_clean(cycle)
        elif perturbation.renews_inside and perturbed_partition(cycle) is partition:
            self._update(params, final, cycle.scalars.noise(ahead=1))
        else:
            # A group or a parameter was switched, and one pass cannot serve two sets; or the weights are clean already.
            perturbation.check_next(cycle)
            in_copies = self.rule.updates_copies and perturbation.climbs_from_copies(cycle)
            self._update(params, replace(final, at_perturbed_weights=True, in_copies=in_copies))
            perturbation.put_on_next(cycle)

    def _creates_state(self) -> bool:
        """Distributed checkpointing creates the state by a step with lr 0, on weights that it wants unchanged."""
        cycle = self.cycle
        return not cycle.groups.state() and all(cycle.scalars.host_value(g, "lr") == 0 for g in cycle.groups)

    # --- prepare ---------------------------------------------------------------------------------

    def _update(self, params: list[Tensor], final: Final, noise: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; restore the perturbed ones that have none.

        Arguments:
            noise: rolling: the key of the coming round, which is drawn in the same pass.
        """
        self.complete = all([g is not None for g in final.perturbed])  # a list takes half the time of a generator
        if not self.complete:
            params = [p for k, p in enumerate(params) if final.has(k)]
        cycle, split_by = self.cycle, self.rule.split_by
        if self.mask.exists:
            by_rule, is_on = split_by, self.mask.is_on
            split_by = lambda group: (by_rule(group), is_on(group))  # noqa: E731
        if noise is not None:
            by_all = split_by
            split_by = lambda group: (by_all(group), SCALE(group))  # noqa: E731
        partition = cycle.partitions.of(params, cycle.weights.partition, split_by)
        try:
            self._commit(partition, self._prepare(partition, final, noise), final, noise)
        except LayoutError:
            # An op has refused, and nothing is written. Everything follows the parameters, once.
            cycle.weights.lay_out(partition.buckets)
            self._commit(partition, self._prepare(partition, final, noise, lay_out=True), final, noise)

    def _prepare(
        self, partition: Partition, final: Final, noise: Tensor | None, lay_out: bool = False
    ) -> list[Prepared]:
        buckets = partition.buckets
        shared = [self._share(bucket, final, noise, lay_out) for bucket in buckets]
        if final.clean is not None and self.perturbation.combines:
            self.perturbation.combine(self.cycle, final, list(zip(buckets, shared, strict=True)))
        limit = self.cycle.groups.setup.max_grad_norm
        if limit is not None and buckets:
            self._clip(buckets, shared, limit)
        work = [Prepared(b, s, self.rule.prepare(b, s)) for b, s in zip(buckets, shared, strict=True)]
        calls = [call for _, s, own in work for call in (own, s.keep) if call is not None]
        if len(calls) > 1:
            for call in calls:
                call.check()  # an op checks before it writes, but the last one would come after the first has written
        return work

    def _share(self, bucket: Bucket, final: Final, noise: Tensor | None, lay_out: bool) -> SharedArguments:
        cycle, amp, scalars = self.cycle, self.amp, self.cycle.scalars
        shared = SharedArguments(
            bucket.params,
            bucket.gradients(final.perturbed, lay_out, self.complete),
            None if final.clean is None else bucket.gradients(final.clean, lay_out),
            self._numbers(bucket, final),
        )
        if cycle.groups.setup.capturable:
            shared.lrs = scalars.on_device(bucket, "lr")
        if amp is not NO_AMP or cycle.nonfinite is not None or final.rounds != 1 or final.unscaled:
            shared.grad_scale = amp.factor(final.rounds, final.unscaled, bucket.device)
            shared.found_inf = amp.skip(cycle.nonfinite, bucket.device)
        if self.perturbation.draws and any([group["eta"] for group in bucket.groups]):
            self._share_history(bucket, final, shared)
        # Drawn apart: the norm of a vector that is divided among ranks is known only when all of them have updated it;
        # and an update measures norms, which absolute noise has not.
        apart = bucket.split_vectors or (noise is not None and SCALE(bucket.groups[0]) == "absolute")
        if noise is not None and bucket.perturbed and not apart:
            shared.noise = noise
            if cycle.groups.setup.capturable:
                shared.sigmas = sigmas_on_device(cycle, bucket)
                shared.drawn_with = partial(drawn_with, cycle, bucket, rolling=True)
            else:
                shared.numbers["sigma"] = bucket.columns("relative sigma", SIGMA, relative)["sigma"]
        if self.mask.exists:
            shared.masks, shared.numbers["kappa"] = self.mask.masks_and_kappa(cycle, bucket)
        if bucket.perturbed or bucket.has_master:
            shared.store = cycle.weights.store(bucket)
        if final.in_copies and bucket.perturbed:
            shared.params, shared.store = shared.store.backups or [], IN_PLACE
        return shared

    def _share_history(self, bucket: Bucket, final: Final, shared: SharedArguments) -> None:
        """ARWP's history, where this step enters it."""
        if any([self.perturbation.keeps_history(group) for group in bucket.groups]):
            # Created at the first step even if unused: checkpoint loaders need the keys.
            history = self.cycle.state.histories(bucket.params)
            if final.at_perturbed_weights and not final.squares:
                shared.history = history
                shared.numbers |= {"beta": bucket.values("beta"), "eta": bucket.values("eta")}

    def _numbers(self, bucket: Bucket, final: Final) -> dict[str, list[Any]]:
        """What the perturbed and the clean gradient are multiplied by, and zeros for what this step may do without."""
        zeros = bucket.zeros
        negates = self.rule.negates and any([group["maximize"] for group in bucket.groups])
        if final.clean is not None:
            reads = self.perturbation.weights
            if negates:
                reads = {key: signed(read) for key, read in reads.items()}
            weights = bucket.columns("mixed, signed" if negates else "mixed", reads)
            if final.clean_rounds != 1:
                name, read, by = "clean", reads["clean_weight"], final.clean_rounds
                weights = weights | bucket.columns(name, {"clean_weight": lambda group: read(group) / by})
        elif negates:
            weights = bucket.columns("signed", SIGNED)
        else:
            weights = {"grad_weight": bucket.ones, "clean_weight": zeros}
        absent = {"lr": zeros, "kappa": zeros, "beta": zeros, "sigma": zeros, "eta": zeros}
        return {**weights, **absent, "index": bucket.index, "offset": bucket.offset}

    def _clip(self, buckets: list[Bucket], shared: list[SharedArguments], limit: float) -> None:
        """max_grad_norm: scale the final gradient so that its norm over all parameters is at most that."""
        norms = []
        for bucket, s in zip(buckets, shared, strict=True):
            norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
            weights = {key: s.numbers[key] for key in ("grad_weight", "clean_weight")}
            bucket.op("gradient_norm_")(norm, s.grads, s.clean_grads, s.component, s.grad_scale, **weights)
            norms.append((bucket.ranks, norm))
        total = global_norm(norms)
        clip = (limit / (total + 1e-6)).clamp(max=1.0)
        for bucket, s in zip(buckets, shared, strict=True):
            s.clip = clip.to(bucket.device)
        self.grad_norm = total

    # --- commit ----------------------------------------------------------------------------------

    def _commit(self, partition: Partition, work: list[Prepared], final: Final, noise: Tensor | None) -> None:
        """Write. Where it fails, all weights are clean afterwards, and the gradients wait as after a round.

        In a capture, which writes nothing, the weights are then as perturbed as before.
        """
        state = self.cycle.state
        calls = [call for _, _, call in work if call is not None]
        try:
            for call in calls:
                call.run()
            if self.rule.finishes:
                self.rule.finish(work)
            else:
                for keep in [s.keep for _, s, _ in work if s.keep is not None]:
                    keep.run()
            self.updated = True
            self._finish(partition, work, final, noise)
        except BaseException as error:
            if isinstance(error, (TypeError, ValueError)) and not any(call.done for call in calls):
                raise  # an op has checked its arguments, and nothing is written
            state.keep_created()
            self._leave_clean(
                noise is not None or final.in_copies, next((call for call in calls if not call.done), None)
            )
            if isinstance(error, LayoutError):
                raise RuntimeError("step: a memory format has changed during the step") from error
            raise
        if state.created:
            state.keep_created()

    def _finish(self, partition: Partition, work: list[Prepared], final: Final, noise: Tensor | None) -> None:
        cycle, weights = self.cycle, self.cycle.weights
        perturbed = weights.partition
        for bucket, s, call in work:
            if bucket.has_master:
                cycle.state.note_masters(bucket.params, bucket.versions())
            for done in (call, s.keep):
                if done is not None and done.after is not None:
                    done.after()
        perturbed_by = [(b, s.store, draw_call(b, s)) for b, s, _ in work if s.noise is not None]
        if not (partition.covers_perturbed or final.in_copies):
            perturbed_by += self._restore_params_without_gradient(partition.members, noise)
        skips = [s.found_inf for _, s, _ in work if s.found_inf is not None]
        skipped = cycle.count_skip(skips) if skips or cycle.groups.setup.capturable else False
        perturbation = self.perturbation
        if self.mask.exists or perturbation.counts_steps or perturbation.has_interval:
            if self.mask.exists:
                self.mask.count_step(cycle, skipped)
            if perturbation.counts_steps:
                perturbation.count_step(cycle, skipped)
            if perturbation.has_interval and work and not (skipped or self.creates_state):
                for group in cycle.groups.owner().own_groups:  # type: ignore[union-attr]
                    group["perturb_count"] += 1
        if final.squares:
            self._update_history(final.squares, partition.members)
        if self.grad_norm is not None:
            cycle.grad_norm = self.grad_norm
        if final.in_copies:
            return  # perturbed as before; the copies are ahead
        if noise is None or perturbed is None:
            weights.left()
            return
        perturbed_by += [self._draw(b, s.store, noise) for b, s, _ in work if b.perturbed and s.noise is None]
        cycle.scalars.next_round()
        cycle.scalars.note_draw()
        weights.perturbed_by(perturbed, perturbed_by)

    def _leave_clean(self, writes_copies: bool, interrupted: Call | None) -> None:
        cycle = self.cycle
        if cycle.weights.partition is None:
            return
        if is_capturing():
            cycle.weights.note_captured_writes()
            return
        if writes_copies:
            cycle.weights.put_back()  # the update writes the copies, too, so that each is clean, old or new
            return
        params = cycle.groups.params()
        # Of several launches the first ones may have written, and a call that fails may leave all versions moved.
        unknown: list[Tensor] = []
        if interrupted is not None and interrupted.progress == "launches":
            unknown = interrupted.bucket.params
        cycle.weights.restore_untouched(frozenset(map(id, unknown)))
        if self.updated:
            cycle.drop_pending()
            cycle.gradients.mark_used(params)
        else:
            self.perturbation.keep_round(cycle, params)

    def _draw(self, bucket: Bucket, store: CleanStore, noise: Tensor) -> tuple[Bucket, CleanStore, Call]:
        call = noise_call(self.cycle, bucket, store, noise)
        call.run()
        return bucket, store, call

    def _restore_params_without_gradient(
        self, updated: frozenset[int], noise: Tensor | None
    ) -> list[tuple[Bucket, CleanStore, Call]]:
        """Perturbed parameters without any gradient; rolling draws their next noise, too, and returns by what."""
        cycle, weights = self.cycle, self.cycle.weights
        assert weights.partition is not None
        missing = [p for b in weights.partition.buckets for p in b.params if id(p) not in updated]
        buckets = cycle.partitions.of(missing, weights.partition).buckets
        stores = [weights.restore_bucket(bucket) for bucket in buckets]
        return [] if noise is None else [self._draw(b, s, noise) for b, s in zip(buckets, stores, strict=True)]

    def _update_history(self, squares: dict[Tensor, Tensor], updated: frozenset[int]) -> None:
        """mix="losses" and "ranks": F <- beta F + the squares that were taken from the perturbed gradient."""
        cycle = self.cycle
        for group in filter(self.perturbation.keeps_history, cycle.groups):
            params = [p for p in group["params"] if id(p) in updated]
            for p, history in zip(params, cycle.state.histories(params), strict=True):
                part = dtensor.local(history)
                new = part * float(group["beta"])
                if p in squares:
                    new += squares[p]
                skip = self.amp.skip(cycle.nonfinite, part.device)
                part.copy_(new if skip is None else torch.where(skip != 0, part, new))


def _are_zero(grads: Grads) -> bool:
    return not any(bool(dtensor.local(g).any()) for g in grads if g is not None)


def draw_call(bucket: Bucket, s: SharedArguments) -> Call:
    """Rolling: the draw of the coming round by itself, as the update makes it in the same pass."""
    arguments = bucket.params, *s.store, None, s.history, s.sigmas, s.noise
    return Call(bucket, REPEATABLE, arguments, {key: s.numbers[key] for key in DRAWN_WITH}, drawn_with=s.drawn_with)


def restore(perturbation: NoPerturbation, cycle: Cycle) -> None:
    """PERTURBED -> CLEAN; the round's gradients join the sum that is set aside."""
    params = cycle.groups.params()
    counted = cycle.gradients.has_new_since_perturb(params)
    cycle.weights.restore()
    perturbation.end_round(cycle, params, counted)
