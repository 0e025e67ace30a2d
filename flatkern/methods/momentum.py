"""MomentumSAM: against the base's momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..values import check_flag
from .fields import check_numbers, put


@dataclass(frozen=True)
class MomentumSAM:
    """Momentum-SAM: against the base optimizer's momentum in place of along a gradient, so with one gradient a step.

        e = -rho v / (||v||_2 + 1e-12),    g = grad L(w + e)        v: the base's momentum, zero before its first step

    v is SGD's `momentum_buffer`, Adam's and AdamW's `exp_avg`, as torch keeps them; `Wrap` takes either of its base's.
    It is no micro-batch mSAM, which is `SAM` with several rounds.

    Arguments:
        rho: radius of the perturbation, in the L2 norm over all perturbed parameters.
        rolling: the perturbation stays on between steps, and `step()` renews it along the new momentum, for trainers
            that call nothing but `step()`; `opt.follow(model)` as for RWP.

    Weight decay is taken at the clean weights, AdamW's before the step, as torch's (the authors' code decays perturbed
    weights under SGD, and behind AdamW's step).

    Group keys: `rho`.

    Raises:
        ValueError: rho negative or not finite. The optimizer refuses a base without momentum.
        TypeError: a value of another type.

    Source: Becker et al. 2024 (arXiv:2401.12033), algorithm 1; the authors' code (MarlonBecker/MSAM).
    """

    rho: float = 0.3
    rolling: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "rho")
        put(self, "rolling", check_flag("MomentumSAM", "rolling", self.rolling))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {"rho": self.rho, "ascent": "MomentumSAM"}
