"""Hugging Face Accelerate: every method by one call a micro-batch.

    step = passes(accelerator, opt, model)

    for x, y in loader:
        with accelerator.accumulate(model):
            loss = step(lambda: loss_of(model(x), y))      # in place of forward, backward, step() and zero_grad()

Rolling RWP and MomentumSAM do not need it: `opt.optimizer.follow(model)` after `prepare()`, which has put its own
optimizer around flatkern's, is enough, and the loop stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..optim.base import FlatOptimizer
from ..running_stats import frozen_running_stats
from .shared import averaging_over_ranks, replicas_in, unwrapped
from .window import Window

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        "flatkern.integrations.accelerate needs accelerate; pip install 'flatkern[accelerate]'"
    ) from error

Closure = Callable[[], Tensor]

OTHERS = {
    "DEEPSPEED": "DeepSpeed runs backward and step by itself, on flat copies of the parameters",
    "MEGATRON_LM": "Megatron-LM runs backward and step by itself, on flat shards of the parameters",
    "XLA": "XLA devices have no kernels here",
}


def passes(
    accelerator: Accelerator,
    opt: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    *others: torch.nn.Module,
    sync_ascent: bool = False,
) -> Step:
    """The training step of an Accelerate script, with as many passes as the method needs.

        model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
        step = passes(accelerator, opt, model)

        for x, y in loader:
            with accelerator.accumulate(model):
                loss = step(lambda: loss_of(model(x), y))
                scheduler.step()

    The closure runs forward and returns the loss; backward, the scaler, `no_sync`, the step and the zeroing of
    gradients are done inside, the step at the last micro-batch of a window (`accelerator.sync_gradients`).

        RWP, ARWP, MomentumSAM,  perturb() before the window, a pass for each micro-batch
        mix="ranks"
        rolling, IRE alone       a pass for each micro-batch
        SAM, ASAM, GSAM,         two passes for each micro-batch, a round each (mSAM); `rounds="sum"`
        FriendlySAM, LookSAM
        interval=, LookSAM's k   in a window between two ascents a pass for each micro-batch
        m-RWP, m-ARWP            of N micro-batches the first half, rounded up, is clean, the others are noisy, one
                                 pass each; `rounds="sum"`. Where a window is one micro-batch, it is both, in two
                                 passes, or the noisy one is another: `step(closure, noisy=closure_of_another_batch)`
        enhance=IRE(...)         `step(closure, mask=lambda: flatkern.sampled_label_loss(model(x)))`: where the mask is
                                 due, it is taken before the window

    A window begins with no gradients: what others have left in `.grad` (the generator's step in a discriminator's) is
    dropped, as `zero_grad()` would. Between two calls weights are clean, for evaluations and others that read them, and
    `.grad` is empty: noise and gradients come back with the next micro-batch. Statistics of BatchNorm are those of
    clean weights: second passes leave those of all prepared models alone. Where a closure raises, or
    `accelerator.load_state` comes within a window, the weights are clean, and the window is dropped; so does
    `step.drop_window()`. Clip by `max_grad_norm=` of the optimizer.

    Arguments:
        accelerator: with its `gradient_accumulation_steps`, `mixed_precision` and model prepared.
        opt: flatkern's, as it was made or as `prepare` has returned it.
        model: what `prepare` has returned. With several processes it is needed, since Accelerate itself keeps but the
            module inside of DDP; with one it may be left out.
        others: further models, where the optimizer has parameters of several.
        sync_ascent: under DDP the ascent of SAM and ASAM follows each rank's own gradient (mSAM over the ranks), so
            that a step sends no more than an ordinary one; True takes the mean over the ranks for each ascent. FSDP2
            always does, and so do, whatever is given, SAM and ASAM with `lam`, GSAM, FriendlySAM and LookSAM: the
            ascent's gradient enters their update or their state, and replicas would part.

    Returns:
        `step(closure, noisy=None, mask=None)`, which returns the detached loss of the micro-batch, at clean weights
        where the method has a clean pass there.

    Raises:
        TypeError: `accelerator` is no Accelerator, `opt` none of flatkern's.
        ValueError: `opt` or `model` was not prepared; `model` is missing, or another one that holds parameters of the
            optimizer; mix="losses"; several micro-batches a step without rounds="sum".
        NotImplementedError: Accelerate runs DeepSpeed, Megatron-LM, XLA or FSDP1.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"passes: accelerator is {type(accelerator).__name__}, but should be an accelerate.Accelerator")
    inner = unwrapped(opt)
    if not isinstance(inner, FlatOptimizer):
        raise TypeError(f"passes: opt is {type(inner).__name__}, but should be an optimizer of flatkern's")
    _check_distributed(accelerator)
    prepared = next((o for o in accelerator._optimizers if o is opt or o.optimizer is inner), None)
    if prepared is None:
        raise ValueError("passes: opt was not prepared; call model, opt = accelerator.prepare(model, opt) first")
    _check_rounds(accelerator, inner)
    return Step(accelerator, prepared, inner, _models_of(accelerator, inner, model, others), sync_ascent)


