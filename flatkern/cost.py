"""cost(opt): what one step of an optimizer moves, launches and keeps, counted from its parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import dtensor
from .optim.names import names_of
from .optim.traffic import Sizes
from .tables import history_length, mask_shape

if TYPE_CHECKING:
    from .optim.base import FlatOptimizer


@dataclass(frozen=True)
class Cost:
    """Per optimizer step; the floor that the algorithm allows, not a measurement.

    Fields:
        parameters: elements, without frozen ones.
        bytes_moved: read and written by perturb() and step(), gradients counted once per read.
        base_bytes: what the plain fused base optimizer moves.
        launches: op calls of a step that is perturbed, whatever the number of tensors; without those of
            `update_mask()`.
        state_bytes: kept and saved: momenta, masters, history, IRE's mask.
        scratch_bytes: kept, not saved: clean copies, a gradient at clean weights that the update takes, and
            Friendly-SAM's second mean.
    """

    parameters: int
    bytes_moved: int
    base_bytes: int
    launches: int
    state_bytes: int
    scratch_bytes: int

    @property
    def multiple_of_base(self) -> float:
        return self.bytes_moved / self.base_bytes if self.base_bytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "multiple_of_base": self.multiple_of_base}


def cost(opt: FlatOptimizer) -> Cost:
    """Count bytes, op calls and memory of one step of `opt`, from shapes and dtypes alone; of sharded
    parameters what is on this rank. Where only every k-th step ascends, the mean over k steps.

    Counted: perturb (read w, write the clean copy, write w'; nothing on clean ranks), the norm and ascent reads of
    SAM, the update (read clean w, gradients, moments; write w, moments), IRE's mask. mSAM's further rounds, autograd's
    accumulation and `Wrap`'s base step are not counted.
    """
    perturbation, enhancement = opt.perturbation, opt.setup.enhancement
    parameters = bytes_moved = base_bytes = state_bytes = scratch_bytes = 0
    for group in opt.own_groups:
        moments = 2 if "betas" in group else int(group.get("momentum", 0) != 0)
        for p, name in zip(group["params"], names_of(group), strict=True):
            if not p.requires_grad:
                continue
            master = opt.setup.has_master(p)
            p = dtensor.local(p)
            n, item = p.numel(), p.element_size()
            weight = 4 if master else item  # bytes of the clean weight, wherever it is kept
            moment = 4 if master else item
            parameters += n
            # A master is stored beside the parameter, so the update writes both.
            base = n * (2 * weight + item + 2 * moments * moment + (item if master else 0))
            base_bytes += base
            bytes_moved += base
            if opt.max_grad_norm is not None:
                bytes_moved += n * item * (2 if perturbation.mixes else 1)
            state_bytes += n * (moments * moment + (4 if master else 0))
            if enhancement is not None and group["enhance"]:
                mask = math.prod(mask_shape(p))
                state_bytes += mask
                # The step reads the mask; its update reads the gradient four times and writes the mask.
                bytes_moved += mask + round((4 * n * item + mask) / group["mask_interval"])
            if opt.setup.method is None or not group["perturb"]:
                continue
            if perturbation.keeps_history(group):
                state_bytes += 4 * history_length(p)
            if perturbation.is_clean_rank:
                continue
            sizes = Sizes(weight, item, moment, 0 if master else item, perturbation.is_adaptive(group, p, name))
            extra = perturbation.traffic(group, sizes)
            bytes_moved += round(n * extra.moved)
            scratch_bytes += n * extra.scratch
            state_bytes += n * extra.state
    launches = (
        perturbation.launches_of(opt.own_groups) - perturbation.is_clean_rank + (opt.setup.max_grad_norm is not None)
    )
    return Cost(parameters, bytes_moved, base_bytes, launches, state_bytes, scratch_bytes)
