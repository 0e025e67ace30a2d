"""state_dict and pickling: saved dtypes are kept, our group keys survive torch's checkpoints, no scratch."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import RWP
from ..tables import history_length
from . import layouts

if TYPE_CHECKING:
    from .base import FlatOptimizer


def load(opt: FlatOptimizer, state_dict: dict[str, Any]) -> None:
    """torch's load_state_dict, without its cast of every state tensor to the parameter's dtype."""
    state_dict = dict(state_dict)
    for hook in opt._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(opt, state_dict) or state_dict
    groups, saved_groups = opt.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"load_state_dict: the checkpoint has {len(saved_groups)} parameter groups, the optimizer {len(groups)}"
        )
    for k, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"load_state_dict: group {k} has {len(saved['params'])} parameters in the checkpoint, "
                f"{len(group['params'])} in the optimizer"
            )

    opt.cycle.end_by_version()
    ids = chain.from_iterable(g["params"] for g in saved_groups)
    by_id = dict(zip(ids, opt._parameters(), strict=True))
    opt.state.clear()
    for key, saved in state_dict["state"].items():
        if key in by_id:
            p = by_id[key]
            opt.state[p] = {name: _fit(name, value, p) for name, value in saved.items()}
        else:
            opt.state[key] = saved
    for group, saved in zip(groups, saved_groups, strict=True):
        # In place: schedulers and a wrapped base optimizer share these very dicts.
        group.update({k: v for k, v in saved.items() if k != "params"})
    settle(opt)
    for post_hook in opt._optimizer_load_state_dict_post_hooks.values():
        post_hook(opt)


def _fit(name: str, value: Any, p: Tensor) -> Any:
    """A state value on the parameter's device, in its memory format, in the dtype it was saved with."""
    if name == "step":
        return value.clone().float().cpu() if isinstance(value, Tensor) else torch.tensor(float(value))
    if not isinstance(value, Tensor):
        return value
    return layouts.like(value.detach().to(p.device, copy=True), p)


def settle(opt: FlatOptimizer) -> None:
    """After loading: forget what belonged to the old state, drop masters nobody uses, say what starts empty."""
    opt.cycle.plans.clear()
    opt.cycle.consumed = None
    opt.cycle.master_versions.clear()
    adaptive = isinstance(opt.method, RWP)
    missing = False
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p, {})
            if not opt._has_master(p):
                state.pop("master", None)
            history = state.get("history")
            if history is not None and history.numel() != history_length(p):
                del state["history"]
                history = None
            missing = missing or (adaptive and group["eta"] > 0 and bool(state) and history is None)
    if missing:
        warnings.warn("load_state_dict: the checkpoint has no ARWP history; it starts empty", UserWarning, stacklevel=4)


FIXED = ("method", "backend", "master_weights", "max_grad_norm", "base")


def getstate(opt: FlatOptimizer) -> dict[str, Any]:
    """torch's, and what stays fixed; the cycle starts anew in the copy."""
    state = torch.optim.Optimizer.__getstate__(opt)
    return {**state, "flatkern": {name: getattr(opt, name) for name in FIXED if hasattr(opt, name)}}


def setstate(opt: FlatOptimizer, state: dict[str, Any]) -> None:
    state = dict(state)
    fixed = state.pop("flatkern", None)
    if fixed is not None:
        opt.__dict__.update(fixed)
        opt._new_cycle()
        opt.__dict__["_ready"] = True
    torch.optim.Optimizer.__setstate__(opt, state)
