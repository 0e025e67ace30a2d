"""Refusals and warnings that several parts share. Every function takes plain values, never an optimizer."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

from ..pages import page

# What lies between a warning and the user's line: our calls, torch's wrappers of them, context managers.
_OURS = tuple(os.path.dirname(path) + os.sep for path in (os.path.dirname(__file__), torch.__file__))
_BETWEEN = (*_OURS, contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning that names the line of the user's that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def refuse_while_perturbed(call: str, way_back: str) -> None:
    raise RuntimeError(f"{call}: the weights are perturbed; call {way_back} first")


def refuse_while_suspended(call: str) -> None:
    raise RuntimeError(
        f"{call}: inside clean() the weights stay as they are; leave the with block first (between the micro-batches "
        "of flatkern.integrations.accelerate: step.drop_window())"
    )


def refuse_while_pending(call: str) -> None:
    raise RuntimeError(
        f"{call}: gradients of an unfinished step are pending; call step(), or release() to drop them, first"
    )


def refuse_lost_sum() -> None:
    raise RuntimeError(
        "step: .grad was cleared after this round had added its gradient to the sum of earlier rounds, and the two "
        "cannot be parted again; drop the rounds by restore() and release(). Between rounds call opt.zero_grad(), "
        f"which keeps the sum, not model.zero_grad(); {page('cycle', 'gradients')}"
    )


def refuse_scaled_ascent(method: str) -> None:
    raise RuntimeError(
        f"step: {method} under a GradScaler needs perturb(scaler=scaler), which unscales the gradient at the clean "
        "weights; the scaler does not see it in step()"
    )


def refuse_unused_gradient(method: str, pattern: str) -> None:
    raise RuntimeError(
        f"perturb: there is a gradient in .grad that no step has used, and {method} has one gradient, taken at the "
        "perturbed weights, so it would be lost; call opt.zero_grad() if it is not wanted. "
        f"The pattern is: {pattern}; {page('cycle', 'gradients')}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_lost_write(names: list[str]) -> None:
    raise RuntimeError(
        f"step: others have written to {_listed(names)} since it was perturbed, and the clean weights would undo "
        "that; write inside `with opt.clean():`, or call restore() (rolling: eval()) before the write. Where a forward "
        'writes, as that of Embedding(max_norm=...), set the group key writes="drop": such a write then goes with the '
        f"perturbation. Now restore() or eval() keeps what was written; {page('cycle', 'writes')}"
    )


def refuse_captured_perturbation(names: list[str]) -> None:
    raise RuntimeError(
        f"step: {_listed(names)} was perturbed inside a CUDA graph, and does not hold what the last replay drew: the "
        "capture failed, or no replay came since, or others have written to it; restore() keeps what is there; "
        f"{page('gpu', 'graphs')}"
    )


def refuse_unseen_write(names: list[str]) -> None:
    raise RuntimeError(
        f"eval: {_listed(names)} holds other values than were drawn, so others have written to its .data; the "
        f"perturbation has ended, and what was written stays. Write inside `with opt.clean():`; "
        f"{page('cycle', 'writes')}"
    )


def warn_left_as_written(names: list[str]) -> None:
    warn(
        f"others have written to {_listed(names)} since it was perturbed; an ascent cannot be taken out of that, so it "
        f"stays as it is; write inside `with opt.clean():`; {page('cycle', 'writes')}"
    )


def warn_never_perturbed(optimizer: str, method: str, pattern: str) -> None:
    warn(
        f"{optimizer} has {method} but has not perturbed in its first 10 steps, "
        f"so it is the plain base optimizer; the expected pattern is: {pattern}; {page('cycle', 'gradients')}"
    )


def refuse_lost_model(model: str) -> None:
    raise RuntimeError(
        f"step: the followed {model} holds none of the optimizer's parameters any more, so that its forwards have no "
        "noise: something has replaced them (DeepSpeed's ZeRO does, as do fully_shard() and "
        "load_state_dict(assign=True)); make the optimizer on the parameters that the model has now and follow() then, "
        f"or remove() the handle; {page('cycle', 'following')}"
    )


def refuse_sharded_later() -> None:
    raise RuntimeError(
        "follow: fully_shard() came after follow(model), so that a forward gathers the weights before the noise is "
        "switched; follow the sharded model: opt.follow(model) behind fully_shard(), or behind accelerator.prepare(); "
        f"{page('ranks', 'fsdp2')}"
    )


def warn_never_followed(steps: int, trained: bool) -> None:
    called = (
        "train() was called before each of them, but never eval()"
        if trained
        else ("neither train() nor eval() was called")
    )
    warn(
        f"step: {steps} steps of a rolling optimizer, which leave the noise on in evaluations and checkpoints: nothing "
        f"follows a model, and {called}; call opt.follow(model) once"
        + (", or pass callbacks=[FlatkernCallback()] to Hugging Face's Trainer" if trained else "")
        + f"; {page('cycle', 'following')}"
    )


def warn_no_followed_forward(model: str, steps: int) -> None:
    warn(
        f"step: {steps} steps, but no forward of the followed {model} ran (Lightning calls training_step(), other "
        "loops call a part of the model), so that the noise stays on in evaluations; follow the module whose forward "
        "runs, or call opt.train() and opt.eval(). If it was compiled and had run before follow(), the graph may know "
        f"nothing of it: call torch.compiler.reset() once; {page('cycle', 'following')}"
    )


def warn_always_in_eval_mode(model: str, steps: int) -> None:
    warn(
        f"step: the followed {model} was in eval mode in the forwards of the last {steps} steps, so that there was no "
        "noise: these were steps of the base optimizer; call model.train() for training (and eval() on the parts that "
        f"should stay in eval mode); {page('cycle', 'following')}"
    )


def warn_rounded_away(method: str, moved: int, total: int) -> None:
    """SAM's ascent on bfloat16 weights is often below half an ulp."""
    warn(
        f"{method} ascends on bfloat16 weights: {moved / total:.0%} of {total} weights moved; "
        "for the rest the step is below half an ulp; float32 weights under autocast are perturbed fully; "
        f"{page('numerics', 'half-precision')}"
    )


def warn_unnamed(method: str) -> None:
    """ASAM's authors scale norm layers' weights, and without names nobody knows them from biases."""
    warn(
        f"{method} scales the ascent of every parameter whose name contains 'weight', but the names are unknown, so "
        "that norm layers' weights are taken for biases: it scales tensors of two and more dimensions only; pass "
        "model.named_parameters() to the optimizer, or call opt.name_parameters(model); "
        f"{page('methods', 'sam-and-asam')}"
    )


def warn_never_masked(optimizer: str) -> None:
    warn(
        f"{optimizer} has IRE, but its mask was not updated in the first 10 steps, so it is the plain base optimizer; "
        "the expected pattern is: if opt.mask_due: flatkern.sampled_label_loss(model(x)).backward(); opt.update_mask()"
        f"; {page('methods', 'ire')}"
    )


def warn_keys_of_the_base(keys: list[str]) -> None:
    """They may as well have been meant for us."""
    ours = ", ".join(f"perturb_{key}" for key in keys)
    warn(f"Wrap: the base's groups have {', '.join(keys)}, so these are the base's values; ours are {ours}")


def warn_starts_empty(what: str) -> None:
    warn(f"load_state_dict: the checkpoint has no {what}; it starts empty; {page('cycle', 'checkpoints')}")
