"""The class behind a method: the only place that asks which method it is. Everything else asks the class."""

from __future__ import annotations

from ..methods import GSAM, RWP, SAM, FriendlySAM, LookSAM, Method, MomentumSAM
from .friendly_sam import FriendlyAscent
from .gsam import SurrogateGapAscent
from .looksam import ReusedAscent
from .mixed_sam import MixedAscent
from .momentum_sam import MomentumPerturbation, RollingMomentum
from .mrwp import MixedLosses, MixedPerturbation, MixedSums
from .perturbation import NoPerturbation
from .ranks import ParallelPerturbation
from .rwp import RandomPerturbation, RollingPerturbation
from .sam import AscentPerturbation


def perturbation_of(method: Method | None, where: str = "perturbation_of") -> NoPerturbation:
    """The class behind a method.

    Raises:
        TypeError: it is none of ours.
    """
    if method is None:
        return NoPerturbation()
    if isinstance(method, SAM):
        return AscentPerturbation(method) if method.lam is None else MixedAscent(method)
    if isinstance(method, GSAM):
        return SurrogateGapAscent(method)
    if isinstance(method, FriendlySAM):
        return FriendlyAscent(method)
    if isinstance(method, LookSAM):
        return ReusedAscent(method)
    if isinstance(method, MomentumSAM):
        return (RollingMomentum if method.rolling else MomentumPerturbation)(method)
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
    raise TypeError(
        f"{where}: perturb is {method!r}, but should be flatkern.RWP(), SAM(), ASAM(), GSAM(), FriendlySAM(), "
        "LookSAM() or MomentumSAM(), or None"
    )
