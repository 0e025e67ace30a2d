"""Refusals and warnings of the cycle, each naming the way out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from .. import shards
from ..methods import RWP

if TYPE_CHECKING:
    from .base import FlatOptimizer
    from .plan import Plan


def pattern(opt: FlatOptimizer) -> str:
    """The training pattern that the optimizer's method expects."""
    if isinstance(opt.method, RWP):
        if opt.method.rolling:
            return "opt.train(); loss.backward(); opt.step(); or opt.follow(model) once"
        if opt.method.lam is None:
            return "opt.perturb(); loss.backward(); opt.step()"
        return "loss on A .backward(); opt.perturb(); loss on B .backward(); opt.step()"
    return "loss.backward(); opt.perturb(); loss on the same batch .backward(); opt.step()"


def way_back(opt: FlatOptimizer) -> str:
    return "eval()" if opt.rolling else "restore()"


def refuse_unfinished(opt: FlatOptimizer, call: str) -> None:
    """Refuse `call` while the weights are perturbed or gradients wait in the optimizer."""
    refuse_suspended(opt, call)
    if opt.cycle.plan is not None:
        raise RuntimeError(f"{call}: the weights are perturbed; call {way_back(opt)} first")
    if opt.cycle.has_pending():
        raise RuntimeError(
            f"{call}: gradients of an unfinished step are pending; call step(), or release() to drop them, first"
        )


def refuse_suspended(opt: FlatOptimizer, call: str) -> None:
    if opt.cycle.suspended:
        raise RuntimeError(f"{call}: inside clean() a perturbation is suspended; leave the with block first")


def warn_never_perturbed(opt: FlatOptimizer) -> None:
    cycle = opt.cycle
    if opt.method is None or cycle.ever_perturbed or "pattern" in cycle.warned:
        return
    cycle.warned.add("pattern")
    warnings.warn(
        f"{type(opt).__name__} has {type(opt.method).__name__} but has not perturbed in its first 10 steps, "
        f"so it is the plain base optimizer; the expected pattern is: {pattern(opt)}",
        UserWarning,
        stacklevel=5,
    )


def warn_rounded_away(opt: FlatOptimizer, plan: Plan) -> None:
    """SAM's climb on bfloat16 weights is often below half an ulp; say once how many weights it moved."""
    cycle = opt.cycle
    if "rounded" in cycle.warned:
        return
    cycle.warned.add("rounded")
    moved = total = 0
    for bucket in plan.buckets:
        climbs = any(group["rho"] > 0 for group in bucket.groups)
        for p, clean in zip(shards.parts(bucket.params), shards.parts(bucket.clean), strict=True):
            if p.dtype == torch.bfloat16 and climbs:
                moved += int((p != clean.to(p.dtype)).sum())
                total += p.numel()
    if total:
        warnings.warn(
            f"{type(opt.method).__name__} climbs on bfloat16 weights: {moved / total:.0%} of {total} weights moved; "
            "for the rest the step is below half an ulp; float32 weights under autocast are perturbed fully",
            UserWarning,
            stacklevel=6,
        )
