"""Which models a rolling optimizer follows, and whether their forwards switch its noise. No tensor is touched here."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from .errors import refuse_lost_model, warn_always_in_eval_mode, warn_never_followed, warn_no_followed_forward
from .groups import Groups

FIRST_STEPS = 10  # a mistake in the training loop shows by then


class Place(NamedTuple):
    """Where a parameter is: in the model, and in the optimizer. It is looked up there, since both may replace it."""

    module: weakref.ref[torch.nn.Module]
    name: str
    group: int
    position: int


class Followed:
    """One model, held weakly, and one of the parameters that it shares with the optimizer."""

    def __init__(self, model: torch.nn.Module, place: Place) -> None:
        self.model = weakref.ref(model)
        self.place = place


class Followers:
    """The models of one optimizer, and what their forwards did since the last step."""

    def __init__(self, groups: Groups) -> None:
        self.models: list[Followed] = []
        self.switched = False  # eval() was called, by the user or by a followed forward
        self.switched_on = False  # train() was, since the last step
        self.trained = self.evaluated = False  # a followed forward ran in that mode since the last step
        self._groups = groups
        self._ever = False
        self._first_step = 0  # since when it is followed; without, since when it exists
        self._eval_steps = 0  # in a row whose followed forwards ran in eval mode
        self._train_steps = 0  # before which train() was called

    def find(self, model: torch.nn.Module) -> Followed:
        """A model that may be followed.

        Raises:
            ValueError: it holds none of the optimizer's parameters.
        """
        place = self._place(model)
        if place is None:
            raise ValueError(
                f"follow: model is {type(model).__name__} and holds none of the optimizer's parameters, but should be "
                "the model that the optimizer was made for; where parameters are replaced (fully_shard(), "
                "DeepSpeed's ZeRO), make the optimizer afterwards"
            )
        return Followed(model, place)

    def add(self, followed: Followed, steps: int) -> None:
        """Follow it, too.

        Arguments:
            steps: that were taken before.
        """
        if not self.models:
            self._ever, self._first_step = True, steps
        self.models.append(followed)

    def drop(self, followed: Followed) -> None:
        if followed in self.models:
            self.models.remove(followed)

    def check_step(self, steps: int) -> None:
        """At the start of a step, before anything is written: do the models still hold the parameters, and do their
        forwards switch the noise?

        Arguments:
            steps: that were taken before.

        Raises:
            RuntimeError: a model holds none of the parameters any more.
        """
        groups = self._groups.owner().param_groups  # type: ignore[union-attr]
        for followed in tuple(self.models):
            module, name, group, position = followed.place
            try:
                found = module()._parameters[name] is groups[group]["params"][position]  # type: ignore[union-attr]
            except (AttributeError, KeyError, IndexError):
                found = False
            if not found:
                self._look_again(followed)
        self._train_steps += self.switched_on
        self.switched_on = False
        if self.trained or self.evaluated:
            self._eval_steps = 0 if self.trained else self._eval_steps + 1
            self.trained = self.evaluated = False
            if self._eval_steps == FIRST_STEPS:
                warn_always_in_eval_mode(self._names(), FIRST_STEPS)
        elif steps + 1 == self._first_step + FIRST_STEPS and not self.switched:
            # Who calls train() once may well call eval() later; a Trainer calls it before every forward, and never
            # eval() before it saves.
            if not self._ever and self._train_steps in (0, FIRST_STEPS):
                warn_never_followed(FIRST_STEPS, bool(self._train_steps))
            elif self.models and not self._train_steps:
                warn_no_followed_forward(self._names(), FIRST_STEPS)

    def _look_again(self, followed: Followed) -> None:
        """The parameter that was looked at has gone: take another one, or refuse."""
        model = followed.model()
        if model is None:
            return self.drop(followed)
        place = self._place(model)
        if place is None:
            refuse_lost_model(type(model).__name__)
        else:
            followed.place = place
        return None

    def _place(self, model: torch.nn.Module) -> Place | None:
        """A parameter that the model shares with the optimizer."""
        places = {id(p): (g, k) for g, group in enumerate(self._groups) for k, p in enumerate(group["params"])}
        for module in model.modules():
            for name, p in module._parameters.items():
                if id(p) in places:
                    return Place(weakref.ref(module), name, *places[id(p)])
        return None

    def _names(self) -> str:
        return ", ".join(type(f.model()).__name__ for f in self.models)