def _models_of(
    accelerator: Accelerator,
    opt: FlatOptimizer,
    model: torch.nn.Module | None,
    others: tuple[torch.nn.Module, ...],
) -> list[torch.nn.Module]:
    """The prepared models that hold the optimizer's parameters."""
    ours = {id(p) for group in opt.param_groups for p in group["params"]}
    if model is None and accelerator.distributed_type.name.startswith("MULTI"):
        raise ValueError(
            "passes: model is missing, and with several processes it decides which passes synchronize; "
            "step = passes(accelerator, opt, model), with the model that accelerator.prepare() has returned"
        )
    prepared = [m for m in accelerator._models if any(id(p) in ours for p in m.parameters())]
    if model is None:
        return prepared
    given = [model, *others]
    for m in given:
        if not any(id(p) in ours for p in m.parameters()) or _is_unwrapped(accelerator, m):
            raise ValueError(
                f"passes: model is {type(m).__name__}, but should be the model of the optimizer's parameters, as "
                "accelerator.prepare() has returned it"
            )
    held = {id(p) for m in given for p in m.parameters()}
    for m in prepared:
        if any(id(p) in ours - held for p in m.parameters()):
            raise ValueError(
                f"passes: model is {type(model).__name__}, but the optimizer has parameters of {type(m).__name__}, "
                "too; pass all of its models: passes(accelerator, opt, model, other_model)"
            )
    return given


def _is_unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """The module inside of DDP in place of DDP."""
    replicated = accelerator.distributed_type.name.startswith("MULTI")
    return replicated and not replicas_in(model)


