"""Friendly-SAM: the ascent goes beside a mean of earlier gradients, which the same pass renews."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..methods import FriendlySAM
from ..tables import same_layout
from .amp import Amp
from .buckets import Bucket
from .cycle import Cycle, known_set
from .gradients import Final, Grads
from .groups import Group
from .sam import Numbers, UnscaledAscent
from .traffic import Sizes, Traffic

MEAN = {
    "sigma": lambda group: float(group["sigma"]),
    "momentum": lambda group: float(group["perturb_momentum"]),
}


class FriendlyAscent(UnscaledAscent):
    """SAM along d = a - sigma m; then m <- momentum m + (1 - momentum) a.

    New means are written beside the old ones, and take their place when the ascent has succeeded: an ascent that fails,
    or that no gradient follows, leaves m as it was.
    """

    state_key = "ascent_mean"

    def __init__(self, method: FriendlySAM) -> None:
        super().__init__(method)
        self.counts_steps = True
        self._others: dict[Tensor, Tensor] = {}  # scratch of the same kind as the means
        self._ascents = 0  # of the coming step
        self._renewed: dict[Tensor, None] = {}  # parameters whose mean this round has renewed
        self._first: set[Tensor] = set()  # those of them that had none before
        self._blank: dict[Tensor, tuple[Tensor, int]] = {}  # zeros that no gradient is in, and their versions

    def traffic_when_due(self, sizes: Sizes) -> Traffic:
        # The norm and the ascent read the mean, and the ascent writes the new one.
        return super().traffic_when_due(sizes).plus(3 * sizes.moment, scratch=sizes.moment, state=sizes.moment)

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        super().check_group(group, optimizer, capturable)
        if capturable:
            raise ValueError(
                f"{optimizer}: {self.name} keeps two means, which change places in every step, but capturable is True, "
                "and a CUDA graph knows one address; pass capturable=False"
            )

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        self._renewed, self._first = {}, set()
        flags = self.unscale(cycle, scaler)  # means are of unscaled gradients
        super().move(cycle, params, new, None)
        cycle.skip_if(flags)
        self._ascents += 1
        self._exchange(cycle)
        # The first mean is the first gradient, whatever the momentum.
        if self._first and cycle.nonfinite is not None and known_set([cycle.nonfinite]):
            self.forget_round(cycle)

    def means(self, cycle: Cycle, bucket: Bucket) -> tuple[list[Tensor] | None, list[Tensor] | None, Numbers]:
        means, created = cycle.state.like_params(bucket.params, self.state_key)
        numbers = bucket.columns("mean", MEAN)
        if self._blank:
            pairs = enumerate(zip(bucket.params, means, strict=True))
            created = {*created, *(k for k, (p, mean) in pairs if self._is_blank(p, mean))}
        if self._first:  # the calls are prepared anew, in another memory format
            created = {*created, *(k for k, p in enumerate(bucket.params) if p in self._first)}
        if created:
            self._first.update(bucket.params[k] for k in created)
            numbers = {**numbers, "momentum": [0.0 if k in created else m for k, m in enumerate(numbers["momentum"])]}
        self._renewed.update(dict.fromkeys(bucket.params))
        return means, [self._other(p, m) for p, m in zip(bucket.params, means, strict=True)], numbers

    def create_state(self, cycle: Cycle) -> None:
        super().create_state(cycle)
        for p in cycle.groups.params():
            for mean in cycle.state.existing(self.state_key, [p]):
                self._blank[p] = mean, dtensor.version(mean)

    def _is_blank(self, p: Tensor, mean: Tensor) -> bool:
        """No checkpoint has been loaded into it, either."""
        known, version = self._blank.get(p, (None, 0))
        return known is mean and version == dtensor.version(mean)

    def _other(self, p: Tensor, mean: Tensor) -> Tensor:
        """Where the new mean of `p` is written."""
        other = self._others.get(p)
        if other is None or other.dtype != mean.dtype or not same_layout(*dtensor.local_parts([other, mean])):
            with torch.inference_mode(False):
                other = torch.empty_like(mean, memory_format=torch.preserve_format, requires_grad=False)
            self._others[p] = other
        return other

    def _exchange(self, cycle: Cycle) -> None:
        for p in self._renewed:
            self._others[p] = cycle.state.replace(p, self.state_key, self._others[p])

    def forget_round(self, cycle: Cycle) -> None:
        """The means are what they were before this round's ascent."""
        self._exchange(cycle)
        for p in self._first:
            cycle.state.drop(p, self.state_key)
        cycle.state.keep_created()
        self._renewed, self._first = {}, set()
        self._ascents -= 1

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if not counted:
            self.drop_round(cycle)
        super().end_round(cycle, params, counted)

    def drop_round(self, cycle: Cycle) -> None:
        if self._renewed:
            self.forget_round(cycle)

    def count_step(self, cycle: Cycle, skipped: bool) -> None:
        if self._ascents == 1 and skipped:
            self.drop_round(cycle)
        self.forget()

    def forget(self) -> None:
        self._ascents, self._renewed, self._first = 0, {}, set()
        self._blank.clear()

    def release(self) -> None:
        self._others.clear()

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        final = super().final(cycle, params, grads, amp)
        if final is not None and final.at_perturbed_weights:
            self.check_unscaled(cycle, amp)
        return final
