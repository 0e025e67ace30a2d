"""What the command measures of a model, one after the other, and what each costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .curves import line, plane
from .evaluation import Loss, repeated_value
from .hessian import largest_eigenvalue
from .sharpness import ascent_sharpness, average_sharpness
from .weights import resting_weights

GRADIENT, PRODUCT = 3, 6  # in forwards
USUAL_PRODUCTS = 20  # of the Hessian, until the digits' eigenvalues have converged; for the progress bar


@dataclass(frozen=True)
class Settings:
    """What the command was asked for; see its options."""

    points: int
    extent: float
    directions: int
    dims: int
    sigma: float
    draws: int
    rho: float
    iterations: int
    seed: int
    include_vectors: bool
    backend: str | None

    def along(self) -> dict[str, Any]:
        """What lines and planes have in common."""
        names = ("points", "extent", "seed", "include_vectors", "backend")
        return {name: getattr(self, name) for name in names}


Measure = Callable[[nn.Module, Loss, Settings, Callable[[], None]], Any]


def average(model: nn.Module, loss: Loss, s: Settings, tick: Callable[[], None]) -> Any:
    return average_sharpness(
        model, loss, sigma=s.sigma, draws=s.draws, seed=s.seed, backend=s.backend, tick=tick
    )  # fmt: skip


def ascent(model: nn.Module, loss: Loss, s: Settings, tick: Callable[[], None]) -> Any:
    return ascent_sharpness(model, loss, rho=s.rho, backend=s.backend)


def eigenvalue(model: nn.Module, loss: Loss, s: Settings, tick: Callable[[], None]) -> Any:
    def each() -> None:
        for _ in range(PRODUCT):
            tick()

    return largest_eigenvalue(model, loss, iterations=s.iterations, seed=s.seed, tick=each)


def curve(model: nn.Module, loss: Loss, s: Settings, tick: Callable[[], None]) -> Any:
    return line(model, loss, directions=s.directions, **s.along(), tick=tick)


def contours(model: nn.Module, loss: Loss, s: Settings, tick: Callable[[], None]) -> Any:
    return plane(model, loss, **s.along(), tick=tick)


# What takes least comes first, so that an interrupt finds something finished.
MEASURES: dict[str, Measure] = {
    "average_sharpness": average,
    "ascent_sharpness": ascent,
    "line": curve,
    "largest_eigenvalue": eigenvalue,
    "plane": contours,
}


def wanted(settings: Settings) -> dict[str, int]:
    """The measures, and how many forwards each is expected to take."""
    forwards = {
        "average_sharpness": settings.draws,
        "ascent_sharpness": GRADIENT,
        "line": settings.directions * settings.points,
        "largest_eigenvalue": PRODUCT * min(USUAL_PRODUCTS, settings.iterations),
        "plane": settings.points**2,
    }
    return {name: forwards[name] for name in MEASURES if name != "plane" or settings.dims == 2}


def loss_at_rest(model: nn.Module, loss: Loss) -> float:
    """The loss before anything else, so that its own errors and its warning are not those of a measure."""
    return resting_weights("landscape", model, lambda params: repeated_value("landscape", model, loss))


def measured(name: str, model: nn.Module, loss: Loss, settings: Settings, tick: Callable[[], None]) -> dict[str, Any]:
    """One measure as plain data.

    Raises:
        ValueError: a curve without a finite point.
    """
    found = MEASURES[name](model, loss, settings, tick)
    if name in ("line", "plane") and not any(math.isfinite(each) for row in found.losses for each in row):
        raise ValueError(f"{name}: loss(model) is not finite at any point; take a smaller extent (--range)")
    spread = {"mean": found.mean, "std": found.std} if name == "line" else {}
    return dataclasses.asdict(found) | spread
