"""Names of parameters, for ASAM's rule: in the groups, where torch keeps those of `named_parameters()`."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

import torch
from torch import Tensor

from .groups import Group

KEY = "param_names"


def names_of(group: Group) -> list[str]:
    """One name for each parameter of a group; "" where nobody has told it."""
    found: list[str] | None = group.get(KEY)
    return [""] * len(group["params"]) if found is None else found


def take_from(groups: list[Group], model: torch.nn.Module) -> None:
    """Give the parameters of `groups` the names that they have in `model`; others keep theirs.

    Raises:
        TypeError: it is no module.
        ValueError: it has none of the parameters.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"name_parameters: model is {type(model).__name__}, but should be a torch.nn.Module")
    known = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in known for group in groups for p in group["params"]):
        raise ValueError(
            f"name_parameters: {type(model).__name__} has none of the optimizer's parameters; pass the model whose "
            "parameters() the optimizer was made of"
        )
    for group in groups:
        pairs = zip(group["params"], names_of(group), strict=True)
        group[KEY] = [known.get(id(p), name) for p, name in pairs]


def join(groups: list[Group], new: Group, models: Iterable[ref[torch.nn.Module]]) -> None:
    """A group that joins named ones: what `models` know of it, so that torch, which wants all or none named, takes it.

    Arguments:
        models: those that have told names, as long as they live.
    """
    params = new["params"]
    if KEY in new or isinstance(params, set) or not any(KEY in group for group in groups):
        return
    params = new["params"] = [params] if isinstance(params, Tensor) else list(params)
    if all(isinstance(p, Tensor) for p in params):
        alive = [model for model in (each() for each in models) if model is not None]
        known = {id(p): name for model in alive for name, p in model.named_parameters()}
        new[KEY] = [known.get(id(p), "") for p in params]
