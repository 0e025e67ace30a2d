"""torch.amp.GradScaler: unscaling and inf-checking the pass whose gradients it does not see in step()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

if TYPE_CHECKING:
    from .base import FlatOptimizer


class _Pass:
    """What a scaler takes for an optimizer: one of its own per pass, since it unscales each only once."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


def unscale_pass(opt: FlatOptimizer, scaler: Any) -> None:
    """Unscale the gradients in `.grad` in place; where they are not finite, `scaler.update()` lowers the
    scale and the coming step is skipped."""
    if not scaler.is_enabled():
        return
    cycle = opt.cycle
    cycle.scaler_pass = _Pass(opt.param_groups)
    scaler.unscale_(cycle.scaler_pass)
    found = scaler._per_optimizer_states[id(cycle.scaler_pass)]["found_inf_per_device"]
    for flag in found.values():
        cycle.require_finite(flag.reshape(()))


def check_scaled(opt: FlatOptimizer, scaler: Any) -> None:
    """Refuse a gradient that the scaler has unscaled before perturb(): it does so once per step, and the gradient of
    the perturbed weights would enter the update with the scale still on it."""
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states.get(id(opt), {}).get("stage") is OptState.UNSCALED:
        raise RuntimeError(
            "perturb: scaler.unscale_() was called before perturb(), and a scaler unscales only once per step; "
            "call it after the last backward, right before step(), or clip with max_grad_norm"
        )


def loss_scale(scaler: Any) -> float | Tensor:
    """What the scaler multiplies the loss by; 1 without one. A tensor, so that the host need not wait."""
    return 1.0 if scaler is None or not scaler.is_enabled() else scaler._get_scale_async()


def check_recorded(opt: FlatOptimizer) -> None:
    """Refuse a scaled step whose gradients the scaler has not seen: its `found_inf` is then an empty sum."""
    flag = getattr(opt, "found_inf", None)
    if flag is not None and not isinstance(flag, Tensor):
        raise RuntimeError(
            "step: the scaler has seen no gradient in .grad; under a GradScaler the last round ends in step(), "
            "not in restore()"
        )
    if flag is not None and opt.cycle.squares and opt.cycle.scaler is None:
        raise RuntimeError(
            'step: m-ARWP with mix="losses" under a GradScaler needs perturb(scaler=scaler), for the scale of '
            "the perturbed gradient"
        )


def forget(opt: FlatOptimizer) -> None:
    """After a refused step: the scaler only removes what it hung on the optimizer when a step succeeds."""
    for name in ("grad_scale", "found_inf"):
        opt.__dict__.pop(name, None)


def constant(value: float, device: torch.device) -> Tensor:
    """0-dim float32; filled on the device, because a copy from the host would make it wait."""
    return torch.full((), value, dtype=torch.float32, device=device)


def factor(opt: FlatOptimizer, rounds: int, device: torch.device) -> Tensor | None:
    """1 / (loss scale x rounds), 0-dim float32; None stands for 1."""
    scale: Tensor | None = getattr(opt, "grad_scale", None)
    if scale is None:
        return None if rounds == 1 else constant(1.0 / rounds, device)
    return (scale.to(device=device, dtype=torch.float32).reshape(()) * rounds).reciprocal()


def found_inf(opt: FlatOptimizer, device: torch.device) -> Tensor | None:
    """Nonzero where the step must be skipped; None without a scaler and without an ascent."""
    flag: Tensor | None = getattr(opt, "found_inf", None)
    skip = opt.cycle.skip
    if flag is None:
        return None if skip is None else skip.to(device)
    flag = flag.to(device=device, dtype=torch.float32).reshape(())
    return flag if skip is None else torch.maximum(flag, skip.to(device))
