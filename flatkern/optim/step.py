"""One step in two phases: *prepare* every call (reads, checks, creates state, may refuse), then *commit* (writes).

Nothing is written before the calls of all buckets are prepared, so a refused step has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import dtensor
from ..checks import LayoutError
from .amp import Amp
from .buckets import Bucket, Call, Partition
from .cycle import Cycle
from .gradients import Final, Grads, gradients_of
from .groups import Group
from .ire import Mask
from .layouts import like
from .perturb import NoPerturbation, draw, draw_again, global_norm, noise_call, partition_of, perturbable
from .weights import CleanStore


@dataclass
class SharedArguments:
    """What every update op takes besides its rule's own state and numbers."""

    store: CleanStore  # where the clean weights are; (None, None) where the parameters hold them
    history: list[Tensor] | None
    grads: list[Tensor]
    clean_grads: list[Tensor] | None
    masks: list[Tensor] | None
    lrs: Tensor | None
    sigmas: Tensor | None
    noise: Tensor | None  # rolling: of the coming round
    grad_scale: Tensor | None
    clip: Tensor | None
    found_inf: Tensor | None
    numbers: dict[str, list[Any]]

    def tensors(self) -> tuple[Any, ...]:
        """The positional arguments that follow a rule's own state."""
        return (
            *self.store, self.history, self.grads, self.clean_grads, self.masks,
            self.lrs, self.sigmas, self.noise, self.grad_scale, self.clip, self.found_inf,
        )  # fmt: skip


class Prepared(NamedTuple):
    """The part of a step that falls to one bucket."""

    bucket: Bucket
    shared: SharedArguments
    call: Call


class Rule(Protocol):
    """A base rule. Ours are one fused call a bucket; Wrap restores, mixes, and calls its base."""

    @property
    def reads_lr(self) -> bool:
        """True if its ops take learning rates."""

    def flags(self, group: Group) -> tuple[Any, ...]:
        """What splits parameters into different op calls, besides device and masters."""

    def sign(self, group: Group) -> float:
        """-1 where gradients are negated on their way in."""

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call:
        """The call of one bucket. Creates state, and writes nothing."""

    def commit(self, work: list[Prepared]) -> None:
        """Run the calls, and what else the rule needs."""


