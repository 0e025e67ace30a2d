"""RWP and ARWP: noise, and one gradient, taken there; noise that stays on between steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import RWP
from ..values import check_uint32
from .amp import Amp
from .cycle import Cycle
from .draw import draw
from .gradients import Final, Grads
from .groups import Group
from .perturbation import NoPerturbation
from .scalars import Read


class RandomPerturbation(NoPerturbation):
    """RWP and ARWP: Gaussian noise, and one gradient, taken there."""

    pattern = "opt.perturb(); loss.backward(); opt.step()"
    moves = True
    draws = True
    ops = ("perturb_gaussian_", "filter_norms_")
    refuses_perturb = ""
    accumulates = False
    launches = 2
    read: Read = None  # a group's values for the draw

    def __init__(self, method: RWP) -> None:
        self.name = type(method).__name__
        self.lam = method.lam
        self.sums = method.rounds == "sum"

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        if (group["lam"] is None) != (self.lam is None):
            raise ValueError(
                f"{optimizer}: a group has lam={group['lam']!r} and the method lam={self.lam!r}; "
                "lam may not mix None and a number"
            )
        for key in ("seed", "stream", "round"):
            if not (capturable and isinstance(group[key], Tensor)):
                check_uint32(optimizer, key, group[key])

    def is_described_by(self, saved: Group, group: Group) -> bool:
        return (
            {"sigma", "lam", "eta"} <= set(saved)
            and (saved["lam"] is None) == (group["lam"] is None)
            and (saved["eta"] > 0) == (group["eta"] > 0)
        )

    def keeps_history(self, group: Group) -> bool:
        return bool(group["eta"] > 0 and group["perturb"])

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        if new and not cycle.gradients.holds_zeros_only(params):
            raise RuntimeError(
                "perturb: there is a gradient in .grad that no step has used, and RWP has one gradient, taken at the "
                "perturbed weights, so it would be lost; call opt.zero_grad() if it is not wanted. "
                f"The pattern is: {self.pattern}"
            )

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        draw(cycle, self.read)
        cycle.unscaled.scaler = scaler
        if new:
            self.keep_clean_gradient(cycle, params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)
        cycle.scalars.next_round()

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        """Keep the gradient at the clean weights, which came first. Here there is none, but for zeros."""
        cycle.gradients.mark_zeroed(params)


class RollingPerturbation(RandomPerturbation):
    """RWP and ARWP whose noise stays on between steps; step() renews it."""

    pattern = "opt.train(); loss.backward(); opt.step(); or opt.follow(model) once"
    rolling = True
    refuses_perturb = "perturb: the optimizer is rolling and perturbs in step(); use train(), eval() or follow(model)"
    accumulates = True
    launches = 1

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        """There are no rounds."""

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        """There are no rounds."""

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final:
        return Final(grads, at_perturbed_weights=cycle.weights.partition is not None)
