"""The state machine: which call may come when. Every part that changes between calls hangs here.

Parts are made once and never replaced: wrappers such as Lightning's run the optimizer's methods on a proxy with another
`__dict__`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

from .amp import Unscaled
from .buckets import Partitions
from .errors import refuse_while_pending, refuse_while_perturbed, refuse_while_suspended
from .gradients import Ledger
from .groups import Groups
from .scalars import OnHost
from .state import State
from .weights import Weights


class Phase(Enum):
    """What is in the parameters."""

    CLEAN = "clean weights"
    PERTURBED = "perturbed weights"
    SUSPENDED = "clean weights inside clean(), and a perturbation that waits"


CLEAN, PERTURBED, SUSPENDED = Phase
# Call: the phase that it leads to from each; from the others it is refused.
TRANSITIONS: dict[str, dict[Phase, Phase]] = {
    "perturb": {CLEAN: PERTURBED},
    "restore": {CLEAN: CLEAN, PERTURBED: CLEAN},
    "step": {CLEAN: CLEAN, PERTURBED: CLEAN},
    "rolling step": {CLEAN: PERTURBED, PERTURBED: PERTURBED},
    "train": {CLEAN: PERTURBED, PERTURBED: PERTURBED, SUSPENDED: SUSPENDED},
    "eval": {CLEAN: CLEAN, PERTURBED: CLEAN},
    "clean": {CLEAN: CLEAN, PERTURBED: SUSPENDED, SUSPENDED: SUSPENDED},
    "release": {CLEAN: CLEAN},
    "update_mask": {CLEAN: CLEAN},
    "add_param_group": {CLEAN: CLEAN},
    "state_dict": {CLEAN: CLEAN},
    "pickle or deepcopy": {CLEAN: CLEAN},
    "load_state_dict": {CLEAN: CLEAN, PERTURBED: CLEAN, SUSPENDED: CLEAN},
}
# Calls that are refused while gradients of an unfinished step wait, too.
BETWEEN_STEPS = frozenset(("update_mask", "add_param_group", "state_dict", "pickle or deepcopy"))


class Cycle:
    """What one optimizer remembers between calls.

    | call               | CLEAN                       | PERTURBED                 | SUSPENDED |
    | ------------------ | --------------------------- | ------------------------- | --------- |
    | perturb()          | -> PERTURBED                | refused                   | refused   |
    | restore(), eval()  | nothing                     | -> CLEAN, counts a round  | refused   |
    | step()             | update                      | -> CLEAN, update          | refused   |
    | step(), rolling    | update, -> PERTURBED        | update, new noise         | refused   |
    | train(), rolling   | -> PERTURBED                | nothing                   | nothing   |
    | clean()            | nothing                     | -> SUSPENDED, and back    | nothing   |
    | state_dict() and others | between steps          | refused                   | refused   |

    `TRANSITIONS` is the same as data.
    """

    def __init__(self, groups: Groups, scalars: OnHost, rolling: bool, deferred_state: bool) -> None:
        self.rolling = rolling
        self.groups = groups
        self.scalars = scalars
        self.gradients = Ledger()
        self.partitions = Partitions(groups)
        self.state = State(groups, deferred_state)
        self.weights = Weights(self.state)
        self.unscaled = Unscaled()
        self.nonfinite: Tensor | None = None  # nonzero: a gradient that the coming step depends on was not finite
        self.ascent_norm: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.steps = 0
        self.warned_rounded_away = False

    @property
    def phase(self) -> Phase:
        weights = self.weights
        return CLEAN if weights.partition is None else SUSPENDED if weights.suspended else PERTURBED

    def require(self, call: str) -> Phase:
        """Refuse `call` in a phase, or between gradients, that it may not meet; returns the phase."""
        phase = self.phase
        if phase not in TRANSITIONS["rolling step" if self.rolling and call == "step" else call]:
            if phase is SUSPENDED:
                refuse_while_suspended(call)
            if call == "perturb":
                raise RuntimeError("perturb: already perturbed; call step() or restore() first")
            refuse_while_perturbed(call, "eval()" if self.rolling else "restore()")
        if call in BETWEEN_STEPS and self.gradients.is_pending:
            refuse_while_pending(call)
        return phase

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """A call from clean weights that fails leaves clean weights, and no state that it has created."""
        try:
            yield
        except BaseException:
            if self.weights.partition is not None:
                self.weights.restore()
            self.state.undo_created()
            raise
        self.state.keep_created()

    def skip_if(self, flags: list[Tensor]) -> None:
        """Skip the coming step where one of `flags` (0-dim float32) is nonzero."""
        for flag in flags:
            known = self.nonfinite
            self.nonfinite = flag if known is None else torch.maximum(known, flag.to(known.device))

    def drop_pending(self) -> None:
        """Forget the gradients of an unfinished step."""
        self.gradients.drop()
        self.nonfinite = None
        self.unscaled.forget()
