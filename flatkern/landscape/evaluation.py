"""The loss of a model as a number, and its gradient; what a caller's loss may return."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


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
    """
    with torch.enable_grad():
        found = tensor_of(op, model, loss)
        refuse_nonfinite(op, found.item())
        grads: tuple[Tensor | None, ...] = (None,) * len(params)
        if found.requires_grad:
            grads = torch.autograd.grad(found.sum(), params, create_graph=twice, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(
            f"{op}: loss(model) has no gradient with respect to any parameter of the model; compute it from this "
            "model, without torch.no_grad(), .detach() or .item()"
        )
    return found.item(), list(grads)
