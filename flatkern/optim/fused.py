"""What SGD, Adam and AdamW share: construction, and a step that is one fused op call a bucket."""

from __future__ import annotations

from typing import Any

import torch

from ..values import check_value
from .base import FlatOptimizer
from .groups import Group, Setup

WHY_REFUSED = {
    "amsgrad": "no kernel keeps the maximum of the second moments; pass amsgrad=False",
    "differentiable": "the kernels write in place and have no backward; pass differentiable=False",
}


def require_unset(name: str, **flags: bool) -> None:
    """Refuse torch options that no kernel has."""
    for flag, value in flags.items():
        if value:
            raise ValueError(f"{name}: {flag} is {value!r}, but {WHY_REFUSED[flag]}")


class FusedOptimizer(FlatOptimizer):
    """An optimizer whose base rule is one of our update ops."""

    updates_copies = True

    def start(self, params: Any, defaults: Group, *fixed: Any) -> None:
        """Construct on `params`.

        Arguments:
            fixed: the fields of `Setup` after the name, in its order, as the constructor was given them.
        """
        defaults |= self.set_up(Setup(type(self).__name__, *fixed))
        for key in ("lr", "weight_decay"):
            check_value(key, defaults[key])  # torch checks defaults even where every group overrides them
        torch.optim.Optimizer.__init__(self, params, defaults)
        self.check_new_parameters()

    def checks_key(self, key: str) -> bool:
        return key in self.defaults  # a checkpoint of another method has values that mean nothing here

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        require_unset(self.setup.name, differentiable=group["differentiable"])
