"""What can be read of an optimizer at any time."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..methods import IRE, Method
from .cycle import Cycle
from .groups import Setup, checked_limit
from .ire import Mask
from .passes import Pair, checked_passes
from .perturbation import NoPerturbation
from .phase import Phase
from .tracing import untraced


class Known(torch.optim.Optimizer):
    """The parts of an optimizer, and what they know. Nothing here changes anything, but that two may be set: `passes`
    and `max_grad_norm`."""

    setup: Setup
    cycle: Cycle
    perturbation: NoPerturbation
    mask: Mask

    # The groups with our values under our names, and those names as keys. Wrap shares its groups with a base, and has
    # others; here both are found without a Python call, because every step asks several times.
    own_groups: Any = property(attrgetter("param_groups"))
    keys_of: Any = staticmethod(repeat)

    @property
    def method(self) -> Method | None:
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
        """The limit of the final gradient's norm. It may be set, and counts from the next step on; in a captured CUDA
        graph it stays as captured.

        Raises:
            ValueError: it is set to something else than a number > 0, or None.
        """
        return self.setup.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.setup.max_grad_norm = checked_limit(self.setup.name, value)

    @property
    def rolling(self) -> bool:
        return self.perturbation.rolling

    @property
    def is_perturbed(self) -> bool:
        """True while the parameters hold perturbed weights."""
        return self.cycle.phase is Phase.PERTURBED

    @property
    @untraced
    def perturb_due(self) -> bool:
        """True if perturb() belongs to the coming step.

        Always, but for methods with an interval, whose steps in between are made by step() alone. A step that is due
        may be made without it, and is then one of the base optimizer.

        Raises:
            ValueError: groups differ in `perturb_interval`.
        """
        return self.perturbation.is_due(self.own_groups)

    @property
    def ascent_norm(self) -> Tensor | None:
        """SAM/ASAM: norm of the last ascent gradient (scaled by T_w for ASAM); 0-dim float32 on the device."""
        return self.cycle.ascent_norm

    @property
    def grad_norm(self) -> Tensor | None:
        """With `max_grad_norm`: norm of the last final gradient before clipping; 0-dim float32 on the device."""
        return self.cycle.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing, because an ascent, or a gradient under a GradScaler, was not finite.

        A new 0-dim int64 tensor on the device, where it is counted: the host does not wait. It starts at 0 with the
        optimizer and is not in checkpoints.
        """
        known = self.cycle.skipped_steps
        if known is not None:
            return known.clone()
        return torch.zeros((), dtype=torch.int64, device=self.cycle.groups.params()[0].device)

    @property
    @untraced
    def loss_weight(self) -> float:
        """What the next loss is to be multiplied by, where that mixes the gradients; 1.0 elsewhere.

        mix="losses": 1 - lam at clean weights, lam at perturbed ones. mix="ranks", of W ranks: W lam / noisy on noisy
        ranks, W (1 - lam) / clean on clean ones, at any time.
        """
        return self.perturbation.loss_weight(self.own_groups, self.is_perturbed)

    @property
    def passes(self) -> Pair | None:
        """m-RWP with rounds="sum": (n1, n2), the numbers of clean and of noisy passes of the coming step.

        Backward passes are counted. Where they cannot be, the step is refused unless these are set before it: sharded
        parameters, reentrant checkpointing, gradients that are assigned or written between two passes, models of which
        no parameter is in every pass. Set them also where a pass is several backwards. What is set counts for the
        coming step, and is forgotten afterwards. None: nothing is set.

        Raises:
            RuntimeError: the method does not count passes.
            TypeError, ValueError: it is set to something else than two integers >= 1, or None.
        """
        return self.cycle.passes.given

    @passes.setter
    def passes(self, value: Pair | None) -> None:
        if not self.perturbation.counts:
            raise RuntimeError(
                'passes: only m-RWP with rounds="sum" weighs by the numbers of passes; pass '
                'perturb=flatkern.RWP(lam=..., rounds="sum")'
            )
        self.cycle.passes.given = checked_passes(value)
