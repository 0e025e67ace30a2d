"""SAM whose update takes the gradient at the clean weights, too: mixed SAM, and what GSAM and LookSAM share with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ..values import NOT_NEGATIVE, Range
from .amp import Amp
from .cycle import Cycle
from .gradients import Final, Grads, gradients_of, resolved
from .groups import Group
from .perturbation import MIXED_BY_LAM, Weights
from .sam import UnscaledAscent
from .traffic import Sizes, Traffic


class ClimbedGradients(UnscaledAscent):
    """SAM that keeps the gradient which it ascends along. Several rounds keep the sum."""

    mixes = True

    def keep_ascent(self, cycle: Cycle, params: list[Tensor], scaler: Any) -> None:
        cycle.skip_if(self.unscale(cycle, scaler))
        cycle.gradients.ascent = cycle.gradients.take(params, gradients_of(params))

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        cycle.gradients.end_ascent(counted)
        super().end_round(cycle, params, counted)

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        cycle.gradients.end_ascent(cycle.gradients.has_new_since_perturb(params))
        super().keep_round(cycle, params)

    def traffic_when_due(self, sizes: Sizes) -> Traffic:
        return super().traffic_when_due(sizes).plus(sizes.item, scratch=sizes.item)

    def needs_clean(self, groups: list[Group]) -> bool:
        """True if the gradient at the clean weights changes the step."""
        raise NotImplementedError

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        final = super().final(cycle, params, grads, amp)
        if final is None or not final.at_perturbed_weights or not self.needs_clean(cycle.groups.listed()):
            return final
        self.check_unscaled(cycle, amp)
        ledger = cycle.gradients
        counted = cycle.weights.partition is not None and ledger.has_new_since_perturb(params)
        pairs = zip(params, resolved(ledger.ascents_with(counted)), strict=True)
        clean = [a if p.requires_grad else None for p, a in pairs]  # it may have been frozen since
        return replace(final, clean=clean, clean_rounds=final.rounds)


class MixedAscent(ClimbedGradients):
    """(1 - lam) of the gradient at the clean weights and lam of the perturbed one."""

    mixes_by_lam = True
    ranges: ClassVar[Mapping[str, Range]] = {"lam": NOT_NEGATIVE}
    weights: ClassVar[Weights] = MIXED_BY_LAM

    def needs_clean(self, groups: list[Group]) -> bool:
        return any([group["lam"] != 1 for group in groups])
