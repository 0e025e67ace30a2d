"""IRE: when the mask is updated, from which gradients, and what an update op takes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..checks import check_gradient
from ..dispatch import resolve
from ..methods import IRE
from ..selection import kth_smallest_magnitude, shards_of
from ..values import check_positive
from .buckets import Bucket
from .cycle import Cycle
from .gradients import gradients_of
from .groups import Group, common_value
from .layouts import like
from .scalars import is_capturing


class Mask:
    """The mask of one optimizer; without an enhancement there is none, and every question is answered so.

    Its bits are in the state, its age in steps is `group["mask_age"]`, None before the first update;
    `group["largest_lr"]` is what kappa_follows_lr compares with.
    """

    def __init__(self, enhancement: IRE | None) -> None:
        self._enhancement = enhancement
        self.exists = enhancement is not None
        self.ops = ("count_magnitudes_", "pack_mask_") if self.exists else ()

    def is_on(self, group: Group) -> bool:
        """True if the steps of a group are amplified now."""
        return self._enhancement is not None and group["enhance"] and group["mask_age"] is not None

    def is_due(self, groups: list[Group]) -> bool:
        if self._enhancement is None or not groups:
            return False
        age = groups[0]["mask_age"]
        return age is None or age >= common_value(groups, "mask_interval", "mask_due", "one mask")

    def is_missed(self, groups: list[Group]) -> bool:
        """True if steps would be amplified, had the mask ever been updated."""
        return self.exists and any(g["mask_age"] is None and g["enhance"] and g["kappa"] > 0 for g in groups)

    def check_group(self, group: Group, optimizer: str) -> None:
        """Refuse what no mask could serve."""
        if self.exists:
            check_positive(optimizer, "mask_interval", group["mask_interval"])

    def check_common(self, groups: list[Group], optimizer: str) -> None:
        """Refuse groups with different values where there is one mask for all."""
        if self.exists and groups:
            common_value(groups, "mask_interval", optimizer, "one mask")
            common_value(groups, "sharp_fraction", optimizer, "one mask")

    def masks_and_kappa(self, cycle: Cycle, bucket: Bucket) -> tuple[list[Tensor] | None, list[float]]:
        """What an update takes, on a bucket whose groups agree on being amplified; (None, zeros) where they are not."""
        if not bucket.groups[0]["enhance"]:
            return None, bucket.zeros
        # Created at the first step even if unused: checkpoint loaders need the keys.
        masks = cycle.state.masks(bucket.params)
        if not self.is_on(bucket.groups[0]):
            return None, bucket.zeros
        return masks, bucket.values("kappa", self._kappa)

    def _kappa(self, group: Group) -> float:
        """kappa, or kappa min(1, lr / the largest lr so far)."""
        kappa = float(group["kappa"])
        if not self._enhancement.kappa_follows_lr:  # type: ignore[union-attr]
            return kappa
        lr = float(group["lr"])
        return kappa * (lr / max(lr, group["largest_lr"])) if lr else 0.0

    def count_step(self, cycle: Cycle, skipped: bool) -> None:
        """The mask is a step older, unless the step is known to be skipped."""
        if skipped:
            return
        for group in cycle.groups:
            if self._enhancement.kappa_follows_lr:  # type: ignore[union-attr]
                group["largest_lr"] = max(group["largest_lr"], float(group["lr"]))
            if group["mask_age"] is not None:
                group["mask_age"] += 1

    def update(self, cycle: Cycle, scaler: Any) -> None:
        """Read `.grad`, set the masks, drop the gradients.

        Raises:
            RuntimeError: nothing has changed then.
        """
        if self._enhancement is None:
            raise RuntimeError("update_mask: this optimizer has no enhancement; pass enhance=flatkern.IRE(kappa=...)")
        cycle.require("update_mask")
        cycle.groups.check_changed()
        if is_capturing():
            raise RuntimeError(
                "update_mask: a CUDA graph is being captured, and a mask needs the host; update it outside"
            )
        every = cycle.groups.params()
        gradients_of(every)
        params = [p for group in cycle.groups if group["enhance"] for p in group["params"] if p.requires_grad]
        seen = [p for p in params if p.grad is not None]
        _check_new(cycle, every, seen)
        fraction = common_value(cycle.groups.listed(), "sharp_fraction", "update_mask", "one mask")
        grads = _walkable(seen)
        backend, total = cycle.groups.setup.backend, sum(g.numel() for g in grads)
        shards = shards_of(grads)
        flat = min(max(int(total * (1 - fraction)), 1), total)
        masks = dict(zip(map(id, params), cycle.state.masks(params), strict=True))
        # Everything is at hand before the host waits: then the device does.
        packs = [(shard, [dtensor.local(masks[id(seen[k])]) for k in shard.at]) for shard in shards]
        threshold = kth_smallest_magnitude(shards, total, flat, backend)
        if threshold is None:
            if scaler is None or not scaler.is_enabled():
                raise RuntimeError(
                    "update_mask: a gradient is not finite, so the mask is kept; call zero_grad() and take another "
                    "batch"
                )
            cycle.state.undo_created()
        else:
            for shard, here in packs:
                resolve("pack_mask_", shard.device.type, backend)(here, shard.grads, threshold.to(shard.device))
            # What has no gradient has no mask; a parameter that is left out or frozen now may have one from before.
            reached = set(map(id, seen))
            for mask in cycle.state.existing("mask", [p for p in every if id(p) not in reached]):
                dtensor.local(mask).zero_()
            for group in cycle.groups:
                group["mask_age"] = 0
        cycle.gradients.clear(every)


def _walkable(params: list[Tensor]) -> list[Tensor]:
    """The gradients in the parameters' memory formats; refuses what no kernel can walk."""
    for k, p in enumerate(params):
        if p.grad.layout is not torch.strided:  # type: ignore[union-attr]
            check_gradient(f"update_mask: grads[{k}]", dtensor.local(p.grad), dtensor.local(p))  # type: ignore[arg-type]
    return [like(p.grad, p) for p in params]  # type: ignore[arg-type]


def _check_new(cycle: Cycle, every: list[Tensor], seen: list[Tensor]) -> None:
    """Refuse the gradients of the last step, which are in `.grad` until somebody zeroes them."""
    if not seen:
        raise RuntimeError(
            "update_mask: no parameter has a gradient; run flatkern.sampled_label_loss(model(x)).backward() first"
        )
    # Values are asked, too, except of shards: those of one rank may be zeros, and the others would wait for it.
    ledger = cycle.gradients
    if not (ledger.is_new(every) if any(map(dtensor.is_sharded, seen)) else ledger.was_given(every)):
        raise RuntimeError(
            "update_mask: the gradients in .grad are those of the last step, or zeros, and the mask needs new ones; "
            "call opt.zero_grad(), then flatkern.sampled_label_loss(model(x)).backward(), then update_mask()"
        )
