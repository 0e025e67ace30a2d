"""Fused kernels and optimizers for training methods that look for flat minima."""

from . import library, schedules
from .compilation import warm_up
from .cost import Cost, cost
from .dispatch import backends
from .functional import filter_norms, perturb_, restore_
from .losses import sampled_label_loss
from .methods import ASAM, GSAM, IRE, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM
from .optim.adam import Adam, AdamW
from .optim.sgd import SGD
from .optim.wrap import Wrap
from .running_stats import frozen_running_stats

__version__ = "0.1.0"
__all__ = [
    "ASAM",
    "GSAM",
    "IRE",
    "RWP",
    "SAM",
    "SGD",
    "Adam",
    "AdamW",
    "Cost",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "Wrap",
    "backends",
    "cost",
    "filter_norms",
    "frozen_running_stats",
    "perturb_",
    "restore_",
    "sampled_label_loss",
    "schedules",
    "warm_up",
]

library.register()
