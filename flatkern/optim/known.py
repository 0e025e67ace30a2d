"""What can be read of an optimizer at any time."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..methods import IRE, RWP, SAM
from .cycle import Cycle
from .groups import Setup
from .ire import Mask
from .perturbation import NoPerturbation
from .phase import Phase


class Known(torch.optim.Optimizer):
    """The parts of an optimizer, and what they know. Nothing here changes anything."""

    setup: Setup
    cycle: Cycle
    perturbation: NoPerturbation
    mask: Mask

    # The groups with our values under our names, and those names as keys. Wrap shares its groups with a base, and has
    # others; here both are found without a Python call, because every step asks several times.
    own_groups: Any = property(attrgetter("param_groups"))
    keys_of: Any = staticmethod(repeat)

    @property
    def method(self) -> RWP | SAM | None:
        return self.setup.method

    @property
    def enhancement(self) -> IRE | None:
        return self.setup.enhancement

    @property
    def backend(self) -> str | None:
        return self.setup.backend

    @property
    def capturable(self) -> bool:
        return self.setup.capturable

    @property
    def master_weights(self) -> bool:
        return self.setup.master_weights

    @property
    def max_grad_norm(self) -> float | None:
        return self.setup.max_grad_norm

    @property
    def rolling(self) -> bool:
        return self.perturbation.rolling

    @property
    def is_perturbed(self) -> bool:
        """True while the parameters hold perturbed weights."""
        return self.cycle.phase is Phase.PERTURBED

    @property
    def ascent_norm(self) -> Tensor | None:
        """SAM/ASAM: norm of the last ascent gradient (scaled by T_w for ASAM); 0-dim float32 on the device."""
        return self.cycle.ascent_norm

    @property
    def grad_norm(self) -> Tensor | None:
        """With `max_grad_norm`: norm of the last final gradient before clipping; 0-dim float32 on the device."""
        return self.cycle.grad_norm

    @property
    def loss_weight(self) -> float:
        """mix="losses": what the next loss is to be multiplied by, 1 - lam at clean weights, lam at perturbed ones."""
        return self.perturbation.loss_weight(self.own_groups, self.is_perturbed)
