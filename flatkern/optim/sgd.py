"""SGD with momentum, alone or at the perturbed weights of a flatness-seeking method."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor

from ..methods import IRE, Method
from .buckets import Bucket, Call, SharedArguments
from .fused import FusedOptimizer, require_unset
from .groups import Group

NUMBERS_ON_DEVICE = {
    "momentum": lambda group: float(group["momentum"]),
    "dampening": lambda group: float(group["dampening"]),
    "weight_decay": lambda group: float(group["weight_decay"]),
    "nesterov": lambda group: bool(group["nesterov"]),
}
NUMBERS = {"lr": lambda group: float(group["lr"]), **NUMBERS_ON_DEVICE}


class SGD(FusedOptimizer):
    """torch.optim.SGD, with a perturbation around it, in one pass over memory.

        d <- g + weight_decay w
        v <- momentum v + (1 - dampening) d          (first step: v <- d)
        w <- w - lr v                                (nesterov: w - lr (d + momentum v))

    Arguments, in torch's order and with torch's meaning:
        params: tensors, groups, or (name, tensor) pairs. float32, float16 or bfloat16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.
        foreach, fused: accepted and ignored; `backend` decides.
        differentiable: refused when True.
    and ours, keyword-only:
        perturb: flatkern.RWP, SAM, ASAM, GSAM, FriendlySAM, LookSAM or MomentumSAM, or None for the plain optimizer.
        enhance: flatkern.IRE, or None.
        backend: "eager", "cpp", "triton" or "cuda", used or refused; None takes the best one that is live.
        master_weights: keep float32 weights behind half-precision parameters.
        capturable: steps may be captured in a CUDA graph. group["lr"], group["sigma"] and group["round"] are tensors on
            the device then: a replay reads what they are and goes on to the next round, and schedulers fill them in
            place. A number that is assigned to one is copied there at the next call. Every other value (momentum,
            rho, lam, eta, kappa, ...) and whether IRE has a mask stay as they were at the capture; `update_mask()`
            runs outside, and `mask_due` counts the steps that Python ran. Needs the Triton or the CUDA
            backend and all parameters on one device. As torch says of its graphs, a replay uses the tensors of the
            capture: weights, state, and gradients, which are the graph's own where the backward pass is captured, too.
            Run a few steps before a capture, so that all tables are on the device and all kernels loaded; `release()`
            frees memory that graphs read.
        max_grad_norm: clip the final (mixed, averaged, unscaled) gradient to this global L2 norm.

    State, per parameter: `momentum_buffer` (the parameter's dtype; float32 with masters), `master`,
    `history` (ARWP; float32, one per filter). A torch.optim.SGD checkpoint loads and continues.

    Raises:
        ValueError, TypeError: a value out of range, or parameters that no kernel can walk; the message
            names the argument, the value and the remedy.
    """

    state_keys = ("momentum_buffer",)
    ops = ("sgd_update_",)
    split_by = staticmethod(lambda group: group["momentum"] != 0)
    flag_keys = (*FusedOptimizer.flag_keys, "nesterov", "maximize")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        perturb: Method | None = None,
        enhance: IRE | None = None,
        backend: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        require_unset("SGD", differentiable=differentiable)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        self.start(params, defaults, perturb, enhance, backend, master_weights, max_grad_norm, capturable)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call:
        buffers, after = None, None
        created: Collection[int] = ()
        if bucket.groups[0]["momentum"] != 0:
            (buffers,), created = self.cycle.state.get(bucket, ("momentum_buffer",))
        numbers = {**shared.numbers, **bucket.columns("sgd", NUMBERS if shared.lrs is None else NUMBERS_ON_DEVICE)}
        if created:
            # v <- d on the first step is v <- momentum 0 + (1 - 0) d.
            dampening = numbers["dampening"]
            numbers["dampening"] = [0.0 if k in created else d for k, d in enumerate(dampening)]
            if shared.found_inf is not None and any(dampening):
                after = partial(self._forget_skipped_first_step, bucket, created, shared.found_inf)
        return Call(bucket, "sgd_update_", (shared.params, buffers, *shared.tensors()), numbers, after)

    def _forget_skipped_first_step(self, bucket: Bucket, created: Collection[int], found_inf: Tensor) -> None:
        """A skipped first step is no first step: with dampening the next one must still be v <- d.

        Only here the host may wait for a GPU, once, and before any graph is captured.
        """
        if bool(found_inf):
            for k in created:
                del self.state[bucket.params[k]]["momentum_buffer"]
