"""`python -m flatkern demo --search`: where the demo's hyper-parameters come from. The test set plays no part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from .demo_training import METHODS, SETTINGS, load_data, train

# Other seeds than the demo's, so other initial weights, batches and wrong labels.
SEEDS = range(1000, 1005)
BASE = {"lr": (0.05, 0.1, 0.2), "weight_decay": (5e-4, 5e-3, 5e-2)}
STRENGTHS = {
    "RWP": (0.005, 0.01, 0.02, 0.04, 0.08),
    "ARWP": (0.005, 0.01, 0.02, 0.04, 0.08),
    "m-RWP": (0.005, 0.01, 0.02, 0.04, 0.08),
    "m-ARWP": (0.005, 0.01, 0.02, 0.04, 0.08),
    "SAM": (0.05, 0.1, 0.2, 0.4, 0.8),
    "ASAM": (0.5, 1.0, 2.0, 4.0, 8.0),
    "mSAM": (0.05, 0.1, 0.2, 0.4, 0.8),
}


def search(epochs: int, backend: str | None, settings: Any = SETTINGS) -> Iterator[dict[str, Any]]:
    """Every candidate with its validation accuracy; learning rate and weight decay first, for SGD, then shared.

    A candidate's `chosen` is True if it is the best of its method so far.
    """
    for setting in settings:
        data = {seed: load_data(seed, SETTINGS[setting]) for seed in SEEDS}

        def score(name: str, hyper: dict[str, float]) -> tuple[float, float]:
            runs = [train(name, data[s], s, epochs, hyper, backend, "validation", points=1) for s in SEEDS]  # noqa: B023
            ends = [run["curve"][-1] for run in runs]
            return mean(end["accuracy"] for end in ends), -mean(end["loss"] for end in ends)

        base = yield from _best(setting, "SGD", [dict(zip(BASE, v)) for v in itertools.product(*BASE.values())], score)
        for name, strengths in STRENGTHS.items():
            key = METHODS[name].strength
            yield from _best(setting, name, [{**base, key: s} for s in strengths], score)


def _best(setting: str, name: str, candidates: list[Any], score: Callable[..., tuple[float, float]]) -> Any:
    """The candidate of highest accuracy, the lower loss where several have it."""
    scores: list[tuple[float, float]] = []
    for hyper in candidates:
        scores.append(score(name, hyper))
        accuracy, loss = scores[-1]
        chosen = scores[-1] == max(scores)
        yield {"setting": setting, "method": name, **hyper, "accuracy": accuracy, "loss": -loss, "chosen": chosen}
    return candidates[scores.index(max(scores))]
