"""The parameter groups as every part reads them: in place, whoever owns the list (the optimizer, or Wrap's base)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol, cast
from weakref import ref

import torch
from torch import Tensor

from ..methods import IRE, Method
from ..values import is_number

Group = dict[str, Any]
PARAMS = itemgetter("params")
PLAIN = frozenset((float, int, bool, str, type(None)))
# What every step changes, or what no check depends on.
_COUNTERS = ("round", "drawn", "mask_age", "largest_lr")
PREFIX = "perturb_"
OWN_NAMES = frozenset(("perturb_momentum", "perturb_interval", "perturb_count"))  # where the prefix is the name's
UNCHECKED = frozenset(("params", "param_names", "perturb_count", *_COUNTERS, *(PREFIX + key for key in _COUNTERS)))


def own_key(group: Group, name: str) -> str:
    """Under which key a group of any optimizer has our value of that name, if it has one."""
    own = PREFIX + name
    return own if own in group and own not in OWN_NAMES else name


def common_value(groups: list[Group], key: str, where: str, shared: str) -> float:
    """A value that all groups have to share.

    Arguments:
        shared: why, in words.

    Raises:
        ValueError: they do not.
    """
    value = groups[0][key]
    for k, group in enumerate(groups):
        if group[key] != value:
            raise ValueError(
                f"{where}: {key} is {value} in group 0 and {group[key]} in group {k}, but all groups share {shared}; "
                "assign the same value to all of them"
            )
    return float(value)


class OwnValues(MutableMapping[str, Any]):
    """A group of Wrap's base as our parts read and write it, each value under our name for it.

    The key of a value is `perturb_<name>` where the group has one, and always where `<name>` is the base's.
    """

    __slots__ = ("base_keys", "group")

    def __init__(self, group: Group, base_keys: frozenset[str]) -> None:
        self.group = group
        self.base_keys = base_keys

    def key(self, name: str) -> str:
        own = PREFIX + name
        return own if own not in OWN_NAMES and (own in self.group or name in self.base_keys) else name

    def __getitem__(self, name: str) -> Any:
        return self.group[self.key(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        self.group[self.key(name)] = value

    def __delitem__(self, name: str) -> None:
        del self.group[self.key(name)]

    def __iter__(self) -> Iterator[str]:
        names = ((key, key if key in OWN_NAMES else key.removeprefix(PREFIX)) for key in self.group)
        return (name for key, name in names if self.key(name) == key)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Owner(Protocol):
    """Who owns the groups and the state: the optimizer."""

    param_groups: list[Group]
    state: Any

    @property
    def own_groups(self) -> list[Group]:
        """The groups with our values under our names; `param_groups` itself unless they are shared with a base."""

    def keys_of(self, name: str) -> Any:
        """Under which key each of `param_groups` has our value of that name."""

    def check_group(self, group: Group) -> None:
        """Refuse a group with a value that a step cannot use."""


@dataclass
class Setup:
    """What the constructor fixes. A copy of a pickled optimizer takes it over."""

    name: str  # of the optimizer's class, for messages
    method: Method | None = None
    enhancement: IRE | None = None
    backend: str | None = None
    master_weights: bool = False
    max_grad_norm: float | None = None
    capturable: bool = False
    base_keys: frozenset[str] | None = None  # Wrap: our names that are group keys of its base; None: nobody shares them

    def has_master(self, p: Tensor) -> bool:
        """True if float32 weights are kept behind `p`."""
        return self.master_weights and p.dtype != torch.float32


def checked_limit(name: str, limit: Any) -> float | None:
    """What max_grad_norm is set to, of the optimizer of that name.

    Raises:
        ValueError: it is neither a number > 0 nor None.
    """
    if limit is not None and not (is_number(limit) and limit > 0):
        raise ValueError(f"{name}: max_grad_norm is {limit!r}, but should be a number > 0, or None")
    return cast("float | None", limit)


class Groups:
    """The groups of one optimizer, reached through a weak reference, so that no part keeps its optimizer alive."""

    def __init__(self, setup: Setup, owner: Callable[[], Owner | None]) -> None:
        self.setup = setup
        self.owner = owner
        self._checked: dict[int, list[Any]] = {}  # by group: values that were found right
        self._views: list[OwnValues] = []
        self.named_by: list[ref[torch.nn.Module]] = []  # models that have told names

    def listed(self) -> list[Group]:
        """The groups, our values under our names."""
        owner = self.owner()
        return [] if owner is None else owner.own_groups

    def own(self, group: Group) -> Group:
        """A group, or what was saved of one, with our values under our names."""
        keys = self.setup.base_keys
        return group if keys is None else cast(Group, OwnValues(group, keys))

    def views(self, groups: list[Group]) -> list[Group]:
        """`own` of the base's groups: the same objects as long as the groups are the same."""
        known = self._views
        if len(known) != len(groups) or any([v.group is not g for v, g in zip(known, groups, strict=True)]):
            known[:] = [cast(OwnValues, self.own(group)) for group in groups]
        return cast(list[Group], known)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.listed())

    def state(self) -> Any:
        """The owner's state, by parameter."""
        owner = self.owner()
        return {} if owner is None else owner.state

    def params(self) -> list[Tensor]:
        """All parameters, frozen ones too, in the optimizer's order."""
        return list(chain.from_iterable(map(PARAMS, self.owner().param_groups)))  # type: ignore[union-attr]

    def check_changed(self) -> None:
        """Check every value that has changed since the last call, before anything is written."""
        owner, checked, changed = self.owner(), self._checked, False
        for k, group in enumerate(owner.param_groups):  # type: ignore[union-attr]
            # A number that is written into a tensor is a change, too.
            found = [v if type(v) in PLAIN else self._seen(v) for key, v in group.items() if key not in UNCHECKED]
            if checked.get(k) != found:
                owner.check_group(group)  # type: ignore[union-attr]
                checked[k], changed = found, True
        if changed:
            owner.check_common()  # type: ignore[union-attr]

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
