"""Noise: which parameters a draw perturbs, and the op calls that add it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..tables import columns, filters
from .buckets import Bucket, Call, CleanStore, Partition
from .cycle import Cycle
from .external_writes import REPEATABLE
from .groups import Group
from .scalars import Read, last_draw

# What sigma of a group is relative to; "absolute": to nothing, and no norm is needed.
SCALE: Callable[[Group], str] = itemgetter("scale")

NUMBERS: dict[str, Callable[[Group], Any]] = {
    "sigma": lambda group: float(group["sigma"]),
    "eta": lambda group: float(group["eta"]),
    "scale": SCALE,
}


def _of_last_draw(read: Callable[[Group], Any]) -> Callable[[Group], Any]:
    return lambda group: read(last_draw(group))


NUMBERS_OF_LAST_DRAW = {key: _of_last_draw(read) for key, read in NUMBERS.items()}


def perturbed_partition(cycle: Cycle, read: Read = None) -> Partition:
    """The parameters that the coming draw perturbs, in buckets."""
    groups = cycle.groups.owner().own_groups  # type: ignore[union-attr]
    on = [g for g in groups if (g if read is None else read(g))["perturb"]]
    split_by = SCALE if read is None else lambda group: SCALE(read(group))
    return cycle.partitions.of([p for g in on for p in g["params"] if p.requires_grad], split_by=split_by)


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
        sigmas = sigmas_on_device(cycle, bucket, read)
        lists = {"sigma": bucket.zeros, "eta": bucket.values(f"eta, {name}", numbers["eta"])}
    else:
        lists = bucket.columns(name, numbers, relative)
    history = cycle.state.histories(bucket.params) if any(lists["eta"]) else None
    norms = None
    if SCALE(bucket.groups[0] if read is None else read(bucket.groups[0])) == "absolute":
        norms = _ones(bucket)
    elif bucket.split_vectors:
        norms = _norms_of_the_whole(bucket, store.masters or bucket.params)
    arguments = bucket.params, *store, norms, history, sigmas, noise
    given = {"sigma": lists["sigma"], "eta": lists["eta"], "index": bucket.index, "offset": bucket.offset}
    call = Call(bucket, REPEATABLE, arguments, given)
    if sigmas is not None:
        call.drawn_with = partial(drawn_with, cycle, bucket, cycle.rolling)
    return call


def relative(bucket: Bucket, lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Standard deviations relative to the norm of a filter, which kernels multiply them by."""
    factors = _factors(bucket, lists["scale"])
    return {**lists, "sigma": [sigma * factor for sigma, factor in zip(lists["sigma"], factors, strict=True)]}


def _factors(bucket: Bucket, scales: list[str]) -> list[float]:
    """scale="rms" divides by the root of a filter's length, of the whole tensor."""
    lengths = (max(columns(p), 1) for p in bucket.params)
    return [n**-0.5 if scale == "rms" else 1.0 for n, scale in zip(lengths, scales, strict=True)]


def sigmas_on_device(cycle: Cycle, bucket: Bucket, read: Read = None) -> Tensor | None:
    """The same where the numbers are on the device."""
    return _relative_on_device(bucket, cycle.scalars.on_device(bucket, "sigma", read), read)


def drawn_with(cycle: Cycle, bucket: Bucket, rolling: bool) -> tuple[Tensor | None, Tensor]:
    """The sigmas and the key of the noise that is in the weights, after replays of a captured graph too."""
    sigmas, key = cycle.scalars.drawn_with(bucket, rolling)
    return _relative_on_device(bucket, sigmas, last_draw if rolling else None), key


def _relative_on_device(bucket: Bucket, sigmas: Tensor | None, read: Read) -> Tensor | None:
    def factors(bucket: Bucket, lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "rms" not in lists["scale"]:
            return {"factors": []}
        # Kept, because a captured graph reads it.
        found = torch.tensor(_factors(bucket, lists["scale"]), dtype=torch.float64, device=bucket.device)
        return {"factors": [found]}

    name, numbers = ("scale", NUMBERS) if read is None else ("scale of the last draw", NUMBERS_OF_LAST_DRAW)
    kept = bucket.columns(name, {"scale": numbers["scale"]}, factors)["factors"]
    return sigmas * kept[0] if kept and sigmas is not None else sigmas


def _ones(bucket: Bucket) -> list[Tensor]:
    """A norm of 1 for every filter; they are kept."""

    def ones(bucket: Bucket, _: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parts = dtensor.local_parts(bucket.params)
        return {"ones": [torch.ones(filters(p), dtype=torch.float32, device=p.device) for p in parts]}

    return bucket.columns("ones of filters", {}, ones)["ones"]


def _norms_of_the_whole(bucket: Bucket, weights: list[Tensor]) -> list[Tensor]:
    """L2 norms of vectors of which every rank has a part; one sum over the ranks, a float per vector."""
    norms = torch.empty(len(weights), dtype=torch.float32, device=bucket.device)
    each = list(norms.split(1))
    bucket.op("filter_norms_")(each, weights)
    norms.copy_(dtensor.all_reduce_sum(norms.double().square(), bucket.ranks).sqrt())
    return each
