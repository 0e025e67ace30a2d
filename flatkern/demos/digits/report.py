"""The demo's numbers: means and deviations over seeds, two tables, and what they do and do not say."""

from __future__ import annotations

from statistics import mean, median, stdev
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .methods import EPOCHS, METHODS
from .training import PROBE_SIGMA, SETTINGS, TEST, TRAIN

TITLES = {"clean": "clean labels", "noisy": f"{SETTINGS['noisy']:.0%} wrong labels"}
BASE = "SGD"
Summary = dict[str, dict[str, dict[str, Any]]]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def summarise(runs: list[dict[str, Any]]) -> Summary:
    """{setting: {method: statistics over seeds}}; differences are to SGD of the same seed."""
    summary: Summary = {}
    for setting in SETTINGS:
        base = {r["seed"]: r["accuracy"] for r in runs if r["method"] == BASE and r["setting"] == setting}
        for name in METHODS:
            of = [r for r in runs if r["method"] == name and r["setting"] == setting]
            if not of:
                continue
            accuracy = [r["accuracy"] for r in of]
            difference = mean(r["accuracy"] - base[r["seed"]] for r in of)
            step_ms, optimizer_ms = (median(r[key] for r in of) for key in ("step_ms", "optimizer_ms"))
            spread = max(deviation(accuracy), deviation(list(base.values())))
            summary.setdefault(setting, {})[name] = {
                "seeds": len(of),
                "accuracy": mean(accuracy),
                "accuracy_std": deviation(accuracy),
                "difference_to_sgd": difference,
                # One seed has no deviation, so all are marked.
                "within_one_std": len(of) < 2 or abs(difference) <= spread,
                "loss_increase": mean(r["loss_increase"] for r in of),
                "train_loss": mean(r["train_loss"] for r in of),
                "step_ms": step_ms,
                "optimizer_ms": optimizer_ms,
                "optimizer_share": optimizer_ms / step_ms,
                "gradients_per_step": METHODS[name].gradients,
                **of[0]["cost"],
            }
    return summary


def named(name: str) -> Text:
    return Text(f"{name} (base)" if name == BASE else name, style="bold" if name == BASE else "")


def accuracy_table(summary: Summary, seeds: int) -> Table:
    """Accuracies of both settings; fits into 80 columns."""
    over = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    table = Table(title=f"Test accuracy in %, {over}", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for title in TITLES.values():
        table.add_column(title, justify="right")
        table.add_column("- SGD", justify="right")
        table.add_column("rise", justify="right")
    for name in METHODS:
        cells: list[Text] = []
        for setting in SETTINGS:
            row = summary.get(setting, {}).get(name)
            cells += accuracy_cells(name, row) if row else [Text()] * 3
        table.add_row(named(name), *cells)
    return table


def accuracy_cells(name: str, row: dict[str, Any]) -> list[Text]:
    style = "bold" if name == BASE else ""
    difference = Text("")
    if name != BASE:
        better = "green" if row["difference_to_sgd"] > 0 else "red"
        mark = "≈" if row["within_one_std"] else " "
        difference = Text(f"{row['difference_to_sgd']:+.1f}{mark}", style="dim" if row["within_one_std"] else better)
    spread = f" ± {row['accuracy_std']:.1f}" if row["seeds"] > 1 else ""
    return [
        Text(f"{row['accuracy']:.1f}{spread}", style=style),
        difference,
        Text(f"{row['loss_increase']:.4f}", style=style),
    ]


def cost_table(summary: Summary, served_by: str) -> Table:
    """What a step costs; times are medians over both settings."""
    table = Table(title=f"Cost of a step, backend {served_by}", title_justify="left", title_style="bold", box=None)
    heads = ("gradients", "ms", "optimizer ms", "its share", "passes", "times SGD's")
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    for name in METHODS:
        rows = [summary[s][name] for s in SETTINGS if name in summary.get(s, {})]
        if rows:
            step_ms, optimizer_ms = (median(r[key] for r in rows) for key in ("step_ms", "optimizer_ms"))
            table.add_row(
                named(name),
                f"{rows[0]['gradients_per_step']:g}",
                f"{step_ms:.2f}",
                f"{optimizer_ms:.3f}",
                f"{optimizer_ms / step_ms:.0%}",
                f"{rows[0]['passes']:.0f}",
                f"{rows[0]['multiple_of_sgd']:.1f}",
                style="bold" if name == BASE else "",
            )
    return table


def notes(summary: Summary, seeds: int) -> list[RenderableType]:
    """What the numbers are and are not."""
    words = Table.grid(padding=(0, 2))
    words.add_column(style="bold", no_wrap=True)
    words.add_row("≈", "within one standard deviation of SGD's accuracy: no difference was shown")
    if seeds == 1:
        words.add_row("", "one seed has no standard deviation, so all are marked")
    words.add_row("- SGD", "mean difference to SGD with the same seed")
    words.add_row("rise", f"of the training loss under noise of {PROBE_SIGMA} times each filter's norm; small is flat;")
    words.add_row("", "a network that has learned little is flat, too")
    words.add_row("passes", "reads and writes of all weights per step that the method needs (flatkern.cost)")
    text = (
        f"What this is: {TRAIN} training images of 8x8 pixels, {TEST} test images, a network of "
        f"{summary['clean'][BASE]['parameters']} weights. It shows that the methods work, not which is best. "
        "All runs of a seed have the same start, batches and number of steps (SGD, 2x steps: twice as many); methods "
        "with two gradients compute twice as much per step. Hyper-parameters were chosen per setting and method for "
        f"{EPOCHS} epochs with other seeds, on validation images with right labels and never on test images "
        "(--search); each method had as many candidates as SGD; mSAM, mixed SAM, GSAM and Friendly-SAM take SAM's, "
        "SAM-IRE SAM's and IRE's kappa. RWP rolling is RWP in fewer passes: the same weights, bit for bit. "
        "Momentum-SAM is rolling, too. Milliseconds are medians. A network this small fits in cache, so they are "
        "mostly the cost of calls; on large ones it is the passes that count."
    )
    return [words, "", text]
