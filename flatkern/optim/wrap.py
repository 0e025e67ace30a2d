"""Wrap: a flatness-seeking method around any torch.optim.Optimizer instance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..checks import check_gradient
from ..methods import IRE, Method
from ..values import check_value
from .base import FlatOptimizer
from .buckets import Bucket, Call, SharedArguments
from .errors import warn_keys_of_the_base
from .groups import PREFIX, Group, Setup
from .phase import CLEAN
from .scalars import LAST_DRAW
from .state import OWN_KEYS
from .step import Prepared, draw_call
from .tracing import untraced

ALWAYS_OURS = ("perturb", "enhance", "writes", "adaptive")


class Wrap(FlatOptimizer):
    """Any optimizer at the perturbed weights of a flatness-seeking method.

        restore w;  g <- clip (lam g + (1 - lam) g_clean);  base.step();  rolling: perturb again

    The base keeps its rule, its state and its parameter groups, which are shared: schedulers work on
    either, and `state_dict()` is the base's, with our own state added where the base keeps none. Restore and
    mixing are passes of their own here, and gradients are mixed into copies, which are in `.grad` after the step, so
    the fused `SGD`, `Adam` and `AdamW` are faster; under a GradScaler `found_inf` is read on the host. The round is a
    number of the host, so that no CUDA graph can be captured, whatever the base. Where the base raises, the weights are
    clean, `.grad` is as before, and `step()` may be called again.

    No group key is shared. A name is the base's if it is in its defaults or in one of its groups when it is wrapped
    (`rho` of Adadelta, `beta`, `kappa`); our value is then under `perturb_<name>`, which always overrides, so that
    values of ours in the base's groups are written `perturb_sigma`, `perturb_rho`. `perturb`, `enhance`, `writes` and
    `adaptive` are always ours. The base's values are its own: nothing here checks them.

    A base with modes, as schedule-free ones, is switched along: `eval()` restores, then calls `base.eval()`; `train()`
    calls `base.train()`, then perturbs if rolling.

    Arguments:
        base_optimizer: an instance, constructed on the parameters.
        perturb, enhance, backend, max_grad_norm: as `flatkern.SGD`.

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer instance, or already one of flatkern's,
            or a ZeroRedundancyOptimizer, whose ranks own disjoint parameters, or one whose step() needs a closure,
            such as LBFGS.
    """

    defers_state = True
    finishes = True
    negates = False
    ops = ("mix_gradients_", "amplify_")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        perturb: Method | None = None,
        enhance: IRE | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_base(base_optimizer)
        setup = Setup("Wrap", perturb, enhance, backend, max_grad_norm=max_grad_norm)
        own_defaults = self.set_up(setup)
        self.base = base_optimizer
        setup.base_keys, own_defaults = _keys_of_the_base(base_optimizer, own_defaults)
        added = [(group, key) for group in base_optimizer.param_groups for key in own_defaults if key not in group]
        for group, key in added:
            group[key] = own_defaults[key]
        try:
            super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, **own_defaults})
            self.check_new_parameters()
        except BaseException:
            for group, key in added:
                del group[key]
            raise

    @property
    def param_groups(self) -> list[Group]:
        """The base's own, also after it has loaded a checkpoint."""
        groups: list[Group] = self.base.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        if self.__dict__.get("_ready"):  # torch's constructor sets a list of its own, which is not needed
            self.base.param_groups = value

    @property
    def own_groups(self) -> list[Group]:
        return self.cycle.groups.views(self.base.param_groups)

    def keys_of(self, name: str) -> list[str]:
        return [group.key(name) for group in self.own_groups]  # type: ignore[attr-defined]

    def check_group(self, group: Group) -> None:
        """Refuse a value of ours that a step cannot use."""
        own, name = self.cycle.groups.own(group), self.setup.name
        for key in self.own_defaults():
            overriding = PREFIX + key
            if overriding in group and not (key == "lam" and own[key] is None):
                # It is named as it is in the group.
                check_value(overriding, own[key], name, wanted=self.perturbation.ranges.get(key))
        super().check_group(dict(own))

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if self.__dict__.get("_ready"):
            self.base.state = value

    # --- modes -----------------------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """As the fused optimizers', after `base.train()`, where the base has modes."""
        if mode and hasattr(self.base, "train"):
            self.cycle.require("train")
            if self.perturbation.rolling:  # what super() will refuse is refused before the base has moved
                self.cycle.groups.check_changed()
                self.cycle.weights.check_alone("train", self.cycle.groups.params())
            self._switch_base("train")
        super().train(mode)

    @untraced
    @torch.no_grad()
    def eval(self) -> None:
        """As the fused optimizers', and `base.eval()` follows, where the base has modes."""
        super().eval()
        self._switch_base("eval")

    def _switch_base(self, mode: str) -> None:
        """Bases with modes move the weights, so only between perturbations, and not inside clean()."""
        switch = getattr(self.base, mode, None)
        if callable(switch) and self.cycle.phase is CLEAN:
            switch()

    # --- the rule --------------------------------------------------------------------------------

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call | None:
        """The way back to clean weights; None where they are clean."""
        for k, p, g in zip(bucket.index, bucket.params, shared.grads, strict=True):
            if g.shape != p.shape:
                check_gradient(f"step: grads[{k}]", g, p)
        mixing = self._mixing(bucket, shared, shared.grads, shared.history)
        if mixing is not None:
            mixing.check()
        if shared.masks is not None:
            self._amplification(bucket, shared, self.cycle.weights.store(bucket).backups).check()
        return Call(bucket, "restore_", (bucket.params, shared.store.backups), {}) if bucket.perturbed else None

    def _mixing(self, bucket: Bucket, s: SharedArguments, grads: Any, history: Any) -> Call | None:
        """The call that forms the final gradient in `grads`; None where it is formed already."""
        if s.clean_grads is None and s.grad_scale is None and s.clip is None and history is None:
            return None
        numbers = {key: s.numbers[key] for key in ("grad_weight", "clean_weight", "beta")}
        arguments = grads, history, None, s.clean_grads, s.component, s.grad_scale, s.clip, None
        return Call(bucket, "mix_gradients_", arguments, numbers)

    def finish(self, work: list[Prepared]) -> None:
        """Mix, let the base step, amplify, draw."""
        if any(s.found_inf is not None and bool(s.found_inf) for _, s, _ in work):
            self._draw(work)
            return
        previous = self._save_for_amplify(work)
        gradients, renewed = self._mix(work)
        before = [p.grad for bucket, _, _ in work for p in bucket.params]
        try:
            for (bucket, _, _), grads in zip(work, gradients, strict=True):
                for p, new in zip(bucket.params, grads, strict=True):
                    p.grad = new
            if self.perturbation.rolling and self.cycle.phase is CLEAN:
                self._switch_base("train")  # a rolling step in eval mode ends in train mode
            self.base.step()
        except BaseException:
            for p, g in zip((p for bucket, _, _ in work for p in bucket.params), before, strict=True):
                p.grad = g
            raise
        for known, new in renewed:
            dtensor.local(known).copy_(dtensor.local(new))
        self.cycle.state.settle_deferred()
        for (bucket, s, _), old in zip(work, previous, strict=True):
            if s.masks is not None:
                self._amplification(bucket, s, old).run()
        self._draw(work)

    def _amplification(self, bucket: Bucket, s: SharedArguments, previous: list[Tensor] | None) -> Call:
        return Call(bucket, "amplify_", (bucket.params, previous, s.masks), {"kappa": s.numbers["kappa"]})

    def _mix(self, work: list[Prepared]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """The final gradients, in copies, and what is kept of them with its new values: a base that fails changes
        none."""
        gradients: list[list[Tensor]] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for bucket, s, _ in work:
            history = None if s.history is None else [dtensor.local(h).clone() for h in s.history]
            grads = s.grads
            if self._mixing(bucket, s, grads, history) is not None:
                grads = [g.clone() for g in grads]
                self._mixing(bucket, s, grads, history).run()  # type: ignore[union-attr]
            if history is not None:
                kept += zip(s.history or (), history, strict=True)
            if s.keep is not None:
                first, second, outs, *rest = s.keep.args
                new = [dtensor.local(out).clone() for out in outs]
                Call(bucket, s.keep.op, (first, second, new, *rest), s.keep.kwargs).run()
                kept += zip(outs, new, strict=True)
            gradients.append(grads)
        return gradients, kept

    def _save_for_amplify(self, work: list[Prepared]) -> list[list[Tensor] | None]:
        """The displacement of a base that is not ours is known only from a copy; a perturbation has one already."""
        previous: list[list[Tensor] | None] = []
        for bucket, s, _ in work:
            if s.masks is not None and not bucket.perturbed:
                previous.append(self.cycle.weights.save(bucket))
            else:
                previous.append(s.store.backups)
        return previous

    def _draw(self, work: list[Prepared]) -> None:
        """Rolling: the noise of the coming round."""
        for bucket, s, _ in work:
            if s.noise is not None:
                draw_call(bucket, s).run()

    # --- groups and state belong to the base -----------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, on the base, which shares its groups."""
        if not self.__dict__.get("_ready"):
            return  # torch's constructor hands over the groups that the base has already
        self.cycle.require("add_param_group")
        self.join_round(param_group)
        for key, value in self.defaults.items():
            param_group.setdefault(key, value)
        self.base.add_param_group(param_group)
        self.check_added_group()

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with ARWP's history and IRE's mask, whether the base keeps state or not."""
        self.begin_saving()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        result = self.with_draws(self.base.state_dict())
        deferred = self.cycle.state.deferred
        for k, p in enumerate(self.cycle.groups.params()):
            if deferred.get(p):
                result["state"][k] = {**result["state"].get(k, {}), **deferred[p]}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, result) or result
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the base, all of it or nothing. Group keys of ours that the checkpoint lacks keep their values."""
        self.cycle.require("load_state_dict")
        loaded = self.read_checkpoint(state_dict)
        own = {p: {k: v for k, v in entry.items() if k in OWN_KEYS} for p, entry in loaded.state.items()}
        self.base.load_state_dict(_without_own_state(loaded.saved))
        self.end_for_loading()
        # torch casts every state tensor to its parameter's dtype; the base's keep theirs.
        for p, entry in loaded.state.items():
            for name, value in entry.items():
                if name == "step":
                    continue  # torch leaves it as it was saved
                present = self.state[p].get(name) if p in self.state else None
                if isinstance(present, Tensor) and isinstance(value, Tensor) and present.dtype != value.dtype:
                    self.state[p][name] = value
        self.cycle.state.deferred.clear()
        self.cycle.state.deferred.update({p: entry for p, entry in own.items() if entry})
        self.cycle.state.settle_deferred()
        self.finish_loading()

    def raw_state(self) -> dict[str, Any]:
        state = super().raw_state()
        state["flatkern"] |= {"base": self.base, "deferred": self.cycle.state.deferred}
        return state

    def set_fixed(self, fixed: dict[str, Any]) -> None:
        self.base = fixed.pop("base")
        deferred = fixed.pop("deferred", {})
        super().set_fixed(fixed)
        self.cycle.state.deferred.update(deferred)


def _keys_of_the_base(base: torch.optim.Optimizer, own_defaults: Group) -> tuple[frozenset[str], Group]:
    """Our names that are the base's group keys; and our defaults under the keys that are left to us."""
    names = (*own_defaults, LAST_DRAW)
    found = {key: [g for g in base.param_groups if key in g] for key in names if key not in ALWAYS_OURS}
    base_keys = frozenset(key for key, groups in found.items() if groups or key in base.defaults)
    doubtful = [
        key for key, groups in found.items() if key not in base.defaults and any(PREFIX + key not in g for g in groups)
    ]
    if doubtful:
        warn_keys_of_the_base(doubtful)
    keys = {key: PREFIX + key if key in base_keys else key for key in own_defaults}
    return base_keys, {keys[key]: value for key, value in own_defaults.items()}


def _check_base(base: Any) -> None:
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"Wrap: base_optimizer is {base!r}, but should be a torch.optim.Optimizer instance")
    if isinstance(base, FlatOptimizer):
        raise TypeError("Wrap: base_optimizer is flatkern's already; pass perturb= to it instead")
    name = type(base).__name__
    if name == "ZeroRedundancyOptimizer":
        raise TypeError("Wrap: ZeroRedundancyOptimizer steps a shard of the parameters; use FSDP2 or a plain optimizer")
    for parameter in inspect.signature(base.step).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise TypeError(
                f"Wrap: base_optimizer is {name}, whose step() needs {parameter.name}, but Wrap has the final "
                "gradient alone; wrap an optimizer whose step() takes no arguments"
            )


def _without_own_state(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as the base reads it: our state stays outside, since many bases create theirs in empty entries."""
    state = {}
    for key, entry in saved["state"].items():
        rest = {k: v for k, v in entry.items() if k not in OWN_KEYS} if isinstance(entry, dict) else entry
        if rest or not entry:
            state[key] = rest
    return {**saved, "state": state}
