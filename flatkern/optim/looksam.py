"""LookSAM: what SAM's gradient has beside the ordinary one is kept, and serves the steps until the next ascent."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import dtensor
from .amp import Amp
from .buckets import Call, global_norm
from .cycle import Cycle
from .gradients import Final, Grads
from .groups import Group
from .gsam import LEAST, Parts, alpha_of, beside, products
from .mixed_sam import ClimbedGradients
from .perturbation import Weights
from .traffic import Sizes, Traffic, ascend

LENGTH = 1024.0  # of what is kept: elements of a direction in a billion dimensions are normal numbers of float16, too
LEAST_SQUARE = 2.0**-126


class ReusedAscent(ClimbedGradients):
    """g_p in every k-th step; between, a + alpha ||a|| g_v / ||g_v||, g_v = g_p - <a, g_p> / ||a||^2 a of the last."""

    ops = (*ClimbedGradients.ops, "gradient_products_", "gradient_norm_", "mix_gradients_")
    state_key = "orthogonal"
    weights: ClassVar[Weights] = {"grad_weight": lambda group: 1.0, "clean_weight": alpha_of}

    launches = 5
    combines = True

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        between = (sizes.item + sizes.moment) * (1 - 1 / group["perturb_interval"])
        return super().traffic(group, sizes).plus(between, state=sizes.moment)

    def traffic_when_due(self, sizes: Sizes) -> Traffic:
        # Products read both gradients, and what is kept is made of both; the update reads the perturbed one alone.
        return ascend(sizes).plus(4 * sizes.item + sizes.moment, scratch=sizes.item)

    def needs_clean(self, groups: list[Group]) -> bool:
        return True

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        final = super().final(cycle, params, grads, amp)
        groups = cycle.groups.listed()
        if final is None or final.at_perturbed_weights or self.is_due(groups) or not any(map(alpha_of, groups)):
            return final
        pairs = zip(params, grads, strict=True)
        kept: Grads = [
            next(cycle.state.existing(self.state_key, [p]), None) if g is not None and p.requires_grad else None
            for p, g in pairs
        ]
        return replace(final, clean=kept) if any(t is not None for t in kept) else final

    def combine(self, cycle: Cycle, final: Final, parts: Parts) -> None:
        if final.at_perturbed_weights:
            self._keep(cycle, parts)
        else:
            self._reuse(parts)

    def _keep(self, cycle: Cycle, parts: Parts) -> None:
        reached = {p for bucket, _ in parts for p in bucket.params}
        stale = list(cycle.state.existing(self.state_key, [p for p in cycle.groups.params() if p not in reached]))
        aa, ag, gg = products(parts)
        square = beside(gg, ag, aa.clamp(min=LEAST_SQUARE))
        there = square >= LEAST * gg
        scale = LENGTH * there / square.where(there & (square > 0), torch.ones_like(square)).sqrt()
        component = torch.stack([-ag / aa.clamp(min=LEAST_SQUARE) * scale, -scale])
        for bucket, shared in parts:
            outs, _ = cycle.state.like_params(bucket.params, self.state_key)
            numbers = bucket.columns("kept", {"clean_weight": lambda group: float(group["perturb"])})
            numbers = {"grad_weight": bucket.zeros, "beta": bucket.zeros, **numbers}
            here = component.to(bucket.device, torch.float32)
            tensors = shared.grads, None, outs, shared.clean_grads, here, shared.grad_scale, None, shared.found_inf
            shared.keep = Call(bucket, "mix_gradients_", tensors, numbers)
            shared.clean_grads = None  # the update is SAM's
        if stale and parts:
            parts[0][1].keep.after = partial(_clear, stale, parts[0][1].found_inf)  # type: ignore[union-attr]

    def _reuse(self, parts: Parts) -> None:
        norms = []
        for bucket, shared in parts:
            norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
            wanted = bucket.values("is perturbed, as a weight", lambda group: float(group["perturb"]))
            numbers = {"grad_weight": wanted, "clean_weight": bucket.zeros}
            bucket.op("gradient_norm_")(norm, shared.grads, None, None, shared.grad_scale, **numbers)
            norms.append((bucket.ranks, norm))
        total = global_norm(norms) / LENGTH
        component = torch.stack([total, torch.zeros_like(total)])
        for bucket, shared in parts:
            shared.component = component.to(bucket.device)


def _clear(stale: list[Tensor], found_inf: Tensor | None) -> None:
    """What an earlier ascent kept of parameters that this one did not reach goes, unless the step is skipped."""
    for t in map(dtensor.local, stale):
        t.zero_() if found_inf is None else t.mul_((found_inf != 0).to(t.device))
