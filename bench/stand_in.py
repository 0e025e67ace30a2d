"""A stand-in for a GPU: the whole GPU plan on the CPU with small tensors, to see that the harness works.

    python bench/run.py --device cuda --dry-run

Every number is meaningless. What differs from gpu.py is here, and is what gpu.py cannot run without a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from time import perf_counter_ns

import torch

from .gpu import MARKER, Gpu
from .models import MODELS, Model, Shape


class Event:
    def record(self) -> None:
        self.at = perf_counter_ns()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e6


class StandIn(Gpu):
    """A CPU that takes the part of a GPU; nothing but markers is ever "started" on it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.started: list[str] = []
        super().__init__()

    def event(self) -> Event:
        return Event()

    def spin(self, cycles: int) -> None:
        self.started.append(MARKER)

    def synchronize(self) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def l2_bytes(self) -> int:
        return 1024

    def trace(self, run: Callable[[], object]) -> list[str]:
        self.started.clear()
        run()
        return list(self.started)

    def info(self) -> dict:
        names = "memory_bytes", "multiprocessors", "l2_bytes"
        text = dict.fromkeys(["driver", "cuda", "compute_capability"], "none")
        return {"name": "dry run", "count": 0, **dict.fromkeys(names, 0), **text, "nvidia_smi": {}}


def small(shape: Shape) -> Shape:
    """A shape with the same rank, few rows and few columns."""
    return tuple(min(size, 3 if i == 0 else 8) for i, size in enumerate(shape))


def prepare() -> None:
    """Replace the models by small ones with as many tensors, and compile nothing: that would take minutes.

    This process then measures nothing real.
    """
    for name, model in MODELS.items():
        MODELS[name] = shrunk(model)
    torch.compile = lambda function, **options: function


def shrunk(model: Model) -> Model:
    shapes = [small(shape) for shape in model.shapes()]
    return replace(model, rule=lambda: shapes, numel=sum(map(prod, shapes)))
