"""`python -m flatkern demo`: a small network on handwritten digits, trained by methods that look for flat minima."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live

from ... import doctor
from .. import shared
from . import plot, report, search
from .methods import EPOCHS, FULL, METHODS, SAMPLE, TUNED, Plan, hyper_parameters
from .training import BATCH, MOMENTUM, SETTINGS, SHARDS, TEST, TRAIN, load_data, train

app = typer.Typer(add_completion=False, rich_markup_mode=None)
Run = dict[str, Any]


class Backend(str, Enum):
    cpp = "cpp"
    eager = "eager"


@app.command()
def demo(
    full: Annotated[
        bool,
        typer.Option("--full", help="Every method, clean labels too, five seeds; four to five minutes on two cores."),
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help=f"Of every run: {SAMPLE.seeds}, or {FULL.seeds}.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = EPOCHS,
    backend: Annotated[Backend | None, typer.Option(help="Used or refused; without it the best one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("demo-results"),
    threads: Annotated[int, typer.Option(min=1, help="Of torch; so small a network gains nothing from more.")] = 1,
    search: Annotated[bool, typer.Option("--search", help="Tune on validation images instead (long).")] = False,
) -> None:
    """Train a small convolutional network on scikit-learn's handwritten digits.

    40% of the training labels are wrong, and one method of each kind is tried: under a minute on two cores.
    Shows accuracy, flatness, time per step and passes over memory; writes a picture and all numbers. Works offline.
    Ctrl-C keeps what was finished.
    """
    name = shared.usable_backend(backend.value if backend else None, "cpu")
    shared.writable_folder(out, *(["search.json"] if search else ["demo.json", "demo.png"]))
    torch.set_num_threads(threads)
    console = shared.make_console()
    if search:
        show_search(console, epochs, name, out)
        return
    plan = FULL if full else SAMPLE
    plan = dataclasses.replace(plan, seeds=seeds or plan.seeds, epochs=epochs)
    start, runs = time.perf_counter(), list[Run]()
    stopped = shared.keep_finished(console, runs, len(plan.runs()), lambda: show_runs(console, plan, name, runs))
    served_by = name or next(iter(doctor.serving("cpu")))
    facts = about(plan, served_by) | {"interrupted": stopped, "seconds": time.perf_counter() - start}
    show_results(console, plan, runs, facts, out)
    if stopped:
        raise typer.Exit(shared.INTERRUPTED)


def show_runs(console: Console, plan: Plan, backend: str | None, runs: list[Run]) -> None:
    """Train everything into `runs`, under a progress bar and a table that fills up; in a pipe a line for each run."""
    bar, planned, start = shared.make_progress(console), plan.runs(), time.perf_counter()
    work = sum(METHODS[name].gradients * METHODS[name].length for _, _, name in planned)
    task, loaded, data = bar.add_task("", total=plan.epochs * work), None, None
    live = Live(bar, console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    with live or contextlib.nullcontext():
        for number, (seed, setting, name) in enumerate(planned, start=1):
            doing = f"seed {seed + 1} of {plan.seeds}, {report.TITLES[setting]}, {name}"
            if live:
                tables = report.accuracy_tables(report.summarise(runs), plan, console.width)
                live.update(Group(doing, bar, "", *tables))  # a low window cuts off the end
            if data is None or loaded != (seed, setting):
                data, loaded = load_data(seed, SETTINGS[setting]), (seed, setting)
            tick = functools.partial(bar.advance, task, METHODS[name].gradients)
            hyper = hyper_parameters(setting, name)
            runs.append({"setting": setting, **train(name, data, seed, plan.epochs, hyper, backend, tick=tick)})
            if not live:
                took = time.perf_counter() - start
                console.print(f"{number:3} of {len(planned)}, {took:3.0f} s: {doing}: {runs[-1]['accuracy']:.1f} %")


def show_results(console: Console, plan: Plan, runs: list[Run], facts: dict[str, Any], out: Path) -> None:
    """Tables, what they say and do not, and both files; the numbers first, which cannot be had again."""
    picture, numbers, stopped = out / "demo.png", out / "demo.json", facts["interrupted"]
    summary = report.summarise(runs)
    shared.write_json(numbers, facts | {"summary": summary, "runs": runs})
    if stopped:
        console.print(stopped, "", style="bold", sep="\n")
    for table in report.accuracy_tables(summary, plan, console.width):
        console.print(table, "")
    console.print(report.cost_table(summary, facts["machine"]["backend"], console.width), "")
    console.print(*report.notes(summary, plan), sep="\n")
    plot.draw(runs, summary, plan, stopped).savefig(picture)
    console.print(
        f"\n{stopped or f'{len(runs)} runs'} in {facts['seconds']:.0f} s: {picture}, {numbers}", soft_wrap=True
    )


def show_search(console: Console, epochs: int, backend: str | None, out: Path) -> None:
    """Print and write every candidate's validation accuracy."""
    rows: list[Run] = []

    def show() -> None:
        for row in search.search(epochs, backend):
            rows.append(row)
            names = ("lr", "weight_decay", "sigma", "rho", "alpha", "kappa")
            values = ", ".join(f"{key} {row[key]:g}" for key in names if key in row)
            line = f"{row['setting']:6}{row['method']:13}{values:40}{row['accuracy']:6.2f} {'*' * row['chosen']}"
            console.print(line, soft_wrap=True)

    complete = shared.until_interrupted(show)
    stopped = None if complete else f"interrupted: {len(rows)} of {search.candidates()} candidates"
    shared.write_json(out / "search.json", {"epochs": epochs, "interrupted": stopped, "candidates": rows})
    console.print(f"{stopped or 'done'}: {out / 'search.json'} (* best of its method so far)", soft_wrap=True)
    if not complete:
        raise typer.Exit(shared.INTERRUPTED)


def about(plan: Plan, backend: str) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    facts = shared.circumstances("demo", "cpu", backend)
    facts["versions"] |= {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "matplotlib")}
    return {
        **facts,
        "seeds": plan.seeds,
        "epochs": plan.epochs,
        "methods": plan.methods,
        "settings": plan.settings,
        "data": {"train": TRAIN, "test": TEST, "batch": BATCH, "wrong_labels": SETTINGS},
        "hyper_parameters": {"momentum": MOMENTUM, "shards": SHARDS} | TUNED,
    }


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    return shared.run_app(app, arguments, "demo")
