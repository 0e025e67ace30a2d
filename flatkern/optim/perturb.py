"""The class behind a method: the only place that asks which method it is. Everything else asks the class."""

from __future__ import annotations

from ..methods import RWP, SAM
from .mrwp import MixedLosses, MixedPerturbation, MixedSums
from .perturbation import NoPerturbation
from .ranks import ParallelPerturbation
from .rwp import RandomPerturbation, RollingPerturbation
from .sam import AscentPerturbation


def perturbation_of(method: RWP | SAM | None, where: str = "perturbation_of") -> NoPerturbation:
    """The class behind a method.

    Raises:
        TypeError: it is none of ours.
    """
    if method is None:
        return NoPerturbation()
    if isinstance(method, SAM):
        return AscentPerturbation(method)
    if isinstance(method, RWP):
        if method.rolling:
            return RollingPerturbation(method)
        if method.lam is None:
            return RandomPerturbation(method)
        if method.mix == "ranks":
            return ParallelPerturbation(method, where)
        if method.rounds == "sum":
            return MixedSums(method)
        return (MixedLosses if method.mix == "losses" else MixedPerturbation)(method)
    raise TypeError(f"{where}: perturb is {method!r}, but should be flatkern.RWP, SAM or ASAM, or None")
