"""state_dict and pickling: saved dtypes are kept, our group keys survive torch's checkpoints, no scratch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import shards
from ..methods import RWP
from ..tables import history_length, mask_shape, same_layout
from . import capture, layouts

if TYPE_CHECKING:
    from .base import FlatOptimizer


_METHOD_KEYS = ("sigma", "lam", "eta", "beta", "rho")  # that mean something else in another method


def load(opt: FlatOptimizer, state_dict: dict[str, Any]) -> None:
    """torch's load_state_dict, without its cast of every state tensor to the parameter's dtype."""
    state_dict = prepare(opt, state_dict)
    opt.cycle.end_by_version()
    before = dict(opt.state) if opt.capturable else {}
    opt.state.clear()
    for p, saved in by_parameter(opt, state_dict):
        there = before.get(p, {})
        opt.state[p] = {name: _into(there.get(name), fit(name, value, p)) for name, value in saved.items()}
    known = {i for group in state_dict["param_groups"] for i in group["params"]}
    opt.state.update({key: value for key, value in state_dict["state"].items() if key not in known})
    for group, saved in zip(opt.param_groups, state_dict["param_groups"], strict=True):
        # In place: schedulers share these very dicts.
        group.update({k: v for k, v in saved.items() if k != "params"})
    settle(opt)


def _into(there: Any, value: Any) -> Any:
    """The loaded value in the memory that was there, which captured graphs know by address."""
    tensors = isinstance(there, Tensor) and isinstance(value, Tensor)
    if tensors and (there.dtype, there.device) == (value.dtype, value.device) and same_layout(there, value):
        return there.copy_(value)
    return value


def prepare(opt: FlatOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run the hooks, refuse what does not fit, and complete the groups; the checkpoint itself stays as it is."""
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
    for k, (p, saved) in enumerate(by_parameter(opt, state_dict)):
        for name, value in saved.items():
            if isinstance(value, Tensor) and value.dim() and shards.is_sharded(value) != shards.is_sharded(p):
                kinds = ["one tensor", "sharded"]
                raise ValueError(
                    f"load_state_dict: {name} of parameter {k} is {kinds[shards.is_sharded(value)]} in the checkpoint, "
                    f"and the parameter {kinds[shards.is_sharded(p)]}; torch.distributed.checkpoint.state_dict."
                    "set_optimizer_state_dict divides it (StateDictOptions(full_state_dict=True))"
                )
    if opt.enhancement is not None and any("mask_age" not in saved for saved in saved_groups):
        warnings.warn("load_state_dict: the checkpoint has no IRE mask; it starts empty", UserWarning, stacklevel=5)
    completed = [_completed(opt, group, saved) for group, saved in zip(groups, saved_groups, strict=True)]
    for group, saved in zip(groups, completed, strict=True):
        opt._check_group({**group, **saved})
    return {**state_dict, "param_groups": completed}


def _completed(opt: FlatOptimizer, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved group; what it lacks, and the values of another method, as they are in the optimizer."""
    ours = () if opt.method is None else (*opt.method.defaults, "perturb")
    if opt.enhancement is not None:
        group = {**group, "mask_age": None}  # without a mask in the checkpoint there is none
        ours = (*ours, *opt.enhancement.defaults)
    if isinstance(opt.method, RWP):
        same = "sigma" in saved and (saved["lam"] is None) == (group["lam"] is None)
        same = same and (saved["eta"] > 0) == (group["eta"] > 0)
    else:
        same = "rho" in saved and ("eta" in saved) == ("eta" in group)
    kept = {key: group[key] for key in ours if not same and key in _METHOD_KEYS}
    if "capturable" in group:
        kept["capturable"] = group["capturable"]  # of this optimizer, not of the one that was saved
    completed = {**{key: group[key] for key in ours}, **saved, **kept}
    return capture.as_numbers(completed, group, opt.capturable)


def by_parameter(opt: FlatOptimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Parameters of the optimizer with their saved state."""
    ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    for i, p in zip(ids, opt._parameters(), strict=True):
        if i in state_dict["state"]:
            yield p, state_dict["state"][i]


def fit(name: str, value: Any, p: Tensor) -> Any:
    """A state value on the parameter's device, in its memory format, in the dtype it was saved with."""
    if name == "step":
        step = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        return step.to(p.device, torch.float32, copy=True)
    if not isinstance(value, Tensor):
        return value
    return layouts.like(value.detach().to(p.device, copy=True), p)


def settle(opt: FlatOptimizer) -> None:
    """After loading: forget the old state, drop masters nobody uses, say what starts empty, run the hooks."""
    opt.cycle.plans.clear()
    opt.cycle.checked.clear()
    opt.cycle.consumed = None
    opt.cycle.master_versions.clear()
    capture.adopt(opt)
    adaptive = isinstance(opt.method, RWP)
    missing = False
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p, {})
            if "mask" in state and (opt.enhancement is None or state["mask"].shape != mask_shape(p)):
                del state["mask"]
            if not opt._has_master(p):
                state.pop("master", None)
            history = state.get("history")
            if history is not None and history.numel() != history_length(p):
                del state["history"]
                history = None
            missing = missing or (adaptive and group["eta"] > 0 and bool(state) and history is None)
    if missing:
        warnings.warn("load_state_dict: the checkpoint has no ARWP history; it starts empty", UserWarning, stacklevel=5)
    for hook in opt._optimizer_load_state_dict_post_hooks.values():
        hook(opt)


FIXED = ("method", "enhancement", "backend", "master_weights", "max_grad_norm", "capturable", "base")


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
