"""Schedules of the perturbation's strength, for `group["sigma"]` or `group["rho"]`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .values import check_value, is_number


def cosine_increase(start: float, increase: float, total_steps: int) -> Callable[[int], float]:
    """The papers' cosine increase of sigma.

        sigma(t) = start (1 + increase (1 - cos(pi t / T)) / 2),    sigma(0) = start, sigma(T) = start (1 + increase)

    Arguments:
        start: value at t = 0, >= 0.
        increase: relative growth until T, >= -1; the released recipe has start 0.001, increase 10.
        total_steps: T > 0, in optimizer steps. Later t stay at the final value.

    Returns:
        A function of the step number t.

    Raises:
        ValueError: a value out of range.

    Source: Li et al. 2024 (arXiv:2404.00357); Bisla et al. 2022 (LPF-SGD).
    """
    numbers = all(map(is_number, (start, increase, total_steps)))
    if not (numbers and 0 <= start < math.inf and -1 <= increase < math.inf and 0 < total_steps < math.inf):
        raise ValueError(
            f"cosine_increase: start {start!r}, increase {increase!r}, total_steps {total_steps!r}, "
            "but should be start >= 0, increase >= -1, total_steps > 0"
        )

    def value(t: int) -> float:
        progress = min(max(t / total_steps, 0.0), 1.0)
        return start * (1.0 + increase * (1.0 - math.cos(math.pi * progress)) / 2.0)

    return value


class PerturbationScheduler:
    """Sets a group key such as "sigma" or "rho" from a function of the step number; in place where it is a tensor.

        scheduler = PerturbationScheduler(opt, "sigma", cosine_increase(0.001, 10, total_steps))
        ...; opt.step(); scheduler.step()

    Arguments:
        optimizer: one of flatkern's.
        key: the group key to set in every group.
        schedule: step number -> value.

    Raises:
        ValueError: a group has no such key; a value out of range for a tensor, which nobody checks later.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, key: str, schedule: Callable[[int], float]) -> None:
        for k, group in enumerate(optimizer.param_groups):
            if key not in group:
                raise ValueError(
                    f"PerturbationScheduler: group {k} has no {key!r}; the optimizer's method does not use it"
                )
        self.optimizer, self.key, self.schedule = optimizer, key, schedule
        self.last_step = 0
        self._set()

    def _set(self) -> None:
        value = self.schedule(self.last_step)
        for group in self.optimizer.param_groups:
            if isinstance(group[self.key], torch.Tensor):
                check_value(self.key, value, "PerturbationScheduler")
                group[self.key].fill_(value)  # in place, where a captured graph reads it
            else:
                group[self.key] = value

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_step = state["last_step"]
        self._set()
