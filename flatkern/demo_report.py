"""The demo's numbers: means and deviations over seeds, two tables, and what they do and do not say."""

from __future__ import annotations

from statistics import mean, median, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from .demo_training import BATCH, METHODS, PROBE_SIGMA, SETTINGS, TEST, TRAIN

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
                "accuracy": mean(accuracy),
                "accuracy_std": deviation(accuracy),
                "difference_to_sgd": difference,
                # One seed has no deviation, so nothing is told apart.
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
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
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
    return [
        Text(f"{row['accuracy']:.1f} ± {row['accuracy_std']:.1f}", style=style),
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
                str(rows[0]["gradients_per_step"]),
                f"{step_ms:.2f}",
                f"{optimizer_ms:.3f}",
                f"{optimizer_ms / step_ms:.0%}",
                f"{rows[0]['passes']:.0f}",
                f"{rows[0]['multiple_of_sgd']:.1f}",
                style="bold" if name == BASE else "",
            )
    return table


def notes(parameters: int) -> str:
    """What the numbers are and are not."""
    return (
        "≈      within one standard deviation of SGD: no difference was shown. Differences are to SGD of the same seed.\n"
        f"rise   of the training loss, on average, under noise of {PROBE_SIGMA} times the filter's norm; small is flat.\n"
        "passes reads and writes of all weights that the optimizer needs per step (flatkern.cost): what counts for large\n"
        f"       models. This one has {parameters} weights, all in cache, so its milliseconds are mostly the cost of calls.\n"
        f"\nTiny data ({TRAIN} training images of 8x8 pixels, {TEST} test images, batches of {BATCH}): it shows that the "
        "methods work, not which is best.\nSame start, same batches and same number of steps for all; methods with two "
        "gradients compute twice as much per step,\nas does SGD with 2x steps in total. Learning rate and weight decay "
        "were tuned for SGD and are shared; each method's\nstrength was tuned per setting. Both on validation images with "
        "right labels (--search), never on test images.\nRWP rolling is RWP with fewer passes: the same weights, bit for bit."
    )
