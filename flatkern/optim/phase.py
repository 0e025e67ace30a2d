"""What is in the parameters, and which call may come when: the state machine as data."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """What is in the parameters."""

    CLEAN = "clean weights"
    PERTURBED = "perturbed weights"
    SUSPENDED = "clean weights inside clean(); a perturbation waits, if there was one"


CLEAN, PERTURBED, SUSPENDED = Phase
# Call: the phase that it leads to from each; from the others it is refused.
TRANSITIONS: dict[str, dict[Phase, Phase]] = {
    "perturb": {CLEAN: PERTURBED},
    "restore": {CLEAN: CLEAN, PERTURBED: CLEAN},
    "step": {CLEAN: CLEAN, PERTURBED: CLEAN},
    "rolling step": {CLEAN: PERTURBED, PERTURBED: PERTURBED},
    "train": {CLEAN: PERTURBED, PERTURBED: PERTURBED, SUSPENDED: SUSPENDED},
    "eval": {CLEAN: CLEAN, PERTURBED: CLEAN, SUSPENDED: SUSPENDED},
    "clean": {CLEAN: SUSPENDED, PERTURBED: SUSPENDED, SUSPENDED: SUSPENDED},
    "release": {CLEAN: CLEAN},
    "update_mask": {CLEAN: CLEAN, SUSPENDED: SUSPENDED},
    "add_param_group": {CLEAN: CLEAN},
    "refresh_masters": {CLEAN: CLEAN, SUSPENDED: SUSPENDED},
    "state_dict": {CLEAN: CLEAN, SUSPENDED: SUSPENDED},
    "pickle or deepcopy": {CLEAN: CLEAN, SUSPENDED: SUSPENDED},
    "load_state_dict": {CLEAN: CLEAN, PERTURBED: CLEAN},
}
# Calls that are refused while gradients of an unfinished step wait, too.
BETWEEN_STEPS = frozenset(("update_mask", "add_param_group", "state_dict", "pickle or deepcopy"))
