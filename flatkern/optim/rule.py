"""What our own base rules share: construction, lazy state, masters, layouts. A rule's equation is elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import shards
from ..checks import check_value
from ..dispatch import gather_state
from . import capture
from .base import FlatOptimizer
from .plan import Bucket, Group

WHY_REFUSED = {
    "amsgrad": "no kernel keeps the maximum of the second moments; pass amsgrad=False",
    "differentiable": "the kernels write in place and have no backward; pass differentiable=False",
}


def require_unset(name: str, **flags: bool) -> None:
    """Refuse torch options that no kernel has."""
    for flag, value in flags.items():
        if value:
            raise ValueError(f"{name}: {flag} is {value!r}, but {WHY_REFUSED[flag]}")


class RuleOptimizer(FlatOptimizer):
    """An optimizer whose base rule is one of our update ops."""

    def _start(self, params, defaults, perturb, enhance, backend, master_weights, max_grad_norm, capturable) -> None:  # type: ignore[no-untyped-def]
        self.capturable = bool(capturable)
        defaults |= self._configure(perturb, enhance, backend, master_weights, max_grad_norm)
        for key in ("lr", "weight_decay"):
            # torch checks defaults even where every group overrides them.
            self._check_value(key, defaults[key])
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._check_new_parameters()
        capture.adopt(self)
        self._ready = True

    def _is_ours(self, key: str) -> bool:
        return True

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        require_unset(type(self).__name__, differentiable=group["differentiable"])

    def _check_value(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element")
        check_value(key, value)

    # --- state, created at the first step that needs it ------------------------------------------

    def _states(self, bucket: Bucket, keys: tuple[str, ...]) -> tuple[list[list[Tensor]], set[int]]:
        """Lists of state tensors for `keys`, and the positions whose state is new (zeros)."""
        lists = gather_state(self.state, bucket.params, keys)
        if lists is not None:
            return lists, set()
        created = set()
        for k, p in enumerate(bucket.params):
            state = self.state[p]
            for key in keys:
                if state.get(key) is None:
                    created.add(k)
                    state[key] = self._new_state(p, key)
                    self.cycle.created.append((p, key))
        return [[self.state[p][key] for p in bucket.params] for key in keys], created

    def _new_state(self, p: Tensor, key: str) -> Tensor:
        if key == "step":
            # Beside the parameter, so that on a GPU a skipped step is known where it counts.
            return torch.zeros((), dtype=torch.float32, device=p.device)
        dtype = torch.float32 if self._has_master(p) else p.dtype
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def _masters(self, params: list[Tensor]) -> list[Tensor]:
        """The float32 weights behind `params`, made or re-made where the parameter was written by others."""
        versions = self.cycle.master_versions
        result = []
        for p in params:
            state = self.state[p]
            master = state.get("master")
            if master is None:
                # A perturbed parameter's clean value is known even where somebody has cleared the state.
                source = self.cycle.clean_copy(p) if self._is_held(p) else p.detach()
                with torch.inference_mode(False):
                    part = shards.local(source).to(torch.float32, copy=True, memory_format=torch.preserve_format)
                    master = state["master"] = shards.beside(p, part, p.shape)
                self.cycle.created.append((p, "master"))
            elif versions.get(p) != shards.version(p) and not self._is_held(p):
                part, mine = shards.local(p), shards.local(master)
                if not torch.equal(mine.to(p.dtype), part):
                    mine.copy_(part)
            result.append(master)
        return result

    def _is_held(self, p: Tensor) -> bool:
        """True while `p` holds a perturbation, and so differs from its master by right."""
        return self.cycle.plan is not None and id(p) in self.cycle.plan.members
