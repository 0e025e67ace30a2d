"""RWP, SAM and its kin, IRE: frozen descriptions of a method, each with its equation. No tensors here.

Any value may be overridden per parameter group under the same key, and changed at any step.
"""

from .ire import IRE
from .momentum import MomentumSAM
from .rwp import RWP
from .sam import ASAM, GSAM, SAM, FriendlySAM, LookSAM

Method = RWP | SAM | GSAM | FriendlySAM | LookSAM | MomentumSAM

__all__ = ["ASAM", "GSAM", "IRE", "RWP", "SAM", "FriendlySAM", "LookSAM", "Method", "MomentumSAM"]
