"""m-RWP and m-ARWP: a gradient at the clean weights, too, and how the two are mixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import dtensor
from ..dispatch import resolve
from ..tables import history_length
from .amp import Amp, check_can_unscale
from .cycle import Cycle
from .errors import refuse_lost_sum
from .gradients import Final, Grads, gradients_of, resolved
from .groups import Group
from .perturbation import MIXED_BY_LAM, NoPerturbation, Weights, with_earlier_rounds
from .rwp import RandomPerturbation
from .traffic import Sizes, Traffic

WHY_UNSCALED = 'm-RWP with mix="gradients" needs; keep float32 weights under torch.autocast, or use mix="losses"'


class MixedPerturbation(RandomPerturbation):
    """m-RWP and m-ARWP: (1 - lam) of the gradient at the clean weights and lam of the perturbed one."""

    pattern = "loss on A .backward(); opt.perturb(); loss on B .backward(); opt.step()"
    closures = "clean and perturbed"
    starts_perturbed = False
    has_clean_pass = True
    mixes = True
    weights: ClassVar[Weights] = MIXED_BY_LAM

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        return super().traffic(group, sizes).plus(sizes.item, scratch=sizes.item)

    def loss_weight(self, groups: list[Group], perturbed: bool) -> float:
        value = common_lam(groups)
        return value if perturbed else 1.0 - value

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        ledger = cycle.gradients
        if ledger.rounds and cycle.unscaled.is_done and not ledger.clean:
            raise RuntimeError(
                "perturb: under a GradScaler m-RWP takes one noisy round before its clean pass, not several"
            )
        if ledger.clean and new:
            raise RuntimeError("perturb: a second clean gradient, but m-RWP has one; call step() or zero_grad() first")
        if scaler is not None:
            check_can_unscale(scaler, params, WHY_UNSCALED)

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        if cycle.unscaled.scaler is not None:
            cycle.skip_if(cycle.unscaled.unscale(cycle.groups.listed()))
        cycle.gradients.clean = cycle.gradients.take(params, gradients_of(params))

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if counted and cycle.unscaled.scaler is not None and not cycle.gradients.clean:
            cycle.skip_if(cycle.unscaled.unscale(cycle.groups.listed()))
        super().end_round(cycle, params, counted)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        """The perturbed gradients and exactly one clean one, whichever pass came first."""
        ledger, perturbed = cycle.gradients, cycle.weights.partition is not None
        if not perturbed and not ledger.rounds and not ledger.clean:
            return Final(grads)
        rounds = ledger.rounds + (perturbed and ledger.has_new_since_perturb(params))
        if not rounds and perturbed and not ledger.clean:
            return None
        new_clean = not perturbed and ledger.is_new(params)
        self._check_passes(cycle, rounds, new_clean, amp)
        if ledger.lost:
            refuse_lost_sum()
        if not new_clean:
            if not perturbed:
                grads = resolved(ledger.accumulated_grads)
            elif ledger.rounds:
                grads = with_earlier_rounds(cycle, params, grads)
            return Final(grads, ledger.clean, rounds, True)
        # restore() has unscaled the perturbed gradients; `.grad`, the clean one, still carries the scale.
        clean = grads if amp.grad_scale is None else unscaled_copies(grads, amp.grad_scale.reciprocal())
        return Final(resolved(ledger.accumulated_grads), clean, rounds, True, unscaled=True)

    def _check_passes(self, cycle: Cycle, rounds: int, new_clean: bool, amp: Amp) -> None:
        perturbed, clean = cycle.weights.partition is not None, cycle.gradients.clean
        if not rounds:
            raise RuntimeError(
                "step: m-RWP has a clean gradient but no perturbed one; run a backward between perturb() and step()"
            )
        if new_clean and clean:
            raise RuntimeError("step: m-RWP has two clean gradients, but needs exactly one; zero_grad() drops the last")
        if not new_clean and not clean:
            first = "call restore(), " if perturbed else ""
            raise RuntimeError(
                f"step: m-RWP needs one clean gradient; {first}run a backward at the clean weights, then step()"
            )
        if amp.found_inf is not None and not cycle.unscaled.is_done:
            raise RuntimeError(
                'step: m-RWP with mix="gradients" under a GradScaler needs perturb(scaler=scaler), which unscales the '
                "gradient that the scaler does not see in step()"
            )


class MixedSums(MixedPerturbation):
    """rounds="sum": of n1 clean and n2 noisy passes, each loss divided by n1 + n2, the means are mixed.

    g = (1 - lam) (n1 + n2) / n1 g_clean + lam (n1 + n2) / n2 g_perturbed
    """

    counts = True

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        cycle.passes.watch(params)  # a parameter may have been frozen when the optimizer was made
        super().move(cycle, params, new, scaler)

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        cycle.passes.clean = cycle.passes.in_grad(params)
        super().keep_clean_gradient(cycle, params)

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if counted:
            cycle.passes.end_round(params)
        super().end_round(cycle, params, counted)

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        if cycle.gradients.has_new_since_perturb(params):
            cycle.passes.end_round(params)
        super().keep_round(cycle, params)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        ledger, passes = cycle.gradients, cycle.passes
        perturbed = cycle.weights.partition is not None
        # Counted first: the sum of earlier rounds may have to be put back into `.grad`.
        in_grad = passes.in_grad(params)
        noisy = in_grad if perturbed and ledger.has_new_since_perturb(params) else 0
        clean = passes.clean if ledger.clean or perturbed else in_grad
        final = super().final(cycle, params, grads, amp)
        if final is None or final.clean is None:
            return final
        n1, n2 = passes.of_step(clean, noisy)
        return replace(final, rounds=n2 / (n1 + n2), clean_rounds=n1 / (n1 + n2))


class MixedLosses(MixedPerturbation):
    """mix="losses": losses are weighted by lam, and autograd adds the gradients up in `.grad`."""

    closures = "none"
    mixes = False

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        return RandomPerturbation.traffic(self, group, sizes)

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        if any(group["eta"] > 0 for group in cycle.groups) and new:
            raise RuntimeError(
                'perturb: m-ARWP with mix="losses" must see the perturbed gradient alone; run the noisy pass first: '
                "perturb(); backward; restore(); backward; step()"
            )

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        """It stays in `.grad`."""

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if counted:
            cycle.gradients.squares = self._squares(cycle)

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        self.end_round(cycle, params, counted=True)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        if amp.found_inf is not None and cycle.gradients.squares and cycle.unscaled.scaler is None:
            raise RuntimeError(
                'step: m-ARWP with mix="losses" under a GradScaler needs perturb(scaler=scaler), for the scale of '
                "the perturbed gradient"
            )
        final = NoPerturbation.final(self, cycle, params, grads, amp)
        if final is None:
            return None
        return replace(final, squares=self._squares(cycle) if final.at_perturbed_weights else cycle.gradients.squares)

    def _squares(self, cycle: Cycle) -> dict[Tensor, Tensor]:
        """What the history needs of the perturbed gradient, which is in `.grad` only now."""
        squares = {}
        for group in filter(self.keeps_history, cycle.groups):
            params = [p for p in group["params"] if p.grad is not None]
            wide = [dtensor.local(p.grad) for p in params if p.dim() >= 2]
            norms = [g.new_empty(history_length(g), dtype=torch.float32) for g in wide]
            if wide:
                resolve("filter_norms_", wide[0].device.type, cycle.groups.setup.backend)(norms, wide)
            rest = iter(norms)
            scale = float(group["lam"]) * cycle.unscaled.loss_scale()
            for p in params:
                g = next(rest) if p.dim() >= 2 else dtensor.local(p.grad).float().flatten()
                squares[p] = (g / scale).square() if group["lam"] else torch.zeros_like(g)
        return squares


def common_lam(groups: list[Group]) -> float:
    """The one lam of all groups, which the loss is weighted by."""
    lam = {group["lam"] for group in groups}
    if len(lam) > 1:
        raise RuntimeError(f"loss_weight: groups have different lam {sorted(lam)}, so no single loss weight exists")
    return float(lam.pop())


def unscaled_copies(grads: Grads, factor: Tensor) -> Grads:
    copies = [dtensor.local(g).clone() for g in grads if g is not None]
    torch._foreach_mul_(copies, factor)
    parts = iter(copies)
    return [None if g is None else dtensor.wrap_like(g, next(parts), g.shape) for g in grads]
