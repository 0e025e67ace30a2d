"""IRE's threshold: the k-th smallest magnitude of gradients, which may be on several devices and sharded over ranks.

No optimizer here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensor
from .checks import MAGNITUDE_DIGITS
from .dispatch import resolve

SAMPLED = 2**20  # elements from which on a sample costs less than the pass it saves, and is large enough to guess well
CACHE_LINE_FLOATS = 16  # elements of float32 that memory delivers together


class Shard(NamedTuple):
    """Gradients on one device whose rows are sharded over the same ranks."""

    device: torch.device
    ranks: dtensor.Ranks
    at: list[int]  # positions among all gradients
    grads: list[Tensor]  # local parts


def shards_of(grads: list[Tensor]) -> list[Shard]:
    """Gradients by device and ranks, in the order of their first appearance."""
    found: dict[Any, Shard] = {}
    for k, g in enumerate(grads):
        where = g.device, dtensor.ranks_of(g)
        shard = found.setdefault(where, Shard(*where, [], []))
        shard.at.append(k)
        shard.grads.append(dtensor.local(g))
    return list(found.values())


def kth_smallest_magnitude(shards: list[Shard], total: int, rank: int, backend: str | None) -> Tensor | None:
    """The `rank`-th smallest magnitude of all elements of `shards`, exactly.

        t = |g|_(rank),    |g|_(1) <= |g|_(2) <= ... <= |g|_(total)

    A radix selection. The bits of |g| as float32, read as an integer, have the order of the magnitudes: 31 bits, in
    three digits of 11, 10 and 10 bits. One pass counts how often each value of a digit occurs among the elements that
    agree with t in the digits before; the cumulative counts give that digit of t.

    The pass for the first digit is the slowest, because it counts every element. From SAMPLED elements on, a sample of
    one in 64 guesses this digit instead. The pass for the second digit also counts the elements below the guess, which
    shows whether it is right; so the result never depends on the sample.

    Arguments:
        shards: `shards_of(grads)`, at least one.
        total: elements of all gradients, on all ranks.
        rank: from 1 (the smallest) to `total`.
        backend: "eager", "cpp" or "triton", used or refused; None takes the best one.

    Returns:
        0-dim float32 on the first shard's device, the same on all ranks; None if an element is infinite or NaN.

    Traffic: three passes over the gradients, of which the sample saves one; after a guess that is wrong by one three
    again, and five after a worse one. Nothing is sorted, and only the sample is copied. The host waits for the device
    once, and once more for each wrong guess. Counts of sharded gradients are summed over their ranks: 33 KB in three
    all-reduces.
    """
    device = shards[0].device
    wanted = torch.tensor(rank, device=device)
    unknown = torch.empty(0, dtype=torch.int64, device=device)
    prefix = _guess_first_digit(shards, wanted / total, backend) if total >= SAMPLED else unknown
    for attempt in range(3):
        counts = _count(shards, prefix, backend)
        below, last = counts[-2], counts[:-1].sum()  # ranks below the prefix, and up to the last with it
        finite, low, high = torch.stack([counts[-1] == 0, wanted <= below, last < wanted]).tolist()
        if not finite:
            return None
        if not (low or high):
            break
        # Near the border of two digits a sample is wrong by one; a second time it is not relied on.
        prefix = unknown if attempt else prefix + (1 if high else -1)
    while True:
        digit = torch.searchsorted(counts[-2] + counts[:-2].cumsum(0), wanted)
        prefix = torch.cat([prefix, digit.reshape(1)])
        if len(prefix) == len(MAGNITUDE_DIGITS):
            break
        counts = _count(shards, prefix, backend)
    _, second, third = MAGNITUDE_DIGITS
    bits = (((prefix[0] << second) | prefix[1]) << third) | prefix[2]
    return bits.to(torch.int32).view(torch.float32)


def _guess_first_digit(shards: list[Shard], quantile: Tensor, backend: str | None) -> Tensor:
    """The first digit of a quantile of the magnitudes, by a sample; int64 (1,)."""
    counts = _count(shards, torch.empty(0, dtype=torch.int64, device=quantile.device), backend, _sample)[:-2]
    up_to = counts.cumsum(0)
    digit = torch.searchsorted(up_to, (quantile * up_to[-1]).long()).clamp(max=len(counts) - 1)
    return digit.reshape(1)


def _sample(grads: list[Tensor]) -> list[Tensor]:
    """One cache line in 64, so that a 64th of the memory is read; tensors of less than 64 lines are left out."""
    step = 64 * CACHE_LINE_FLOATS
    # The views are copied together: on a GPU a copy of each would be a launch of each.
    lines = torch.cat([g.as_strided((g.numel() // step, CACHE_LINE_FLOATS), (step, 1)) for g in grads])
    return [lines.flatten()]


def _count(
    shards: list[Shard],
    prefix: Tensor,
    backend: str | None,
    select: Callable[[list[Tensor]], list[Tensor]] = lambda grads: grads,
) -> Tensor:
    """count_magnitudes_ of all gradients, or of what `select` takes of them, summed over devices and ranks."""
    size = 2 ** MAGNITUDE_DIGITS[len(prefix)] + 2
    found = []
    for shard in shards:
        part = torch.empty(size, dtype=torch.int64, device=shard.device)
        count_magnitudes_ = resolve("count_magnitudes_", shard.device.type, backend)
        count_magnitudes_(part, select(shard.grads), prefix.to(shard.device))
        found.append(dtensor.all_reduce_sum(part, shard.ranks).to(prefix.device))
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)
