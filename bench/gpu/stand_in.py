"""A stand-in for a GPU: the races of `make gpu` on the CPU with a few small tensors, to see that the script works.

Every number is meaningless. What differs from timing/gpu.py is here, and is what it cannot run without a device.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from time import perf_counter_ns

import torch

from ..models import MODELS, Model, Shape
from ..timing.gpu import DeviceClock, Gpu
from ..timing.harness import HOST, LOOP


class Event:
    def record(self) -> None:
        self.at = perf_counter_ns()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e6


class StandIn(Gpu):
    """A CPU that takes the part of a GPU."""

    device = torch.device("cpu")
    burst = 1
    tried = False  # whether a turn has been made the long way

    def event(self) -> Event:
        return Event()

    def spin(self, cycles: int) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def profile(self, on: bool) -> None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def l2_bytes(self) -> int:
        return 1024

    def steps_in_loop(self, candidate) -> int:
        return 1

    def turn(self, candidate, count: int) -> dict[str, int]:
        """The interpreter takes its time: a candidate makes one turn, and only the first turn is whole."""
        if not hasattr(candidate, "found"):
            candidate.found = self.one_step(candidate) if self.tried else super().turn(candidate, count)
            self.tried = True
        return candidate.found

    def one_step(self, candidate) -> dict[str, int]:
        found = candidate.steps(DeviceClock(self, {}), 0)
        return found | {HOST + name: ns for name, ns in found.items()} | {LOOP: sum(found.values())}


def small(shape: Shape) -> Shape:
    """A shape with the same rank, few rows and few columns."""
    return tuple(min(size, 3 if i == 0 else 8) for i, size in enumerate(shape))


def shrunk(model: Model) -> Model:
    """A model's first tensor and its first vector, made small."""
    every = model.shapes()
    shapes = [small(every[0]), small(next(shape for shape in every[1:] if len(shape) < 2 or model.small))]
    return replace(model, rule=lambda: shapes, tensors=len(shapes), numel=sum(map(prod, shapes)))


def prepare() -> None:
    """Replace the models by small ones, and compile nothing: that would take minutes.

    This process then measures nothing real.
    """
    for name, model in MODELS.items():
        MODELS[name] = shrunk(model)
    torch.compile = lambda function, **options: function
    torch.set_num_threads(1)
