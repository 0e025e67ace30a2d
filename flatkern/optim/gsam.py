"""GSAM: SAM's step without what the clean gradient has beside the perturbed one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .buckets import Bucket, SharedArguments, global_sum
from .cycle import Cycle
from .gradients import Final
from .groups import Group
from .mixed_sam import ClimbedGradients
from .perturbation import Weights
from .traffic import Sizes, Traffic

EPS = 1e-12
LEAST = 1e-12  # of the square of what is beside a projection, relative: 1e-6 of its norm
Parts = list[tuple[Bucket, SharedArguments]]


def alpha_of(group: Group) -> float:
    """0 where a group is not perturbed."""
    return float(group["alpha"]) if group["perturb"] else 0.0


class SurrogateGapAscent(ClimbedGradients):
    """g_p - alpha a_v, a_v = a - cos(a, g_p) ||a|| g_p / ||g_p||."""

    ops = (*ClimbedGradients.ops, "gradient_products_")
    weights: ClassVar[Weights] = {"grad_weight": lambda group: 1.0, "clean_weight": lambda group: -alpha_of(group)}

    launches = 4
    combines = True

    def traffic_when_due(self, sizes: Sizes) -> Traffic:
        return super().traffic_when_due(sizes).plus(2 * sizes.item)

    def needs_clean(self, groups: list[Group]) -> bool:
        return any([alpha_of(group) for group in groups])

    def combine(self, cycle: Cycle, final: Final, parts: Parts) -> None:
        aa, ag, gg = products(parts)
        norm_a, norm_g = aa.sqrt(), gg.sqrt()
        # Linear in a, so that the sum over rounds serves as well as their mean.
        share = ag / (norm_a * norm_g + EPS) * norm_a / (norm_g + EPS)
        component = torch.stack([torch.ones_like(share), share]) * (beside(aa, ag, gg) >= LEAST * aa)
        for bucket, shared in parts:
            shared.component = component.to(bucket.device, torch.float32)


def products(parts: Parts) -> tuple[Tensor, ...]:
    """<a, a>, <a, g> and <g, g> over the perturbed parameters, float64: a the clean gradient, g the unscaled other."""
    found = []
    for bucket, shared in parts:
        each = torch.zeros(3, dtype=torch.float64, device=bucket.device)
        wanted = bucket.values("is perturbed", lambda group: bool(group["perturb"]))
        lists = [[g for g, w in zip(of, wanted, strict=True) if w] for of in (shared.grads, shared.clean_grads or ())]
        if lists[0]:
            bucket.op("gradient_products_")(each, *lists)
        if shared.grad_scale is not None:
            scale = shared.grad_scale.to(bucket.device).double()
            each = each * torch.stack([torch.ones_like(scale), scale, scale * scale])
        found.append((bucket.ranks, each))
    return global_sum(found).unbind()


def beside(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """||x||^2 less that of its projection on y."""
    return xx - xy * (xy / yy.clamp(min=torch.finfo(torch.float64).tiny))
