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
from .followers import Followers
from .gradients import Ledger
from .groups import Groups
from .overflow import OverflowOnRank
from .passes import Passes
from .phase import BETWEEN_STEPS, SUSPENDED, TRANSITIONS, Phase
from .scalars import OnHost
from .state import State
from .weights import Weights


class Cycle:
    """What one optimizer remembers between calls.

    | call               | CLEAN                       | PERTURBED                 | SUSPENDED |
    | ------------------ | --------------------------- | ------------------------- | --------- |
    | perturb()          | -> PERTURBED                | refused                   | refused   |
    | restore()          | nothing                     | -> CLEAN, counts a round  | refused   |
    | step()             | update                      | -> CLEAN, update          | refused   |
    | step(), rolling    | update, -> PERTURBED        | update, new noise         | refused   |
    | train(), rolling   | -> PERTURBED                | nothing                   | nothing   |
    | eval(), rolling    | nothing                     | -> CLEAN                  | nothing   |
    | clean()            | -> SUSPENDED, and back      | -> SUSPENDED, and back    | nothing   |
    | state_dict(), pickle | between steps             | refused                   | between steps |
    | load_state_dict()  | loads                       | -> CLEAN, loads           | refused   |
    | add_param_group()  | between steps               | refused                   | refused   |
    | update_mask()      | between steps               | refused                   | between steps |

    `TRANSITIONS` is the same as data.
    """

    def __init__(self, groups: Groups, scalars: OnHost, rolling: bool, deferred_state: bool) -> None:
        self.rolling = rolling
        self.groups = groups
        self.scalars = scalars
        self.gradients = Ledger()
        self.passes = Passes(self.gradients.fired)
        self.partitions = Partitions(groups)
        self.state = State(groups, deferred_state)
        self.weights = Weights(self.state, groups.setup)
        self.unscaled = Unscaled()
        self.overflow = OverflowOnRank(self.weights)
        self.followers = Followers(groups)
        self.nonfinite: Tensor | None = None  # nonzero: a gradient that the coming step depends on was not finite
        self.before_ascent: tuple[Tensor | None] | None = None  # `nonfinite` before the last ascent
        self.ascent_norm: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor | None = None  # 0-dim int64; None: no step could have been skipped
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
        self.weights.put_back()
        self.state.undo_created()

    def skip_if(self, flags: list[Tensor]) -> None:
        """Skip the coming step where one of `flags` (0-dim float32) is nonzero."""
        for flag in flags:
            known = self.nonfinite
            self.nonfinite = flag if known is None else torch.maximum(known, flag.to(known.device))

    def count_skip(self, flags: list[Tensor]) -> bool:
        """Count this step as skipped where the first of `flags` is nonzero, on the device; the others are its copies.

        Returns:
            True if the host knows that it is skipped.
        """
        capturable, flag = self.groups.setup.capturable, flags[0] if flags else None
        if flag is None and not (capturable and self.skipped_steps is None):
            return False  # a captured graph must find the counter: one that it creates is zero at every replay
        known = self.skipped_steps
        device = flag.device if flag is not None else self.groups.params()[0].device
        if known is None or known.device != device:
            with torch.inference_mode(False):
                new = torch.zeros((), dtype=torch.int64, device=device)
            known = self.skipped_steps = new if known is None else new.copy_(known)
        if flag is not None:
            known.add_(flag != 0)
        return not capturable and known_set(flags)

    def drop_ascent(self) -> None:
        """A round has no gradient, so whether its ascent was finite does not matter."""
        if self.before_ascent is not None:
            (self.nonfinite,) = self.before_ascent

    def drop_pending(self) -> None:
        """Forget the gradients of an unfinished step."""
        self.nonfinite = self.before_ascent = None
        self.unscaled.forget()
        if self.overflow.is_watching:
            self.overflow.forget()
        if self.passes.is_counting:
            self.passes.forget()
        self.gradients.drop()


def known_set(flags: list[Tensor]) -> bool:
    """True if one of `flags` is nonzero, as far as the host knows: for a GPU it does not wait."""
    return any([flag.is_cpu and bool(flag) for flag in flags])
