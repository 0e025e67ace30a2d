"""Which parameters one op call serves, and the argument lists that repeat from step to step.

Nothing here touches the values of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtensor
from ..checks import check
from ..dispatch import bind, item_comparer, layouts_of, resolve
from ..ops import OPS
from .groups import Group, Groups
from .layouts import like

Read = Callable[[Group], Any]
Complete = Callable[["Bucket", dict[str, list[Any]]], dict[str, list[Any]]]
MAX_PARTITIONS = 256  # models whose set of gradients changes at random would otherwise collect them without bound


class Bucket:
    """Parameters of one device (sharded: of one group of ranks) that are treated alike, in the optimizer's order."""

    def __init__(
        self,
        backend: str | None,
        device: torch.device,
        sharded: bool,
        ranks: dtensor.Ranks,
        split_vectors: bool,
        perturbed: bool,
        has_master: bool,
    ) -> None:
        self.backend = backend
        self.device = device
        self.sharded = sharded  # the parameters are DTensors, of which ops see the local parts
        self.ranks = ranks  # who holds their other rows
        self.split_vectors = split_vectors  # then a filter is divided among `ranks`, and its norm is a sum over them
        self.perturbed = perturbed
        self.has_master = has_master
        self.params: list[Tensor] = []
        self.index: list[int] = []  # position among all parameters, frozen ones included
        self.dtypes: list[torch.dtype] = []
        self.groups: list[Group] = []
        self.counts: list[int] = []  # parameters of each group
        self.covers_all = False  # holds all of the optimizer's parameters
        self.zeros: list[float] = []  # 0.0 and 1.0, once per parameter
        self.ones: list[float] = []
        self.offset: list[int] = []  # the row that is held first of each unsharded tensor
        self.checked: dict[str, Any] = {}  # by op: layouts that were found right
        self._columns: dict[str, tuple[list[Any], dict[str, list[Any]]]] = {}

    def add(self, param: Tensor, group: Group, index: int) -> None:
        if not self.groups or self.groups[-1] is not group:
            self.groups.append(group)
            self.counts.append(0)
        self.counts[-1] += 1
        self.params.append(param)
        self.dtypes.append(param.dtype)
        self.index.append(index)
        self.zeros.append(0.0)
        self.ones.append(1.0)
        self.offset.append(dtensor.first_row(param) if self.ranks else 0)

    def columns(self, name: str, reads: Mapping[str, Read], complete: Complete | None = None) -> dict[str, list[Any]]:
        """Group values as ops take them: for each of `reads` a list with one entry per parameter.

        They are kept under `name`, and the same lists are returned until a value has changed.

        Arguments:
            complete: makes of the lists what is kept and returned in their place.
        """
        now = [[read(group) for group in self.groups] for read in reads.values()]
        kept = self._columns.get(name)
        if kept is None or kept[0] != now:
            lists = ([v for v, n in zip(row, self.counts, strict=True) for _ in range(n)] for row in now)
            columns = dict(zip(reads, lists, strict=True))
            kept = self._columns[name] = now, columns if complete is None else complete(self, columns)
        return kept[1]

    def values(self, key: str, read: Read | None = None) -> list[Any]:
        """float(group[key]), or `read(group)`, once per parameter."""
        return self.columns(key, {key: read or (lambda group: float(group[key]))})[key]

    def constant(self, value: Any) -> list[Any]:
        """`value` once per parameter."""
        return self.values(f"constant {value!r}", lambda _: value)

    def gradients(self, grads: list[Tensor | None], lay_out: bool, complete: bool = False) -> list[Tensor]:
        """Of one gradient per parameter of the optimizer those of this bucket; zeros where one is missing.

        Arguments:
            lay_out: give them the parameters' memory format.
            complete: none is missing.
        """
        found: list[Any] = grads if self.covers_all else [grads[i] for i in self.index]
        if not (complete or all([g is not None for g in found])):
            found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.params, strict=True)]
        return [like(g, p) for g, p in zip(found, self.params, strict=True)] if lay_out else found

    def op(self, name: str) -> Callable[..., None]:
        """The function that runs op `name` on this bucket's device."""
        run = resolve(name, self.device.type, self.backend)
        return dtensor.on_parts(run) if self.sharded else run

    def versions(self) -> list[int]:
        """Of the parameters; they change with every write."""
        return [dtensor.version(p) for p in self.params] if self.sharded else [p._version for p in self.params]

    def name(self, k: int) -> str:
        """What a message calls parameter `k`."""
        p = self.params[k]
        for group in self.groups:
            for q, name in zip(group["params"], group.get("param_names") or (), strict=False):
                if q is p:
                    return f"params[{self.index[k]}] ({name})"
        return f"params[{self.index[k]}]"


