"""The largest eigenvalue of the loss's Hessian, by power iteration on products of the Hessian with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import perturb_
from ..tables import filters
from ..values import check_uint32, check_value
from .curves import POSITIVE, nothing
from .evaluation import Loss, gradient, repeated_value, second_derivative
from .power import PowerIteration, Product, Vector, norm
from .weights import START, resting_weights


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue of the Hessian.

    Fields:
        value: v^T H v of the last v, a vector of length 1: the eigenvalue where `converged`, and where not, a number
            that it is not below.
        dominant: the eigenvalue of largest magnitude: `value`, or a negative one; None where that is not known.
        residual: ||H v - value v||_2; an eigenvalue, not always the largest, is that close to `value`.
        products: of the Hessian with a vector, each of the price of two gradients.
        converged: whether the residual is at most tolerance |value|, in an iteration that ends at the largest one; of
            two that are nearly equal it may be the smaller.
        loss: at the model's weights.
    """

    value: float
    dominant: float | None
    residual: float
    products: int
    converged: bool
    loss: float


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

        v <- H v / ||H v||_2,    value = v^T H v,    until ||H v - value v||_2 <= tolerance |value|

    H v is the gradient of g^T v, by autograd; the graph of g is kept. That ends at the eigenvalue of largest magnitude.
    Where it is negative, iteration goes on until the residual is tolerance^2 |value|, and begins again orthogonal to
    that vector, until a value is not negative: it is the largest one, as all others are smaller in magnitude. At most 8
    vectors are kept. With 8 of them, or where half of the products that are left bring no convergence (eigenvalues of
    equal magnitude and opposite sign), the rest is spent on H + ||H v|| I, whose largest eigenvalue is of largest
    magnitude; the criterion is the same, of H. A negative value has converged where it is found like this, or where
    the parameters are so few that the vectors kept are all there are.
    The eigenvalue is more accurate than its vector: an error of about residual^2 / (distance to the next eigenvalue).
    The model is in evaluation mode meanwhile; modes and buffers are put back as in `line`. Weights do not move.

    Kept beside the graph are three vectors of the size of the parameters, in float32 for half-precision ones, and one
    more for each negative eigenvalue of larger magnitude.

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

    Warns:
        UnrepeatableLoss: as `line`.
    """
    op = "largest_eigenvalue"
    check_value("tolerance", tolerance, op, tensors=False, wanted=POSITIVE)
    most = check_uint32(op, "iterations", iterations, least=2)
    check_uint32(op, "seed", seed)

    def work(params: list[Tensor]) -> Eigenvalue:
        repeated_value(op, model, loss)
        base, product = hessian_product(op, model, loss, params)

        def ticking(v: Vector) -> Vector:
            hv = product(v)
            tick()
            return hv

        eps = max(torch.finfo(p.dtype).eps for p in params)
        power = PowerIteration(ticking, lambda: first_vector(params, seed), tolerance, most, eps)
        try:
            found = power.largest()
        except ArithmeticError:
            text = f"{op}: the Hessian times a vector is not finite; look at the loss and the batch"
            raise ValueError(text) from None
        return Eigenvalue(found.value, found.dominant, found.residual, power.products, found.converged, base)

    return resting_weights(op, model, work)


def first_vector(params: list[Tensor], seed: int) -> Vector:
    """A random vector of length 1: flatkern's noise, which does not depend on the device."""
    v = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in params]
    ones = [torch.ones(filters(x), device=x.device) for x in v]
    perturb_(v, 1.0, seed=seed, stream=START, round=0, norms=ones)
    length = norm(v)
    dtypes = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    return [x.div_(length).to(dtype) for x, dtype in zip(v, dtypes, strict=True)]


def hessian_product(op: str, model: nn.Module, loss: Loss, params: list[Tensor]) -> tuple[float, Product]:
    """The loss, and v -> H v.

    Raises:
        RuntimeError: from the gradient or a product, where an operation cannot be differentiated twice.
    """
    base, grads = gradient(op, model, loss, params, twice=True)
    curved = [(k, g) for k, g in enumerate(grads) if g is not None and g.requires_grad]

    def product(v: Vector) -> Vector:
        if not curved:  # the loss is linear
            return [torch.zeros_like(x) for x in v]
        which, of = zip(*curved, strict=True)
        along = [v[k].to(g.dtype) for k, g in zip(which, of, strict=True)]
        with second_derivative(op):
            found = torch.autograd.grad(of, params, along, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if h is None else h.to(x.dtype) for x, h in zip(v, found, strict=True)]

    return base, product
