"""Momentum-SAM: the perturbation goes against the base optimizer's momentum, so that a step has one gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods import MomentumSAM
from .buckets import Call, CleanStore
from .cycle import Cycle
from .errors import refuse_unused_gradient
from .gradients import Final
from .groups import Group
from .perturbation import NoPerturbation, StaysPerturbed
from .sam import Climb, climb_calls, warn_if_rounded_away
from .scalars import LAST_DRAW
from .traffic import Sizes, Traffic, perturb

MOMENTA = ("momentum_buffer", "exp_avg")  # as torch's optimizers call them
CLIMB = {"rho": lambda group: -float(group["rho"]), "eta": lambda group: -1.0}
Read = Callable[[Group], Group]


def present(group: Group) -> Group:
    return group


def last_climb(group: Group) -> Group:
    """Rolling: the values of the climb that is on, or was before an evaluation; a schedule may have moved them."""
    return group.get(LAST_DRAW, group)  # type: ignore[no-any-return]


class MomentumPerturbation(NoPerturbation):
    """w - rho v / ||v||, v the base's momentum; nothing moves before the base's first step."""

    pattern = "opt.perturb(); loss.backward(); opt.step()"
    moves = True
    starts_perturbed = True
    ops = ("ascent_norm_", "perturb_ascent_")
    refuses_perturb = ""
    accumulates = False
    launches = 3

    def __init__(self, method: MomentumSAM) -> None:
        self.name = type(method).__name__

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        if group["perturb"] and group.get("betas") is None and not group.get("momentum"):
            raise ValueError(
                f"{optimizer}: {self.name} goes along the base's momentum, but a group has momentum "
                f"{group.get('momentum')!r} and no betas; give it momentum > 0, take Adam or AdamW, or perturb=False"
            )

    def is_described_by(self, saved: Group, group: Group) -> bool:
        return "rho" in saved and saved.get("ascent") == group["ascent"]

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        return perturb(sizes).plus(2 * sizes.moment)

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        if new and not cycle.gradients.holds_zeros_only(params):
            refuse_unused_gradient(self.name, self.pattern)
        self._momenta(cycle, params)

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        self.climb(cycle, present)
        if new:
            cycle.gradients.mark_zeroed(params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)

    def _momenta(self, cycle: Cycle, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """The momentum of each parameter that has one.

        Raises:
            RuntimeError: the base has made a step, and keeps none.
        """
        state, found = cycle.groups.state(), {}
        for k, p in enumerate(params):
            entry = state.get(p) or {}
            key = next((key for key in MOMENTA if entry.get(key) is not None), None)
            if key is not None:
                found[p] = entry[key]
            elif "step" in entry:
                raise RuntimeError(
                    f"perturb: {self.name} goes along the base's momentum, but the state of params[{k}] has neither "
                    f"{' nor '.join(MOMENTA)}; use another base"
                )
        return found

    def _wanted(self, cycle: Cycle, read: Read) -> list[Tensor]:
        groups = cycle.groups.listed()
        return [p for group in groups if read(group)["perturb"] for p in group["params"] if p.requires_grad]

    def climb(self, cycle: Cycle, read: Read) -> None:
        """CLEAN -> PERTURBED."""
        on = self._wanted(cycle, read)
        momenta = self._momenta(cycle, on)
        partition = cycle.partitions.of([p for p in on if p in momenta])

        def prepare(stores: list[CleanStore], again: bool) -> list[Call]:
            along = momenta if not again else self._momenta(cycle, on)  # which have followed a memory format

            reads = {key: (lambda group, number=number: number(read(group))) for key, number in CLIMB.items()}
            name = "climb" if read is present else "last climb"
            return climb_calls(partition, stores, lambda b: Climb([along[p] for p in b.params], b.columns(name, reads)))

        calls = cycle.weights.perturb(partition, prepare)
        if calls:
            cycle.ascent_norm = calls[0].args[-1]
        if not cycle.warned_rounded_away:
            warn_if_rounded_away(cycle, self.name)


class RollingMomentum(StaysPerturbed, MomentumPerturbation):
    """The perturbation stays on between steps; step() renews it along the new momentum."""

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        # Float32 weights are climbed from their copies, which the step has updated in place.
        is_written_once = sizes.copy == sizes.item == 4
        return super().traffic(group, sizes).plus(-sizes.copy if is_written_once else 0)

    def put_on(self, cycle: Cycle) -> None:
        self._climb_and_note(cycle, last_climb)

    def put_on_next(self, cycle: Cycle) -> None:
        self._climb_and_note(cycle, present)

    put_on_after_clean = put_on_next

    def climbs_from_copies(self, cycle: Cycle, params: list[Tensor], final: Final) -> bool:
        """Not where a parameter's first momentum adds it to what is perturbed, nor from copies in half precision."""
        partition = cycle.weights.partition
        if partition is None or any(b.has_master or {*b.dtypes} != {torch.float32} for b in partition.buckets):
            return False
        reached = {p for k, p in enumerate(params) if final.has(k)}
        coming = [p for p in self._wanted(cycle, present) if p in reached or id(p) in partition.members]
        return cycle.partitions.of(coming) is partition

    def _climb_and_note(self, cycle: Cycle, read: Read) -> None:
        self.climb(cycle, read)
        for group in cycle.groups:
            group[LAST_DRAW] = {key: read(group)[key] for key in ("rho", "perturb")}
