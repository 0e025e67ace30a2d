"""IRE: when the mask is updated, from which gradients, and what the update op takes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import shards
from ..checks import MAGNITUDE_DIGITS
from ..dispatch import resolve
from ..tables import mask_shape
from . import capture, layouts, messages
from .plan import Bucket, Group

if TYPE_CHECKING:
    from .base import FlatOptimizer
    from .update import Work

SAMPLED = 2**20  # gradients from which on a sample is worth its while, and tells enough
LINE = 16  # elements that are read together


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
    if opt.enhancement is None or not bucket.groups[0]["enhance"]:
        return None, bucket.constant(0.0)
    # Made at the first step, whatever it is: checkpoints are loaded into the state that a first step makes.
    masks = masks_of(opt, bucket.params)
    if not is_on(opt, bucket.groups[0]):
        return None, bucket.constant(0.0)
    bucket.values("kappa")
    return masks, bucket.values("kappa now", lambda g: _kappa(opt, g))


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
    places = _places(grads)
    threshold = _threshold(opt, places, sum(g.numel() for g in grads), opt.enhancement.sharp_fraction)
    if threshold is None:
        if scaler is None or not scaler.is_enabled():
            raise RuntimeError(
                "update_mask: a gradient is not finite, so the mask is kept; call zero_grad() and take another batch"
            )
    else:
        masks = dict(zip(params, masks_of(opt, params), strict=True))
        for place in places:
            here = [shards.local(masks[seen[k]]) for k in place.at]
            resolve("pack_mask_", place.device.type, opt.backend)(here, place.grads, threshold.to(place.device))
        reached = {id(p) for p in seen}
        for p in params:
            if id(p) not in reached:
                shards.local(masks[p]).zero_()
        for group in opt.param_groups:
            group["mask_age"] = 0
    for p in opt._parameters():
        p.grad = None
    opt.cycle.mark_consumed([])


class Place(NamedTuple):
    """Gradients of one device, whose other rows the same ranks hold."""

    device: torch.device
    ranks: shards.Ranks
    at: list[int]  # positions among all gradients
    grads: list[Tensor]  # the parts that are here


def _places(grads: list[Tensor]) -> list[Place]:
    found: dict[Any, Place] = {}
    for k, g in enumerate(grads):
        where = g.device, shards.ranks_of(g)
        place = found.setdefault(where, Place(*where, [], []))
        place.at.append(k)
        place.grads.append(shards.local(g))
    return list(found.values())


def _threshold(opt: FlatOptimizer, places: list[Place], total: int, sharp_fraction: float) -> Tensor | None:
    """The K-th smallest of `total` magnitudes, 0-dim float32, exact; None where a gradient is not finite.

    A radix selection over the bits: a histogram per digit, no sort and no copy of the gradients. Of sharded ones the
    histograms are added up over the ranks, 33 KB in all. Of many gradients the first digit is guessed from a sample,
    because its histogram, in which every element has a part, is the slowest; counts tell whether the guess is right.
    """
    device = places[0].device
    wanted = torch.tensor(min(max(int(total * (1 - sharp_fraction)), 1), total), device=device)
    unknown = torch.empty(0, dtype=torch.int64, device=device)
    prefix = _guessed(opt, places, wanted / total) if total >= SAMPLED else unknown
    for attempt in range(3):
        counts = _histogram(opt, places, prefix)
        finite, low, high = torch.stack(
            [counts[-1] == 0, wanted <= counts[-2], counts[:-1].sum() < wanted]
        ).tolist()  # fmt: skip
        if not finite:
            return None
        if not (low or high):
            break
        # Near the end of its digits a sample is wrong by one.
        prefix = unknown if attempt else prefix + (1 if high else -1)
    while True:
        digit = torch.searchsorted(counts[-2] + counts[:-2].cumsum(0), wanted)
        prefix = torch.cat([prefix, digit.reshape(1)])
        if len(prefix) == len(MAGNITUDE_DIGITS):
            break
        counts = _histogram(opt, places, prefix)
    bits = torch.zeros((), dtype=torch.int64, device=device)
    for digit, width in zip(prefix, MAGNITUDE_DIGITS, strict=True):
        bits = (bits << width) | digit
    return bits.to(torch.int32).view(torch.float32)


def _guessed(opt: FlatOptimizer, places: list[Place], quantile: Tensor) -> Tensor:
    """The first digit of a quantile of the magnitudes as one in 64 of them has it; int64 (1,)."""
    counts = _histogram(opt, places, torch.empty(0, dtype=torch.int64, device=quantile.device), _sample)[:-2]
    up_to = counts.cumsum(0)
    digit = torch.searchsorted(up_to, (quantile * up_to[-1]).long()).clamp(max=len(counts) - 1)
    return digit.reshape(1)


def _sample(grads: list[Tensor]) -> list[Tensor]:
    """A cache line of every 64, of tensors that have so many."""
    pieces = []
    for g in grads:
        count = g.numel() // (64 * LINE)
        pieces.append(g.as_strided((count, LINE), (64 * LINE, 1)).flatten())
    return [torch.cat(pieces)]


def _histogram(
    opt: FlatOptimizer,
    places: list[Place],
    prefix: Tensor,
    select: Callable[[list[Tensor]], list[Tensor]] = lambda grads: grads,
) -> Tensor:
    """count_magnitudes_ of everything, or of what `select` leaves of it, wherever it is."""
    size = 2 ** MAGNITUDE_DIGITS[len(prefix)] + 2
    counts = torch.zeros(size, dtype=torch.int64, device=prefix.device)
    for place in places:
        part = torch.empty(size, dtype=torch.int64, device=place.device)
        count = resolve("count_magnitudes_", place.device.type, opt.backend)
        count(part, select(place.grads), prefix.to(place.device))
        counts += shards.add_up(part, place.ranks).to(prefix.device)
    return counts
