"""Lightning: one callback that switches the noise where the Trainer trains, evaluates, averages and saves.

The optimizer is made in `configure_optimizers` as any other; nothing of the LightningModule changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from ..optim.base import FlatOptimizer
from ..optim.errors import warn
from ..optim.perturbation import NoPerturbation
from ..running_stats import frozen_running_stats
from ..values import check_flag

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        f"flatkern.integrations.lightning needs Lightning ({error}); pip install 'flatkern[lightning]'"
    ) from error

# Callbacks that read the parameters after a batch. By name: a Lightning that has no such class has no such callback.
AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}

ROLLING = "RWP(rolling=True) or MomentumSAM(rolling=True)"
TWO_PASSES = ("twice each", "clean and perturbed")  # how often step(closure) calls it

MaskLoss = Callable[[torch.nn.Module, Any], torch.Tensor]


class FlatkernCallback(Callback):
    """Everything that flatkern's optimizers need of a Lightning Trainer.

        def configure_optimizers(self):
            return flatkern.AdamW(self.parameters(), lr=1e-3, perturb=flatkern.RWP(sigma=0.01, rolling=True))

        trainer = Trainer(callbacks=[FlatkernCallback()])

    Rolling RWP, ARWP and MomentumSAM: the perturbation is on in training batches and off in validation, test,
    prediction, checkpoints and when training ends, by an exception too. Where the other methods are between two passes,
    `state_dict()` of the module or of a part copies clean weights; a checkpoint with the optimizer's state raises
    there. Under automatic optimization they need no further line: Lightning hands a closure to `step()`, which runs
    `training_step` as often as the step needs; BatchNorm's running statistics are those of the first pass.
    What cannot work is refused when training starts.

    Arguments:
        mask_loss: for IRE: `mask_loss(model, batch)` returns the loss whose gradient makes the mask,
            `lambda model, batch: flatkern.sampled_label_loss(model(batch[0]))`. It is called when a mask is due, before
            the batch is trained on. `model` is `trainer.model`, the LightningModule or DDP around it; call it itself,
            not a part of it, so that DDP sees the pass. None: `training_step` calls `update_mask()`, as a loop does.
        clean_between_batches: put the clean weights back after every training batch, for callbacks that read or write
            them there; costs a pass over memory a step. None: where Lightning's StochasticWeightAveraging,
            WeightAveraging or EMAWeightAveraging is among the callbacks.

    Raises:
        RuntimeError, ValueError: from `Trainer.fit`, before the first batch; a method that the Trainer's mode cannot
            carry, or a clipping that would not be what it says.
    """

    def __init__(self, mask_loss: MaskLoss | None = None, clean_between_batches: bool | None = None) -> None:
        super().__init__()
        if mask_loss is not None and not callable(mask_loss):
            raise TypeError(
                f"FlatkernCallback: mask_loss is {mask_loss!r}, but should be a function of (model, batch), or None"
            )
        if clean_between_batches is not None:
            clean_between_batches = check_flag("FlatkernCallback", "clean_between_batches", clean_between_batches)
        self.mask_loss = mask_loss
        self.clean_between_batches = clean_between_batches
        self.optimizers: list[FlatOptimizer] = []
        self._handles: list[Any] = []
        self._suspended = ExitStack()  # what leads back from clean weights to a perturbation that is under way
        self._second_pass = ExitStack()  # what ends with the second of two passes

    # --- the beginning and the end of training ---------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Callbacks run in their order, and those that read weights after a batch must find clean ones. A new list:
        # Lightning is walking over this one.
        if trainer.callbacks[0] is not self:
            trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [opt for opt in trainer.optimizers if isinstance(opt, FlatOptimizer)]
        if not found:
            warn(
                "FlatkernCallback: configure_optimizers() returns no optimizer of flatkern's, so there is nothing to do"
            )
        for opt in found:
            _check(trainer, pl_module, opt, self.mask_loss)
        self.optimizers = found
        self._handles = [opt.follow(pl_module) for opt in found if opt.rolling]
        explicit = [opt for opt in found if opt.perturbation.moves and not opt.rolling]
        self._handles += _copy_clean_weights(pl_module, explicit, self._suspended)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._suspended.close()
        for opt in self.optimizers:
            opt.eval()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        """Clean weights, nothing pending, no hooks in the model."""
        self._second_pass.close()
        self._suspended.close()
        for opt in self.optimizers:
            opt.eval()
            opt.release()  # gradients of a step that will not be finished; a checkpoint could not be made of them
        self.optimizers = []
        self._unfollow()

    def _unfollow(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- batches ---------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._suspended.close()
        # StochasticWeightAveraging adds an epoch without backward to measure BatchNorm's statistics at the averaged
        # weights. Lightning has no public name for it.
        measures_statistics = getattr(trainer.fit_loop, "_skip_backward", False)
        if measures_statistics:
            self._unfollow()  # or training forwards would switch the noise on
        for opt in self.optimizers:
            if measures_statistics:
                opt.eval()
                continue
            _check_accumulation(trainer, pl_module, opt)  # schedules change it
            first = batch_idx % trainer.accumulate_grad_batches == 0
            if self.mask_loss is not None and first and opt.enhancement is not None and opt.mask_due:
                _update_mask(trainer, pl_module, opt, self.mask_loss, batch)
            opt.train()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._second_pass.close()
        if not isinstance(optimizer, FlatOptimizer) or not pl_module.automatic_optimization:
            return
        kind = optimizer.perturbation.closures_of(optimizer.own_groups)
        if kind in TWO_PASSES and not optimizer.is_perturbed:
            self._second_pass.enter_context(frozen_running_stats(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._second_pass.close()  # it does not come where training_step has skipped its batch
        clean = self.clean_between_batches
        if clean is None:
            clean = any(base.__name__ in AVERAGING for c in trainer.callbacks for base in type(c).__mro__)
        if clean:
            self._make_clean()

    # --- evaluation ------------------------------------------------------------------------------

    def _make_clean(self) -> None:
        for opt in self.optimizers:
            if opt.is_perturbed and not opt.rolling:  # manual optimization, over several batches
                self._suspended.enter_context(opt.clean())
            else:
                opt.eval()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_clean()


class _Hook:
    """What a module holds while it trains. A copied or pickled module has a callable of Python's own that does nothing
    in place of this, so that the copy neither takes the optimizer along nor needs flatkern."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _is_perturbed(module: torch.nn.Module, opt: FlatOptimizer) -> bool:
    """A frozen teacher is not: its `state_dict()` may come between a forward and its backward."""
    moved = opt.cycle.weights.partition
    return opt.is_perturbed and moved is not None and any(id(p) in moved.members for p in module.parameters())


