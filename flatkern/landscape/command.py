"""`python -m flatkern landscape`: how flat trained models are, the digits demo's or the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..demos import shared
from ..demos.digits.methods import EPOCHS, METHODS
from . import plot, report, subjects
from .evaluation import UnrepeatableLoss
from .measures import GRADIENT, Settings, loss_at_rest, measured, wanted
from .report import Run
from .subjects import Subject

app = typer.Typer(add_completion=False, rich_markup_mode=None)
COMPARED = ["SGD", "RWP", "SAM", "m-RWP"]
YOUR_MODEL = (
    "Measure this model: FUNCTION(device) returns (model, loss), and loss(model) the loss of a fixed batch as a scalar "
    "tensor."
)


class Sizes(NamedTuple):
    """What is taken where an option is not given."""

    points: int = 21
    directions: int = 5
    draws: int = 20
    iterations: int = 200
    epochs: int = EPOCHS


FULL, QUICK = Sizes(), Sizes(points=11, directions=2, draws=5, iterations=40, epochs=5)


def sizes(name: str) -> str:
    return f"{getattr(FULL, name)}, or {getattr(QUICK, name)} with --quick."


@app.command()
def landscape(
    model: Annotated[str | None, typer.Option(metavar="FILE.py:FUNCTION", help=YOUR_MODEL)] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Of the digits, repeatable: {', '.join(COMPARED)}.")] = None,
    dims: Annotated[int, typer.Option(min=1, max=2, help="2: contours over two directions, too.")] = 1,
    points: Annotated[int | None, typer.Option(min=2, help=f"Of each direction: {sizes('points')}")] = None,
    extent: Annotated[float, typer.Option("--range", help="R: directions from -R to R, in norms of a filter.")] = 1.0,
    directions: Annotated[int | None, typer.Option(min=1, help=f"Random ones: {sizes('directions')}")] = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="Directions move biases and norms, too.")] = False,
    sigma: Annotated[float, typer.Option(help="Noise of the average sharpness, RWP's.")] = 0.01,
    draws: Annotated[int | None, typer.Option(min=2, help=f"Of that noise: {sizes('draws')}")] = None,
    rho: Annotated[float, typer.Option(help="Radius of SAM's ascent.")] = 0.05,
    iterations: Annotated[int | None, typer.Option(min=2, help=f"For the eigenvalue: {sizes('iterations')}")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of training and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help=f"Less of all, and {QUICK.epochs} epochs of digits.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; the digits are trained on the CPU.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Used or refused; without it the best one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; 1 for the digits.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("landscape-results"),
) -> None:
    """How flat the loss is around a model's weights.

    Along filter-normalised random directions (Li et al. 2018), on average under noise, after SAM's ascent, and by the
    Hessian's largest eigenvalue. Without --model the digits demo's network is trained by several methods and measured
    on its training images, in under a minute on two cores. Shows a table; writes a picture and all numbers.
    Works offline. Weights are put back bit for bit. Ctrl-C keeps what was finished.
    """
    check_numbers(extent, sigma, rho)
    place = shared.usable_device(device)
    size, name = QUICK if quick else FULL, shared.usable_backend(backend, place.type)
    settings = Settings(
        points or size.points, extent, directions or size.directions, dims, sigma, draws or size.draws, rho,
        iterations or size.iterations, seed, vectors, name,
    )  # fmt: skip
    shared.writable_folder(out, "landscape.json", "landscape.png")
    if threads or model is None:
        torch.set_num_threads(threads or 1)
    if model is None:
        measure_digits(method or COMPARED, size.epochs, settings, place, out)
    else:
        measure_file(model, settings, place, out)


def check_numbers(extent: float, sigma: float, rho: float) -> None:
    """Refused before anything is trained; typer's own bounds let infinity pass."""
    for hint, value in (("--range", extent), ("--sigma", sigma), ("--rho", rho)):
        least = "> 0" if hint == "--range" else ">= 0"
        if not 0 <= value < math.inf or (least == "> 0" and not value):
            raise typer.BadParameter(f"{value} is not a finite number {least}", param_hint=hint)


def measure_digits(names: list[str], epochs: int, settings: Settings, place: torch.device, out: Path) -> None:
    """The demo's network, after some methods."""
    for name in names:
        if name not in METHODS:
            text = f"{name!r} is not one of the demo's methods: {', '.join(METHODS)}"
            raise typer.BadParameter(text, param_hint="--method")
    named = subjects.digits(list(dict.fromkeys(names)), epochs, settings.seed, place, settings.backend)
    facts = about(settings, place) | {"what": digits_are(epochs, settings.seed)}
    measure(named, None, settings, facts, out)


def measure_file(spec: str, settings: Settings, place: torch.device, out: Path) -> None:
    """A user's model."""
    path, function = subjects.file_and_function(spec)
    with subjects.importing_from(path.parent):
        measure([subjects.users(path, function, place)], path, settings, about(settings, place), out)


