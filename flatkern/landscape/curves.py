"""The loss along filter-normalised random directions: lines, and a plane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import filter_norms, perturb_
from ..values import Range, check_positive, check_uint32, check_value
from .evaluation import Loss, mean_and_std, repeated_value, value
from .weights import DIRECTIONS, Weights, moving_weights

POSITIVE = Range(lambda v: v > 0, "> 0 and finite")


def nothing() -> None:
    """What is called after every evaluation, unless a caller wants to know."""


@dataclass(frozen=True)
class Line:
    """The loss along random directions.

    Fields:
        alphas: where.
        losses: for each direction, the loss at each alpha.
        loss: at the model's weights.
    """

    alphas: list[float]
    losses: list[list[float]]
    loss: float

    @property
    def mean(self) -> list[float]:
        """Over the directions, at each alpha."""
        return [mean_and_std(list(at))[0] for at in zip(*self.losses, strict=True)]

    @property
    def std(self) -> list[float]:
        """Standard deviation over the directions, at each alpha; 0 where there is one direction."""
        return [mean_and_std(list(at))[1] for at in zip(*self.losses, strict=True)]


@dataclass(frozen=True)
class Plane:
    """The loss on a grid over two random directions.

    Fields:
        alphas: where, along either direction.
        losses: `losses[i][j]` is that of w + alphas[i] d_0 + alphas[j] d_1.
        loss: at the model's weights.
    """

    alphas: list[float]
    losses: list[list[float]]
    loss: float


class Directions:
    """Random directions, each filter as long as that of the weights; drawn again wherever they are added.

    Kept are the factors ||w_f|| / ||z_f||, a number a filter. ||z_f|| is measured with the noise in place of the
    weights.
    """

    def __init__(self, op: str, weights: Weights, seed: int, count: int, include_vectors: bool) -> None:
        self._weights, self._seed = weights, seed
        self._params = [p for p in weights.params if p.numel() and (include_vectors or p.dim() >= 2)]
        if not self._params:
            raise ValueError(
                f"{op}: model has no parameter of two dimensions or more, and others are left out; pass "
                "include_vectors=True (--vectors)"
            )
        norms = filter_norms(self._params)
        self._scales = [self._factors(norms, number) for number in range(count)]

    @torch.no_grad()
    def _factors(self, norms: list[Tensor], number: int) -> list[Tensor]:
        for p in self._params:
            p.zero_()
        self._draw(1.0, number, [torch.ones_like(norm) for norm in norms])
        lengths = filter_norms(self._params)
        self._weights.restore()
        return [norm / length for norm, length in zip(norms, lengths, strict=True)]

    def _draw(self, alpha: float, number: int, scales: list[Tensor]) -> None:
        seed, backend = self._seed, self._weights.backend
        perturb_(self._params, alpha, seed=seed, stream=DIRECTIONS, round=number, norms=scales, backend=backend)

    def move_to(self, *alphas: float) -> None:
        """w + alphas[0] d_0 + alphas[1] d_1 ...; no alpha of 0 costs a pass, nor changes a bit."""
        self._weights.restore()
        for number, alpha in enumerate(alphas):
            if alpha:
                self._draw(alpha, number, self._scales[number])


def grid(op: str, extent: float, points: int) -> list[float]:
    """`points` numbers from -extent to extent, whose mirror images are exact.

    Raises:
        TypeError, ValueError: an extent that is not positive, fewer than two points.
    """
    check_value("extent", extent, op, tensors=False, wanted=POSITIVE)
    last = check_uint32(op, "points", points, least=2) - 1
    return [float(extent) * (2 * k - last) / last for k in range(last + 1)]


def line(
    model: nn.Module,
    loss: Loss,
    *,
    directions: int = 5,
    points: int = 21,
    extent: float = 1.0,
    seed: int = 0,
    include_vectors: bool = False,
    backend: str | None = None,
    tick: Callable[[], None] = nothing,
) -> Line:
    """The loss along random directions, filter-normalised.

        f(alpha) = L(w + alpha d),    d_f = z_f ||w_f||_2 / ||z_f||_2,    z ~ N(0, 1),    alpha in [-extent, extent]

    A filter is a dim-0 slice. Parameters that require grad are moved, those of rank <= 1 (biases, norms) are not, as in
    the paper's released code; with `include_vectors` each of them is one filter. The noise is drawn anew at each
    point, so that beside the weights one copy of them is kept, and a number a filter for each direction. ||z_f|| is
    measured once a direction, with the noise in place of the weights. Half-precision weights are rounded at each point.

    The model is in evaluation mode meanwhile. Afterwards weights, buffers and modes are bit for bit what they were,
    also after an exception or Ctrl-C; `.grad` is not touched.

    Arguments:
        loss: called with the model, returns the loss of a fixed batch: a scalar tensor, the same at every call.
        directions: how many.
        points: of each direction, equally spaced; an odd number has the weights themselves among them.
        seed: of the noise.
        backend: as `perturb_`.
        tick: called after every evaluation, for a progress bar.

    Raises:
        TypeError, ValueError: an argument out of range, a loss that is no finite scalar tensor at the model's weights,
            a model without parameters to move, or with some that no kernel can walk.
        RuntimeError: an optimizer holds the weights perturbed.

    Warns:
        UnrepeatableLoss: a second evaluation at the same weights gives another loss.

    Source: Li et al. 2018 (Visualizing the Loss Landscape of Neural Nets, arXiv:1712.09913), section 4.
    """
    alphas, count = grid("line", extent, points), check_positive("line", "directions", directions)
    check_uint32("line", "seed", seed)

    def work(weights: Weights) -> Line:
        base = repeated_value("line", model, loss)
        along = Directions("line", weights, seed, count, include_vectors)
        losses: list[list[float]] = []
        for number in range(count):
            losses.append([])
            for alpha in alphas:
                along.move_to(*(0.0,) * number, alpha)
                losses[-1].append(value("line", model, loss))
                tick()
        return Line(alphas, losses, base)

    return moving_weights("line", model, backend, work)


def plane(
    model: nn.Module,
    loss: Loss,
    *,
    points: int = 21,
    extent: float = 1.0,
    seed: int = 0,
    include_vectors: bool = False,
    backend: str | None = None,
    tick: Callable[[], None] = nothing,
) -> Plane:
    """The loss on a grid over two random directions, filter-normalised.

        f(alpha, beta) = L(w + alpha d_0 + beta d_1)

    All else is as in `line`, whose first two directions of the same seed these are. Nothing makes them orthogonal: in
    many dimensions random directions nearly are.

    Arguments:
        points: of each direction, so that the loss is evaluated points^2 times.
        loss, extent, seed, include_vectors, backend, tick: as in `line`.

    Raises:
        TypeError, ValueError, RuntimeError: as `line`.

    Source: Li et al. 2018 (arXiv:1712.09913), sections 3 and 4.
    """
    alphas = grid("plane", extent, points)
    check_uint32("plane", "seed", seed)

    def work(weights: Weights) -> Plane:
        base = repeated_value("plane", model, loss)
        along = Directions("plane", weights, seed, 2, include_vectors)
        losses: list[list[float]] = []
        for alpha in alphas:
            losses.append([])
            for beta in alphas:
                along.move_to(alpha, beta)
                losses[-1].append(value("plane", model, loss))
                tick()
        return Plane(alphas, losses, base)

    return moving_weights("plane", model, backend, work)
