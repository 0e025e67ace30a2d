"""`python -m flatkern demo`: a small network on handwritten digits with every method, clean labels and wrong ones."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import itertools
import json
import platform
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import flatkern

from ... import doctor
from ...checks import check_backend
from . import plot, report, search
from .methods import EPOCHS, METHODS, TUNED, hyper_parameters
from .training import BATCH, MOMENTUM, SETTINGS, SHARDS, TEST, TRAIN, load_data, train

app = typer.Typer(add_completion=False)


class Backend(str, Enum):
    cpp = "cpp"
    eager = "eager"


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method and setting.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = EPOCHS,
    backend: Annotated[Backend | None, typer.Option(help="Used or refused; without it the best one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("demo-results"),
    threads: Annotated[int, typer.Option(min=1, help="Of torch; so small a network gains nothing from more.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, two epochs: shows that it runs.")] = False,
    search: Annotated[bool, typer.Option("--search", help="Tune on validation images instead (long).")] = False,
) -> None:
    """Train a small convolutional network on scikit-learn's handwritten digits with every method.

    Once with clean labels, once with 40% of the training labels wrong. Shows accuracy, flatness, time per step
    and passes over memory; writes a picture and all numbers. Works offline, in four to five minutes.
    """
    if backend and not flatkern.backends()[backend.value]["live"]:
        raise typer.BadParameter(flatkern.backends()[backend.value]["reason"], param_hint="--backend")
    if quick:
        seeds, epochs = 1, 2
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    name = backend.value if backend else None
    if search:
        show_search(console, epochs, name, out)
        return
    start = time.perf_counter()
    runs = show_runs(console, seeds, epochs, name)
    summary = report.summarise(runs)
    served_by = name or check_backend(None) or next(iter(doctor.serving("cpu")))
    console.print(report.accuracy_table(summary, seeds), "", report.cost_table(summary, served_by), "")
    console.print(*report.notes(summary, seeds))
    if epochs < EPOCHS:
        console.print(f"{epochs} epochs are too few to compare anything.", style="yellow")
    picture, numbers = out / "demo.png", out / "demo.json"
    plot.plot(runs, summary, picture)
    seconds = time.perf_counter() - start
    write(numbers, about(seeds, epochs, served_by) | {"seconds": seconds, "summary": summary, "runs": runs})
    console.print(f"\n{len(runs)} runs in {seconds:.0f} s: {picture}, {numbers}", soft_wrap=True)


def show_runs(console: Console, seeds: int, epochs: int, backend: str | None) -> list[dict[str, Any]]:
    """Train everything under a progress bar and a table that fills up."""
    runs: list[dict[str, Any]] = []
    bar = Progress(
        BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}")
    )
    work = sum(method.gradients * method.length for method in METHODS.values())
    task = bar.add_task("", total=seeds * len(SETTINGS) * epochs * work)
    with Live(bar, console=console, refresh_per_second=2, transient=True) as live:
        # Seeds outermost: what else the machine does meets all methods alike.
        for seed, setting in itertools.product(range(seeds), SETTINGS):
            data = load_data(seed, SETTINGS[setting])
            for name, method in METHODS.items():
                bar.update(task, description=f"seed {seed + 1} of {seeds}, {report.TITLES[setting]}, {name}")
                tick = functools.partial(bar.advance, task, method.gradients)
                hyper = hyper_parameters(setting, name)
                runs.append({"setting": setting, **train(name, data, seed, epochs, hyper, backend, tick=tick)})
                live.update(Group(report.accuracy_table(report.summarise(runs), seed + 1), "", bar))
            if not console.is_terminal:
                console.print(f"seed {seed + 1} of {seeds}, {report.TITLES[setting]}: done")
    return runs


def show_search(console: Console, epochs: int, backend: str | None, out: Path) -> None:
    """Print and write every candidate's validation accuracy."""
    rows = []
    for row in search.search(epochs, backend):
        rows.append(row)
        values = ", ".join(
            f"{k} {row[k]:g}" for k in ("lr", "weight_decay", "sigma", "rho", "alpha", "kappa") if k in row
        )
        console.print(f"{row['setting']:6}{row['method']:13}{values:40}{row['accuracy']:6.2f} {'*' * row['chosen']}")
    write(out / "search.json", {"epochs": epochs, "candidates": rows})
    console.print(f"{out / 'search.json'} (* best of its method so far)")


def about(seeds: int, epochs: int, backend: str) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    # torch's own word: that of its installation lacks the build (+cu130) as a rule.
    versions = {"flatkern": flatkern.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "matplotlib")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {"processor": doctor.processor(), "threads": torch.get_num_threads(), "backend": backend},
        "seeds": seeds,
        "epochs": epochs,
        "data": {"train": TRAIN, "test": TEST, "batch": BATCH, "wrong_labels": SETTINGS},
        "hyper_parameters": {"momentum": MOMENTUM, "shards": SHARDS} | TUNED,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    try:
        app(arguments, prog_name="python -m flatkern demo")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
