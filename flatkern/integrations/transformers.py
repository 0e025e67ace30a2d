"""Hugging Face's Trainer: `FlatkernCallback` for methods of one gradient a step, `FlatkernTrainer` for those of two.

Of the Trainer only what is public is used or overridden.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..losses import sampled_label_loss
from ..optim.base import FlatOptimizer
from ..running_stats import frozen_running_stats
from ..schedules import PerturbationScheduler
from .shared import averaging_over_ranks, drop_step, replicas_in, unwrapped

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "flatkern.integrations.transformers: transformers.Trainer cannot be imported; "
        "pip install 'flatkern[transformers]'"
    ) from error

IGNORED_LABEL = -100  # of positions that are not in a loss, as everywhere in transformers
# Ways of distributing in which the gradients of a single pass are not in `.grad`.
REFUSED_TYPES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class FlatkernCallback(TrainerCallback):
    """What a flatkern optimizer needs of a Trainer: to follow its model, and values that change with its steps.

        opt = flatkern.AdamW(model.parameters(), lr=1e-4, perturb=flatkern.RWP(sigma=0.01, rolling=True))
        trainer = Trainer(model, args, ..., optimizers=(opt, None), callbacks=[FlatkernCallback()])

    A rolling optimizer follows the model while `train()` runs: perturbed weights in training forwards, clean ones in
    evaluations and checkpoints, and afterwards; a Trainer tells nobody of a training that has failed, so that they
    stay perturbed until `opt.eval()` then. ASAM gets the parameters' names from the model, unless it has some.
    In a `FlatkernTrainer` the callback is needed for schedules only, and any method goes.

    Arguments:
        schedules: by group key, a function of the Trainer's `global_step`, such as those of `flatkern.schedules`:
            `FlatkernCallback(sigma=cosine_increase(0.001, 10, total_steps))`. A step begins with its value; a rolling
            optimizer draws with it at the end of that step, for the next one, as with `PerturbationScheduler`.

    Raises:
        TypeError: a schedule is not callable. In `train()`: the optimizer is none of flatkern's.
        ValueError: in `train()`: no group has a schedule's key.
        RuntimeError: in `train()` of a Trainer that is no FlatkernTrainer: the method takes more than one gradient a
            step, or perturbs in calls that nobody makes.

    Warns:
        UserWarning: the optimizer has max_grad_norm, and the Trainer clips, too.
    """

    def __init__(self, **schedules: Callable[[int], float]) -> None:
        for key, schedule in schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"FlatkernCallback: {key} is {schedule!r}, but should be a function of the step number; "
                    "a value that does not change is an argument of the method"
                )
        self.trainer_runs_passes = False  # True while train() of a FlatkernTrainer runs
        self._schedules = schedules
        self._schedulers: list[PerturbationScheduler] = []
        self._optimizer: FlatOptimizer | None = None
        self._followed: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.end()  # of a training that an exception has ended
        opt = optimizer_of(optimizer)
        if self.trainer_runs_passes:
            check_rounds(opt, args.gradient_accumulation_steps)
        else:
            check_one_pass(opt)
            if opt.max_grad_norm is not None and args.max_grad_norm:
                warnings.warn(
                    f"FlatkernCallback: gradients are clipped twice, by args.max_grad_norm={args.max_grad_norm} and by "
                    f"the optimizer's max_grad_norm={opt.max_grad_norm}; set args.max_grad_norm=0.0",
                    stacklevel=2,
                )
        self._schedulers = [PerturbationScheduler(opt, key, f) for key, f in self._schedules.items()]
        if any(g.get("adaptive", False) is None and "param_names" not in g for g in opt.param_groups):
            opt.name_parameters(model)
        self._optimizer = opt
        if opt.rolling:
            self._followed = opt.follow(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for scheduler in self._schedulers:
            scheduler.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def end(self) -> None:
        """Clean weights, and nobody is followed any more. A second call does nothing."""
        opt, followed = self._optimizer, self._followed
        self._optimizer = self._followed = None
        self._schedulers = []
        if opt is not None:
            opt.eval()
        if followed is not None:
            followed.remove()


class FlatkernTrainer(Trainer):
    """A Trainer that runs the passes of every method.

        opt = flatkern.AdamW(model.parameters(), lr=1e-4, perturb=flatkern.SAM(rho=0.05, rounds="sum"))
        FlatkernTrainer(model, args, ..., optimizers=(opt, None)).train()

    A step has N = `gradient_accumulation_steps` micro-batches, fewer in the last one of an epoch. Its passes:

        SAM, ASAM,      two on every micro-batch: a round each, which is mSAM where N > 1; of `interval` and LookSAM's
        GSAM, LookSAM,  `k` one on every micro-batch of a step between two ascents
        FriendlySAM
        m-RWP, m-ARWP   one on every micro-batch, the first ceil(N / 2) at clean weights, the others at noisy ones;
                        N = 1: one on the first half of the batch's rows, clean, and one on the others, noisy, each of
                        which counts as a batch; both on all of it where it cannot be halved (a single row)
        RWP, ARWP,      one on every micro-batch, all at the same perturbed weights (`rolling=True` needs no
        MomentumSAM     FlatkernTrainer)
        IRE             those of its method, and before them, where the mask is due, one with sampled labels on the
                        first micro-batch

    The Trainer divides losses by the number of micro-batches or of their tokens, so the method needs `rounds="sum"`
    (those that ascend do without where N = 1). Second passes leave running statistics alone. Under DDP the ascent of
    SAM and ASAM is that of a rank's own batch (mSAM over ranks); what is averaged over the ranks is the last perturbed
    backward, m-RWP's last clean one, IRE's, and every ascent's of methods that use its gradient further: SAM and ASAM
    with `lam`, GSAM, FriendlySAM, LookSAM. The logged loss is that of the first pass on every micro-batch, or of both
    halves of one; `compute_loss` runs in every pass. While `train()` runs, `args.max_grad_norm` is the optimizer's,
    too, which clips the final, mixed gradient in the Trainer's place, and the logged `grad_norm` is the norm of that
    one before clipping (of methods that mix two, without a limit: none is logged). `evaluate()`, `predict()` and
    `save_model()` see clean weights inside of a step, too. A step that fails, and a training that fails, leaves clean
    weights.

    Other Trainers are combined with it by inheritance: `class SAMTrainer(FlatkernTrainer, Seq2SeqTrainer): pass`.

    Raises, all in `train()`:
        TypeError: the optimizer is none of flatkern's. IRE: the model returns no logits.
        ValueError: rounds="mean" where losses are divided; another mix than "gradients"; two different limits in
            `args.max_grad_norm` and the optimizer's.
        RuntimeError: FSDP or DeepSpeed, with a method that needs more than one pass.
    """

    _micro_batch = 0  # of the window: the micro-batches of a step
    _micro_batches = 1
    _ascends = False  # the step has ascents
    _clipping: tuple[FlatOptimizer, float | None] | None = None  # the optimizer that clips, and its own limit

    # --- what the Trainer calls --------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, FlatkernCallback)]
        if not callbacks:
            callbacks = [FlatkernCallback()]
            self.add_callback(callbacks[0])
        for callback in callbacks:
            callback.trainer_runs_passes = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._return_clipping()
            opt = unwrapped(self.optimizer)
            if isinstance(opt, FlatOptimizer) and has_unfinished_step(opt):
                drop_step(opt)
            for callback in callbacks:
                callback.trainer_runs_passes = False
                callback.end()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_unless_the_optimizer_does(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            if self._clipping is None or max_norm not in (self.args.max_grad_norm, float("inf")):
                return clip(parameters, max_norm, *args, **kwargs)
            opt, _ = self._clipping
            if opt.max_grad_norm is not None:
                return torch.tensor(float("nan"))  # not known before the step; log() has it
            # Where two are mixed, `.grad` holds the perturbed one alone, whose norm means nothing.
            return None if opt.perturbation.mixes else clip(parameters, max_norm, *args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_unless_the_optimizer_does

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batch, self._micro_batches = 0, len(samples)
        return samples, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        opt = optimizer_of(self.optimizer)
        try:
            if self._micro_batch == 0:
                self._begin_step(opt, model, inputs)
            loss = self._run_passes(opt, model, inputs, num_items_in_batch)
        except BaseException:
            drop_step(opt)
            raise
        self._micro_batch += 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and self._clipping is not None:
            opt, _ = self._clipping
            if opt.max_grad_norm is not None and opt.grad_norm is not None:
                logs = {**logs, "grad_norm": opt.grad_norm.item()}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._clean_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._clean_weights():
            super().save_model(*args, **kwargs)

    def _clean_weights(self) -> AbstractContextManager[None]:
        """Inside of a step, where a callback may evaluate; the step goes on afterwards. Followed models need it not."""
        opt = unwrapped(self.optimizer)
        is_perturbed = isinstance(opt, FlatOptimizer) and opt.is_perturbed and not opt.rolling
        return opt.clean() if is_perturbed else nullcontext()

    # --- passes ------------------------------------------------------------------------------------

    def _begin_step(self, opt: FlatOptimizer, model: Any, inputs: Any) -> None:
        kind = self.accelerator.distributed_type.value
        if kind in REFUSED_TYPES and needs_passes(opt):
            raise RuntimeError(
                f"FlatkernTrainer: the model is distributed by {kind}, where a single pass leaves no gradients to "
                "perturb by; use DDP, or flatkern.RWP(rolling=True) or MomentumSAM(rolling=True) with FlatkernCallback"
            )
        if has_unfinished_step(opt):
            warnings.warn(
                "FlatkernTrainer: the last micro-batches were not followed by optimizer.step(), because the data ended "
                "or a callback stopped the epoch inside of a step; their gradients are dropped",
                stacklevel=3,
            )
            drop_step(opt)
        self._take_over_clipping(opt)
        self._ascends = opt.perturbation.ascends and opt.perturb_due
        if opt.mask_due:
            self._update_mask(opt, model, inputs)

    def _take_over_clipping(self, opt: FlatOptimizer) -> None:
        """The Trainer would clip what is in `.grad` before the step: of two that are mixed only the perturbed one."""
        if self._clipping is None or self._clipping[0] is not opt:
            self._return_clipping()
            self._clipping = opt, opt.max_grad_norm
        limit, own = self.args.max_grad_norm, self._clipping[1]
        if limit and own not in (None, limit):
            raise ValueError(
                f"FlatkernTrainer: args.max_grad_norm is {limit} and the optimizer's max_grad_norm is {own}; give one "
                "of them, and args.max_grad_norm=0.0 (its default is 1.0) for the other"
            )
        opt.max_grad_norm = limit or own

    def _return_clipping(self) -> None:
        if self._clipping is not None:
            opt, opt_limit = self._clipping
            opt.max_grad_norm, self._clipping = opt_limit, None

    def _run_passes(self, opt: FlatOptimizer, model: Any, inputs: Any, items: Any) -> Any:
        """The passes on one micro-batch; after the last one only `step()` is missing."""
        perturbation, scaler = opt.perturbation, self.accelerator.scaler
        k, n = self._micro_batch, self._micro_batches
        if self._ascends:
            replicas, synchronized = replicas_in(model), perturbation.uses_ascent_gradient
            with averaging_over_ranks(replicas, synchronized):
                loss = super().training_step(model, inputs, items)
            opt.perturb(scaler)
            with averaging_over_ranks(replicas, k == n - 1), frozen_running_stats(model):
                super().training_step(model, inputs, items)
            if k < n - 1:
                opt.restore()
            return loss
        if perturbation.has_clean_pass and n == 1:
            return self._run_halves(opt, model, inputs, items)
        if perturbation.has_clean_pass:
            clean = (n + 1) // 2
            if k < clean:
                with averaging_over_ranks(replicas_in(model), k == clean - 1):
                    return super().training_step(model, inputs, items)
            if k == clean:
                opt.perturb(scaler)
                opt.passes = clean, n - clean
            with averaging_over_ranks(replicas_in(model), k == n - 1), frozen_running_stats(model):
                return super().training_step(model, inputs, items)
        if perturbation.starts_perturbed and k == 0:
            opt.perturb(scaler)
        return super().training_step(model, inputs, items)

    def _run_halves(self, opt: FlatOptimizer, model: Any, inputs: Any, items: Any) -> Any:
        """m-RWP with a single micro-batch: half of the rows at clean weights, the others at noisy ones.

        A half counts its own items. So its loss is its mean, whether `compute_loss` divides by items or takes the mean
        itself, and the Trainer, which divides by one at most, need not know which.
        """
        *batches, rows = halves(inputs)
        opt.passes = 1, 1
        compute_loss = self.compute_loss
        losses: list[Tensor] = []
        for half, count in zip(batches, rows, strict=True):
            if items is not None:
                _, items = super().get_batch_samples(iter([half]), 1, self.args.device)
                items = torch.as_tensor(items).clamp(min=1)  # rows whose labels are all ignored: 0 / 1, not 0 / 0
            is_noisy = bool(losses)
            if is_noisy:
                opt.perturb(self.accelerator.scaler)
            with (
                self._loss_by(lambda *args, **kwargs: _halved(compute_loss(*args, **kwargs))),
                averaging_over_ranks(replicas_in(model), True),
                frozen_running_stats(model) if is_noisy else nullcontext(),
            ):
                losses.append(super().training_step(model, half, items) * (2 * count / sum(rows)))
        return losses[0] + losses[1]

    def _update_mask(self, opt: FlatOptimizer, model: Any, inputs: Any) -> None:
        """IRE: a pass of its own at clean weights, by the Trainer's step with another loss."""

        def loss_of_sampled_labels(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return sampled_label_loss(self.logits_for_mask(self.outputs_for_mask(model, inputs), inputs))

        with self._loss_by(loss_of_sampled_labels), opt.clean(), frozen_running_stats(model):
            with averaging_over_ranks(replicas_in(model), True):
                super().training_step(model, inputs)
            opt.update_mask(self.accelerator.scaler)

    @contextmanager
    def _loss_by(self, compute_loss: Callable[..., Any]) -> Iterator[None]:
        """On the instance, so that it precedes those of derived classes."""
        own = vars(self).get("compute_loss")
        self.compute_loss = compute_loss
        try:
            yield
        finally:
            del self.compute_loss
            if own is not None:
                self.compute_loss = own

    def outputs_for_mask(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """IRE: what `logits_for_mask` gets: `model(**inputs)`, without inputs that its forward does not take.

        To be overridden with the forward of your `compute_loss`, where that is another one.
        """
        taken = inspect.signature(self.model.forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in taken):
            return model(**inputs)
        names = {p.name for p in taken}
        return model(**{key: value for key, value in inputs.items() if key in names})

    def logits_for_mask(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """IRE: the logits that labels are drawn for, shape (..., classes). To be overridden where a model has others.

        `outputs["logits"]`, at the positions that are in the loss where `inputs["labels"]` has one for each.

        Raises:
            TypeError: the model returns none.
            ValueError: there is a single class, so that a label drawn from it tells nothing.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"FlatkernTrainer: IRE draws labels from outputs['logits'], but the model returns "
                f"{type(outputs).__name__} without; override FlatkernTrainer.logits_for_mask"
            )
        if logits.shape[-1] < 2:
            raise ValueError(
                f"FlatkernTrainer: IRE draws labels from the model's logits, which have shape {tuple(logits.shape)}, "
                "but should be (..., classes); of a regression override FlatkernTrainer.logits_for_mask"
            )
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.shape != logits.shape[:-1]:
            return logits
        if getattr(getattr(self.model, "loss_function", None), "__name__", "") == "ForCausalLMLoss":
            logits, labels = logits[..., :-1, :], labels[..., 1:]  # a position predicts the next label
        chosen = logits[labels != IGNORED_LABEL]
        return chosen if len(chosen) else logits


def optimizer_of(optimizer: Any) -> FlatOptimizer:
    """The flatkern optimizer of a Trainer.

    Raises:
        TypeError: there is none.
    """
    opt = unwrapped(optimizer)
    if not isinstance(opt, FlatOptimizer):
        raise TypeError(
            f"FlatkernCallback: the Trainer's optimizer is {type(opt).__name__}, but should be one of flatkern's; "
            "pass Trainer(..., optimizers=(flatkern.AdamW(model.parameters(), ...), None))"
        )
    return opt


def needs_passes(opt: FlatOptimizer) -> bool:
    """True if `step()` alone is not the method: somebody has to perturb, or to update a mask."""
    return opt.mask.exists or (opt.perturbation.moves and not opt.rolling)


def check_one_pass(opt: FlatOptimizer) -> None:
    """Refuse what a Trainer that only calls `step()` cannot do."""
    if needs_passes(opt):
        perturbation = opt.perturbation
        explicit = perturbation.moves and not opt.rolling
        name = perturbation.name if explicit else "IRE"
        may_roll = explicit and (perturbation.draws or perturbation.starts_perturbed)
        rolling = f", or perturb=flatkern.{name}(rolling=True)" if may_roll else ""
        raise RuntimeError(
            f"FlatkernCallback: {name} needs more than the optimizer.step() of a Trainer; use "
            f"flatkern.integrations.transformers.FlatkernTrainer in its place{rolling}"
        )


def check_rounds(opt: FlatOptimizer, accumulation: int) -> None:
    """Refuse a method that would weigh the gradients of losses which the Trainer has divided as if it had not."""
    if opt.method is None or opt.rolling:
        return
    mix = getattr(opt.method, "mix", "gradients")
    if mix != "gradients":
        raise ValueError(
            f'FlatkernTrainer: the method has mix="{mix}", whose losses are multiplied by opt.loss_weight, and nobody '
            'does that here; pass mix="gradients", rounds="sum"'
        )
    perturbation = opt.perturbation
    if (perturbation.has_clean_pass or (perturbation.ascends and accumulation > 1)) and not perturbation.sums:
        raise ValueError(
            'FlatkernTrainer: the method has rounds="mean", but the Trainer divides the losses of '
            f'micro-batches; pass perturb=flatkern.{perturbation.name}(..., rounds="sum")'
        )


def has_unfinished_step(opt: FlatOptimizer) -> bool:
    """True if passes have run that no `step()` has used."""
    ledger = opt.cycle.gradients
    perturbed = opt.is_perturbed and not opt.rolling
    return perturbed or ledger.is_pending or ledger.was_given(opt.cycle.groups.params())


def halves(inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[int, int]]:
    """The first and the second half of a batch's rows, and how many rows each has.

    Twice the whole batch where it cannot be halved: a single row, or a tensor that has neither the batch's number of
    rows nor one, or tensors inside of something.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    rows = max(map(len, tensors), default=0)
    is_odd = any(isinstance(v, Mapping) for v in inputs.values()) or any(len(v) not in (1, rows) for v in tensors)
    if rows < 2 or is_odd:
        return inputs, inputs, (1, 1)
    first = (rows + 1) // 2

    def part(rows_of: slice) -> dict[str, Any]:
        return {
            key: v[rows_of] if isinstance(v, (Tensor, list, tuple)) and _length(v) == rows else v
            for key, v in inputs.items()
        }

    return part(slice(first)), part(slice(first, None)), (first, rows - first)


def _halved(loss: Any) -> Any:
    """Of two passes, each a half of the gradient; it may come with outputs."""
    return (loss[0] / 2, *loss[1:]) if isinstance(loss, tuple) else loss / 2


def _length(value: Any) -> int:
    return 0 if isinstance(value, Tensor) and not value.dim() else len(value)
