"""What model.py has written down of the Triton backend's calls: microseconds, and shares of a copy's rate.

Of the oldest Triton that is there, which is the one that a GPU is expected with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench.methods import METHODS, floor_bytes
from bench.models import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "model.json"
# Of a step, for calls that not every step makes.
SHARES = {"mask": next(turn.share for turn in METHODS["ire"].cycle if turn.call == "update_mask")}
Says = Callable[[str], "str | None"]  # of a GPU; None of one that the model does not know


@cache
def table() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def oldest() -> str:
    return min(table()["triton"], key=lambda version: [int(part) for part in version.split(".")[:2]])


@cache
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["call"], row["model"]): row for row in table()["triton"][oldest()]}


def copy_rate(gpu: str) -> float | None:
    return table()["assumed"]["copy, bytes a second"].get(gpu)


def us(model: str, gpu: str, *calls: str) -> float:
    """Of a step that makes these calls."""
    return sum(rows()[call, model]["us"][gpu] * SHARES.get(call, 1.0) for call in calls)


def shares_of_copy(call: str, *models: str) -> Says:
    def says(gpu: str) -> str | None:
        if copy_rate(gpu) is None:
            return None
        return " / ".join(f"{100 * rows()[call, model]['of_copy'][gpu]:.0f}" for model in models) + " %"

    return says


def in_steps(step: Callable[[str, str], float], *steps: tuple[str, tuple[str, ...]]) -> Says:
    """Each a model and its calls, in steps of somebody who takes `step(model, gpu)` microseconds."""

    def says(gpu: str) -> str | None:
        if copy_rate(gpu) is None:
            return None
        return " / ".join(f"{us(model, gpu, *calls) / step(model, gpu):.2f}" for model, calls in steps)

    return says


def fused(base: str) -> Callable[[str, str], float]:
    """torch's fused optimizer, float32, which moves its bytes at a copy's rate."""
    moved = floor_bytes(METHODS["plain"], base, 4)
    return lambda model, gpu: 1e6 * moved * MODELS[model].numel / (copy_rate(gpu) or math.inf)


def plain(call: str) -> Callable[[str, str], float]:
    """Our own plain optimizer."""
    return lambda model, gpu: us(model, gpu, call)
