"""RWP and ARWP: noise, and one gradient, taken there; noise that stays on between steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import RWP
from ..methods.rwp import SCALES
from ..values import check_choice, check_uint32
from .cycle import Cycle
from .draw import draw, draw_again
from .errors import refuse_unused_gradient
from .groups import Group
from .perturbation import NoPerturbation, StaysPerturbed
from .scalars import DRAWN, NOT_DRAWN, Read
from .traffic import Sizes, Traffic, perturb


class RandomPerturbation(NoPerturbation):
    """RWP and ARWP: Gaussian noise, and one gradient, taken there."""

    pattern = "opt.perturb(); loss.backward(); opt.step()"
    moves = True
    draws = True
    starts_perturbed = True
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
        check_choice(optimizer, "scale", group["scale"], SCALES)
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
            refuse_unused_gradient(self.name, self.pattern)

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        return perturb(sizes)

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


class RollingPerturbation(StaysPerturbed, RandomPerturbation):
    """RWP and ARWP whose noise stays on between steps; step() renews it."""

    launches = 1
    renews_inside = True

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        # The update writes the new weight twice, clean and perturbed; apart from it absolute noise is drawn.
        return perturb(sizes) if group["scale"] == "absolute" else Traffic(sizes.copy, sizes.copy)

    def launches_of(self, groups: list[Group]) -> int:
        return self.launches + any(group["scale"] == "absolute" for group in groups)

    def nothing_drawn(self, group: Group) -> Group:
        return {**{key: group[key] for key in ("sigma", *DRAWN)}, "round": NOT_DRAWN}

    def put_on(self, cycle: Cycle) -> None:
        draw_again(cycle)

    put_on_after_clean = put_on  # it was no step of this round, whose noise may have been drawn

    def check_next(self, cycle: Cycle) -> None:
        cycle.scalars.noise(ahead=1)

    def put_on_next(self, cycle: Cycle) -> None:
        cycle.scalars.next_round()
        draw(cycle)
        cycle.scalars.note_draw()
