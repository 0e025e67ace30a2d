"""Refusals and warnings that several parts share. Every function takes plain values, never an optimizer."""

from __future__ import annotations

import warnings


def refuse_while_perturbed(call: str, way_back: str) -> None:
    raise RuntimeError(f"{call}: the weights are perturbed; call {way_back} first")


def refuse_while_suspended(call: str) -> None:
    raise RuntimeError(f"{call}: inside clean() a perturbation is suspended; leave the with block first")


def refuse_while_pending(call: str) -> None:
    raise RuntimeError(
        f"{call}: gradients of an unfinished step are pending; call step(), or release() to drop them, first"
    )


def refuse_lost_sum() -> None:
    raise RuntimeError(
        "step: .grad was cleared after this round had added its gradient to the sum of earlier rounds, and the two "
        "cannot be parted again; drop the rounds by restore() and release(). Between rounds call opt.zero_grad(), "
        "which keeps the sum, not model.zero_grad()"
    )


def warn_never_perturbed(optimizer: str, method: str, pattern: str) -> None:
    warnings.warn(
        f"{optimizer} has {method} but has not perturbed in its first 10 steps, "
        f"so it is the plain base optimizer; the expected pattern is: {pattern}",
        UserWarning,
        stacklevel=5,
    )


def warn_rounded_away(method: str, moved: int, total: int) -> None:
    """SAM's ascent on bfloat16 weights is often below half an ulp."""
    warnings.warn(
        f"{method} ascends on bfloat16 weights: {moved / total:.0%} of {total} weights moved; "
        "for the rest the step is below half an ulp; float32 weights under autocast are perturbed fully",
        UserWarning,
        stacklevel=5,
    )


def warn_unnamed(method: str) -> None:
    """ASAM's authors scale norm layers' weights, and without names nobody knows them from biases."""
    warnings.warn(
        f"{method} scales the ascent of every parameter whose name contains 'weight', but the names are unknown, so "
        "that norm layers' weights are taken for biases: it scales tensors of two and more dimensions only; pass "
        "model.named_parameters() to the optimizer, or call opt.name_parameters(model)",
        UserWarning,
        stacklevel=11,
    )


def warn_never_masked(optimizer: str) -> None:
    warnings.warn(
        f"{optimizer} has IRE, but its mask was not updated in the first 10 steps, so it is the plain base optimizer; "
        "the expected pattern is: if opt.mask_due: flatkern.sampled_label_loss(model(x)).backward(); opt.update_mask()",
        UserWarning,
        stacklevel=6,
    )


def warn_keys_of_the_base(keys: list[str]) -> None:
    """They may as well have been meant for us."""
    ours = ", ".join(f"perturb_{key}" for key in keys)
    warnings.warn(
        f"Wrap: the base's groups have {', '.join(keys)}, so these are the base's values; ours are {ours}",
        UserWarning,
        stacklevel=4,
    )


def warn_starts_empty(what: str) -> None:
    warnings.warn(f"load_state_dict: the checkpoint has no {what}; it starts empty", UserWarning, stacklevel=7)
