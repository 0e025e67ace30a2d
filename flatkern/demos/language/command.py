"""`python -m flatkern language`: a small Llama on bytes, AdamW against AdamW with IRE, at equal steps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import flatkern

from .. import shared
from .training import Llama, Shape, read_text, train

app = typer.Typer(add_completion=False, rich_markup_mode=None)
Run = dict[str, Any]
BASE, ENHANCED = "AdamW", "AdamW-IRE"


@app.command()
def language(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of every run.")] = 600,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method.")] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of both; AdamW's best.")] = 2e-3,
    kappa: Annotated[float, typer.Option(min=0.0, help="IRE's enhancement of flat directions.")] = 2.0,
    sharp_fraction: Annotated[float, typer.Option(help="Coordinates that are not enhanced, in (0, 1).")] = 0.4,
    width: Annotated[int, typer.Option(min=16, help="Of the model.")] = Shape.width,
    layers: Annotated[int, typer.Option(min=1)] = Shape.layers,
    heads: Annotated[int, typer.Option(min=1)] = Shape.heads,
    context: Annotated[int, typer.Option(min=8, help="Bytes that the model sees.")] = Shape.context,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    text: Annotated[int, typer.Option(min=100_000, help="Bytes of text.")] = 8_000_000,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Of flatkern; used or refused.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("language-results"),
) -> None:
    """Train a small Llama on the sources of Python's standard library, byte by byte: AdamW against AdamW-IRE.

    Both see the same batches from the same start, for the same number of steps; IRE's mask takes one more gradient
    every ten steps. Works offline, in a few minutes on two cores; larger sizes want --device cuda.
    Ctrl-C keeps what was finished.
    """
    if width % (2 * heads):
        raise typer.BadParameter(f"{width} is not a multiple of twice the heads, {2 * heads}", param_hint="--width")
    place = shared.usable_device(device)
    backend = shared.usable_backend(backend, place.type)
    try:
        flatkern.IRE(kappa, sharp_fraction=sharp_fraction)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sharp-fraction") from None
    shared.writable_folder(out, "language.json", "language.png")
    shape = Shape(width, layers, heads, context)
    options = {"steps": steps, "lr": lr, "kappa": kappa, "sharp_fraction": sharp_fraction, "batch": batch}
    console, runs = shared.make_console(), list[Run]()

    def work() -> None:
        show_runs(console, read_text(text), shape, options, seeds, runs, device=place, backend=backend)

    stopped = shared.keep_finished(console, runs, 2 * seeds, work)
    show_results(console, runs, about(shape, options, str(place), backend) | {"interrupted": stopped}, out)
    if stopped:
        raise typer.Exit(shared.INTERRUPTED)


def about(shape: Shape, options: dict[str, Any], device: str, backend: str | None) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    return {
        **shared.circumstances("language", device, backend),
        "shape": vars(shape) | {"parameters": sum(p.numel() for p in Llama(shape).parameters())},
        "options": options,
    }


def show_runs(
    console: Console, text: Any, shape: Shape, options: dict[str, Any], seeds: int, runs: list[Run], **where: Any
) -> None:
    """Train everything into `runs`, under a progress bar; in a pipe a line for each run."""
    options = dict(options)
    kappa, bar = options.pop("kappa"), shared.make_progress(console)
    console.print(f"{len(text[0]) / 1e6:.1f} MB of text, {len(text[1]) / 1e6:.1f} held out")
    task = bar.add_task("", total=2 * seeds * options["steps"])
    doing = Text()
    live = Live(Group(doing, bar), console=console, transient=True) if console.is_terminal else None
    with live or contextlib.nullcontext():
        for seed in range(seeds):
            for name, strength in ((BASE, None), (ENHANCED, kappa)):
                title = f"seed {seed + 1} of {seeds}, {name}"

                def tick(loss: float, title: str = title) -> None:
                    bar.advance(task)
                    doing.plain = f"{title}, loss {loss:.3f}"

                run = train(strength, text, shape, **options, seed=seed, **where, tick=tick)
                runs.append({"method": name, "seed": seed, **run})
                if not live:
                    last = run["curve"][-1]["validation"]
                    console.print(f"{len(runs)} of {2 * seeds}: {title}: {last:.4f} nats per byte held out")


def show_results(console: Console, runs: list[Run], facts: dict[str, Any], out: Path) -> None:
    """The table and both files; the numbers first, which cannot be had again."""
    picture, numbers, stopped = out / "language.png", out / "language.json", facts["interrupted"]
    shared.write_json(numbers, facts | {"runs": runs})
    options, seeds = facts["options"], len({run["seed"] for run in runs})
    console.print(table(runs, console.width), "", sep="\n")
    size = f"{facts['shape']['parameters'] / 1e6:.2f} M parameters"
    title = f"{size}, lr {options['lr']:g}, kappa {options['kappa']:g}, {seeds} seed{'s' * (seeds > 1)}"
    draw(runs, title + (f"; {stopped}" if stopped else "")).savefig(picture)
    console.print(
        f"{size}. Equal steps are not equal compute: see masks ms. One seed does not show which method is better."
    )
    console.print(f"{stopped or f'{len(runs)} runs'}: {picture}, {numbers}", soft_wrap=True)


def table(runs: list[Run], width: int) -> Table:
    """Last losses, where IRE passed AdamW's last loss, and what the optimizer cost."""
    heads = ("", "training", "held\nout", "AdamW's\nat step", "optimizer\nms", "masks\nms", "step\nms")
    shown = shared.make_table("nats per byte, mean over seeds", heads, width)
    goal = {run["seed"]: run["curve"][-1]["validation"] for run in runs if run["method"] == BASE}
    for name in (BASE, ENHANCED):
        of = [run for run in runs if run["method"] == name]
        if not of:
            continue  # interrupted before it
        last = [run["curve"][-1] for run in of]
        reached = [next((p["step"] for p in r["curve"] if p["validation"] <= goal[r["seed"]]), None) for r in of]
        each = {key: mean(1e3 * r["seconds"][key] / r["curve"][-1]["step"] for r in of) for key in of[0]["seconds"]}
        shown.add_row(
            name,
            f"{mean(p['training'] for p in last):.4f}",
            f"{mean(p['validation'] for p in last):.4f}",
            "\n".join("never" if step is None else str(step) for step in reached),
            *(f"{each[key]:.2f}" for key in ("optimizer", "masks", "total")),
        )
    return shown


def draw(runs: list[Run], title: str) -> Figure:
    """Validation and training loss by step, all seeds."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("validation", "training"), strict=True):
        for name, color in ((BASE, "black"), (ENHANCED, "#1b6ca8")):
            for k, run in enumerate(r for r in runs if r["method"] == name):
                curve = run["curve"]
                axis.plot([p["step"] for p in curve], [p[key] for p in curve], color=color, label=None if k else name)
        axis.set(title=f"{key} loss (nats per byte)", xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(f"A small Llama on the standard library's sources: {title}", fontsize=11)
    return figure


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    return shared.run_app(app, arguments, "language")
