"""torch.amp.GradScaler: what it hangs on an optimizer, as a value; unscaling the pass that it does not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState


@dataclass(frozen=True)
class Amp:
    """A scaler's attributes, read once at the public call: `self` may be a proxy with attributes of its own."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def factor(self, rounds: float, unscaled: bool, device: torch.device) -> Tensor | None:
        """1 / (loss scale x rounds), 0-dim float32; None stands for 1.

        Arguments:
            unscaled: the loss scale is off already.
        """
        if self.grad_scale is not None and not unscaled:
            return (self.grad_scale.to(device=device, dtype=torch.float32).reshape(()) * rounds).reciprocal()
        if rounds == 1 and not unscaled:
            return None
        # Filled on the device, because a copy from the host would make it wait.
        return torch.full((), 1.0 / rounds, dtype=torch.float32, device=device)

    def skip(self, nonfinite: Tensor | None, device: torch.device) -> Tensor | None:
        """Nonzero where the step must be skipped; None without a scaler and without an ascent.

        Arguments:
            nonfinite: nonzero where another gradient that the step depends on was not finite.
        """
        if self.found_inf is None:
            return None if nonfinite is None else nonfinite.to(device)
        flag = self.found_inf.to(device=device, dtype=torch.float32).reshape(())
        return flag if nonfinite is None else torch.maximum(flag, nonfinite.to(device))


NO_AMP = Amp()


def amp_of(optimizer: Any) -> Amp:
    """What a scaler has hung on `optimizer`.

    Raises:
        RuntimeError: the scaler has seen no gradient; its `found_inf` is then an empty sum.
    """
    scale, flag = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is None and flag is None:
        return NO_AMP
    if flag is not None and not isinstance(flag, Tensor):
        raise RuntimeError(
            "step: the scaler has seen no gradient in .grad; under a GradScaler the last round ends in step(), "
            "not in restore()"
        )
    return Amp(scale, flag)


def is_scaling(optimizer: Any) -> bool:
    """True inside `scaler.step(optimizer)`."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def forget(optimizer: Any) -> None:
    """After a refused step: the scaler removes what it hung on the optimizer only when a step succeeds."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)


class _Pass:
    """What a scaler takes for an optimizer: one of its own per pass, since it unscales each only once."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


def record(scaler: Any, flag: Tensor) -> None:
    """Tell a scaler of a pass that it does not see: where `flag` is 1, `scaler.update()` lowers the scale.

    Arguments:
        flag: 0-dim float32.
    """
    if scaler is None or not scaler.is_enabled():
        return
    seen = _Pass([])
    entry = scaler._per_optimizer_states[id(seen)]
    # A copy, because update() adds up in the first one that it finds.
    entry.update({"pass": seen, "found_inf_per_device": {flag.device: flag.clone()}})


class Unscaled:
    """The pass that a scaler has unscaled before step(), between perturb() and step()."""

    def __init__(self) -> None:
        self.scaler: Any = None  # the one given to perturb()
        self._pass: _Pass | None = None

    @property
    def is_done(self) -> bool:
        return self._pass is not None

    def unscale(self, param_groups: list[dict[str, Any]]) -> list[Tensor]:
        """Unscale the gradients in `.grad` in place. Where they are not finite, `scaler.update()` lowers the scale.

        Returns:
            Flags, nonzero where a gradient was not finite, one per device.
        """
        if not self.scaler.is_enabled():
            return []
        self._pass = _Pass(param_groups)
        self.scaler.unscale_(self._pass)
        entry = self.scaler._per_optimizer_states[id(self._pass)]
        entry["pass"] = self._pass  # its id must not go to another one before update() drops the entry
        return [flag.reshape(()) for flag in entry["found_inf_per_device"].values()]

    def forget(self) -> None:
        self.scaler = self._pass = None

    def loss_scale(self) -> float | Tensor:
        """What the scaler multiplies the loss by; 1 without one. A tensor, so that the host need not wait."""
        on = self.scaler is not None and self.scaler.is_enabled()
        return self.scaler._get_scale_async() if on else 1.0


def check_not_unscaled(scaler: Any, optimizer: Any) -> None:
    """Refuse a gradient that the scaler has unscaled before perturb(): it does so once per step, and the gradient of
    the perturbed weights would enter the update with the scale still on it."""
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states.get(id(optimizer), {}).get("stage") is OptState.UNSCALED:
        raise RuntimeError(
            "perturb: scaler.unscale_() was called before perturb(), and a scaler unscales only once per step; "
            "call it after the last backward, right before step(), or clip with max_grad_norm"
        )


def check_can_unscale(scaler: Any, params: list[Tensor], why: str) -> None:
    """Refuse float16 gradients, which a scaler does not unscale, before the weights move.

    Arguments:
        why: what needs it, and what to do; it ends the message.
    """
    if scaler is None or not scaler.is_enabled():
        return
    for k, p in enumerate(params):
        if p.dtype == torch.float16 and p.requires_grad:
            raise RuntimeError(
                f"perturb: params[{k}] is float16, and scaler.unscale_() refuses float16 gradients, which {why}"
            )
