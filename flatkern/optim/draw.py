"""Noise: which parameters a draw perturbs, and the op calls that add it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import dtensor
from .buckets import Bucket, Call, Partition
from .cycle import Cycle
from .external_writes import REPEATABLE
from .scalars import Read, last_draw
from .weights import CleanStore

NUMBERS = {"sigma": lambda group: float(group["sigma"]), "eta": lambda group: float(group["eta"])}
NUMBERS_OF_LAST_DRAW = {
    "sigma": lambda group: float(last_draw(group)["sigma"]),
    "eta": lambda group: float(last_draw(group)["eta"]),
}


def perturbed_partition(cycle: Cycle, read: Read = None) -> Partition:
    """The parameters that the coming draw perturbs, in buckets."""
    groups = cycle.groups.owner().own_groups  # type: ignore[union-attr]
    on = [g for g in groups if (g if read is None else read(g))["perturb"]]
    return cycle.partitions.of([p for g in on for p in g["params"] if p.requires_grad])


def draw(cycle: Cycle, read: Read = None) -> None:
    """CLEAN -> PERTURBED by the noise of the current round, which does not advance here."""
    partition = perturbed_partition(cycle, read)
    noise, buckets = cycle.scalars.noise(ahead=0), partition.buckets
    cycle.weights.perturb(
        partition,
        lambda stores, _: [noise_call(cycle, b, s, noise, read) for b, s in zip(buckets, stores, strict=True)],
    )


def draw_again(cycle: Cycle) -> None:
    """Rolling: the noise of the current round as it was drawn, if it was; a schedule may have moved sigma since."""
    draw(cycle, last_draw)
    cycle.scalars.note_draw(last_draw)


def noise_call(cycle: Cycle, bucket: Bucket, store: CleanStore, noise: Tensor, read: Read = None) -> Call:
    """perturb_gaussian_ on one bucket."""
    name, numbers = ("noise", NUMBERS) if read is None else ("noise of the last draw", NUMBERS_OF_LAST_DRAW)
    sigmas = None
    if cycle.groups.setup.capturable:
        sigmas = cycle.scalars.on_device(bucket, "sigma", read)
        lists = {"sigma": bucket.zeros, "eta": bucket.values(f"eta, {name}", numbers["eta"])}
    else:
        lists = bucket.columns(name, numbers)
    history = cycle.state.histories(bucket.params) if any(lists["eta"]) else None
    norms = _norms_of_the_whole(bucket, store.masters or bucket.params) if bucket.split_vectors else None
    arguments = bucket.params, *store, norms, history, sigmas, noise
    call = Call(bucket, REPEATABLE, arguments, {**lists, "index": bucket.index, "offset": bucket.offset})
    if sigmas is not None:
        call.drawn_with = partial(cycle.scalars.drawn_with, bucket, cycle.rolling)
    return call


def _norms_of_the_whole(bucket: Bucket, weights: list[Tensor]) -> list[Tensor]:
    """L2 norms of vectors of which every rank has a part; one sum over the ranks, a float per vector."""
    norms = torch.empty(len(weights), dtype=torch.float32, device=bucket.device)
    each = list(norms.split(1))
    bucket.op("filter_norms_")(each, weights)
    norms.copy_(dtensor.all_reduce_sum(norms.double().square(), bucket.ranks).sqrt())
    return each