def _check_distributed(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    reason = OTHERS.get(kind.name)
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        reason = "FSDP1 flattens the parameters, so that filters are cut"
    if reason is not None:
        raise NotImplementedError(
            f"passes: {reason}; use DDP, or FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2))"
        )


def _check_rounds(accelerator: Accelerator, opt: FlatOptimizer) -> None:
    """Is the method what Accelerate's losses, divided by the number of micro-batches, need?"""
    kind = opt.perturbation.closures
    if kind == "none":
        raise ValueError(
            'passes: mix="losses" leaves the weighting of losses to the loop; make the optimizer with mix="gradients"'
        )
    count = accelerator.gradient_accumulation_steps
    if kind != "one" and count > 1 and not opt.perturbation.sums:
        raise ValueError(
            f"passes: gradient_accumulation_steps is {count}, and Accelerate divides every loss by it, but the "
            f"method's rounds are averaged; "
            f'pass {type(opt.method).__name__}(..., rounds="sum")'
        )


def _watch(accelerator: Accelerator, window: Window) -> list[Any]:
    """Hooks of checkpoints, which keep neither the window nor its optimizer alive."""
    known, config = weakref.ref(window), accelerator.project_configuration

    def before_save(models: Any, weights: Any, folder: str) -> None:
        if (alive := known()) is not None:
            alive.check_save(folder, config.automatic_checkpoint_naming)

    def before_load(models: Any, folder: str) -> None:
        if (alive := known()) is not None:
            alive.drop_open()

    def after_load(opt: torch.optim.Optimizer) -> None:
        if (alive := known()) is not None:
            alive.forget()

    return [
        accelerator.register_save_state_pre_hook(before_save),
        accelerator.register_load_state_pre_hook(before_load),
        window.opt.register_load_state_dict_post_hook(after_load),
    ]


def _end(window: Window, handles: list[Any]) -> None:
    """The Step is gone: its window will not go on."""
    for handle in handles:
        handle.remove()
    window.drop_open()


class Step:
    """`loss = step(closure)`: a micro-batch, and with the last one of a window the step. Made by `passes`."""

    def __init__(
        self,
        accelerator: Accelerator,
        prepared: Any,
        opt: FlatOptimizer,
        models: list[torch.nn.Module],
        sync_ascent: bool,
    ) -> None:
        self.optimizer = opt
        self._accelerator = accelerator
        self._prepared = prepared
        self._sync_ascent = sync_ascent
        self._models = models
        self._replicas = [replica for model in models for replica in replicas_in(model)]
        self._sharded = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
        self._window = Window(opt, self._sharded)
        weakref.finalize(self, _end, self._window, _watch(accelerator, self._window)).atexit = False

    def __call__(self, closure: Closure, noisy: Closure | None = None, mask: Closure | None = None) -> Tensor:
        """Run the passes of a micro-batch; see `passes`.

        Raises:
            TypeError, ValueError: an argument that the method or the window does not take, or one that is missing.
                Nothing has changed then.
        """
        opt, window = self.optimizer, self._window
        self._check(closure, noisy, mask)
        try:
            window.begin_micro_batch()
            if mask is not None and window.index == 0 and opt.mask_due:
                self._take_mask(mask)
            if window.index == 0:  # for all of its micro-batches, whatever schedules do in between
                window.kind = opt.perturbation.closures_of(opt.own_groups)
            kind = window.kind
            if kind == "twice each":
                loss = self._ascend(closure)
            elif kind == "clean and perturbed":
                loss = self._mix(closure, noisy or closure)
            else:
                loss = self._accumulate(closure)
            if self._accelerator.sync_gradients:
                self._prepared.step()
                self._prepared.zero_grad()
                window.forget()
            else:
                window.end_micro_batch()
        except BaseException:
            window.drop()
            raise
        return loss

    def drop_window(self) -> None:
        """Drop the micro-batches since the last step, where a loop ends or loads within a window.

        The weights are clean afterwards, and the next micro-batch is the first of a window, which ends where
        Accelerate, whose count goes on, says so.
        """
        self._window.drop_open()

    # --- the methods -----------------------------------------------------------------------------

    def _accumulate(self, closure: Closure) -> Tensor:
        """One gradient: all micro-batches at the same weights, which are perturbed before the first one."""
        opt = self.optimizer
        if self._window.index == 0 and opt.perturbation.starts_perturbed:
            self._window.reshard()
            opt.perturb(scaler=self._accelerator.scaler)
        return self._pass(closure, opt.loss_weight)

    def _ascend(self, closure: Closure) -> Tensor:
        """SAM: a round for each micro-batch; only the last perturbed backward is synchronized."""
        opt, last = self.optimizer, self._accelerator.sync_gradients
        synchronized = self._sync_ascent or opt.perturbation.uses_ascent_gradient
        with self._synchronized(synchronized):
            loss = self._pass(closure)
        opt.perturb(scaler=self._accelerator.scaler)
        with self._frozen(), self._synchronized(last):
            self._pass(closure)
        if not last:
            opt.restore()
        return loss

    def _mix(self, closure: Closure, noisy: Closure) -> Tensor:
        """m-RWP: the first micro-batches at clean weights, the others at perturbed ones."""
        opt, accelerator, window = self.optimizer, self._accelerator, self._window
        last, sums = accelerator.sync_gradients, opt.perturbation.sums
        half = (accelerator.gradient_accumulation_steps + 1) // 2
        if window.index == 0 and last:  # the whole window: a loss of two passes
            weight = 0.5 if sums else 1.0
            with self._synchronized(True):
                loss = self._pass(closure, weight)
            opt.perturb(scaler=accelerator.scaler)
            with self._frozen(), self._synchronized(True):
                self._pass(noisy, weight)
            counted = 1, 1
        elif window.index < half and not last:
            with self._synchronized(window.index == half - 1):
                loss = self._pass(closure)
            window.clean += 1
            return loss
        else:
            if not opt.is_perturbed:
                if window.index < half:
                    self._reduce_gradients()
                window.reshard()
                opt.perturb(scaler=accelerator.scaler)
            with self._frozen(), self._synchronized(last):
                loss = self._pass(closure)
            counted = window.clean, window.index + 1 - window.clean
        if last and sums:
            opt.passes = counted  # of sharded parameters they cannot be counted
        return loss

    def _reduce_gradients(self) -> None:
        """A window that ends early, with its data: the clean passes before did not synchronize yet."""
        if self._replicas:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.copy_(self._accelerator.reduce(p.grad, reduction="mean"))

    def _take_mask(self, mask: Closure) -> None:
        """All ranks have the same mask, since it is made of the mean gradient."""
        opt = self.optimizer
        with opt.clean(), self._synchronized(True):
            self._pass(mask)
            opt.update_mask(scaler=self._accelerator.scaler)

    # --- what they share -------------------------------------------------------------------------

    def _pass(self, closure: Closure, weight: float = 1.0) -> Tensor:
        loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(f"step: closure has returned {type(loss).__name__}, but should return the loss, a tensor")
        if not loss.requires_grad:
            raise ValueError("step: closure has returned a loss without a graph; it returns it without backward()")
        self._accelerator.backward(loss if weight == 1.0 else loss * weight)
        return loss.detach()

    @contextmanager
    def _synchronized(self, on: bool) -> Iterator[None]:
        """Forward and backward that take the mean over DDP's ranks, or do not, whatever `accumulate` has set.

        FSDP2 adds unsynchronized gradients up outside of `.grad`, where no method finds them: it always synchronizes.
        """
        for shards in self._sharded:
            shards.set_requires_gradient_sync(True)
        with averaging_over_ranks(self._replicas, on):
            yield

    def _beside(self) -> list[torch.nn.Module]:
        """Prepared models of other optimizers: a discriminator in the generator's loss."""
        parts = {part for model in self._models for part in model.modules()}
        return [model for model in self._accelerator._models if parts.isdisjoint(model.modules())]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in [*self._models, *self._beside()]:
                stack.enter_context(frozen_running_stats(model))
            yield

    def _check(self, closure: Closure, noisy: Closure | None, mask: Closure | None) -> None:
        opt, accelerator = self.optimizer, self._accelerator
        if not callable(closure):
            raise TypeError(
                f"step: closure is {type(closure).__name__}, but should be a function that runs the forward and "
                "returns the loss: step(lambda: loss_of(model(x), y))"
            )
        if self._window.index == 0:
            _check_rounds(accelerator, opt)
        if noisy is not None and opt.perturbation.closures != "clean and perturbed":
            raise TypeError("step: noisy is given, but only m-RWP has a batch of its own for the noisy pass")
        if noisy is not None and not (self._window.index == 0 and accelerator.sync_gradients):
            raise ValueError(
                "step: noisy is given, but with gradient accumulation the second half of the micro-batches is noisy; "
                "leave it out"
            )
        if mask is not None and opt.enhancement is None:
            raise TypeError("step: mask is given, but the optimizer has no enhance=flatkern.IRE(...)")
        if mask is None and self._window.index == 0 and opt.enhancement is not None and opt.mask_due:
            raise TypeError(
                "step: mask is missing, and IRE's is due; pass "
                "step(closure, mask=lambda: flatkern.sampled_label_loss(model(x)))"
            )
