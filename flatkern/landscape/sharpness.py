"""How much the loss rises around a model's weights: on average under RWP's noise, and after SAM's ascent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..dispatch import call
from ..tables import same_layout
from ..values import check_uint32, check_value
from .curves import nothing
from .evaluation import Loss, gradient, mean_and_std, repeated_value, value
from .weights import Weights, moving_weights


@dataclass(frozen=True)
class AverageSharpness:
    """E[L(w + e)] - L(w), estimated.

    Fields:
        loss: L(w).
        increase: the mean of L(w + e) - L(w) over the draws.
        standard_error: of that mean: the standard deviation over the draws, divided by sqrt(draws).
        sigma, draws: of the noise.
    """

    loss: float
    increase: float
    standard_error: float
    sigma: float
    draws: int


@dataclass(frozen=True)
class AscentSharpness:
    """L(w + rho g / ||g||) - L(w).

    Fields:
        loss: L(w).
        increase: of it by the ascent.
        gradient_norm: ||g||_2, over all parameters that require grad.
        rho: the ascent's length.
    """

    loss: float
    increase: float
    gradient_norm: float
    rho: float


def average_sharpness(
    model: nn.Module,
    loss: Loss,
    *,
    sigma: float = 0.01,
    draws: int = 20,
    seed: int = 0,
    backend: str | None = None,
    tick: Callable[[], None] = nothing,
) -> AverageSharpness:
    """How much the loss rises on average under filter-wise Gaussian noise: what RWP makes small.

        E[L(w + e)] - L(w),    e_f = sigma ||w_f||_2 z,    z ~ N(0, 1)

    All parameters that require grad are moved, those of rank <= 1 as one filter each, as RWP does. Of the same seed
    every model of equal shapes meets the same z. What is kept and restored is as in `line`.

    Arguments:
        loss: as in `line`.
        sigma: standard deviation of the noise relative to a filter's norm, RWP's.
        draws: at least two.
        seed, backend, tick: as in `line`.

    Raises:
        TypeError, ValueError, RuntimeError: as `line`.
        ValueError: the loss is not finite under one of the draws.

    Warns:
        UnrepeatableLoss: as `line`.

    Source: Li et al. 2024 (arXiv:2404.00357), eq. 5.
    """
    op = "average_sharpness"
    check_value("sigma", sigma, op, tensors=False)
    check_uint32(op, "draws", draws, least=2)
    check_uint32(op, "seed", seed)

    def work(weights: Weights) -> AverageSharpness:
        base, increases = repeated_value(op, model, loss), []
        for number in range(draws):
            weights.add_noise(float(sigma), seed, number)
            at = f"in draw {number} of the noise of sigma {sigma:g}; take a smaller sigma"
            increases.append(finite_nearby(op, model, loss, at) - base)
            weights.restore()
            tick()
        increase, std = mean_and_std(increases)
        return AverageSharpness(base, increase, std / math.sqrt(draws), float(sigma), draws)

    return moving_weights(op, model, backend, work)


def ascent_sharpness(model: nn.Module, loss: Loss, *, rho: float = 0.05, backend: str | None = None) -> AscentSharpness:
    """How much the loss rises after one step along the gradient: what SAM makes small.

        L(w + e) - L(w),    e = rho g / ||g||_2,    g = dL/dw

    To first order e is the worst perturbation of length rho; the norm is taken over all parameters that require grad.
    Kept are a copy of the weights and the gradient. What is restored is as in `line`.

    Arguments:
        loss: as in `line`; it must have a gradient.
        rho: SAM's radius.
        backend: as `perturb_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `line`.
        ValueError: the gradient, or the loss after the ascent, is not finite.

    Warns:
        UnrepeatableLoss: as `line`.

    Source: Foret et al. 2021 (SAM, arXiv:2010.01412), eq. 2.
    """
    op = "ascent_sharpness"
    check_value("rho", rho, op, tensors=False)

    def work(weights: Weights) -> AscentSharpness:
        base = repeated_value(op, model, loss)
        _, grads = gradient(op, model, loss, weights.params)
        pairs = [(p, laid_out_as(p, g)) for p, g in zip(weights.params, grads, strict=True) if g is not None]
        norm = ascend(op, [p for p, _ in pairs], [g for _, g in pairs], float(rho), backend)
        at = f"after the ascent of rho {rho:g}; take a smaller rho"
        return AscentSharpness(base, finite_nearby(op, model, loss, at) - base, norm, float(rho))

    return moving_weights(op, model, backend, work)


def finite_nearby(op: str, model: nn.Module, loss: Loss, at: str) -> float:
    """The loss at perturbed weights.

    Raises:
        ValueError: infinite or NaN, with which a difference is no number; `at` completes the sentence.
    """
    found = value(op, model, loss)
    if not math.isfinite(found):
        raise ValueError(f"{op}: loss(model) is {found}, but should be finite, at the perturbed weights {at}")
    return found


def laid_out_as(p: Tensor, grad: Tensor) -> Tensor:
    """A gradient as the kernels walk it: dense, in its parameter's memory format."""
    grad = grad.detach().to_dense() if grad.layout != torch.strided else grad.detach()
    return grad if same_layout(grad, p) else torch.empty_like(p, requires_grad=False).copy_(grad)


@torch.no_grad()
def ascend(op: str, params: list[Tensor], grads: list[Tensor], rho: float, backend: str | None) -> float:
    """w <- w + rho g / ||g||_2 with SAM's kernels; returns the norm, which is that of all devices.

    Raises:
        ValueError: the norm is not finite; nothing has been written.
    """
    devices = {p.device: [k for k, q in enumerate(params) if q.device == p.device] for p in params}
    norms = []
    for device, which in devices.items():
        norms.append(torch.zeros((), dtype=torch.float32, device=device))
        plain = {"eta": [-1.0] * len(which), "sigma": [0.0] * len(which)}
        call("ascent_norm_", device.type, backend, norms[-1], None, [grads[k] for k in which], None, **plain)
    norm = math.hypot(*(each.item() for each in norms))
    if not math.isfinite(norm):
        raise ValueError(f"{op}: the gradient's norm is {norm}, but should be finite; look at the loss and the batch")
    for device, which in devices.items():
        n = len(which)
        call(
            "perturb_ascent_", device.type, backend, [params[k] for k in which], None, None, None,
            [grads[k] for k in which], None, torch.tensor(norm, dtype=torch.float32, device=device),
            rho=[rho] * n, eta=[-1.0] * n, sigma=[0.0] * n, momentum=[0.0] * n,
        )  # fmt: skip
    return norm
