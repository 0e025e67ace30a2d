"""Momentum-SAM: the perturbation goes against the base optimizer's momentum, so that a step has one gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods import MomentumSAM
from .buckets import Partition
from .cycle import Cycle
from .errors import refuse_unused_gradient
from .groups import Group
from .perturbation import NoPerturbation, StaysPerturbed
from .sam import Climb, climb_calls, warn_if_rounded_away
from .scalars import LAST_DRAW
from .state import OWN_KEYS
from .traffic import Sizes, Traffic, perturb

OWN = {*OWN_KEYS, "master"}  # which tell nothing of the base
MOMENTA = ("momentum_buffer", "exp_avg")  # as torch's optimizers call them
CLIMB = {"rho": lambda group: -float(group["rho"]), "eta": lambda group: -1.0}
CLIMBED = ("rho", "perturb")  # what a rolling climb was made with
Read = Callable[[Group], Group]


def momentum_in(entry: dict[str, Any] | None) -> Tensor | None:
    """Of a base optimizer's state of one parameter."""
    return next((entry[key] for key in MOMENTA if entry.get(key) is not None), None) if entry else None


def present(group: Group) -> Group:
    return group


def last_climb(group: Group) -> Group:
    """Rolling: the values of the climb that is on, or was before an evaluation; a schedule may have moved them."""
    return group.get(LAST_DRAW, group)  # type: ignore[no-any-return]


class MomentumPerturbation(NoPerturbation):
    """w - rho v / ||v||, v the base's momentum, zero where it has none yet."""

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
        self.check_step(cycle)

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        self.climb(cycle, present)
        if new:
            cycle.gradients.mark_zeroed(params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)

    def _momenta(self, cycle: Cycle, params: list[Tensor]) -> list[Tensor]:
        """The momentum of each parameter; zeros where there is none."""
        state, found = cycle.groups.state(), []
        for p in params:
            momentum = momentum_in(state.get(p))
            dtype = torch.float32 if cycle.groups.setup.has_master(p) else p.dtype
            found.append(torch.zeros_like(p, dtype=dtype, requires_grad=False) if momentum is None else momentum)
        return found

    def check_step(self, cycle: Cycle) -> None:
        """
        Raises:
            RuntimeError: the base has made a step, and keeps no momentum.
        """
        state = cycle.groups.state()
        for k, p in enumerate(self.perturbed_partition(cycle, present).params):
            entry = state.get(p) or {}
            if entry.keys() - OWN and momentum_in(entry) is None:
                raise RuntimeError(
                    f"{self.name} goes along the base's momentum, but the state of perturbed parameter {k} has neither "
                    f"{' nor '.join(MOMENTA)} ({', '.join(sorted(map(str, entry.keys() - OWN)))}); use another base"
                )

    def perturbed_partition(self, cycle: Cycle, read: Read) -> Partition:
        groups = cycle.groups.listed()
        on = [group for group in groups if read(group)["perturb"]]
        return cycle.partitions.of([p for group in on for p in group["params"] if p.requires_grad])

    def climb(self, cycle: Cycle, read: Read) -> None:
        """CLEAN -> PERTURBED; or anew, from copies that are ahead."""
        partition = self.perturbed_partition(cycle, read)
        reads = {key: (lambda group, number=number: number(read(group))) for key, number in CLIMB.items()}
        name = "climb" if read is present else "last climb"
        calls = cycle.weights.perturb(
            partition,
            lambda stores, _: climb_calls(
                partition, stores, lambda b: Climb(self._momenta(cycle, b.params), b.columns(name, reads))
            ),
        )
        if calls:
            cycle.ascent_norm = calls[0].args[-1]
        if not cycle.warned_rounded_away:
            state = cycle.groups.state()
            if any(momentum_in(state.get(p)) is not None for p in partition.params):  # else it is zero, and so is e
                warn_if_rounded_away(cycle, self.name)


class RollingMomentum(StaysPerturbed, MomentumPerturbation):
    """The perturbation stays on between steps; step() renews it along the new momentum."""

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        extra = super().traffic(group, sizes)
        # float32 copies are updated in place, and not written a second time.
        return extra.plus(-sizes.copy) if sizes.copy == sizes.weight == 4 else extra

    def nothing_drawn(self, group: Group) -> Group:
        return {key: group[key] for key in CLIMBED}  # there is no momentum, whatever they are

    def put_on(self, cycle: Cycle) -> None:
        self.check_step(cycle)
        self._climb_and_note(cycle, last_climb)

    def put_on_next(self, cycle: Cycle) -> None:
        self._climb_and_note(cycle, present)

    put_on_after_clean = put_on_next

    def _climb_and_note(self, cycle: Cycle, read: Read) -> None:
        self.climb(cycle, read)
        for group in cycle.groups:
            group[LAST_DRAW] = {key: read(group)[key] for key in CLIMBED}

    def climbs_from_copies(self, cycle: Cycle) -> bool:
        """Not where a group or a parameter was switched, nor from copies in half precision."""
        partition = cycle.weights.partition
        if partition is None or any(b.has_master or {*b.dtypes} != {torch.float32} for b in partition.buckets):
            return False
        return self.perturbed_partition(cycle, present) is partition
