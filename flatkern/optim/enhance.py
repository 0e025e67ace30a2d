"""IRE: when the mask is updated, from which gradients, and what the update op takes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import MAGNITUDE_DIGITS
from ..dispatch import resolve
from ..tables import mask_shape
from . import capture, layouts, messages
from .plan import Bucket, Group

if TYPE_CHECKING:
    from .base import FlatOptimizer
    from .update import Work

EXPONENT_OF_INFINITY = 255 << (MAGNITUDE_DIGITS[0] - 8)  # first digits from here on are not finite


def is_on(opt: FlatOptimizer, group: Group) -> bool:
    """True if the steps of a group are amplified now."""
    return opt.enhancement is not None and group["enhance"] and group["mask_age"] is not None


def is_due(opt: FlatOptimizer) -> bool:
    if opt.enhancement is None:
        return False
    age = opt.param_groups[0]["mask_age"]
    return age is None or age >= opt.enhancement.interval


def of(opt: FlatOptimizer, bucket: Bucket) -> tuple[list[Tensor] | None, list[float]]:
    """Masks and kappa of a bucket, whose groups agree on being amplified; (None, zeros) where they are not."""
    if not is_on(opt, bucket.groups[0]):
        return None, bucket.constant(0.0)
    bucket.values("kappa")
    return masks_of(opt, bucket.params), bucket.values("kappa now", lambda g: _kappa(opt, g))


def _kappa(opt: FlatOptimizer, group: Group) -> float:
    kappa = float(group["kappa"])
    assert opt.enhancement is not None
    if not opt.enhancement.kappa_follows_lr:
        return kappa
    first = float(group.get("initial_lr", opt.defaults["lr"]))
    return kappa * float(group["lr"]) / first if first else 0.0


def masks_of(opt: FlatOptimizer, params: list[Tensor]) -> list[Tensor]:
    """The masks; zero where a parameter has none yet."""
    return opt._kept(params, "mask", mask_shape, torch.uint8)


def count_step(opt: FlatOptimizer, work: Work) -> None:
    """The mask is a step older, unless the step was skipped. (On a GPU the host does not wait to know.)"""
    if opt.enhancement is None:
        return
    flags = [] if opt.capturable else [f.found_inf for _, _, f in work if f.found_inf is not None]
    if any(flag.is_cpu and bool(flag) for flag in flags):
        return
    for group in opt.param_groups:
        if group["mask_age"] is not None:
            group["mask_age"] += 1


def update_mask(opt: FlatOptimizer, scaler: Any) -> None:
    """Read `.grad`, set the masks, drop the gradients."""
    if opt.enhancement is None:
        raise RuntimeError("update_mask: this optimizer has no enhancement; pass enhance=flatkern.IRE(kappa=...)")
    messages.refuse_unfinished(opt, "update_mask")
    if capture.is_under_way():
        raise RuntimeError("update_mask: a CUDA graph is being captured, and a mask needs the host; update it outside")
    params = [p for group in opt.param_groups if group["enhance"] for p in group["params"] if p.requires_grad]
    seen = [p for p in params if p.grad is not None]
    if not seen:
        raise RuntimeError(
            "update_mask: no parameter has a gradient; run flatkern.sampled_label_loss(model(x)).backward() first"
        )
    grads = [layouts.like(p.grad, p) for p in seen]
    threshold = _threshold(opt, grads, opt.enhancement.sharp_fraction)
    if threshold is None:
        if scaler is None or not scaler.is_enabled():
            raise RuntimeError(
                "update_mask: a gradient is not finite, so the mask is kept; call zero_grad() and take another batch"
            )
    else:
        masks = dict(zip(params, masks_of(opt, params), strict=True))
        for op, device, at in _by_device(opt, "pack_mask_", seen):
            op([masks[seen[k]] for k in at], [grads[k] for k in at], threshold.to(device))
        reached = {id(p) for p in seen}
        for p in params:
            if id(p) not in reached:
                masks[p].zero_()
        for group in opt.param_groups:
            group["mask_age"] = 0
    for p in opt._parameters():
        p.grad = None
    opt.cycle.mark_consumed([])


def _by_device(opt: FlatOptimizer, op: str, tensors: list[Tensor]) -> list[tuple[Any, torch.device, list[int]]]:
    """An op per device, with the positions of the tensors that are there."""
    positions: dict[torch.device, list[int]] = {}
    for k, t in enumerate(tensors):
        positions.setdefault(t.device, []).append(k)
    return [(resolve(op, device.type, opt.backend), device, at) for device, at in positions.items()]


def _threshold(opt: FlatOptimizer, grads: list[Tensor], sharp_fraction: float) -> Tensor | None:
    """The K-th smallest magnitude, 0-dim float32, exact; None where a gradient is not finite.

    A radix selection over the bits: a histogram per digit, no sort and no copy of the gradients.
    """
    total = sum(g.numel() for g in grads)
    device = grads[0].device
    remaining = torch.tensor(min(max(int(total * (1 - sharp_fraction)), 1), total), device=device)
    prefix = torch.empty(0, dtype=torch.int64, device=device)
    bits = torch.zeros((), dtype=torch.int64, device=device)
    for level, width in enumerate(MAGNITUDE_DIGITS):
        counts = torch.zeros(2**width, dtype=torch.int64, device=device)
        for op, where, at in _by_device(opt, "count_magnitudes_", grads):
            part = torch.empty(2**width, dtype=torch.int64, device=where)
            op(part, [grads[k] for k in at], prefix.to(where))
            counts += part.to(device)
        if level == 0 and bool(counts[EXPONENT_OF_INFINITY:].any()):
            return None
        up_to = counts.cumsum(0)
        digit = torch.searchsorted(up_to, remaining)
        remaining = remaining - (up_to[digit] - counts[digit])
        prefix = torch.cat([prefix, digit.reshape(1)])
        bits = (bits << width) | digit
    return bits.to(torch.int32).view(torch.float32)