def measure(named: list[Subject], path: Path | None, settings: Settings, facts: dict[str, Any], out: Path) -> None:
    """Measure all models, show and write what is finished, and end with the exit status."""
    console, runs, start = shared.make_console(), list[Run](), time.perf_counter()
    complete = shared.until_interrupted(lambda: show_runs(console, named, path, settings, runs))
    planned = len(named) * len(wanted(settings))
    done = sum(name in run for run in runs for name in report.TITLES)
    stopped = None if complete else f"interrupted: {done} of {planned} measurements"
    if stopped and not done:
        text = f"interrupted before the first of {planned} measurements was finished: nothing to show"
        console.print(f"{text}; {not_written(out)}", soft_wrap=True)
        raise typer.Exit(shared.INTERRUPTED)
    facts |= {"interrupted": stopped, "seconds": time.perf_counter() - start}
    show_results(console, runs, settings, facts, out)
    if stopped:
        raise typer.Exit(shared.INTERRUPTED)
    if report.failed(runs):
        raise typer.Exit(1)


def show_runs(console: Console, named: list[Subject], path: Path | None, settings: Settings, runs: list[Run]) -> None:
    """Measure everything into `runs`, under a progress bar and a table that fills up; in a pipe a line each."""
    bar, forwards = shared.make_progress(console), wanted(settings)
    training = [GRADIENT * subject.gradients * subject.epochs for subject in named]
    task = bar.add_task("", total=sum(training) + len(named) * sum(forwards.values()))
    live = Live(bar, console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def show(doing: str) -> None:
        if live:
            live.update(Group(Text(doing), bar, "", report.table(runs, settings, console.width)))

    behind = 0.0
    with live or contextlib.nullcontext():
        for subject, price in zip(named, training, strict=True):
            show(f"{subject.name}: training" if price else f"{subject.name}: loading")
            model, loss = subject.make(functools.partial(bar.advance, task, GRADIENT * subject.gradients))
            run: Run = {"model": subject.name, "parameters": sum(p.numel() for p in model.parameters())}
            run |= loss_itself(model, loss, path)
            behind += price
            if "error" in run:
                runs.append(run)
                continue  # a loss that cannot be computed fails everywhere
            for name, share in forwards.items():
                show(f"{subject.name}: {report.TITLES[name]}")
                run[name] = outcome(name, model, loss, path, settings, functools.partial(bar.advance, task))
                behind += share
                bar.update(task, completed=behind)
                if run not in runs:
                    runs.append(run)
                if not live:
                    console.print(f"{subject.name}: {report.TITLES[name]}: {report.cell(run, name)}", soft_wrap=True)


def loss_itself(model: torch.nn.Module, loss: Any, path: Path | None) -> dict[str, Any]:
    """The loss at the model's weights, with a warning where it is not the same at every call; or its error."""
    found: dict[str, Any]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UnrepeatableLoss)
        try:
            found = {"loss": loss_at_rest(model, loss)}
        except Exception as error:
            found = {"error": subjects.described(error, path)}
    for each in said:
        if issubclass(each.category, UnrepeatableLoss):
            found["warning"] = str(each.message)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found


def outcome(
    name: str, model: torch.nn.Module, loss: Any, path: Path | None, settings: Settings, tick: Callable[[], None]
) -> dict[str, Any]:
    """A measure, or its error: what else is measured is not lost."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnrepeatableLoss)  # loss_itself has said it
            return measured(name, model, loss, settings, tick)
    except Exception as error:
        return {"error": subjects.described(error, path)}


def show_results(console: Console, runs: list[Run], settings: Settings, facts: dict[str, Any], out: Path) -> None:
    """The table and both files; the numbers first, which cannot be had again."""
    picture, numbers, stopped = out / "landscape.png", out / "landscape.json", facts["interrupted"]
    errors = [text for run in runs for text in report.errors(run)]
    console.print(*([stopped, ""] if stopped else []), style="bold", sep="\n", end="")
    if any("loss" in run for run in runs):
        shared.write_json(numbers, report.as_json(facts | {"runs": runs}))
        console.print(report.table(runs, settings, console.width), "")
        console.print(*report.notes(runs, settings, facts["what"]), sep="\n")
        plot.draw(runs, settings, stopped).savefig(picture)
        console.print(f"\n{stopped or 'done'} in {facts['seconds']:.0f} s: {picture}, {numbers}", soft_wrap=True)
    else:
        console.print(f"nothing could be measured: {not_written(out)}", soft_wrap=True)
    for text in errors:
        print(text, file=sys.stderr)


def not_written(out: Path) -> str:
    """An earlier run's files are left, and must not look like this one's."""
    older = [str(out / name) for name in ("landscape.png", "landscape.json") if (out / name).exists()]
    return "no file was written" + (f"; of an earlier run: {', '.join(older)}" if older else "")


def digits_are(epochs: int, seed: int) -> str:
    """What was trained, and what its numbers cannot show."""
    few = "" if epochs == EPOCHS else f" Hyper-parameters are for {EPOCHS} epochs, not for {epochs}."
    return (
        f"Digits: the demo's network, {epochs} epochs, seed {seed}, 40% wrong labels; the loss is that of all training "
        f"images with the labels given. One seed does not show which method is flatter.{few}"
    )


def about(settings: Settings, place: torch.device) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    facts = shared.circumstances("landscape", str(place), settings.backend)
    return facts | {"settings": dataclasses.asdict(settings), "what": None}


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    return shared.run_app(app, arguments, "landscape")