@dataclass
class Call:
    """One op call on a bucket, ready to run."""

    bucket: Bucket
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    after: Callable[[], None] | None = None  # what is left to do when all calls of a step have run
    done: bool = False
    drawn_with: Callable[[], tuple[Any, Any]] | None = None  # of a draw: its sigmas and its key, where graphs move them

    def run(self) -> None:
        bucket = self.bucket
        run = resolve(self.op, bucket.device.type, bucket.backend)
        (dtensor.on_parts(run) if bucket.sharded else run)(*self.args, **self.kwargs)
        self.done = True

    def check(self) -> None:
        """Refuse what the op would refuse, without writing.

        Raises:
            ValueError, TypeError, LayoutError: with the op's own message.
        """
        args = [dtensor.local_parts(a) if isinstance(a, list) else a for a in self.args]
        layouts = layouts_of(args)
        # What was right is right until a layout differs; the groups' numbers are checked when they change.
        if layouts is None or layouts != self.bucket.checked.get(self.op):
            check(OPS[self.op], bind(OPS[self.op], tuple(args), self.kwargs))
            self.bucket.checked[self.op] = layouts

    def with_clean(self, backups: list[Tensor] | None, masters: list[Tensor] | None) -> Call:
        """The same draw with clean weights elsewhere."""
        arguments = self.args[0], backups, masters, *self.repeated()
        return Call(self.bucket, self.op, arguments, self.kwargs, drawn_with=self.drawn_with)

    def repeated(self) -> tuple[Any, ...]:
        """The arguments behind the clean weights with which it gives what is in the weights now: replays of a captured
        graph, which no Python sees, draw other rounds."""
        return self.args[3:] if self.drawn_with is None else (*self.args[3:5], *self.drawn_with())

    def on(self, params: list[Tensor]) -> None:
        """The same call on other tensors, without clean copies; of an op that perturbs."""
        self.bucket.op(self.op)(params, None, *self.args[2:], **self.kwargs)

    @property
    def progress(self) -> str:
        """What tells how far the call came if it is interrupted; see `dispatch.resolve`."""
        return getattr(resolve(self.op, self.bucket.device.type, self.bucket.backend), "progress", "versions")

    def marks(self) -> list[int]:
        """Versions by which `progress` is told: of the first parameter where a call writes all or nothing, of none
        where they do not tell."""
        bucket = self.bucket
        progress = getattr(resolve(self.op, bucket.device.type, bucket.backend), "progress", "versions")
        if progress == "whole":
            return [dtensor.version(bucket.params[0])] if bucket.sharded else [bucket.params[0]._version]
        return [] if progress == "launches" else bucket.versions()


class CleanStore(NamedTuple):
    """Where the clean weights of a bucket are: in one of the two, the other is None. In neither: in the parameters."""

    backups: list[Tensor] | None = None
    masters: list[Tensor] | None = None


IN_PLACE = CleanStore()


@dataclass
class SharedArguments:
    """What every update op takes besides its rule's own state and numbers: filled in by the step, and by the
    perturbation where it mixes."""

    params: list[Tensor]  # what is updated: the bucket's, or copies of them that stay clean
    grads: list[Tensor]
    clean_grads: list[Tensor] | None
    numbers: dict[str, list[Any]]
    store: CleanStore = IN_PLACE  # where the clean weights are
    history: list[Tensor] | None = None
    masks: list[Tensor] | None = None
    lrs: Tensor | None = None  # on the device; None where the rule reads numbers of the host
    sigmas: Tensor | None = None
    noise: Tensor | None = None  # rolling: of the coming round
    component: Tensor | None = None  # what of the clean gradient enters
    grad_scale: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None
    drawn_with: Callable[[], tuple[Any, Any]] | None = None  # see Call
    keep: Call | None = None  # a call that keeps something of the gradients, when the step is made

    def tensors(self) -> tuple[Any, ...]:
        """The positional arguments that follow a rule's own state."""
        return (
            *self.store, self.history, self.grads, self.clean_grads, self.masks,
            self.lrs, self.sigmas, self.noise, self.component, self.grad_scale, self.clip, self.found_inf,
        )  # fmt: skip


