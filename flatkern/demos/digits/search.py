"""`python -m flatkern demo --search`: where the demo's hyper-parameters come from. The test set plays no part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from .methods import METHODS
from .training import SETTINGS, load_data, train

# Other seeds than the demo's, so other initial weights, batches and wrong labels.
SEEDS = range(1000, 1003)
# 16 candidates for every method: SGD's learning rate is tuned with its weight decay, and is everybody's; each other
# method tunes its strength with its weight decay, because both act against memorized labels. mSAM, mixed SAM, GSAM and
# Friendly-SAM take SAM's, SAM-IRE SAM's and IRE's kappa.
LR = (0.02, 0.05, 0.1, 0.2)
WEIGHT_DECAY = (5e-4, 5e-3, 2e-2, 5e-2)
SIGMA, RHO, ADAPTIVE_RHO = (0.01, 0.03, 0.07, 0.15), (0.02, 0.05, 0.1, 0.2), (0.1, 0.25, 0.5, 1.0)
MOMENTUM_RHO = (0.1, 0.3, 1.0, 3.0)
ALPHA = (0.05, 0.1, 0.3, 0.7)
KAPPA = (0.5, 1.0, 2.0, 4.0)
STRENGTHS = {
    "RWP": SIGMA,
    "ARWP": SIGMA,
    "m-RWP": SIGMA,
    "m-ARWP": SIGMA,
    "SAM": RHO,
    "ASAM": ADAPTIVE_RHO,
    "LookSAM": ALPHA,
    "Momentum-SAM": MOMENTUM_RHO,
    "IRE": KAPPA,
}


def candidates() -> int:
    """How many there are in both settings."""
    tuned = sum(len(strengths) for strengths in STRENGTHS.values())
    return len(SETTINGS) * len(WEIGHT_DECAY) * (len(LR) + tuned)


def search(epochs: int, backend: str | None, settings: Any = SETTINGS) -> Iterator[dict[str, Any]]:
    """Every candidate with its validation accuracy, SGD's first.

    A candidate's `chosen` is True if it is the best of its method so far.
    """
    for setting in settings:
        data = {seed: load_data(seed, SETTINGS[setting]) for seed in SEEDS}

        def score(name: str, hyper: dict[str, float]) -> tuple[float, float]:
            runs = [train(name, data[s], s, epochs, hyper, backend, "validation", points=1) for s in SEEDS]  # noqa: B023
            ends = [run["curve"][-1] for run in runs]
            # Rounded, so that equal accuracies are equal and the loss decides.
            return round(mean(end["accuracy"] for end in ends), 6), -mean(end["loss"] for end in ends)

        grid = itertools.product(LR, WEIGHT_DECAY)
        base = yield from _best(setting, "SGD", [{"lr": lr, "weight_decay": decay} for lr, decay in grid], score)
        for name, strengths in STRENGTHS.items():
            grid = itertools.product(WEIGHT_DECAY, strengths)
            key = METHODS[name].strength
            candidates = [{"lr": base["lr"], "weight_decay": decay, key: value} for decay, value in grid]
            yield from _best(setting, name, candidates, score)


def _best(setting: str, name: str, candidates: list[Any], score: Callable[..., tuple[float, float]]) -> Any:
    """The candidate of highest accuracy, the lower loss where several have it."""
    scores: list[tuple[float, float]] = []
    for hyper in candidates:
        scores.append(score(name, hyper))
        accuracy, loss = scores[-1]
        chosen = scores[-1] == max(scores)
        yield {"setting": setting, "method": name, **hyper, "accuracy": accuracy, "loss": -loss, "chosen": chosen}
    return candidates[scores.index(max(scores))]
