"""Sharded parameters (DTensor, as FSDP2 makes them): the local part, its offset in the whole tensor, sums over ranks.

Kernels see local parts. Parameters are sharded along dim 0 only, so that rows stay whole and most of the work is local.
What needs other ranks is the norm of a vector, norms over all parameters, and the counts of IRE's selection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import jobs

PLAIN = frozenset((Tensor, torch.nn.Parameter))
Ranks = tuple[Any, ...]  # the process groups over which a tensor's rows are sharded


def is_sharded(t: Any) -> bool:
    """True if `t` is a DTensor, whatever its placements."""
    if type(t) in PLAIN:
        return False
    # Importing DTensor takes long. A program that has not imported it has no such tensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of `t` on this rank, sharing its memory; `t` itself if it is not sharded."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """The local parts of one argument of an op, whose tensors are all sharded or all plain."""
    return tensors if not tensors or type(tensors[0]) in PLAIN else [local(t) for t in tensors]


def version(t: Tensor) -> int:
    """A number that changes with every write to `t`.

    FSDP2 writes to the local part, and DTensor's own operations count in the wrapper only, so both are added.
    """
    if type(t) in PLAIN:  # told here, because every step asks
        return t._version
    return t._version + t._local_tensor._version if is_sharded(t) else t._version  # type: ignore[attr-defined]


def ranks_of(t: Tensor) -> Ranks:
    """The process groups that hold the other rows of `t`; empty where this rank has all of them."""
    if not is_sharded(t):
        return jobs.shard_of(t).ranks
    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(d) for d, placement in enumerate(placements) if placement.is_shard())


def first_row(t: Tensor) -> int:
    """The index in the whole tensor of the local part's first row (of a vector: of its first element)."""
    if not is_sharded(t) or t.dim() == 0:
        return jobs.shard_of(t).first
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)  # type: ignore[attr-defined]
    return int(offset[0])


def wrap_like(t: Tensor, part: Tensor, shape: int | Sequence[int]) -> Tensor:
    """`part` as a DTensor of global `shape` with the placements of `t`, without a copy; `part` itself if `t` is plain.

    Checkpoints can then reshard the state of `t` for another number of ranks.
    """
    if not is_sharded(t):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def on_parts(run: Callable[..., None]) -> Callable[..., None]:
    """An op that takes DTensors and runs on their local parts."""

    def run_on_parts(*args: Any, **kwargs: Any) -> None:
        run(*(local_parts(a) if isinstance(a, list) else local(a) for a in args), **kwargs)

    run_on_parts.progress = getattr(run, "progress", "versions")  # type: ignore[attr-defined]
    return run_on_parts


def all_reduce_sum(t: Tensor, ranks: Ranks) -> Tensor:
    """Sum `t` over `ranks`, in place, and return it. A recording (see jobs.py) sends nothing."""
    for group in ranks if jobs.current.get() is None else ():
        torch.distributed.all_reduce(t, group=group)
    return t


def check(where: str, params: Sequence[Tensor], *, only_trained: bool = False) -> None:
    """Refuse parameters whose filters are split across ranks; with `only_trained` only those that require grad."""
    for k, p in enumerate(params):
        if not is_sharded(p) or (only_trained and not p.requires_grad):
            continue
        for placement in p.placements:  # type: ignore[attr-defined]
            # FSDP2 over tensor parallelism places strided shards, a class of their own: the local rows are not
            # consecutive rows of the whole tensor.
            if not (placement.is_replicate() or (placement.is_shard(0) and type(placement).__name__ == "Shard")):
                raise ValueError(
                    f"{where}: params[{k}] is a DTensor placed {tuple(p.placements)}, but "  # type: ignore[attr-defined]
                    "filters are kept whole: place it Shard(0) or Replicate(), as fully_shard does"
                )
