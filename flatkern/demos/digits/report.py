"""The demo's numbers: means and deviations over seeds, two tables, and what they can and cannot show."""

from __future__ import annotations

from statistics import mean, median, stdev
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..shared import WIDE, make_table
from .methods import EPOCHS, FULL, METHODS, Plan
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


def accuracy_tables(summary: Summary, plan: Plan, width: int) -> list[Table]:
    """Accuracies of what has been trained; settings beside each other where there is room."""
    beside = [plan.settings] if width >= WIDE else [(setting,) for setting in plan.settings]
    return [accuracy_table(summary, settings, width) for settings in beside if settings[0] in summary]


def accuracy_table(summary: Summary, settings: tuple[str, ...], width: int) -> Table:
    counts = sorted({row["seeds"] for setting in settings for row in summary.get(setting, {}).values()})
    seeds = f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} seeds: mean ± std"
    heads = [head for setting in settings for head in (TITLES[setting], f"- {BASE}", "rise")]
    title = f"Test accuracy in %, {seeds if counts[-1] > 1 else 'one seed'}"
    table = make_table(title, ("", *heads), width)
    for name in METHODS:
        rows = [summary.get(setting, {}).get(name) for setting in settings]
        if any(rows):
            table.add_row(named(name), *(cell for row in rows for cell in accuracy_cells(name, row)))
    return table


def accuracy_cells(name: str, row: dict[str, Any] | None) -> list[Text]:
    if row is None:
        return [Text()] * 3
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


def cost_table(summary: Summary, served_by: str, width: int) -> Table:
    """What a step costs; times are medians over the settings."""
    heads = ("", "gradients", "ms", "optimizer\nms", "its\nshare", "passes", "times\nSGD's")
    table = make_table(f"Cost of a step, backend {served_by}", heads, width)
    for name in METHODS:
        rows = [of[name] for of in summary.values() if name in of]
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


def limits(plan: Plan) -> list[str]:
    """What a reader must not conclude; under the picture, too."""
    lines = [
        f"{plan.seeds} seed{'s' * (plan.seeds > 1)} on one small data set: it shows that the methods work, not which "
        "is best. A difference within one standard deviation shows nothing.",
        "Equal steps are not equal compute: methods with two gradients compute twice as much per step; SGD, 2x steps "
        "is SGD with as much.",
        "Milliseconds on a network this small, which fits in cache, are mostly the cost of calls; on large ones it is "
        "the passes that count.",
    ]
    if plan.methods != FULL.methods:
        lines.insert(
            0,
            f"A sample of --full, which has {len(FULL.methods)} methods, {' and '.join(TITLES.values())}, and "
            f"{FULL.seeds} seeds; the runs that both make are the same.",
        )
    if plan.epochs < EPOCHS:
        lines.insert(0, f"{plan.epochs} epoch{'s' * (plan.epochs > 1)}: too few to compare anything.")
    return lines


def notes(summary: Summary, plan: Plan) -> list[RenderableType]:
    """What the numbers are, and what they cannot show."""
    words = Table.grid(padding=(0, 2, 0, 0))
    words.add_column(style="bold", no_wrap=True)
    words.add_row("≈", "within one standard deviation, its own or SGD's, of SGD's accuracy: no difference was shown")
    if plan.seeds == 1:
        words.add_row("", "one seed has no standard deviation, so all are marked")
    words.add_row("- SGD", "mean difference to SGD with the same seed")
    words.add_row("rise", f"of the training loss under noise of {PROBE_SIGMA} times each filter's norm; small is flat;")
    words.add_row("", "a network that has learned little is flat, too")
    words.add_row("passes", "reads and writes of all weights per step that the method needs (flatkern.cost)")
    listed = Table.grid(padding=(0, 1, 0, 0))
    for line in limits(plan):
        listed.add_row("-", line)
    return [words, "", "What this can and cannot show:", listed, "", setup(summary, plan)]


def setup(summary: Summary, plan: Plan) -> str:
    """What was trained, and how its values were chosen."""
    size = next(iter(summary.values()))[BASE]["parameters"]
    text = (
        f"What this is: {TRAIN} training images of 8x8 pixels, {TEST} test images, a network of {size} weights. "
        "All runs of a seed have the same start, batches and number of steps (SGD, 2x steps: twice as many). "
        f"Hyper-parameters were chosen per setting and method for {EPOCHS} epochs with other seeds, on validation "
        "images with right labels and never on test images (--search); each method had as many candidates as SGD. "
    )
    if "mSAM" in plan.methods:
        text += "mSAM, mixed SAM, GSAM and Friendly-SAM take SAM's, SAM-IRE SAM's and IRE's kappa. "
    here = "" if "RWP rolling" in plan.methods else ", so it is left out"
    return text + (
        f"RWP rolling is RWP in fewer passes: the same weights, bit for bit{here}. Momentum-SAM is rolling, too. "
        "std, behind ±, is the standard deviation over seeds. Milliseconds are means over ten steps of their "
        "medians; methods run one behind the other, so that it shows in them if others use the machine."
    )
