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
        shard = found.get(where)
        if shard is None:
            shard = found[where] = Shard(*where, [], [])
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

    Traffic: three passes over the gradients, of which the sample saves one. The guess is looked at behind the last
    pass, so that the host waits for the device once, with all work queued: a guess that is wrong by one costs two more
    passes, and a worse one five. Nothing is sorted, and only the sample is copied. Counts of sharded gradients are
    summed over their ranks: 33 KB in three all-reduces.
    """
    digits = torch.empty(len(MAGNITUDE_DIGITS), dtype=torch.int64, device=shards[0].device)  # of t, the first one first
    guessed = total >= SAMPLED
    if guessed:
        digits[:1] = _guess_first_digit(shards, rank / total, backend)
    for attempt in range(3):
        below, infinite, inside = _find_digits(shards, digits, int(guessed), rank, backend).tolist()
        if infinite:
            return None
        if not guessed or below < rank <= below + inside:
            break
        # Near the border of two digits a sample is wrong by one; a second time it is not relied on.
        digits[0] += 1 if rank > below else -1
        guessed = attempt == 0
    _, second, third = MAGNITUDE_DIGITS
    upper = torch.add(digits[1], digits[0], alpha=1 << second)
    return torch.add(digits[2], upper, alpha=1 << third).to(torch.int32).view(torch.float32)


def _find_digits(shards: list[Shard], digits: Tensor, known: int, rank: int, backend: str | None) -> Tensor:
    """Find those of the digits that are not known, a pass for each. The host does not wait.

    Returns:
        Of the first of these passes, int64 (3,): how many elements are below the known digits, how many are not finite,
        and how many have the known digits. Where the `rank`-th is none of the last, the digits mean nothing.
    """
    for k in range(known, len(digits)):
        counts = _count(shards, digits[:k], backend)
        below, up_to = counts[-2:-1], counts[:-2].cumsum(0)
        if k == known:
            first = torch.cat([counts[-2:], up_to[-1:]])
        # The last value is found where no other is, so that there is one whatever the rank.
        torch.searchsorted(up_to[:-1], rank - below, out=digits[k : k + 1])
    return first


def _guess_first_digit(shards: list[Shard], quantile: float, backend: str | None) -> Tensor:
    """The first digit of a quantile of the magnitudes, by a sample; int64 (1,)."""
    nothing = torch.empty(0, dtype=torch.int64, device=shards[0].device)
    up_to = _count(shards, nothing, backend, _sample)[:-2].cumsum(0)
    return torch.searchsorted(up_to[:-1], (up_to[-1:] * quantile).long())


def _sample(grads: list[Tensor]) -> list[Tensor]:
    """One cache line in 64, so that a 64th of the memory is read.

    Tensors of less than a 16th of the mean size are left out: they are many, and hold few of the elements. So are those
    of less than 64 lines.
    """
    step = 64 * CACHE_LINE_FLOATS
    sizes = [g.numel() for g in grads]
    least = sum(sizes) // (16 * len(sizes))
    # The views are copied together: on a GPU a copy of each would be a launch of each.
    lines = [
        g.as_strided((size // step, CACHE_LINE_FLOATS), (step, 1))
        for g, size in zip(grads, sizes, strict=True)
        if size >= least
    ]
    return [torch.cat(lines).flatten()]


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
