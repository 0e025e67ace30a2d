"""The demo's methods and their hyper-parameters, and where those come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flatkern

EPOCHS = 25  # that the hyper-parameters are for


@dataclass(frozen=True)
class Method:
    """A row of the demo.

    Fields:
        perturb: from the tuned strength and the run's seed to flatkern's description.
        strength: which value of it is tuned.
        gradients: full-batch gradient evaluations per step.
        length: training steps, as a multiple of the others'.
        tuned_as: the method whose hyper-parameters it takes, if not its own.
    """

    perturb: Callable[[float, int], flatkern.RWP | flatkern.SAM | None]
    strength: str | None = None
    gradients: int = 1
    length: int = 1
    tuned_as: str | None = None


# lam = 0.5, eta = 0.1 and beta = 0.99 are the papers' (arXiv:2211.11489, arXiv:2404.00357), ASAM's eta = 0.01 too
# (arXiv:2102.11600).
METHODS = {
    "SGD": Method(lambda _, seed: None),
    "SGD, 2x steps": Method(lambda _, seed: None, length=2, tuned_as="SGD"),
    "RWP": Method(lambda s, seed: flatkern.RWP(s, seed=seed), "sigma"),
    "RWP rolling": Method(lambda s, seed: flatkern.RWP(s, seed=seed, rolling=True), "sigma", tuned_as="RWP"),
    "ARWP": Method(lambda s, seed: flatkern.RWP(s, eta=0.1, seed=seed), "sigma"),
    "m-RWP": Method(lambda s, seed: flatkern.RWP(s, lam=0.5, seed=seed), "sigma", 2),
    "m-ARWP": Method(lambda s, seed: flatkern.RWP(s, lam=0.5, eta=0.1, seed=seed), "sigma", 2),
    "SAM": Method(lambda s, seed: flatkern.SAM(s), "rho", 2),
    "ASAM": Method(lambda s, seed: flatkern.ASAM(s), "rho", 2),
    "mSAM": Method(lambda s, seed: flatkern.SAM(s), "rho", 2, tuned_as="SAM"),
}

# From `python -m flatkern demo --search`, 25 epochs; SAM's and ASAM's grids were searched in part, so their values are
# the papers' scale and the best of what was searched.
TUNED: dict[str, dict[str, dict[str, float]]] = {
    "clean": {
        "SGD": {"lr": 0.05, "weight_decay": 2e-2},
        "RWP": {"lr": 0.05, "weight_decay": 2e-2, "sigma": 0.03},
        "ARWP": {"lr": 0.05, "weight_decay": 2e-2, "sigma": 0.03},
        "m-RWP": {"lr": 0.05, "weight_decay": 2e-2, "sigma": 0.03},
        "m-ARWP": {"lr": 0.05, "weight_decay": 2e-2, "sigma": 0.03},
        "SAM": {"lr": 0.05, "weight_decay": 2e-2, "rho": 0.05},
        "ASAM": {"lr": 0.05, "weight_decay": 5e-3, "rho": 0.5},
    },
    "noisy": {
        "SGD": {"lr": 0.1, "weight_decay": 5e-2},
        "RWP": {"lr": 0.1, "weight_decay": 2e-2, "sigma": 0.07},
        "ARWP": {"lr": 0.1, "weight_decay": 5e-2, "sigma": 0.07},
        "m-RWP": {"lr": 0.1, "weight_decay": 5e-2, "sigma": 0.07},
        "m-ARWP": {"lr": 0.1, "weight_decay": 5e-2, "sigma": 0.07},
        "SAM": {"lr": 0.1, "weight_decay": 2e-2, "rho": 0.1},
        "ASAM": {"lr": 0.1, "weight_decay": 5e-3, "rho": 0.5},
    },
}


def hyper_parameters(setting: str, name: str) -> dict[str, float]:
    """Learning rate, weight decay, and the strength under its own name."""
    return TUNED[setting][METHODS[name].tuned_as or name]
