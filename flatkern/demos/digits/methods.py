"""The demo's methods and their hyper-parameters, and where those come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flatkern

EPOCHS = 25  # that the hyper-parameters are for

Hyper = dict[str, float]
Perturb = flatkern.RWP | flatkern.SAM | flatkern.GSAM | flatkern.FriendlySAM | flatkern.LookSAM | flatkern.MomentumSAM


@dataclass(frozen=True)
class Method:
    """A row of the demo.

    Fields:
        perturb, enhance: from hyper-parameters (and the run's seed) to flatkern's description.
        strength: which value of it is tuned.
        gradients: full-batch gradient evaluations per step.
        length: training steps, as a multiple of the others'.
        tuned_as: the methods whose hyper-parameters it takes, if not its own; of what several have, the last one's.
    """

    perturb: Callable[[Hyper, int], Perturb | None] = lambda h, seed: None
    enhance: Callable[[Hyper], flatkern.IRE | None] = lambda h: None
    strength: str | None = None
    gradients: float = 1
    length: int = 1
    tuned_as: tuple[str, ...] = ()


def _sam(h: Hyper, seed: int) -> flatkern.SAM:
    return flatkern.SAM(h["rho"])


def _ire(h: Hyper) -> flatkern.IRE:
    return flatkern.IRE(h["kappa"])


# lam = 0.5, eta = 0.1 and beta = 0.99 are the papers' (arXiv:2211.11489, arXiv:2404.00357), ASAM's eta = 0.01 too
# (arXiv:2102.11600); GSAM and Friendly-SAM have flatkern's defaults beside rho, LookSAM its rho, and mixed SAM's lam
# is the middle. IRE takes a gradient more for a mask, every ten steps, and LookSAM one for its ascent, every five.
METHODS = {
    "SGD": Method(),
    "SGD, 2x steps": Method(length=2, tuned_as=("SGD",)),
    "RWP": Method(lambda h, seed: flatkern.RWP(h["sigma"], seed=seed), strength="sigma"),
    "RWP rolling": Method(lambda h, seed: flatkern.RWP(h["sigma"], seed=seed, rolling=True), tuned_as=("RWP",)),
    "ARWP": Method(lambda h, seed: flatkern.RWP(h["sigma"], eta=0.1, seed=seed), strength="sigma"),
    "m-RWP": Method(lambda h, seed: flatkern.RWP(h["sigma"], lam=0.5, seed=seed), strength="sigma", gradients=2),
    "m-ARWP": Method(
        lambda h, seed: flatkern.RWP(h["sigma"], lam=0.5, eta=0.1, seed=seed), strength="sigma", gradients=2
    ),
    "SAM": Method(_sam, strength="rho", gradients=2),
    "ASAM": Method(lambda h, seed: flatkern.ASAM(h["rho"]), strength="rho", gradients=2),
    "mSAM": Method(_sam, gradients=2, tuned_as=("SAM",)),
    "mixed SAM": Method(lambda h, seed: flatkern.SAM(h["rho"], lam=0.5), gradients=2, tuned_as=("SAM",)),
    "GSAM": Method(lambda h, seed: flatkern.GSAM(h["rho"]), gradients=2, tuned_as=("SAM",)),
    "Friendly-SAM": Method(lambda h, seed: flatkern.FriendlySAM(h["rho"]), gradients=2, tuned_as=("SAM",)),
    "LookSAM": Method(lambda h, seed: flatkern.LookSAM(alpha=h["alpha"]), strength="alpha", gradients=1.2),
    "Momentum-SAM": Method(lambda h, seed: flatkern.MomentumSAM(h["rho"], rolling=True), strength="rho"),  # rolling
    "IRE": Method(enhance=_ire, strength="kappa", gradients=1.1),
    "SAM-IRE": Method(_sam, _ire, gradients=2.1, tuned_as=("IRE", "SAM")),
}

# The best of `python -m flatkern demo --search` (torch 2.13.0, backend cpp): highest mean validation accuracy of three
# seeds, written behind. SGD in the noisy setting takes the largest weight decay of the grid; twice that is worse.
# Momentum-SAM with clean labels takes the smallest rho of its grid. LookSAM's usual alpha of 0.7 is too much here: with
# wrong labels it learns nothing.
TUNED: dict[str, dict[str, Hyper]] = {
    "clean": {
        "SGD": {"lr": 0.05, "weight_decay": 0.02},  # 98.1
        "RWP": {"lr": 0.05, "weight_decay": 0.02, "sigma": 0.03},  # 98.1
        "ARWP": {"lr": 0.05, "weight_decay": 0.02, "sigma": 0.03},  # 98.2
        "m-RWP": {"lr": 0.05, "weight_decay": 0.02, "sigma": 0.03},  # 98.2
        "m-ARWP": {"lr": 0.05, "weight_decay": 0.02, "sigma": 0.03},  # 98.2
        "SAM": {"lr": 0.05, "weight_decay": 0.02, "rho": 0.05},  # 98.4
        "ASAM": {"lr": 0.05, "weight_decay": 0.02, "rho": 0.25},  # 98.2
        "LookSAM": {"lr": 0.05, "weight_decay": 0.02, "alpha": 0.1},  # 98.4
        "Momentum-SAM": {"lr": 0.05, "weight_decay": 0.02, "rho": 0.1},  # 98.0
        "IRE": {"lr": 0.05, "weight_decay": 0.02, "kappa": 1.0},  # 97.9
    },
    "noisy": {
        "SGD": {"lr": 0.1, "weight_decay": 0.05},  # 86.2
        "RWP": {"lr": 0.1, "weight_decay": 0.02, "sigma": 0.07},  # 88.9
        "ARWP": {"lr": 0.1, "weight_decay": 0.05, "sigma": 0.07},  # 88.7
        "m-RWP": {"lr": 0.1, "weight_decay": 0.05, "sigma": 0.07},  # 88.7
        "m-ARWP": {"lr": 0.1, "weight_decay": 0.05, "sigma": 0.07},  # 87.0
        "SAM": {"lr": 0.1, "weight_decay": 0.05, "rho": 0.05},  # 88.2
        "ASAM": {"lr": 0.1, "weight_decay": 0.05, "rho": 0.25},  # 89.6
        "LookSAM": {"lr": 0.1, "weight_decay": 0.05, "alpha": 0.1},  # 88.4
        "Momentum-SAM": {"lr": 0.1, "weight_decay": 0.02, "rho": 1.0},  # 91.4
        "IRE": {"lr": 0.1, "weight_decay": 0.05, "kappa": 2.0},  # 85.9
    },
}


def hyper_parameters(setting: str, name: str) -> Hyper:
    """Learning rate, weight decay, and the strength under its own name."""
    return {key: value for own in METHODS[name].tuned_as or (name,) for key, value in TUNED[setting][own].items()}


@dataclass(frozen=True)
class Plan:
    """Which runs are made; those of one seed have the same start, batches and wrong labels."""

    settings: tuple[str, ...] = tuple(TUNED)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 5
    epochs: int = EPOCHS

    def runs(self) -> list[tuple[int, str, str]]:
        """Seed, setting, method; seeds outermost: what else the machine does meets all methods alike."""
        return [(k, setting, name) for k in range(self.seeds) for setting in self.settings for name in self.methods]


FULL = Plan()
# One method of each kind, where methods differ most; without RWP rolling, whose weights are those of RWP.
SAMPLE = Plan(("noisy",), ("SGD", "SGD, 2x steps", "RWP", "ARWP", "m-RWP", "SAM", "Momentum-SAM", "IRE"), seeds=3)
