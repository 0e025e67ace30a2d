"""The loss of a model as a number, and its gradient; what a caller's loss may return."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from statistics import mean, stdev

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
# Relative, of two evaluations: a GPU's kernels may add float32 in another order, which is some 1e-7 of a loss.
SAME, SAME_ULPS = 1e-5, 4
REMEDY = (
    "fused attention: compute the loss inside of torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and load a Hugging "
    'Face model with attn_implementation="eager"; cuDNN\'s recurrent layers: inside of '
    "torch.backends.cudnn.flags(enabled=False); torch.compile: pass the model as it was before"
)


class UnrepeatableLoss(UserWarning):
    """loss(model) is not the same at every call, so that differences of it say nothing of the weights."""


def tensor_of(op: str, model: nn.Module, loss: Loss) -> Tensor:
    """`loss(model)`, refused unless it is one real number.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of one element.
    """
    found = loss(model)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{op}: loss(model) is {type(found).__name__}, but should be a tensor; return the loss before .item()"
        )
    if not found.is_floating_point():
        raise TypeError(f"{op}: loss(model) has dtype {found.dtype}, but should be floating point; return a loss")
    if found.numel() != 1:
        raise ValueError(
            f"{op}: loss(model) has shape {tuple(found.shape)}, but should be a scalar; reduce it by .mean()"
        )
    return found


def value(op: str, model: nn.Module, loss: Loss) -> float:
    """The loss as a number, which may be infinite or NaN."""
    with torch.no_grad():
        return tensor_of(op, model, loss).item()


def finite_value(op: str, model: nn.Module, loss: Loss) -> float:
    """The loss at the model's own weights.

    Raises:
        ValueError: infinite or NaN, so that nothing can be compared with it.
    """
    found = value(op, model, loss)
    refuse_nonfinite(op, found)
    return found


def repeated_value(op: str, model: nn.Module, loss: Loss) -> float:
    """`finite_value`, and a warning where a second evaluation in a row differs.

    By 1e-5 of it, or by 4 ulp of the weights' dtype where that is more: half precision is rounded as it is added up.
    """
    first, second = finite_value(op, model, loss), value(op, model, loss)
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    if not abs(first - second) <= max(SAME, SAME_ULPS * eps) * max(abs(first), abs(second)):
        text = (
            f"{op}: loss(model) is not the same at every call: {first:.6g}, then {second:.6g}; what is measured is not "
            "of the weights alone. Compute it of a fixed batch, without dropout or noise, and without changing weights "
            "or buffers that it depends on"
        )
        warnings.warn(text, UnrepeatableLoss, stacklevel=2)
    return first


def refuse_nonfinite(op: str, found: float) -> None:
    if not math.isfinite(found):
        raise ValueError(
            f"{op}: loss(model) is {found} at the model's own weights, but should be finite; look at its weights and "
            "at the batch"
        )


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Where a value is infinite or NaN the mean is, too, and the deviation is NaN; that of one value is 0."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def gradient(
    op: str, model: nn.Module, loss: Loss, params: list[Tensor], *, twice: bool = False
) -> tuple[float, list[Tensor | None]]:
    """The loss and its gradient; None where the loss does not depend on a parameter. `.grad` stays as it is.

    Arguments:
        twice: the gradient will be differentiated again.

    Raises:
        ValueError: the loss has no gradient, or is not finite.
        RuntimeError: with `twice`, it cannot be differentiated with a graph.
    """
    with torch.enable_grad():
        found = tensor_of(op, model, loss)
        refuse_nonfinite(op, found.item())
        grads: tuple[Tensor | None, ...] = (None,) * len(params)
        if found.requires_grad:
            with second_derivative(op) if twice else contextlib.nullcontext():
                grads = torch.autograd.grad(found.sum(), params, create_graph=twice, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(
            f"{op}: loss(model) has no gradient with respect to any parameter of the model; compute it from this "
            "model, without torch.no_grad(), .detach() or .item()"
        )
    return found.item(), list(grads)


@contextlib.contextmanager
def second_derivative(op: str) -> Iterator[None]:
    """torch's refusal to differentiate twice gets a name and the remedies; some come while the first graph is made."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError, too
        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"{op}: loss(model) should be differentiable twice, but torch says: {text}; {REMEDY}"
        ) from error