class _Saving(_Hook):
    """Before a module's `state_dict()` between two passes: clean weights, until `_Saved` has copied them.

    Arguments:
        suspended: leads back; closed by the callback too, where a `state_dict()` has failed.
    """

    def __init__(self, optimizers: list[FlatOptimizer], suspended: ExitStack) -> None:
        self.optimizers = optimizers
        self.suspended = suspended
        self.outermost: tuple[torch.nn.Module, str] | None = None  # the call that found perturbed weights

    def __call__(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        # keep_vars asks for the parameters themselves, whatever they hold. Calls inside of this one find clean weights.
        perturbed = [] if keep_vars else [opt for opt in self.optimizers if _is_perturbed(module, opt)]
        if perturbed:
            self.outermost = module, prefix
            self.suspended.callback(self.forget)
            for opt in perturbed:
                self.suspended.enter_context(opt.clean())

    def forget(self) -> None:
        self.outermost = None


class _Saved(_Hook):
    """After it: copies, for the parameters themselves go back to where the next pass needs them."""

    def __init__(self, saving: _Saving) -> None:
        self.saving = saving

    def __call__(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if self.saving.outermost != (module, prefix):
            return
        shared: dict[int, Any] = {}  # what shares memory goes on to: tied weights are saved once
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, torch.Tensor):
                state[name] = copy.deepcopy(value, shared)
        self.saving.suspended.close()


def _copy_clean_weights(model: torch.nn.Module, optimizers: list[FlatOptimizer], suspended: ExitStack) -> list[Any]:
    """Hooks for the model and every part of it: adapters and backbones are saved on their own too."""
    saving = _Saving(optimizers, suspended)
    saved = _Saved(saving)
    handles: list[Any] = []
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # has no hooks; those of what it is a part of serve it
            handles.append(module.register_state_dict_pre_hook(saving))
            handles.append(module.register_state_dict_post_hook(saved))
    return handles


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _update_mask(
    trainer: Trainer, pl_module: LightningModule, opt: FlatOptimizer, mask_loss: MaskLoss, batch: Any
) -> None:
    with opt.clean(), frozen_running_stats(pl_module), torch.enable_grad():
        opt.zero_grad()
        with trainer.precision_plugin.train_step_context():
            loss = mask_loss(trainer.model, batch)
        trainer.strategy.backward(loss, None)  # scaled, and reduced over the ranks, as that of a training step
        opt.update_mask(_scaler(trainer))


def _check(trainer: Trainer, pl_module: LightningModule, opt: FlatOptimizer, mask_loss: MaskLoss | None) -> None:
    """Refuse what automatic optimization cannot carry."""
    if not pl_module.automatic_optimization:
        return
    name, method = opt.perturbation.name, opt.perturbation
    precision = trainer.precision_plugin
    if method.closures == "none":
        raise RuntimeError(
            f'FlatkernCallback: {name} has mix="losses", which weighs the losses in the training loop; use '
            'mix="gradients", or manual optimization (self.automatic_optimization = False)'
        )
    runs_closure = _scaler(trainer) is not None or type(precision).__name__ == "DeepSpeedPrecision"
    if runs_closure and method.moves and not method.rolling:
        raise RuntimeError(
            f"FlatkernCallback: under precision={precision.precision!r} Lightning runs training_step once, before "
            f"step(), and hands no closure on ({type(precision).__name__}), so that {name} gets no gradient at "
            'perturbed weights; use precision="bf16-mixed", manual optimization (self.automatic_optimization = False) '
            "with opt.perturb(scaler=self.trainer.precision_plugin.scaler) between two manual_backward() calls, or "
            f"{ROLLING}, which need one gradient"
        )
    _check_accumulation(trainer, pl_module, opt)
    _check_clipping(trainer, pl_module, opt)
    is_replicated = isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel)
    if opt.enhancement is not None and mask_loss is None and is_replicated:
        raise RuntimeError(
            "FlatkernCallback: DDP does not reduce a backward inside of training_step, so that IRE's masks would "
            "differ between the ranks; pass FlatkernCallback(mask_loss=lambda model, batch: "
            "flatkern.sampled_label_loss(model(batch[0])))"
        )


