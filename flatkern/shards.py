"""Sharded parameters (DTensor, as FSDP2 makes them): the part that is here, where it begins, sums over the other ranks.

Kernels see parts. Rows stay whole because parameters are cut along dim 0 only, so most of what is computed needs nobody
else; what does is the norm of a vector, norms over all parameters, and IRE's counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import jobs

PLAIN = frozenset((Tensor, torch.nn.Parameter))
Ranks = tuple[Any, ...]  # the process groups among whose members a tensor's rows are divided


def is_sharded(t: Any) -> bool:
    """True if `t` is a DTensor, whatever its placements."""
    if type(t) in PLAIN:
        return False
    # Where nobody has imported DTensor, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of `t` that is on this rank, sharing its memory; `t` itself if it is not sharded."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def parts(tensors: list[Tensor]) -> list[Tensor]:
    """The parts of one argument of an op, which is sharded as a whole or not at all."""
    return tensors if not tensors or type(tensors[0]) in PLAIN else [local(t) for t in tensors]


def version(t: Tensor) -> int:
    """Changes with every write. FSDP2 writes to the part, DTensor's own operations count in the wrapper only."""
    return t._version + t._local_tensor._version if is_sharded(t) else t._version  # type: ignore[attr-defined]


def ranks_of(t: Tensor) -> Ranks:
    """Who holds the other rows of `t`; empty where all of them are here."""
    if not is_sharded(t):
        return jobs.shard_of(t).ranks
    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(d) for d, placement in enumerate(placements) if placement.is_shard())


def first_row(t: Tensor) -> int:
    """The row of the whole tensor that the part begins with; for vectors the element."""
    if not is_sharded(t) or t.dim() == 0:
        return jobs.shard_of(t).first
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)  # type: ignore[attr-defined]
    return int(offset[0])


def beside(t: Tensor, part: Tensor, shape: int | Sequence[int]) -> Tensor:
    """`part` as state of `t`: cut as `t` is, and `shape` as a whole, so that checkpoints can cut it otherwise."""
    if not is_sharded(t):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def on_parts(run: Callable[..., None]) -> Callable[..., None]:
    """An op that is given sharded tensors and works on their parts."""

    def run_on_parts(*args: Any, **kwargs: Any) -> None:
        run(*(parts(a) if isinstance(a, list) else local(a) for a in args), **kwargs)

    run_on_parts.whole = run.whole  # type: ignore[attr-defined]
    return run_on_parts


def add_up(t: Tensor, ranks: Ranks) -> Tensor:
    """The sum of `t` over `ranks`, in place; in a recording nobody else is asked."""
    for group in ranks if jobs.current.get() is None else ():
        torch.distributed.all_reduce(t, group=group)
    return t


def check(where: str, params: Sequence[Tensor]) -> None:
    """Refuse parameters whose filters are cut."""
    for k, p in enumerate(params):
        if not is_sharded(p):
            continue
        for placement in p.placements:  # type: ignore[attr-defined]
            # Strided shards, of FSDP2 over tensor parallelism, are another class; their rows are not in one piece.
            if not (placement.is_replicate() or (placement.is_shard(0) and type(placement).__name__ == "Shard")):
                raise ValueError(
                    f"{where}: params[{k}] is a DTensor placed {tuple(p.placements)}, but "  # type: ignore[attr-defined]
                    "filters are kept whole: place it Shard(0) or Replicate(), as fully_shard does"
                )