class Partition:
    """The buckets of one set of parameters."""

    def __init__(self, params: list[Tensor], buckets: list[Bucket], perturbed: Partition | None) -> None:
        self.params = params
        self.buckets = buckets
        self.members = frozenset(map(id, params))
        self.covers_perturbed = perturbed is None or perturbed.members <= self.members


class Partitions:
    """Partitions by what they cover. Holding the parameters keeps their ids from being reused."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._found: dict[Hashable, list[Partition]] = {}
        self._same = item_comparer()
        self._count = 0

    def of(
        self,
        params: list[Tensor],
        perturbed: Partition | None = None,
        split_by: Callable[[Group], Hashable] | None = None,
    ) -> Partition:
        """The partition of `params`: split by place, `split_by(group)`, masters, and membership in `perturbed`."""
        groups = self._groups.owner().own_groups  # type: ignore[union-attr]
        # Models move and change dtype as a whole, so one parameter of a group speaks for it.
        heads = [(id(g), split_by(g) if split_by else None, p.device, p.dtype) for g in groups for p in g["params"][:1]]
        key = perturbed, *heads
        for partition in self._found.get(key, ()):
            if self._same((partition.params,), (params,)):
                return partition
        if self._count >= MAX_PARTITIONS:
            self.clear()
        self._count += 1
        partition = Partition(params, self._split(groups, params, perturbed, split_by), perturbed)
        self._found.setdefault(key, []).append(partition)
        return partition

    def clear(self) -> None:
        self._found.clear()
        self._count = 0

    def _split(
        self,
        groups: list[Group],
        params: list[Tensor],
        perturbed: Partition | None,
        split_by: Callable[[Group], Hashable] | None,
    ) -> list[Bucket]:
        setup = self._groups.setup
        wanted = {id(p) for p in params}
        members = perturbed.members if perturbed is not None else frozenset()
        buckets: dict[Hashable, Bucket] = {}
        index = 0
        for group in groups:
            for p in group["params"]:
                if id(p) in wanted:
                    ranks = dtensor.ranks_of(p)
                    kind = (
                        p.device, dtensor.is_sharded(p), ranks, bool(ranks) and p.dim() < 2,
                        id(p) in members, setup.has_master(p),
                    )  # fmt: skip
                    key = *kind, split_by(group) if split_by else None
                    if key not in buckets:
                        buckets[key] = Bucket(setup.backend, *kind)
                    buckets[key].add(p, group, index)
                index += 1
        for bucket in buckets.values():
            bucket.covers_all = len(bucket.params) == index
        return list(buckets.values())


def global_norm(norms: list[tuple[dtensor.Ranks, Tensor]]) -> Tensor:
    """The norm over several buckets, on the device of the first; each is summed over the ranks that share it."""
    first = norms[0][1]
    if len(norms) == 1 and not norms[0][0]:
        return first
    return global_sum([(ranks, norm.double().square()) for ranks, norm in norms]).sqrt().float()


def global_sum(parts: list[tuple[dtensor.Ranks, Tensor]]) -> Tensor:
    """The sum over several buckets, on the device of the first; each is summed over the ranks that share it."""
    device = parts[0][1].device
    shared: dict[dtensor.Ranks, list[Tensor]] = {}
    for ranks, part in parts:
        shared.setdefault(ranks, []).append(part.to(device))
    sums = [dtensor.all_reduce_sum(torch.stack(each).sum(dim=0), ranks) for ranks, each in shared.items()]
    return torch.stack(sums).sum(dim=0)