def _check_accumulation(trainer: Trainer, pl_module: LightningModule, opt: FlatOptimizer) -> None:
    method = opt.perturbation
    if not method.moves or method.accumulates or not pl_module.automatic_optimization:
        return
    if trainer.accumulate_grad_batches > 1:
        raise RuntimeError(
            f"FlatkernCallback: accumulate_grad_batches={trainer.accumulate_grad_batches}, but Lightning hands step() "
            f"the last micro-batch only, and {method.name} needs the perturbed gradients of all of them; use a larger "
            "batch with accumulate_grad_batches=1, manual optimization (self.automatic_optimization = False) with the "
            f"micro-batches in one training_step, or {ROLLING}, which accumulate"
        )


def _check_clipping(trainer: Trainer, pl_module: LightningModule, opt: FlatOptimizer) -> None:
    limit, method = trainer.gradient_clip_val, opt.perturbation
    if not limit:
        _check_own_clipping(trainer, pl_module, opt)
        return
    clip = f"FlatkernCallback: gradient_clip_val={limit!r}"
    remedy = f"pass max_grad_norm={limit!r} to the optimizer and leave gradient_clip_val out"
    if opt.max_grad_norm is not None:
        raise ValueError(
            f"{clip} of the Trainer and max_grad_norm={opt.max_grad_norm!r} of the optimizer, so that gradients would "
            "be clipped twice; leave gradient_clip_val out"
        )
    if _scaler(trainer) is not None:
        raise ValueError(
            f"{clip}, but under a GradScaler the optimizer unscales the gradients itself, and Lightning cannot clip "
            f"them before; {remedy}"
        )
    by_value = trainer.gradient_clip_algorithm == "value"
    if _clips_each_pass(method) or (method.ascends and by_value):
        warn(f"{clip} clips the gradient of each pass of {method.name}, not the one of the step; {remedy}")


def _clips_each_pass(method: NoPerturbation) -> bool:
    """The gradient at clean weights enters the update or the state, beside the other one. Along a plain SAM's it only
    ascends, and a limit of the norm leaves the direction as it is."""
    return method.has_clean_pass or method.uses_ascent_gradient


def _check_own_clipping(trainer: Trainer, pl_module: LightningModule, opt: FlatOptimizer) -> None:
    """What an override does cannot be known, so that it is warned of."""
    if not is_overridden("configure_gradient_clipping", pl_module):
        return
    method, problems = opt.perturbation, []
    if opt.max_grad_norm is not None:
        problems.append(f"clips beside max_grad_norm={opt.max_grad_norm!r} of the optimizer, so twice")
    if _clips_each_pass(method):
        problems.append(f"clips the gradient of each pass of {method.name}, not the one of the step")
    if _scaler(trainer) is not None:
        problems.append("finds scaled gradients under a GradScaler, since the optimizer unscales them itself")
    if problems:
        warn(
            f"FlatkernCallback: configure_gradient_clipping() of {type(pl_module).__name__}, if it clips, "
            f"{', and '.join(problems)}; pass max_grad_norm to the optimizer and leave the override out"
        )
