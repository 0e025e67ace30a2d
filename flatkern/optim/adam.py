"""Adam and AdamW, alone or at the perturbed weights of a flatness-seeking method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import IRE, Method
from ..values import check_value
from .buckets import Bucket, Call, SharedArguments
from .fused import FusedOptimizer, require_unset
from .groups import Group

NUMBERS_ON_DEVICE = {
    "beta1": lambda group: float(group["betas"][0]),
    "beta2": lambda group: float(group["betas"][1]),
    "eps": lambda group: float(group["eps"]),
    "weight_decay": lambda group: float(group["weight_decay"]),
}
NUMBERS = {"lr": lambda group: float(group["lr"]), **NUMBERS_ON_DEVICE}


class Adam(FusedOptimizer):
    """torch.optim.Adam, with a perturbation around it, in one pass over memory.

        g <- g + weight_decay w                      (AdamW: w <- (1 - lr weight_decay) w)
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    Arguments, in torch's order and with torch's meaning:
        params: tensors, groups, or (name, tensor) pairs. float32, float16 or bfloat16.
        lr, betas, eps, weight_decay, maximize, decoupled_weight_decay: as torch.
        amsgrad, differentiable: refused when True.
        foreach, fused: accepted and ignored; `backend` decides.
    and ours, keyword-only: as `SGD`.

    State, per parameter: `step` (0-dim float32), `exp_avg`, `exp_avg_sq` (the parameter's dtype; float32
    with masters), `master`, `history`. A torch.optim.Adam checkpoint loads and continues.

    Raises:
        ValueError, TypeError: a value out of range, or parameters that no kernel can walk; the message
            names the argument, the value and the remedy.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1.
    """

    ops = ("adam_update_", "adamw_update_")  # a group may switch
    state_keys = ("step", "exp_avg", "exp_avg_sq")
    split_by = staticmethod(lambda group: bool(group["decoupled_weight_decay"]))
    flag_keys = (*FusedOptimizer.flag_keys, "maximize", "decoupled_weight_decay", "capturable")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        perturb: Method | None = None,
        enhance: IRE | None = None,
        backend: str | None = None,
        master_weights: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        name = type(self).__name__
        require_unset(name, amsgrad=amsgrad, differentiable=differentiable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self.start(params, defaults, perturb, enhance, backend, master_weights, max_grad_norm, capturable)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        require_unset(self.setup.name, amsgrad=group["amsgrad"])
        if bool(group["capturable"]) != self.setup.capturable:
            raise ValueError(
                f"{self.setup.name}: a group has capturable={group['capturable']!r} and the optimizer "
                f"{self.setup.capturable}; it holds for all groups, so pass it to the constructor"
            )
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ValueError(f"betas is {group['betas']!r}, but should be a pair of numbers in [0, 1)")
        if len({isinstance(beta, Tensor) for beta in group["betas"]}) > 1:
            raise ValueError("betas must be either both floats or both Tensors")
        for key, value in zip(("beta1", "beta2"), group["betas"], strict=True):
            check_value(key, value)

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call:
        numbers = {**shared.numbers, **bucket.columns("adam", NUMBERS if shared.lrs is None else NUMBERS_ON_DEVICE)}
        (exp_avgs, exp_avg_sqs, steps), _ = self.cycle.state.get(bucket, ("exp_avg", "exp_avg_sq", "step"))
        op = "adamw_update_" if bucket.groups[0]["decoupled_weight_decay"] else "adam_update_"
        return Call(bucket, op, (shared.params, exp_avgs, exp_avg_sqs, steps, *shared.tensors()), numbers)


class AdamW(Adam):
    """torch.optim.AdamW: `Adam` with decoupled weight decay, on by default.

        w <- (1 - lr weight_decay) w,    then Adam's step without weight decay

    Arguments, state and errors as `Adam`.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        perturb: Method | None = None,
        enhance: IRE | None = None,
        backend: str | None = None,
        master_weights: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True, perturb=perturb, enhance=enhance, backend=backend,
            master_weights=master_weights, max_grad_norm=max_grad_norm,
        )  # fmt: skip
