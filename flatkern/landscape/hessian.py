"""The largest eigenvalue of the loss's Hessian, by power iteration on products of the Hessian with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import perturb_
from ..tables import filters
from ..values import check_uint32, check_value
from .curves import POSITIVE, nothing
from .evaluation import Loss, gradient
from .weights import START, resting_weights

Product = Callable[[list[Tensor]], list[Tensor]]
REMEDY = (
    "fused attention: compute the loss inside of torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and load a Hugging "
    'Face model with attn_implementation="eager"; cuDNN\'s recurrent layers: inside of '
    "torch.backends.cudnn.flags(enabled=False); torch.compile: pass the model as it was before"
)


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue of the Hessian.

    Fields:
        value: v^T H v of the last v, a vector of length 1: the eigenvalue where `converged`, and where not, a number
            that it is not below.
        dominant: the eigenvalue of largest magnitude: `value`, or a negative one; None where that is not known.
        residual: ||H v - value v||_2; an eigenvalue is that close to `value`.
        products: of the Hessian with a vector, each of the price of two gradients.
        converged: whether the residual is below the tolerance.
        loss: at the model's weights.
    """

    value: float
    dominant: float | None
    residual: float
    products: int
    converged: bool
    loss: float


@dataclass(frozen=True)
class Iteration:
    """Where a power iteration ended: v^T H v, ||H v||, the residual, and the products that it took."""

    value: float
    length: float
    residual: float
    products: int
    converged: bool


def largest_eigenvalue(
    model: nn.Module,
    loss: Loss,
    *,
    tolerance: float = 0.01,
    iterations: int = 200,
    seed: int = 0,
    tick: Callable[[], None] = nothing,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the loss, over all parameters that require grad.

        v <- (H - s I) v / ||(H - s I) v||_2,    value = v^T H v,    until ||H v - value v|| <= tolerance |value - s|

    H v is the gradient of g^T v, by autograd; the graph of g is kept, so that the loss is computed once. First s = 0,
    which ends at the eigenvalue of largest magnitude. Where that is negative, or in half of the iterations none is
    found, a second iteration has s = -||H v||, which makes all eigenvalues positive, so that it ends at the largest.
    The eigenvalue is more accurate than its vector: an error of about residual^2 / (distance to the next eigenvalue).
    The model is in evaluation mode meanwhile; modes and buffers are put back as in `line`. Weights do not move.

    Kept beside the graph are three vectors of the size of the parameters, in float32 for half-precision ones.

    Arguments:
        loss: as in `line`; it must be differentiable twice.
        tolerance: of the residual, relative.
        iterations: most products with the Hessian, in all.
        seed: of the first vector, the same on every device.
        tick: called after every product.

    Raises:
        TypeError, ValueError, RuntimeError: as `line`.
        RuntimeError: an operation of the loss cannot be differentiated twice, fused attention for example; the message
            names the remedies.
    """
    op = "largest_eigenvalue"
    check_value("tolerance", tolerance, op, tensors=False, wanted=POSITIVE)
    most = check_uint32(op, "iterations", iterations, least=2)
    check_uint32(op, "seed", seed)

    def work(params: list[Tensor]) -> Eigenvalue:
        base, product = hessian_product(op, model, loss, params)
        first = iterate(op, product, first_vector(params, seed), 0.0, tolerance, most // 2, tick)
        dominant = first.value if first.converged else None
        if first.converged and first.value >= 0:
            return Eigenvalue(first.value, dominant, first.residual, first.products, True, base)
        left = most - first.products
        last = iterate(op, product, first_vector(params, seed), -first.length, tolerance, left, tick)
        products = first.products + last.products
        return Eigenvalue(last.value, dominant, last.residual, products, last.converged, base)

    return resting_weights(op, model, work)


def first_vector(params: list[Tensor], seed: int) -> list[Tensor]:
    """A random vector of length 1: flatkern's noise, which does not depend on the device."""
    v = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in params]
    ones = [torch.ones(filters(x), device=x.device) for x in v]
    perturb_(v, 1.0, seed=seed, stream=START, round=0, norms=ones)
    length = math.sqrt(dot(v, v))
    dtypes = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    return [x.div_(length).to(dtype) for x, dtype in zip(v, dtypes, strict=True)]


def hessian_product(op: str, model: nn.Module, loss: Loss, params: list[Tensor]) -> tuple[float, Product]:
    """The loss, and v -> H v.

    Raises:
        RuntimeError: from the product, where an operation cannot be differentiated twice.
    """
    base, grads = gradient(op, model, loss, params, twice=True)
    curved = [(k, g) for k, g in enumerate(grads) if g is not None and g.requires_grad]

    def product(v: list[Tensor]) -> list[Tensor]:
        if not curved:  # the loss is linear
            return [torch.zeros_like(x) for x in v]
        which, of = zip(*curved, strict=True)
        along = [v[k].to(g.dtype) for k, g in zip(which, of, strict=True)]
        try:
            found = torch.autograd.grad(of, params, along, retain_graph=True, allow_unused=True)
        except RuntimeError as error:  # NotImplementedError, too
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(cannot_differentiate(op, error)) from error
        return [torch.zeros_like(x) if h is None else h.to(x.dtype) for x, h in zip(v, found, strict=True)]

    return base, product


def cannot_differentiate(op: str, error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{op}: loss(model) should be differentiable twice, but torch says: {text}; {REMEDY}"


@torch.no_grad()
def iterate(
    op: str, product: Product, v: list[Tensor], shift: float, tolerance: float, most: int, tick: Callable[[], None]
) -> Iteration:
    """Power iteration of H - shift I, from a vector of length 1.

    Raises:
        ValueError: H v is not finite.
    """
    number = 0
    while True:
        hv = product(v)
        number += 1
        tick()
        value, length = dot(v, hv), math.sqrt(dot(hv, hv))
        if not math.isfinite(length):
            raise ValueError(f"{op}: the Hessian times a vector is not finite; look at the loss and the batch")
        residual = math.sqrt(sum(squares(h.sub(x, alpha=value)) for h, x in zip(hv, v, strict=True)))
        converged = residual <= tolerance * abs(value - shift)
        if converged or number == most:
            return Iteration(value, length, residual, number, converged)
        v = [h.sub(x, alpha=shift) for h, x in zip(hv, v, strict=True)]  # not in place: autograd may have returned v
        norm = math.sqrt(dot(v, v))
        for x in v:
            x.div_(norm)


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    """Summed in float64."""
    return sum((x * y).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))


def squares(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()
