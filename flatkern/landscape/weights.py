"""A model whose weights move while it is measured: one copy of them, and the way back, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_outer_filters, check_parameters
from ..functional import perturb_, restore_
from ..optim.weights import perturbing

T = TypeVar("T")
# Which noise: streams of their own, so that none of it is what an optimizer of the same seed has trained with.
AVERAGE, DIRECTIONS, START = 1, 2, 3


class Weights:
    """The parameters that require grad, in the model's order, and a copy of them."""

    def __init__(self, params: list[Tensor], backend: str | None) -> None:
        self.params = params
        self.backend = backend
        self._copies = [p.detach().clone() for p in params]

    def restore(self) -> None:
        """Bit for bit. It may be interrupted and called again."""
        restore_(self.params, self._copies, backend=self.backend)

    def add_noise(self, sigma: float, seed: int, number: int) -> None:
        """RWP's noise: w <- w + sigma ||w_f|| z."""
        perturb_(self.params, sigma, seed=seed, stream=AVERAGE, round=number, backend=self.backend)


class Surroundings:
    """What forwards may change beside the weights: every module's mode and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for module, training in self._modes:
            module.training = training
        for module, name, buffer, copy in self._buffers:
            if getattr(module, name) is not buffer:  # a forward that assigns instead of writing in place
                setattr(module, name, buffer)
            buffer.copy_(copy)


def trained_parameters(op: str, model: nn.Module) -> list[Tensor]:
    """The parameters that require grad.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has none.
        RuntimeError: an optimizer holds them perturbed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, but should be a torch.nn.Module")
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            f"{op}: model {type(model).__name__} has no parameter that requires grad, and these are what is moved; "
            "call model.requires_grad_()"
        )
    held = [w.partition.members for w in list(perturbing) if w.partition is not None]
    if any(id(p) in members for members in held for p in params):
        raise RuntimeError(f"{op}: an optimizer holds the model's weights perturbed; call its eval() or restore()")
    return params


def moving_weights(op: str, model: nn.Module, backend: str | None, work: Callable[[Weights], T]) -> T:
    """`work(weights)` in evaluation mode; weights, modes and buffers are afterwards as they were.

    Raises:
        TypeError, ValueError: weights that no kernel can walk; nothing has been written.
    """
    params = trained_parameters(op, model)
    check_parameters(op, params)
    check_outer_filters(op, "params", params)
    weights = Weights(params, backend)
    weights.restore()  # a backend that is refused is refused before anything moves
    surroundings = Surroundings(model)

    def put_back() -> None:
        weights.restore()
        surroundings.put_back()

    return undone(put_back, model, lambda: work(weights))


def resting_weights(op: str, model: nn.Module, work: Callable[[list[Tensor]], T]) -> T:
    """`work(params)` in evaluation mode, which moves no weights; modes and buffers are afterwards as they were."""
    params = trained_parameters(op, model)
    return undone(Surroundings(model).put_back, model, lambda: work(params))


def undone(put_back: Callable[[], None], model: nn.Module, work: Callable[[], T]) -> T:
    """`work()` in evaluation mode, and `put_back()`, which is begun again where it is interrupted.

    No context manager: an interrupt at the beginning of an `__exit__` would leave everything as it is.
    """
    interrupt: BaseException | None = None
    try:
        model.eval()
        return work()
    finally:
        while True:
            try:
                put_back()
                break
            except Exception:
                raise
            except BaseException as error:  # Ctrl-C again
                interrupt = error
        if interrupt is not None:
            raise interrupt
