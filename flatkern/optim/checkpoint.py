"""state_dict and pickling: saved dtypes are kept, our group keys survive torch's checkpoints, no scratch.

Loading is all or nothing: a checkpoint is read, checked and converted before anything is assigned.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..tables import history_length, mask_shape, same_layout
from .cycle import Cycle
from .errors import warn_starts_empty
from .gradients import mean_is_over_ranks
from .groups import Group, Groups, Setup
from .layouts import like
from .perturbation import NoPerturbation
from .scalars import LAST_DRAW, NOT_DRAWN, as_numbers
from .state import LIKE_PARAMS, OWN_KEYS

# That mean something else in another method.
_METHOD_KEYS = (
    "sigma", "lam", "eta", "beta", "scale", "rho", "alpha", "adaptive", "ascent", "perturb_momentum",
    "perturb_interval", "perturb_count",
)  # fmt: skip
Entry = dict[str, Any]


@dataclass
class Checkpoint:
    """What will be assigned; nothing is yet."""

    saved: dict[str, Any]  # in torch's format, with completed groups
    state: dict[Tensor, Entry]  # by parameter, in its place and memory format, in the dtype that was saved
    others: dict[Any, Any]  # state that belongs to no parameter


def read(
    state_dict: dict[str, Any],
    cycle: Cycle,
    perturbation: NoPerturbation,
    own_defaults: Group,
    state_keys: tuple[str, ...],
) -> Checkpoint:
    """Check a checkpoint, complete its groups and convert its state; it stays as it is.

    Arguments:
        own_defaults: the group values that the method and the enhancement bring.
        state_keys: what the base rule keeps per parameter: all of it or none.

    Raises:
        ValueError, TypeError: what does not fit, by parameter and name. Nothing has changed then.
    """
    groups, setup = cycle.groups, cycle.groups.setup
    saved_groups = state_dict["param_groups"]
    _check_sizes(groups.listed(), saved_groups)
    completed = [
        _completed(group, saved, groups, perturbation, own_defaults)
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    owner = groups.owner()
    for group, full in zip(owner.param_groups, completed, strict=True):  # type: ignore[union-attr]
        owner.check_group({**group, **full})  # type: ignore[union-attr]
    state = {}
    for k, (p, entry) in enumerate(_by_parameter(state_dict, groups)):
        _check_entry(k, p, entry, state_keys)
        state[p] = _fitted(p, entry, setup, perturbation)
    _warn_of_what_starts_empty(
        state, groups, [groups.own(saved) for saved in saved_groups], map(groups.own, completed), perturbation
    )
    known = {i for group in saved_groups for i in group["params"]}
    others = {key: value for key, value in state_dict["state"].items() if key not in known}
    return Checkpoint({**state_dict, "param_groups": completed}, state, others)


def _check_sizes(groups: list[Group], saved_groups: list[Group]) -> None:
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


def _by_parameter(state_dict: dict[str, Any], groups: Groups) -> Iterator[tuple[Tensor, Entry]]:
    """Parameters of the optimizer with their saved state."""
    ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    for i, p in zip(ids, groups.params(), strict=True):
        if i in state_dict["state"]:
            yield p, state_dict["state"][i]


def _completed(group: Group, saved: Group, groups: Groups, perturbation: NoPerturbation, own_defaults: Group) -> Group:
    """The saved group; what it lacks, and the values of another method, as they are in the optimizer."""
    setup, full = groups.setup, copy.deepcopy(saved)
    own = groups.own(full)
    is_described = setup.method is None or perturbation.is_described_by(groups.own(saved), group)
    # Without a mask in the checkpoint there is none. Before kappa followed the largest lr it followed the initial one.
    # Before there was a scale, sigma was relative to the norm.
    afresh = {"mask_age": None, "perturb_count": 0, "largest_lr": float(full.get("initial_lr") or 0.0)}
    for key in own_defaults:
        if key not in own or (key in _METHOD_KEYS and not is_described):
            own[key] = "norm" if key == "scale" and is_described else afresh.get(key, group[key])
    if not is_described or (own.get(LAST_DRAW) or {}).get("round") == NOT_DRAWN:
        own.pop(LAST_DRAW, None)
    if "capturable" in group:
        full["capturable"] = group["capturable"]  # of this optimizer, not of the one that was saved
    if perturbation.draws and "stream" in own and mean_is_over_ranks():
        own["stream"] = group["stream"]  # of this rank; often rank 0 alone has saved
    return as_numbers(full, group, groups)


def _check_entry(k: int, p: Tensor, entry: Entry, state_keys: tuple[str, ...]) -> None:
    """Refuse saved state of parameter `k` that no step could use."""
    where = f"load_state_dict: the state of parameter {k}"
    if not isinstance(entry, dict):
        raise TypeError(f"{where} is {type(entry).__name__}, but should be a dict")
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.dim() and dtensor.is_sharded(value) != dtensor.is_sharded(p):
            kinds = ["one tensor", "sharded"]
            raise ValueError(
                f"load_state_dict: {name} of parameter {k} is {kinds[dtensor.is_sharded(value)]} in the checkpoint, "
                f"and the parameter {kinds[dtensor.is_sharded(p)]}; torch.distributed.checkpoint.state_dict."
                "set_optimizer_state_dict divides it (StateDictOptions(full_state_dict=True))"
            )
    missing = [key for key in state_keys if entry.get(key) is None]
    if missing and len(missing) < len(state_keys):
        raise ValueError(f"{where} has no {missing[0]}; it was saved in part, or by another optimizer")
    for name, value in entry.items():
        if name == "step" and name in state_keys:
            _check_step(where, value)
        elif value is not None and name in (*state_keys, "master", *OWN_KEYS):
            _check_tensor(f"{where}: {name}", value, None if name in ("history", "mask") else p.shape, name == "mask")


def _check_tensor(where: str, value: Any, shape: torch.Size | None, is_mask: bool) -> None:
    """Refuse what is no state. A history or mask of another shape is of another model, and is left out."""
    kinds = "an uint8 tensor" if is_mask else "a floating-point tensor"
    if not isinstance(value, Tensor) or (value.dtype != torch.uint8 if is_mask else not value.is_floating_point()):
        raise TypeError(f"{where} is {_kind(value)}, but should be {kinds}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, but should have {tuple(shape)}")
    if is_mask:
        return
    part = dtensor.local(value)
    # float16 overflows in ordinary training, and a history of infinity is one without noise.
    wrong = part.isnan() if shape is None or part.dtype == torch.float16 else ~part.isfinite()
    if bool(wrong.any()):
        raise ValueError(f"{where} is not finite; load an earlier checkpoint")


def _check_step(where: str, value: Any) -> None:
    try:
        step = float(value)
    except (TypeError, ValueError, RuntimeError):
        step = math.nan
    if isinstance(value, (str, bytes)) or not 0 <= step < math.inf:
        raise ValueError(f"{where}: step is {value!r}, but should be a finite number >= 0")


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r}"


def _fitted(p: Tensor, entry: Entry, setup: Setup, perturbation: NoPerturbation) -> Entry:
    """Saved state as `p` needs it, without what this optimizer has no use for."""
    result = {name: _fit(name, value, p) for name, value in entry.items()}
    mask, history = result.get("mask"), result.get("history")
    if mask is not None and (setup.enhancement is None or mask.shape != mask_shape(p)):
        del result["mask"]
    if history is not None and history.numel() != history_length(p):
        del result["history"]
    for key in OWN_KEYS:
        if result.get(key) is None or (key in LIKE_PARAMS and key != perturbation.state_key):
            result.pop(key, None)
        elif key in LIKE_PARAMS:
            result[key] = result[key].to(torch.float32 if setup.has_master(p) else p.dtype)
    if not setup.has_master(p):
        result.pop("master", None)
    return result


def _fit(name: str, value: Any, p: Tensor) -> Any:
    """A state value on the parameter's device, in its memory format, in the dtype it was saved with."""
    if name == "step":
        step = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        return step.to(p.device, torch.float32, copy=True)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return like(value.detach().to(p.device, copy=True), p)