@dataclass
class Step:
    """What a step is made of."""

    rule: Rule
    perturbation: NoPerturbation
    mask: Mask
    cycle: Cycle
    amp: Amp

    def run(self) -> None:
        """Restore, form the final gradient, update; rolling: draw new noise.

        Raises:
            RuntimeError, ValueError, TypeError: the step is refused, and nothing has changed.
        """
        cycle = self.cycle
        params = cycle.groups.params()
        grads = gradients_of(params)
        final = self.perturbation.final(cycle, params, grads, self.amp)
        if final is None:
            restore(self.perturbation, cycle)
        elif self.perturbation.rolling:
            self._run_rolling(params, final)
        else:
            self._update(params, final)
            if final.clean is None:
                cycle.gradients.show_sum(params)
            cycle.drop_pending()
        cycle.gradients.mark_used(params)

    def _run_rolling(self, params: list[Tensor], final: Final) -> None:
        cycle, weights = self.cycle, self.cycle.weights
        partition = weights.partition
        if partition is None:
            # Distributed checkpointing creates the state by a step with lr 0, on weights that it wants unchanged.
            no_state = not cycle.groups.state()
            creates_state = no_state and all(cycle.scalars.host_value(g, "lr") == 0 for g in cycle.groups)
            self._update(params, final)
            if not creates_state:
                draw_again(cycle)
        elif partition_of(cycle, perturbable(cycle)) is partition:
            self._update(params, final, cycle.scalars.noise(ahead=1))
        else:
            # A group or a parameter was switched: one pass cannot serve two sets, so update, then perturb.
            cycle.scalars.check_next_round()
            self._update(params, final)
            cycle.scalars.next_round()
            draw(cycle)
            cycle.scalars.note_draw()

    # --- prepare ---------------------------------------------------------------------------------

    def _update(self, params: list[Tensor], final: Final, noise: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; restore the perturbed ones that have none.

        Arguments:
            noise: rolling: the key of the coming round, which is drawn in the same pass.
        """
        if not _none_missing(final.perturbed):
            params = [p for k, p in enumerate(params) if final.has(k)]
        flags, is_on = self.rule.flags, self.mask.is_on
        cycle = self.cycle
        partition = cycle.partitions.of(params, cycle.weights.partition, lambda g: (flags(g), is_on(g)))
        try:
            self._commit(partition, self._prepare(partition, final, noise), noise)
        except LayoutError:
            # An op has refused, and nothing is written. Everything follows the parameters, once.
            cycle.weights.lay_out(partition.buckets)
            self._commit(partition, self._prepare(partition, final, noise, lay_out=True), noise)

    def _prepare(
        self, partition: Partition, final: Final, noise: Tensor | None, lay_out: bool = False
    ) -> list[Prepared]:
        buckets = partition.buckets
        shared = [self._share(bucket, final, noise, lay_out) for bucket in buckets]
        limit = self.cycle.groups.setup.max_grad_norm
        if limit is not None and buckets:
            self._clip(buckets, shared, limit)
        work = [Prepared(b, s, self.rule.prepare(b, s)) for b, s in zip(buckets, shared, strict=True)]
        if len(work) > 1:
            for _, _, call in work:
                call.check()  # an op checks before it writes, but the last one would come after the first has written
        return work

    def _share(self, bucket: Bucket, final: Final, noise: Tensor | None, lay_out: bool) -> SharedArguments:
        cycle, amp = self.cycle, self.amp
        grads = _of_bucket(bucket, final.perturbed, lay_out)
        clean_grads = None if final.clean is None else _of_bucket(bucket, final.clean, lay_out)
        history, beta, eta = self._history(bucket, final)
        draws = noise is not None and bucket.perturbed and not bucket.split_vectors
        sigma, sigmas = cycle.scalars.of(bucket, "sigma") if draws else (bucket.zeros, None)
        lr, lrs = cycle.scalars.of(bucket, "lr") if self.rule.reads_lr else (bucket.zeros, None)
        masks, kappa = self.mask.masks_and_kappa(cycle, bucket)
        grad_weight, clean_weight = self._weights_of(bucket, final)
        in_place = not (bucket.perturbed or bucket.has_master)
        return SharedArguments(
            store=CleanStore(None, None) if in_place else cycle.weights.store(bucket),
            history=history,
            grads=grads,
            clean_grads=clean_grads,
            masks=masks,
            lrs=lrs,
            sigmas=sigmas,
            noise=noise if draws else None,
            grad_scale=amp.factor(final.rounds, final.unscaled, bucket.device),
            clip=None,
            found_inf=amp.skip(cycle.nonfinite, bucket.device),
            numbers={
                "lr": lr, "grad_weight": grad_weight, "clean_weight": clean_weight, "kappa": kappa,
                "beta": beta, "sigma": sigma, "eta": eta, "index": bucket.index, "offset": bucket.offset,
            },
        )  # fmt: skip

    def _history(self, bucket: Bucket, final: Final) -> tuple[list[Tensor] | None, list[float], list[float]]:
        """ARWP's history with beta and eta; (None, zeros, zeros) where this step does not enter it."""
        if not any([self.perturbation.keeps_history(group) for group in bucket.groups]):
            return None, bucket.zeros, bucket.zeros
        # Created at the first step even if unused: checkpoint loaders need the keys.
        history = self.cycle.state.histories(bucket.params)
        if not final.at_perturbed_weights or self.cycle.gradients.squares:
            return None, bucket.zeros, bucket.zeros
        return history, bucket.values("beta"), bucket.values("eta")

    def _weights_of(self, bucket: Bucket, final: Final) -> tuple[list[float], list[float]]:
        """What the perturbed and the clean gradient are multiplied by; maximize negates them, as torch does."""
        sign = self.rule.sign
        if final.clean is not None:
            of_lam = {
                "grad_weight": lambda g: sign(g) * float(g["lam"]),
                "clean_weight": lambda g: sign(g) * (1.0 - float(g["lam"])),
            }
            lists = bucket.columns("weights of two gradients", of_lam)
            return lists["grad_weight"], lists["clean_weight"]
        if any([group.get("maximize") for group in bucket.groups]):
            return bucket.values("sign", sign), bucket.zeros
        return bucket.ones, bucket.zeros

    def _clip(self, buckets: list[Bucket], shared: list[SharedArguments], limit: float) -> None:
        """max_grad_norm: scale the final gradient so that its norm over all parameters is at most that."""
        norms = []
        for bucket, s in zip(buckets, shared, strict=True):
            norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
            weights = {key: s.numbers[key] for key in ("grad_weight", "clean_weight")}
            bucket.op("gradient_norm_")(norm, s.grads, s.clean_grads, s.grad_scale, **weights)
            norms.append((bucket.ranks, norm))
        total = global_norm(norms)
        clip = (limit / (total + 1e-6)).clamp(max=1.0)
        for bucket, s in zip(buckets, shared, strict=True):
            s.clip = clip.to(bucket.device)
        self.cycle.grad_norm = total

    # --- commit ----------------------------------------------------------------------------------

    def _commit(self, partition: Partition, work: list[Prepared], noise: Tensor | None) -> None:
        """Write. Where it fails, all weights are clean afterwards, and the gradients wait as after restore()."""
        state = self.cycle.state
        try:
            self.rule.commit(work)
            for bucket, _, _ in work:
                state.note_masters(bucket)
            self._finish(partition, work, noise)
        except BaseException as error:
            if isinstance(error, (TypeError, ValueError)) and not any(call.done for _, _, call in work):
                raise  # an op has checked its arguments, and nothing is written
            state.keep_created()
            self._leave_clean(noise)
            if isinstance(error, LayoutError):
                raise RuntimeError("step: a memory format has changed during the step") from error
            raise
        state.keep_created()

    def _finish(self, partition: Partition, work: list[Prepared], noise: Tensor | None) -> None:
        cycle, weights = self.cycle, self.cycle.weights
        perturbed = weights.partition
        if not partition.covers_perturbed:
            self._restore_params_without_gradient(partition.members, noise)
        self.mask.count_step(cycle, [s.found_inf for _, s, _ in work if s.found_inf is not None])
        if cycle.gradients.squares:
            self._update_history_from_losses()
        if noise is None or perturbed is None:
            weights.left()
            return
        # The norm of a vector that is divided among ranks is known only when all of them have updated it.
        for bucket in (b for b, _, _ in work if b.perturbed and b.split_vectors):
            noise_call(cycle, bucket, weights.store(bucket), noise).run()
        cycle.scalars.next_round()
        cycle.scalars.note_draw()
        weights.redrawn(perturbed, [weights.store(bucket) for bucket in perturbed.buckets])

    def _leave_clean(self, noise: Tensor | None) -> None:
        cycle = self.cycle
        if cycle.weights.partition is None:
            return
        if noise is not None:
            cycle.weights.restore()  # the update writes the copies, too, so that each is clean, old or new
            return
        cycle.weights.restore_untouched()
        params = cycle.groups.params()
        self.perturbation.end_round(cycle, params, cycle.gradients.has_new_since_perturb(params))

    def _restore_params_without_gradient(self, updated: frozenset[int], noise: Tensor | None) -> None:
        """Perturbed parameters without any gradient; rolling draws their next noise, too."""
        cycle, weights = self.cycle, self.cycle.weights
        assert weights.partition is not None
        missing = [p for b in weights.partition.buckets for p in b.params if id(p) not in updated]
        for bucket in cycle.partitions.of(missing, weights.partition, lambda _: "without gradient").buckets:
            store = weights.restore_bucket(bucket)
            if noise is not None:
                noise_call(cycle, bucket, store, noise).run()

    def _update_history_from_losses(self) -> None:
        """mix="losses": F <- beta F + the squares that were taken from the perturbed gradient."""
        cycle = self.cycle
        for group in filter(self.perturbation.keeps_history, cycle.groups):
            params = [p for p in group["params"] if p.grad is not None]
            for p, history in zip(params, cycle.state.histories(params), strict=True):
                part = dtensor.local(history)
                new = part * float(group["beta"])
                if p in cycle.gradients.squares:
                    new += cycle.gradients.squares[p]
                skip = self.amp.skip(cycle.nonfinite, part.device)
                part.copy_(new if skip is None else torch.where(skip != 0, part, new))


def restore(perturbation: NoPerturbation, cycle: Cycle) -> None:
    """PERTURBED -> CLEAN; the round's gradients join the sum that is set aside."""
    params = cycle.groups.params()
    counted = cycle.gradients.has_new_since_perturb(params)
    cycle.weights.restore()
    perturbation.end_round(cycle, params, counted)


def _none_missing(values: Grads) -> bool:
    return all([v is not None for v in values])  # a list takes half the time of a generator


def _of_bucket(bucket: Bucket, grads: Grads, lay_out: bool) -> list[Tensor]:
    """The gradients of a bucket; zeros where one is missing."""
    found: list[Any] = bucket.select(grads)
    if not _none_missing(found):
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, bucket.params, strict=True)]
    return [like(g, p) for g, p in zip(found, bucket.params, strict=True)] if lay_out else found
