"""The parameter groups as every part reads them: in place, whoever owns the list (the optimizer, or Wrap's base)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from ..methods import IRE, RWP, SAM
from ..values import is_number

Group = dict[str, Any]
PARAMS = itemgetter("params")
PLAIN = frozenset((float, int, bool, str, type(None)))
# What every step changes, or what no check depends on.
UNCHECKED = frozenset(("params", "param_names", "round", "drawn", "mask_age"))


class Owner(Protocol):
    """Who owns the groups and the state: the optimizer."""

    param_groups: list[Group]
    state: Any
    defaults: dict[str, Any]

    def check_group(self, group: Group) -> None:
        """Refuse a group with a value that a step cannot use."""


@dataclass
class Setup:
    """What the constructor fixes. A copy of a pickled optimizer takes it over."""

    name: str  # of the optimizer's class, for messages
    method: RWP | SAM | None = None
    enhancement: IRE | None = None
    backend: str | None = None
    master_weights: bool = False
    max_grad_norm: float | None = None
    capturable: bool = False

    def has_master(self, p: Tensor) -> bool:
        """True if float32 weights are kept behind `p`."""
        return self.master_weights and p.dtype != torch.float32


class Groups:
    """The groups of one optimizer, reached through a weak reference, so that no part keeps its optimizer alive."""

    def __init__(self, setup: Setup, owner: Callable[[], Owner | None]) -> None:
        self.setup = setup
        self.owner = owner
        self._checked: dict[int, list[Any]] = {}  # by group: values that were found right

    def listed(self) -> list[Group]:
        """The very list of the owner."""
        owner = self.owner()
        return [] if owner is None else owner.param_groups

    def __iter__(self) -> Iterator[Group]:
        return iter(self.listed())

    def state(self) -> Any:
        """The owner's state, by parameter."""
        owner = self.owner()
        return {} if owner is None else owner.state

    def default(self, key: str) -> Any:
        """The owner's default of a group value."""
        owner = self.owner()
        return None if owner is None else owner.defaults[key]

    def params(self) -> list[Tensor]:
        """All parameters, frozen ones too, in the optimizer's order."""
        return list(chain.from_iterable(map(PARAMS, self.owner().param_groups)))  # type: ignore[union-attr]

    def check_changed(self) -> None:
        """Check every value that has changed since the last call, before anything is written."""
        owner, checked = self.owner(), self._checked
        for k, group in enumerate(owner.param_groups):  # type: ignore[union-attr]
            # A number that is written into a tensor is a change, too.
            found = [v if type(v) in PLAIN else self._seen(v) for key, v in group.items() if key not in UNCHECKED]
            if checked.get(k) != found:
                owner.check_group(group)  # type: ignore[union-attr]
                checked[k] = found

    def _seen(self, value: Any) -> Any:
        """What tells a group's value from another one; of tensors on a device which one, since the host would wait."""
        if isinstance(value, Tensor):
            return id(value) if self.setup.capturable or value.numel() != 1 else value.item()
        if isinstance(value, (tuple, list)):
            return [self._seen(v) for v in value]
        return value if is_number(value) else id(value)

    def forget_checked(self) -> None:
        """Check everything anew: other values were loaded."""
        self._checked.clear()
