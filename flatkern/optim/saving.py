"""How an optimizer is saved: state_dict() and pickling as callers of torch expect them. checkpoint.py reads it back."""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import checkpoint
from .groups import Group, Setup
from .known import Known
from .perturbation import StaysPerturbed
from .scalars import LAST_DRAW


class Saved(Known):
    """An optimizer that can be saved; of its class it needs the methods that come first."""

    state_keys: tuple[str, ...] = ()  # what the base rule keeps per parameter

    def make_parts(self, setup: Setup) -> None:
        """Make the parts anew, of a copy."""
        raise NotImplementedError

    def own_defaults(self) -> Group:
        """The group values that the method and the enhancement bring."""
        raise NotImplementedError

    def begin_saving(self) -> None:
        """Clean weights, or a refusal."""
        raise NotImplementedError

    def watch_passes(self) -> None:
        """Count backward passes, for a method that weighs by their number."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Base state, masters and ARWP's history, in torch's format; no scratch.

        Raises:
            RuntimeError: the weights are perturbed and nothing follows a model, or rounds are pending.
        """
        self.begin_saving()
        return self.with_draws(super().state_dict())

    def with_draws(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What a rolling perturbation was made with, in every group: distributed checkpoints load into present keys."""
        if isinstance(self.perturbation, StaysPerturbed):
            for group in map(self.cycle.groups.own, saved["param_groups"]):
                if LAST_DRAW not in group:
                    group[LAST_DRAW] = copy.deepcopy(self.perturbation.nothing_drawn(group))
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of flatkern or of the torch optimizer with the same rule, all of it or nothing.

        Dtypes are kept as saved, strides follow the parameters, group keys that the checkpoint lacks
        keep their present values. On perturbed weights the perturbation ends: parameters that others
        wrote since keep their values, the rest are restored.

        Raises:
            ValueError, TypeError: the checkpoint does not fit; nothing has changed then.
        """
        self.cycle.require("load_state_dict")
        loaded = self.read_checkpoint(state_dict)
        self.end_for_loading()
        checkpoint.assign(loaded, self.cycle)
        self.finish_loading()

    def read_checkpoint(self, state_dict: dict[str, Any]) -> checkpoint.Checkpoint:
        """Run the hooks, and check."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return checkpoint.read(state_dict, self.cycle, self.perturbation, self.own_defaults(), self.state_keys)

    def end_for_loading(self) -> None:
        self.cycle.weights.restore()
        self.cycle.drop_pending()

    def finish_loading(self) -> None:
        checkpoint.forget_what_was(self.cycle)
        self.perturbation.forget()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self.cycle.require("pickle or deepcopy")
        return self.raw_state()

    def raw_state(self) -> dict[str, Any]:
        """torch's, and what stays fixed; the cycle starts anew in the copy."""
        return {**torch.optim.Optimizer.__getstate__(self), "flatkern": dict(vars(self.setup))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fixed = state.pop("flatkern", None)
        if fixed is not None:
            self.set_fixed(dict(fixed))
        torch.optim.Optimizer.__setstate__(self, state)
        self.watch_passes()

    def set_fixed(self, fixed: dict[str, Any]) -> None:
        self.make_parts(Setup(**fixed))
        self._ready = True
