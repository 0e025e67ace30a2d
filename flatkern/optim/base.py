"""The optimizer around every base rule: torch.optim.Optimizer's face, and the calls of the cycle.

It composes parts and decides nothing; a subclass brings a rule (`prepare`, `commit`). What changes between calls is in
`self.cycle`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..checks import check_backend, check_outer_filters, check_parameters
from ..dispatch import resolve
from ..methods import IRE
from ..values import check_flag, check_value
from . import amp, closures, follow, names
from .buckets import Bucket, Call, SharedArguments
from .cycle import Cycle
from .errors import warn_never_masked, warn_never_perturbed
from .groups import Group, Groups, Setup, checked_limit
from .ire import Mask
from .perturb import perturbation_of
from .perturbation import StaysPerturbed
from .phase import Phase
from .saving import Saved
from .scalars import check_can_be_captured, check_group_can_be_captured, scalars_of
from .sharding import check_sharding
from .step import Prepared, Step, restore
from .tracing import untraced

Closure = Callable[[], Any]


class FlatOptimizer(Saved):
    """Base of flatkern's optimizers; see `SGD`, `Adam`, `AdamW`, `Wrap`.

    The cycle is CLEAN -> perturb() -> PERTURBED -> restore() or step() -> CLEAN.
    """

    _step_supports_amp_scaling = True
    flag_keys: tuple[str, ...] = ("perturb", "enhance")  # group values that are True or False
    finishes = False  # `finish` has something to do
    updates_copies = False  # where clean weights are in copies that stay
    negates = True  # the gradient where a group says maximize; a base does it itself
    defers_state = False  # the state is a base's, which creates its own first
    ops: tuple[str, ...] = ()  # that its rule calls

    # --- construction ----------------------------------------------------------------------------

    def set_up(self, setup: Setup) -> Group:
        """Set what stays fixed, and make the parts; returns the group defaults that the method adds."""
        name = setup.name
        if setup.enhancement is not None and not isinstance(setup.enhancement, IRE):
            raise TypeError(f"{name}: enhance is {setup.enhancement!r}, but should be flatkern.IRE(kappa=...), or None")
        checked_limit(name, setup.max_grad_norm)
        setup.master_weights = check_flag(name, "master_weights", setup.master_weights)
        setup.capturable = check_flag(name, "capturable", setup.capturable)
        setup.backend = check_backend(setup.backend)
        self.make_parts(setup)
        return self.own_defaults()

    def make_parts(self, setup: Setup) -> None:
        self.setup = setup
        self.perturbation = perturbation_of(setup.method, setup.name)
        groups = Groups(setup, weakref.ref(self))
        scalars = scalars_of(groups, self.perturbation.draws)
        self.cycle = Cycle(groups, scalars, self.perturbation.rolling, self.defers_state)
        self.mask = Mask(setup.enhancement)
        # An optimizer that is collected while its parameters are perturbed leaves clean weights behind.
        weakref.finalize(self, self.cycle.weights.abandon).atexit = False

    def own_defaults(self) -> Group:
        """The group values that the method and the enhancement bring."""
        method, enhancement = self.setup.method, self.setup.enhancement
        defaults = {} if method is None else {**method.defaults, "perturb": True, "writes": "keep"}
        return defaults if enhancement is None else {**defaults, **enhancement.defaults}

    def check_new_parameters(self) -> None:
        """Refuse parameters that no kernel can walk, that repeat, or that another optimizer holds perturbed."""
        name, params = self.setup.name, self.cycle.groups.params()
        check_sharding(self.setup, params)
        parts = [dtensor.local(p) for p in params]
        check_parameters(name, parts, only_trained=True)
        if self.setup.method is not None or self.setup.enhancement is not None:
            dtensor.check(name, params, only_trained=True)
            check_outer_filters(name, "params", parts, only_trained=True)
        if self.setup.backend is not None:
            for device_type in {p.device.type for p in params} - {"meta"}:
                for op in self.needed_ops():
                    resolve(op, device_type, self.setup.backend)
        self.cycle.weights.check_alone(name, params)
        if self.setup.capturable:
            check_can_be_captured(self.cycle.groups)
        for group in self.param_groups:
            self.check_group(group)
        self.mask.check_common(self.own_groups, name)
        self.check_common()
        self.cycle.scalars.sync_groups(name)
        self.watch_passes()
        self._ready = True

    def needed_ops(self) -> list[str]:
        """What a named backend must have."""
        clipping = ["gradient_norm_"] if self.setup.max_grad_norm is not None else []
        return ["restore_", *self.ops, *self.perturbation.ops, *self.mask.ops, *clipping]

    def watch_passes(self) -> None:
        """Count backward passes, for a method that weighs by their number."""
        if self.perturbation.counts:
            self.cycle.passes.watch(self.cycle.groups.params())

    def check_group(self, group: Group) -> None:
        """Refuse a group with a value that a step cannot use.

        Raises:
            ValueError, TypeError: naming the value and what it should be.
        """
        name, capturable = self.setup.name, self.setup.capturable
        if capturable:
            check_group_can_be_captured(group, name)
        for key, value in group.items():
            if capturable and isinstance(value, Tensor):
                continue  # it was checked when it was set from a number; now the host would have to wait
            if key in self.flag_keys:
                check_flag(name, key, value)
            elif self.checks_key(key) and not (key == "lam" and value is None):
                check_value(key, value, name, wanted=self.perturbation.ranges.get(key))
        if group.get("writes", "keep") not in ("keep", "drop"):
            raise ValueError(f'{name}: writes is {group["writes"]!r}, but should be "keep" or "drop"')
        self.perturbation.check_group(group, name, capturable)
        self.mask.check_group(group, name)

    def check_common(self) -> None:
        """Refuse groups with different values where all share one; of a mask's, making one does."""
        self.perturbation.check_common(self.own_groups, self.setup.name)

    def checks_key(self, key: str) -> bool:
        """True if a group's `key` means what it means here, so that its value must be a number in range."""
        return key in self.own_defaults()

    # --- the rule --------------------------------------------------------------------------------

    @staticmethod
    def split_by(group: Group) -> Any:
        """What splits parameters into different op calls, besides device and masters."""
        return None

    def prepare(self, bucket: Bucket, shared: SharedArguments) -> Call | None:
        """The call of one bucket. Creates state, and writes nothing."""
        raise NotImplementedError

    def finish(self, work: list[Prepared]) -> None:
        """What follows the calls of all buckets."""

    # --- the cycle -------------------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def perturb(self, scaler: Any = None) -> None:
        """Move the weights to the perturbed point; the gradient of the next backward is taken there.

            CLEAN -> PERTURBED

        RWP draws noise (no gradient needed), m-RWP keeps the gradient in `.grad` as the clean one,
        SAM and ASAM ascend along the gradient in `.grad`. The gradients of earlier rounds return to
        `.grad`, so that the next backward accumulates into them.

        Arguments:
            scaler: the torch.amp.GradScaler in use; m-RWP with mix="gradients", mixed SAM, GSAM, Friendly-SAM and
                LookSAM need it to unscale and inf-check the clean gradient. SAM and ASAM tell it of an ascent that is
                not finite, so that `scaler.update()` lowers the scale; without it such a step is skipped, and the
                scale stays.

        Raises:
            RuntimeError: already perturbed; rolling; no method; RWP or Momentum-SAM with a new gradient, which would
                be lost; SAM without one, or on a step between ascents; a second clean gradient for m-RWP; another
                optimizer holds the parameters perturbed. A refused call has changed nothing.
        """
        cycle, perturbation = self.cycle, self.perturbation
        if perturbation.refuses_perturb:
            raise RuntimeError(perturbation.refuses_perturb)
        cycle.require("perturb")
        cycle.groups.check_changed()
        cycle.scalars.sync_groups("perturb")
        params = cycle.groups.params()
        cycle.weights.check_alone("perturb", params)
        if scaler is not None:
            amp.check_not_unscaled(scaler, self)
        new = cycle.gradients.was_given(params)
        perturbation.check(cycle, params, new, scaler)
        try:
            perturbation.move(cycle, params, new, scaler)
        except BaseException:
            cycle.undo()
            raise
        if cycle.state.created:
            cycle.state.keep_created()

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Put the clean weights back, bit for bit, and count one round if it has a gradient.

            PERTURBED -> CLEAN

        The round's gradients are set aside (pointers, no arithmetic) until the next `perturb()` or
        `step()`. On clean weights nothing happens.
        """
        if self.perturbation.rolling:
            raise RuntimeError("restore: a rolling optimizer is restored by eval(), or by follow(model)")
        if self.cycle.require("restore") is Phase.PERTURBED:
            restore(self.perturbation, self.cycle)

    @untraced
    @torch.no_grad()
    def step(self, closure: Closure | list[Closure] | None = None) -> Any:
        """Restore, form the final gradient, and apply the base rule, in one pass.

            PERTURBED or CLEAN -> CLEAN          (rolling: perturbed for the next forward)

        Arguments:
            closure: zeroes the gradients, runs forward and backward, returns the loss. It is called
                once (plain, RWP, Momentum-SAM, rolling, steps between ascents) or twice (SAM and its kin, m-RWP);
                `[clean, noisy]` gives m-RWP two batches, a list gives mSAM its shards.

        Returns:
            The closure's loss, the clean one where there is one; None without a closure.

        Raises:
            RuntimeError: the cycle lacks a gradient it needs, or has one too many; a closure together
                with a gradient scaler. A refused call has changed nothing.
        """
        try:
            if closure is None:
                return self.step_without_closure()
            self.cycle.require("step")
            return closures.step(self, closure, amp.is_scaling(self))
        except BaseException:
            amp.forget(self)
            raise

    def step_without_closure(self) -> None:
        """step() without torch's step hooks, which fire once around the whole."""
        cycle = self.cycle
        cycle.require("step")
        if cycle.rolling:
            cycle.followers.check_step(cycle.steps)
        cycle.groups.check_changed()
        cycle.scalars.sync_groups("step")
        try:
            Step(self, self.perturbation, self.mask, cycle, amp.amp_of(self)).run()
        except BaseException:
            cycle.state.undo_created()
            raise
        cycle.steps += 1
        if cycle.steps == 10:
            if self.setup.method is not None and not cycle.weights.ever_perturbed:
                warn_never_perturbed(self.setup.name, self.perturbation.name, self.perturbation.pattern)
            if self.mask.is_missed(self.own_groups):
                warn_never_masked(self.setup.name)

    @contextmanager
    def perturbed(self, scaler: Any = None) -> Iterator[None]:
        """`perturb()` on entry; on every way out the weights are clean again.

        If the body did not step, `restore()` follows. After an exception this round's gradients are dropped.
        """
        rounds = self.cycle.gradients.rounds
        self.perturb(scaler)
        try:
            yield
        except BaseException:
            closures.abort_round(self, rounds)
            raise
        self.restore()

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Clean weights inside, whatever the mode, for others to read and to write.

        Outside everything is as before, bit for bit, around what others have written inside by any means, `p.data`
        too: noise is drawn again, of the same round; an ascent keeps its bits where nobody wrote, and its difference
        elsewhere. Inside, `train()` and `eval()` do nothing, `state_dict()` and `update_mask()`
        are as on clean weights, and `perturb()`, `restore()`, `step()`, `add_param_group()` and `load_state_dict()`
        raise.
        """
        self.cycle.require("clean")
        with self.cycle.weights.clean():
            yield

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and the zeroed gradients do not count as new ones.

        Between rounds the sum of earlier rounds survives: `zero_grad()` does not drop it.
        """
        ledger, params = self.cycle.gradients, self.cycle.groups.params()
        if self.cycle.weights.partition is not None and ledger.rounds:
            if ledger.has_new_since_perturb(params):
                raise RuntimeError("zero_grad: earlier rounds are summed up in .grad; call step() or restore() first")
            return
        if ledger.holds_sum_in_grad:  # of a step that has failed
            ledger.set_aside(params, counted=False)
        super().zero_grad(set_to_none)
        ledger.squares = {}
        ledger.mark_zeroed(params)

    # --- rolling ---------------------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Rolling: apply the noise of the current round (idempotent; draws nothing new). Otherwise nothing."""
        if not mode:
            return self.eval()
        cycle, perturbation = self.cycle, self.perturbation
        cycle.followers.switched_on = True
        if isinstance(perturbation, StaysPerturbed) and cycle.require("train") is Phase.CLEAN:
            cycle.groups.check_changed()
            cycle.scalars.sync_groups("train")
            cycle.weights.check_alone("train", cycle.groups.params())
            try:
                perturbation.put_on(cycle)
            except BaseException:
                cycle.undo()
                raise
            cycle.state.keep_created()
        return None

    @untraced
    @torch.no_grad()
    def eval(self) -> None:
        """Rolling: clean weights (idempotent; the trajectory does not change). Otherwise as `restore()`."""
        self.cycle.followers.switched = True
        if self.cycle.require("eval") is not Phase.PERTURBED:
            return
        if not self.perturbation.rolling:
            self.restore()
        else:
            self.cycle.gradients.note_noisy(self.cycle.groups.params())
            self.cycle.weights.restore_checked()

    def follow(self, model: torch.nn.Module) -> follow.Handles:
        """Rolling: noise on in the model's training forwards, clean weights in eval forwards, checkpoints and copies.

        The documented way for trainers that call only `step()`: Hugging Face, Lightning, Accelerate, timm. A forward
        pre-hook calls `train()` or `eval()` after `model.training`; before the model or a part of it is read by
        `state_dict()`, written by `load_state_dict()`, copied by `copy.deepcopy` or pickled, `eval()` is called, and so
        by this optimizer's own `state_dict()`. None of it changes the trajectory, and copies are followed by no
        optimizer. Not seen are reads of the parameters themselves, such as the updates of an average: make them inside
        `with opt.clean():`. A model may be compiled before or after; into hooks of torch's own classes (a `Sequential`)
        and of parts of a compiled model Dynamo traces, so that `fullgraph=True` needs `follow(compiled)` there.
        torch.jit.script() compiles hooks: `remove()` the handle before.

        Returns:
            A handle with `remove()`.

        Raises:
            RuntimeError: the optimizer is not rolling.
            ValueError, TypeError: the model holds none of the optimizer's parameters, or is no module. A step raises
                RuntimeError where it does not hold them any more.
        """
        if not self.perturbation.rolling:
            raise RuntimeError(
                "follow: only a rolling optimizer can follow a model; pass perturb=flatkern.RWP(rolling=True), or "
                "MomentumSAM(rolling=True)"
            )
        return follow.follow(self.cycle, model)

    def refresh_masters(self) -> None:
        """`master_weights=True`: take over what others have written to `p.data` of half-precision parameters.

        Such writes move no version, so that nothing else tells; other writes are seen without it.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self.cycle.require("refresh_masters")
        self.cycle.state.forget_masters()

    def release(self) -> None:
        """Free the scratch (saved copies); pending rounds are dropped. The next `perturb()` allocates again.

        Raises:
            RuntimeError: the weights are perturbed, so the scratch holds the clean ones.
        """
        self.cycle.require("release")
        self.cycle.drop_pending()
        self.cycle.weights.release()
        self.perturbation.forget()
        self.perturbation.release()
        self.cycle.partitions.clear()

    # --- enhancement -----------------------------------------------------------------------------

    @property
    @untraced
    def mask_due(self) -> bool:
        """IRE: True when the mask has served its steps, or there is none yet, and `update_mask()` should follow."""
        return self.mask.is_due(self.own_groups)

    @untraced
    @torch.no_grad()
    def update_mask(self, scaler: Any = None) -> None:
        """IRE: set the mask from the gradients in `.grad`, and drop them.

            n_i <- [ |g_i| <= the K-th smallest |g| of all parameters ]

            if opt.mask_due:
                flatkern.sampled_label_loss(model(x)).backward()
                opt.update_mask()

        On clean weights (`with opt.clean():` will do), with no gradients of a step pending, and with new gradients:
        those that the last step has used are refused. Only the order of the gradients counts, so a loss scale does not
        matter. Reads the gradients three or four times; a parameter without one, or a frozen one, gets a mask of zeros.

        Arguments:
            scaler: the GradScaler in use: gradients that are not finite then leave the mask as it is, in silence.

        Raises:
            RuntimeError: no enhancement; perturbed weights; no new gradient; a gradient that is not finite.
            ValueError: groups differ in `sharp_fraction`. Nothing has changed then.
        """
        try:
            self.mask.update(self.cycle, scaler)
        except BaseException:
            self.cycle.state.undo_created()
            raise
        self.cycle.state.keep_created()

    # --- groups ----------------------------------------------------------------------------------

    def name_parameters(self, model: torch.nn.Module) -> None:
        """Take the parameters' names from a model, for ASAM's rule; the same as passing `model.named_parameters()`.

        They are kept in `group["param_names"]`, where torch has them, so that a checkpoint holds them too; parameters
        that are not in the model keep theirs. A group that is added later is named by the same models.

        Raises:
            TypeError: `model` is no torch.nn.Module.
            ValueError: it has none of the optimizer's parameters. Nothing has changed then.
        """
        names.take_from(self.param_groups, model)
        self.cycle.groups.named_by.append(weakref.ref(model))

    # --- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; refused while a perturbation or a round is under way."""
        self.cycle.require("add_param_group")
        ready = self.__dict__.get("_ready")
        if ready:
            self.join_round(param_group)
        super().add_param_group(param_group)
        if ready:
            self.check_added_group()

    def join_round(self, param_group: Group) -> None:
        """A group that joins during training draws the round of the others, and has names if they have."""
        groups = self.cycle.groups
        if self.perturbation.draws:
            groups.own(param_group).setdefault("round", self.own_groups[0]["round"])
        names.join(self.param_groups, param_group, groups.named_by)

    def check_added_group(self) -> None:
        try:
            self.check_new_parameters()
        except Exception:
            self.param_groups.pop()
            raise

    def begin_saving(self) -> None:
        """A checkpoint may name the optimizer before the model: both are clean where it follows one."""
        if self.cycle.followers.models:
            follow.end_noise(self)
        self.cycle.require("state_dict")
