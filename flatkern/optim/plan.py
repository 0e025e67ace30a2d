"""Buckets: the parameters that one op call serves, and the argument lists that repeat from step to step.

Nothing here touches the values of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import is_
from typing import Any

from torch import Tensor

from .. import shards
from ..checks import check_value
from ..dispatch import resolve

Group = dict[str, Any]
MAX_PLANS = 256  # models whose set of gradients changes at random would otherwise collect plans for ever


class Bucket:
    """Parameters of one device (sharded: of one group of ranks) that are treated alike, in the optimizer's order.

    `values(key)` expands a group value to one entry per parameter; the list is rebuilt (and the value
    checked) only when a group's value has changed.
    """

    def __init__(self, device: Any, sharded: bool, ranks: shards.Ranks, cut: bool) -> None:
        self.device = device
        self.sharded = sharded  # the parameters are DTensors, of which ops see the parts
        self.ranks = ranks  # who holds their other rows
        self.cut = cut  # vectors, so that a filter is divided among `ranks` and its norm is a sum over them
        self.params: list[Tensor] = []
        self.index: list[int] = []  # position among all parameters, frozen ones included
        self.groups: list[Group] = []
        self.counts: list[int] = []  # parameters of each group
        self.everything = False  # holds all of the optimizer's parameters
        self.perturbed = False
        self.masters = False
        self.backups: list[Tensor] = []  # scratch of `params`, as of `epoch`
        self.epoch = -1
        self.clean: list[Tensor] = []  # while perturbed: where the clean weights are, backups or masters
        self.versions: list[int] = []  # while perturbed: the parameters' versions after our write
        self._offset: list[int] = []
        self._cache: dict[str, tuple[list[Any], list[Any]]] = {}

    def add(self, param: Tensor, group: Group, index: int) -> None:
        if not self.groups or self.groups[-1] is not group:
            self.groups.append(group)
            self.counts.append(0)
        self.counts[-1] += 1
        self.params.append(param)
        self.index.append(index)

    def values(self, key: str, read: Callable[[Group], Any] | None = None) -> list[Any]:
        """One entry per parameter: float(group[key]), or `read(group)` remembered under `key`."""
        now = [read(g) if read else float(g[key]) for g in self.groups]
        cached = self._cache.get(key)
        if cached is None or cached[0] != now:
            for value in now:
                check_value(key, value)
            cached = now, [v for v, n in zip(now, self.counts, strict=True) for _ in range(n)]
            self._cache[key] = cached
        return cached[1]

    def select(self, values: list[Any]) -> list[Any]:
        """Of one entry per parameter of the optimizer, those of this bucket."""
        return values if self.everything else [values[i] for i in self.index]

    def constant(self, value: Any) -> list[Any]:
        """`value` once per parameter."""
        return self.values(f"constant {value!r}", lambda _: value)

    def op(self, name: str, backend: str | None) -> Callable[..., None]:
        """The function that runs op `name` on this bucket's device."""
        run = resolve(name, self.device.type, backend)
        return shards.on_parts(run) if self.sharded else run

    @property
    def offset(self) -> list[int]:
        """The row that is held first of each unsharded tensor."""
        if not self.ranks:
            return self.constant(0)
        if len(self._offset) != len(self.params):
            self._offset = [shards.first_row(p) for p in self.params]
        return self._offset

    def versions_now(self) -> list[int]:
        """Of the parameters; they change with every write."""
        return [shards.version(p) for p in self.params] if self.sharded else [p._version for p in self.params]


class Plan:
    """The buckets of one set of parameters, and who is in them."""

    def __init__(self, params: list[Tensor], buckets: list[Bucket], perturbed: Plan | None) -> None:
        self.params = params
        self.buckets = buckets
        self.members = frozenset(map(id, params))
        self.covers_perturbed = perturbed is None or perturbed.members <= self.members


class Plans:
    """Plans by the parameters they cover. Holding the parameters keeps their ids from being reused."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, list[Plan]] = {}
        self._count = 0

    def get(
        self,
        groups: list[Group],
        params: list[Tensor],
        perturbed: Plan | None,
        flags: Callable[[Group], Hashable],
        master: Callable[[Tensor], bool],
    ) -> Plan:
        """The plan of `params`: split by place, `flags(group)`, masters, and membership in `perturbed`."""
        # Models move and change dtype as a whole, so one parameter of a group speaks for it.
        heads = [(id(g), flags(g), p.device, p.dtype) for g in groups for p in g["params"][:1]]
        key = perturbed, *heads
        for plan in self._plans.get(key, ()):
            if len(plan.params) == len(params) and all(map(is_, plan.params, params)):
                return plan
        if self._count >= MAX_PLANS:
            self.clear()
        self._count += 1
        plan = _build(groups, params, perturbed, flags, master)
        self._plans.setdefault(key, []).append(plan)
        return plan

    def clear(self) -> None:
        self._plans.clear()
        self._count = 0


def _build(
    groups: list[Group],
    params: list[Tensor],
    perturbed: Plan | None,
    flags: Callable[[Group], Hashable],
    master: Callable[[Tensor], bool],
) -> Plan:
    wanted = {id(p) for p in params}
    members = perturbed.members if perturbed is not None else frozenset()
    buckets: dict[Hashable, Bucket] = {}
    index = 0
    for group in groups:
        for p in group["params"]:
            if id(p) in wanted:
                ranks = shards.ranks_of(p)
                where = p.device, shards.is_sharded(p), ranks, bool(ranks) and p.dim() < 2
                treated = id(p) in members, master(p)
                key = where, flags(group), treated
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = Bucket(*where)
                    bucket.perturbed, bucket.masters = treated
                bucket.add(p, group, index)
            index += 1
    for bucket in buckets.values():
        bucket.everything = len(bucket.params) == index
    return Plan(params, list(buckets.values()), perturbed)
