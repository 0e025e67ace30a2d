"""The state machine: which call may come when. Every part that changes between calls hangs here.

Parts are made once and never replaced: wrappers such as Lightning's run the optimizer's methods on a proxy with another
`__dict__`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .amp import Unscaled
from .buckets import Partitions
from .errors import refuse_while_pending, refuse_while_perturbed, refuse_while_suspended
from .gradients import Ledger
from .groups import Groups
from .phase import BETWEEN_STEPS, SUSPENDED, TRANSITIONS, Phase
from .scalars import OnHost
from .state import State
from .weights import Weights


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
        self.before_ascent: tuple[Tensor | None] | None = None  # `nonfinite` before the last ascent
        self.ascent_norm: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.steps = 0
        self.warned_rounded_away = False
        self.warned_unnamed = False

    @property
    def phase(self) -> Phase:
        """What is in the parameters."""
        return self.weights.phase

    def require(self, call: str) -> Phase:
        """Refuse `call` in a phase, or between gradients, that it may not meet; returns the phase."""
        if self.weights.unfinished:
            self.weights.restore()
        phase = self.weights.phase
        if phase not in TRANSITIONS["rolling step" if self.rolling and call == "step" else call]:
            if phase is SUSPENDED:
                refuse_while_suspended(call)
            if call == "perturb":
                raise RuntimeError("perturb: already perturbed; call step() or restore() first")
            refuse_while_perturbed(call, "eval()" if self.rolling else "restore()")
        if call in BETWEEN_STEPS and self.gradients.is_pending:
            refuse_while_pending(call)
        return phase

    def undo(self) -> None:
        """A call from clean weights has failed: clean weights, and none of the state that it has created."""
        self.weights.restore()
        self.state.undo_created()

    def skip_if(self, flags: list[Tensor]) -> None:
        """Skip the coming step where one of `flags` (0-dim float32) is nonzero."""
        for flag in flags:
            known = self.nonfinite
            self.nonfinite = flag if known is None else torch.maximum(known, flag.to(known.device))

    def drop_ascent(self) -> None:
        """A round has no gradient, so whether its ascent was finite does not matter."""
        if self.before_ascent is not None:
            (self.nonfinite,) = self.before_ascent

    def drop_pending(self) -> None:
        """Forget the gradients of an unfinished step."""
        self.nonfinite = self.before_ascent = None
        self.unscaled.forget()
        self.gradients.drop()
