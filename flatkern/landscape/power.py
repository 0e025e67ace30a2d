"""The largest eigenvalue of a symmetric matrix that is known by its products with vectors: power iterations.

Vectors are lists of tensors. What the matrix is, hessian.py knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = list[Tensor]
Product = Callable[[Vector], Vector]
MOST_DEFLATED = 8  # vectors that are kept, each of the size of the parameters
CLOSE = 0.01  # relative, of eigenvalues


@dataclass(frozen=True)
class Pair:
    """Where an iteration ended: v of length 1, v^T H v, ||H v||, ||H v - value v||, and whether that is small.

    `exact` says of a negative value that v can be deflated: whether the residual is much smaller, without what is along
    vectors deflated before, which is theirs.
    """

    vector: Vector
    value: float
    length: float
    residual: float
    converged: bool
    exact: bool


@dataclass(frozen=True)
class Largest:
    """The largest eigenvalue; the one of largest magnitude, or None where no iteration has ended there."""

    value: float
    residual: float
    converged: bool
    dominant: float | None


class PowerIteration:
    """Power iterations, each orthogonal to the eigenvectors of the negative eigenvalues that others have found.

    An iteration ends at the eigenvalue of largest magnitude. Where that is negative it is deflated, and the next one
    begins, until a value is not negative: all others are smaller in magnitude, so that it is the largest. Where an
    iteration has not converged in half of the products that are left (eigenvalues of equal magnitude and opposite
    sign), or MOST_DEFLATED vectors are kept, a last one takes all that are left, of the matrix shifted so that no
    eigenvalue that remains is negative.
    """

    def __init__(self, product: Product, start: Callable[[], Vector], tolerance: float, most: int, eps: float) -> None:
        """
        Arguments:
            product: v -> H v.
            start: a random vector of length 1.
            tolerance: of ||H v - value v|| / |value|.
            most: products, in all.
            eps: of the numbers that H v is computed in, below which nothing converges.
        """
        self._product, self._start, self._tolerance, self._most = product, start, tolerance, most
        # A negative eigenvector's residual is what others meet of it, and |value| may be much smaller there.
        self._exact = min(tolerance, max(tolerance**2, 64 * eps))
        self._negative: list[Pair] = []
        self.products = 0

    @torch.no_grad()
    def largest(self) -> Largest:
        dominant = None
        while True:
            last = self._iterate(0.0, max(1, (self._most - self.products) // 2))
            if last.converged and not self._negative:
                dominant = last.value
            if last.converged and last.value >= 0:
                return Largest(last.value, last.residual, True, dominant)
            if last.exact and len(self._negative) < MOST_DEFLATED:
                self._negative.append(last)
                if len(self._negative) == sum(x.numel() for x in last.vector):  # nothing is orthogonal to all
                    best = max(self._negative, key=lambda pair: pair.value)
                    return Largest(best.value, best.residual, best.converged, dominant)
                if self.products < self._most:
                    continue
            if self.products == self._most:  # a negative one is not known to be the largest
                return Largest(last.value, last.residual, False, dominant)
            shift = -last.length
            del last  # its vector
            last = self._iterate(shift, self._most - self.products)
            return Largest(last.value, last.residual, last.converged, dominant)

    def _iterate(self, shift: float, most: int) -> Pair:
        """Of H - shift I, for at most `most` products.

        Raises:
            ArithmeticError: H v is not finite.
        """
        v, number = self._start(), 0
        self._normalise(v, [0.0] * len(self._negative))
        while True:
            hv, number = self._product(v), number + 1
            self.products += 1
            value, length = dot(v, hv), norm(hv)
            if not math.isfinite(length):
                raise ArithmeticError
            last, offsets = self._judged(v, hv, value, length)
            deflates = value < 0 and not shift and len(self._negative) < MOST_DEFLATED
            if number == most or (last.exact if deflates else last.converged):
                return last
            v = [h.sub(x, alpha=shift) for h, x in zip(hv, v, strict=True)]  # not in place: autograd may return v
            if not self._normalise(v, offsets):
                return last
            del hv, last  # or the product is computed beside two vectors that nothing reads

    def _judged(self, v: Vector, hv: Vector, value: float, length: float) -> tuple[Pair, list[float]]:
        """The state of an iteration, and how much of each negative vector u belongs to v, as u is not quite exact.

        v + a u has no residual along u if u^T H v + a u^T H u = value a; no such a is stable where values are close.
        """
        residual = norm(h.sub(x, alpha=value) for h, x in zip(hv, v, strict=True))
        ours, others, offsets = residual**2, length**2, []
        for pair in self._negative:
            along, part, gap = dot(pair.vector, hv), dot(pair.vector, v), value - pair.value
            ours -= (along - value * part) ** 2
            others -= along**2
            offsets.append((along - part * pair.value) / gap if gap > CLOSE * abs(pair.value) else 0.0)
        exact = value < 0 and ours <= (self._exact * value) ** 2
        converged = residual <= self._tolerance * abs(value)
        return Pair(v, value, math.sqrt(max(others, 0.0)), residual, converged, exact), offsets

    def _normalise(self, v: Vector, offsets: list[float]) -> bool:
        """v of length 1, in place, with `offsets` of the negative vectors; False where nothing is left of it."""
        for pair in self._negative:
            add(v, pair.vector, -dot(pair.vector, v))
        length = norm(v)
        if not length:
            return False
        for pair, offset in zip(self._negative, offsets, strict=True):
            add(v, pair.vector, offset * length)
        length = norm(v)
        for x in v:
            x.div_(length)
        return True


def add(v: Vector, u: Vector, factor: float) -> None:
    for x, y in zip(v, u, strict=True):
        x.add_(y, alpha=factor)


def dot(a: Vector, b: Vector) -> float:
    """Summed in float64."""
    return sum((x * y).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))


def norm(v: Iterable[Tensor]) -> float:
    """Squared and summed in float64: the squares of a large loss's derivatives are beyond float32."""
    return math.hypot(*(torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in v))