def _warn_of_what_starts_empty(
    state: dict[Tensor, Entry],
    groups: Groups,
    saved_groups: list[Group],
    completed: Iterable[Group],
    perturbation: NoPerturbation,
) -> None:
    if groups.setup.enhancement is not None and any("mask_age" not in saved for saved in saved_groups):
        warn_starts_empty("IRE mask")
    for group, full in zip(groups, completed, strict=True):
        entries = [state.get(p) for p in group["params"]] if perturbation.keeps_history(full) else []
        if any(entry and "history" not in entry for entry in entries):
            warn_starts_empty("ARWP history")
            return


def assign(checkpoint: Checkpoint, cycle: Cycle) -> None:
    """Replace groups and state by those of a checkpoint. Schedulers share the groups, so they are changed in place."""
    groups = cycle.groups
    state = groups.state()
    before = dict(state) if groups.setup.capturable else {}
    state.clear()
    for p, entry in checkpoint.state.items():
        known = before.get(p, {})
        state[p] = {name: _into(known.get(name), value) for name, value in entry.items()}
    state.update(checkpoint.others)
    for group, saved in zip(groups, checkpoint.saved["param_groups"], strict=True):
        if LAST_DRAW not in saved:
            group.pop(LAST_DRAW, None)
    values = [{key: v for key, v in saved.items() if key != "params"} for saved in checkpoint.saved["param_groups"]]
    deque(map(dict.update, groups, values), maxlen=0)  # in one call of C code, so that no signal handler comes between


def _into(known: Any, value: Any) -> Any:
    """The loaded value in the memory that was there, which captured graphs know by address."""
    tensors = isinstance(known, Tensor) and isinstance(value, Tensor)
    if tensors and (known.dtype, known.device) == (value.dtype, value.device) and same_layout(known, value):
        return known.copy_(value)
    return value


def forget_what_was(cycle: Cycle) -> None:
    """After loading: nothing that was remembered of values, state or gradients holds any more."""
    cycle.partitions.clear()
    cycle.groups.forget_checked()
    cycle.gradients.forget_used()
    cycle.state.forget_masters()
    cycle.scalars.sync_groups("load_state_dict")
