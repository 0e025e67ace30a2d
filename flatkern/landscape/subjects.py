"""Which models the command measures: the digits demo's, trained here, or what a function of the user's file returns."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy

from ..demos.digits import training
from ..demos.digits.methods import METHODS, hyper_parameters
from .evaluation import Loss

HINT = "--model"
SETTING = "noisy"  # of the demo: where methods differ most
CONTRACT = "should return (model, loss): a torch.nn.Module, and a function that takes it and returns a scalar tensor"


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Fields:
        name: of its row and curve.
        make: trains or loads it; returns it with its loss. It calls its argument after every epoch.
        epochs, gradients: how often that is, and full-batch gradients in each.
    """

    name: str
    make: Callable[[Callable[[], None]], tuple[nn.Module, Loss]]
    epochs: int = 0
    gradients: float = 0


def digits(names: list[str], epochs: int, seed: int, device: torch.device, backend: str | None) -> list[Subject]:
    """The demo's network, trained by some of its methods from the same start, on the CPU; measured on `device`."""
    data = training.load_data(seed, training.SETTINGS[SETTING])
    images, labels = (part.to(device) for part in data.train)

    def loss(model: nn.Module) -> torch.Tensor:
        return cross_entropy(model(images), labels)

    def subject(name: str) -> Subject:
        def make(tick: Callable[[], None]) -> tuple[nn.Module, Loss]:
            hyper = hyper_parameters(SETTING, name)
            on_cpu = backend if device.type == "cpu" else None
            fitted = training.fit(name, data, seed, epochs, hyper, on_cpu, points=1, tick=tick)
            return fitted.model.to(device), loss

        return Subject(name, make, epochs * METHODS[name].length, METHODS[name].gradients)

    return [subject(name) for name in names]


# ---- a user's model


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """A file's imports find what lies beside it, as if it were run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def file_and_function(spec: str) -> tuple[Path, str]:
    """The parts of FILE.py:FUNCTION, refused where there is no such file."""
    name, colon, function = spec.rpartition(":")
    path = Path(name)
    if not colon or path.suffix != ".py" or not function.isidentifier():
        raise typer.BadParameter(f"{spec!r} should be FILE.py:FUNCTION", param_hint=HINT)
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {name}", param_hint=HINT)
    return path.resolve(), function


def users(path: Path, function: str, device: torch.device) -> Subject:
    """What `function` of a file returns, called with the device.

    Raises:
        typer.BadParameter: a file that cannot be imported, no such function, or it returns something else.
    """
    found = getattr(imported(path), function, None)
    where = f"{path.name}:{function}"
    if not callable(found):
        raise typer.BadParameter(f"{path} has no function {function}", param_hint=HINT)
    try:
        inspect.signature(found).bind(device)
    except (TypeError, ValueError) as error:
        text = f"{where} is called with one argument, the torch.device of --device, but: {error}"
        raise typer.BadParameter(text, param_hint=HINT) from None

    def make(tick: Callable[[], None]) -> tuple[nn.Module, Loss]:
        with its_errors(path, where):
            return checked(found(device), where)

    return Subject(path.stem, make)


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("flatkern_landscape_model", path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{path} is not a Python file", param_hint=HINT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with its_errors(path, path.name):
        spec.loader.exec_module(module)
    return module


def checked(found: Any, where: str) -> tuple[nn.Module, Loss]:
    """A function's result, refused where it is no model with a loss."""
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise typer.BadParameter(f"{where} returned {what}, but {CONTRACT}", param_hint=HINT)
    model, loss = found
    if not isinstance(model, nn.Module) or not callable(loss):
        what = f"({type(model).__name__}, {type(loss).__name__})"
        raise typer.BadParameter(f"{where} returned {what}, but {CONTRACT}", param_hint=HINT)
    return model, loss


@contextlib.contextmanager
def its_errors(path: Path, where: str) -> Iterator[None]:
    """An error of the user's file becomes one message with its line."""
    try:
        yield
    except typer.BadParameter:
        raise
    except (Exception, SystemExit) as error:
        raise typer.BadParameter(f"{where} raised {described(error, path)}", param_hint=HINT) from None


def described(error: BaseException, path: Path | None) -> str:
    """`ValueError: what it says`, and the last line of the user's file that it came through."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    if isinstance(error, SyntaxError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if path is not None and frame.filename == str(path)]
    return f"{text} ({path.name}, line {lines[-1]})" if path is not None and lines else text
