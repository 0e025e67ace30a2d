"""`python -m flatkern language`: a small Llama on bytes, AdamW against AdamW with IRE, at equal steps."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import flatkern

from .training import Llama, Shape, read_text, train

app = typer.Typer(add_completion=False)
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
    """
    if width % (2 * heads):
        raise typer.BadParameter(f"{width} is not a multiple of twice the heads, {2 * heads}", param_hint="--width")
    console, shape = Console(highlight=False), Shape(width, layers, heads, context)
    data = read_text(text)
    size = sum(p.numel() for p in Llama(shape).parameters())
    console.print(
        f"{size / 1e6:.2f} million parameters; {len(data[0]) / 1e6:.1f} MB of text, {len(data[1]) / 1e6:.1f} held out"
    )
    runs: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=2 * seeds * steps)
        for seed in range(seeds):
            for name, strength in ((BASE, None), (ENHANCED, kappa)):

                def tick(loss: float, name: str = name, seed: int = seed) -> None:
                    progress.update(bar, advance=1, description=f"seed {seed + 1} of {seeds}, {name}, loss {loss:.3f}")

                options = {"steps": steps, "batch": batch, "lr": lr, "sharp_fraction": sharp_fraction, "seed": seed}
                run = train(strength, data, shape, **options, device=torch.device(device), backend=backend, tick=tick)  # type: ignore[arg-type]
                runs.append({"method": name, "seed": seed, **run})
    console.print(table(runs))
    out.mkdir(parents=True, exist_ok=True)
    picture, numbers = out / "language.png", out / "language.json"
    plot(runs, picture, f"{size / 1e6:.2f} M parameters, lr {lr:g}, kappa {kappa:g}, {seeds} seed{'s' * (seeds > 1)}")
    about = {
        "command": " ".join(["python -m flatkern language", *sys.argv[2:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flatkern": flatkern.__version__},
        "shape": vars(shape) | {"parameters": size},
        "options": {"steps": steps, "lr": lr, "kappa": kappa, "sharp_fraction": sharp_fraction, "batch": batch},
    }
    numbers.write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")
    console.print(f"{picture}, {numbers}")


def table(runs: list[dict[str, Any]]) -> Table:
    """Last losses, where IRE passed AdamW's last loss, and what the optimizer cost."""
    shown = Table(title="nats per byte, mean over seeds", title_justify="left")
    for head in ("", "training", "validation", "AdamW's at step", "optimizer ms", "masks ms", "step ms"):
        shown.add_column(head, justify="right" if head else "left")
    goal = {run["seed"]: run["curve"][-1]["validation"] for run in runs if run["method"] == BASE}
    for name in (BASE, ENHANCED):
        of = [run for run in runs if run["method"] == name]
        last = [run["curve"][-1] for run in of]
        reached = [next((p["step"] for p in r["curve"] if p["validation"] <= goal[r["seed"]]), None) for r in of]
        each = {key: mean(1e3 * r["seconds"][key] / r["curve"][-1]["step"] for r in of) for key in of[0]["seconds"]}
        shown.add_row(
            name,
            f"{mean(p['training'] for p in last):.4f}",
            f"{mean(p['validation'] for p in last):.4f}",
            ", ".join("never" if step is None else str(step) for step in reached),
            *(f"{each[key]:.2f}" for key in ("optimizer", "masks", "total")),
        )
    return shown


def plot(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    """Validation and training loss by step, all seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("validation", "training"), strict=True):
        for name, color in ((BASE, "black"), (ENHANCED, "#1b6ca8")):
            for k, run in enumerate(r for r in runs if r["method"] == name):
                curve = run["curve"]
                axis.plot([p["step"] for p in curve], [p[key] for p in curve], color=color, label=None if k else name)
        axis.set(title=f"{key} loss (nats per byte)", xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(f"A small Llama on the standard library's sources: {title}", fontsize=11)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    """Run the command; the exit status."""
    try:
        app(arguments, prog_name="python -m flatkern language")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
