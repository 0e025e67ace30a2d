"""What is decided by races: which backend is faster, and whether cache hints pay.

Which backend `backend=None` takes on a GPU, and whether csrc/cuda/device.cuh keeps its hints, follows from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import exp, log
from typing import NamedTuple

from . import goals

EVEN = 0.01  # closer than this nobody is said to be faster
WORTH = 0.02  # hints that give less are not worth their lines
TRITON, CUDA, NEITHER = "triton", "cuda", "even"


class Line(NamedTuple):
    """One race. Times are microseconds on the device; None where somebody did not run."""

    row: dict  # ours, of whatever backend: what was raced
    triton: float | None
    cuda: float | None
    fused: float | None
    copy: float | None  # a copy that moves as many bytes as ours must
    spread: float  # the larger one of the two backends'

    @property
    def ratio(self) -> float | None:
        """CUDA's time in Triton's."""
        return None if self.triton is None or self.cuda is None else self.cuda / self.triton

    @property
    def winner(self) -> str | None:
        if self.ratio is None:
            return None
        return NEITHER if abs(log(self.ratio)) < log(1 + EVEN) else CUDA if self.ratio < 1 else TRITON


def lines(findings: Sequence[dict]) -> list[Line]:
    """The races in which a backend of ours ran beside torch's fused optimizer, in their order."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in goals.races(findings):
        found.setdefault(tuple(goals.same_race(row).values()), {})[row["candidate"]] = row
    return [line_of(by) for by in found.values() if by.keys() & {goals.OURS, goals.CUDA}]


def line_of(by: dict[str, dict]) -> Line:
    def us(label: str) -> float | None:
        return by[label]["us"] if label in by else None

    ours = [by[label] for label in (goals.OURS, goals.CUDA) if label in by]
    row = ours[0]
    fused = us(goals.FUSED) if by.get(goals.FUSED, row)["dtype"] == row["dtype"] else None
    # From rates, as a rate is what was measured of the copy.
    copy = row["us"] * row["gbs"] / row["copy_gbs"] if row.get("copy_gbs") else None
    return Line(row, us(goals.OURS), us(goals.CUDA), fused, copy, max(each.get("spread", 0.0) for each in ours))


def sentence(findings: Sequence[dict]) -> str:
    """Who was faster how often, and by how much in all; empty where only one backend ran."""
    both = [line for line in lines(findings) if line.ratio is not None]
    if not both:
        return ""
    won = {name: sum(line.winner == name for line in both) for name in (CUDA, TRITON, NEITHER)}
    mean = exp(sum(log(line.ratio or 1.0) for line in both) / len(both))
    counts = ", ".join(f"{name} {count}" for name, count in won.items())
    return f"cuda / triton = {mean:.3f} (geometric mean of {len(both)} races; first: {counts})"


# ---- cache hints


def gains(findings: Sequence[dict]) -> list[tuple[dict, float]]:
    """Of each race of stage hints a result with hints, and how much longer it takes without: 0.02 is 2 %."""
    races = [f for f in findings if f["kind"] == "race"]
    without = {f["race"]: f["us"] for f in races if f["candidate"] == goals.NO_HINTS}
    with_hints = [f for f in races if f["candidate"] == goals.CUDA and f["race"] in without]
    return [(f, without[f["race"]] / f["us"] - 1) for f in with_hints]


def policy(findings: Sequence[dict]) -> str:
    """Keep them, or drop them; empty where nothing was raced."""
    found = [gain for _, gain in gains(findings)]
    if not found:
        return ""
    middle = statistics.median(found)
    verdict = "keep the hints" if middle >= WORTH else f"drop the hints, which should give {WORTH:.0%}"
    return f"{verdict}: without them calls take {middle:+.1%} (median; from {min(found):+.1%} to {max(found):+.1%})"
