"""Bytes per parameter that a method moves and keeps beside its base: floors that `flatkern.cost` adds up."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Bytes of an element."""

    weight: int  # of the clean weight, wherever it is
    item: int  # of the parameter and of its gradient
    moment: int  # of a momentum, and of what methods keep like one
    copy: int  # of the copy of the clean weight; 0 where a master is it
    is_adaptive: bool  # the ascent is scaled by the weight


class Traffic(NamedTuple):
    """Bytes per element that come to those of the base's step: read and written, kept as scratch, kept and saved."""

    moved: float = 0
    scratch: int = 0
    state: int = 0

    def plus(self, moved: float = 0, scratch: int = 0, state: int = 0) -> Traffic:
        return Traffic(self.moved + moved, self.scratch + scratch, self.state + state)

    def every(self, k: int) -> Traffic:
        """The mean over k steps, of which one moves this."""
        return Traffic(self.moved / k, self.scratch, self.state)


def perturb(sizes: Sizes) -> Traffic:
    """perturb() reads the weight and writes it perturbed, and its copy, from which the update restores it."""
    return Traffic(sizes.weight + sizes.item + sizes.copy, sizes.copy)


def ascend(sizes: Sizes) -> Traffic:
    """The same, along a gradient, which the norm reads, too."""
    return perturb(sizes).plus(2 * sizes.item + (sizes.weight if sizes.is_adaptive else 0))
