"""The demo's picture: accuracies with every seed, time per step, and accuracy during training."""

from __future__ import annotations

import textwrap
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import METHODS, Plan
from .report import BASE, TITLES, Summary, limits

DPI = 110

# Blue: random perturbations; warm: ascent; green: longer steps; black: the base. (color, line style)
LOOKS = {
    "SGD": ("black", "-"),
    "SGD, 2x steps": ("#888888", "-"),
    "RWP": ("#74a9cf", "-"),
    "RWP rolling": ("#74a9cf", "-"),
    "ARWP": ("#74a9cf", "--"),
    "m-RWP": ("#034e7b", "-"),
    "m-ARWP": ("#034e7b", "--"),
    "SAM": ("#e6550d", "-"),
    "ASAM": ("#e6550d", "--"),
    "mSAM": ("#a1325c", "-"),
    "mixed SAM": ("#a1325c", "--"),
    "GSAM": ("#fd8d3c", "-"),
    "Friendly-SAM": ("#fd8d3c", "--"),
    "LookSAM": ("#d4a017", "-"),
    "Momentum-SAM": ("#d4a017", "--"),
    "IRE": ("#2b8a3e", "-"),
    "SAM-IRE": ("#2b8a3e", "--"),
}


def draw(runs: list[dict[str, Any]], summary: Summary, plan: Plan, stopped: str | None = None) -> Figure:
    """The picture, a column for each setting that has runs and one for times; `stopped` says how it was interrupted."""
    settings = [setting for setting in plan.settings if setting in summary]
    names = [name for name in METHODS if name in summary[settings[0]]]
    size = (4.6 * len(settings) + 4, 6.4 + 0.23 * len(names))  # room for a label between two rows
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(settings) + 1, width_ratios=[*[4] * len(settings), 3], height_ratios=(5, 4))
    for column, setting in enumerate(settings):
        present = [name for name in names if name in summary[setting]]
        of = [run for run in runs if run["setting"] == setting]
        accuracies(axes[0, column], present, of, summary[setting])
        curves(axes[1, column], present, of)
        axes[0, column].set_title(f"{TITLES[setting]}: test accuracy (%)", loc="left", fontsize=11)
        axes[1, column].set_title(f"{TITLES[setting]}: accuracy during training (%)", loc="left", fontsize=11)
    times(axes[0, -1], names, summary)
    axes[0, -1].set_title("time of a step (ms)", loc="left", fontsize=11)
    axes[1, -1].axis("off")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    axes[1, -1].legend(handles, labels, loc="center left", frameon=False, fontsize=10)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    title = "scikit-learn's handwritten digits: large dots and bars are mean ± standard deviation,\n"
    title += "small dots are seeds, the grey band is SGD's"
    figure.suptitle("\n".join([title, *([stopped] if stopped else [])]), fontsize=11)
    below = "\n".join(
        textwrap.fill(f"- {text}", 78 * (len(settings) + 1), subsequent_indent="  ") for text in limits(plan)
    )
    figure.supxlabel(below, fontsize=8, x=0.01, ha="left")
    return figure


def rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.get_yticklabels()[names.index(BASE)].set_fontweight("bold")
    axis.set_ylim(len(names) - 0.5, -0.5)


def accuracies(axis: Axes, names: list[str], runs: list[dict[str, Any]], summary: dict[str, dict[str, Any]]) -> None:
    """One row per method: every seed, mean and standard deviation, on top of SGD's band."""
    base = summary[BASE]
    low, high = (base["accuracy"] + sign * base["accuracy_std"] for sign in (-1, 1))
    axis.axvspan(low, high, color="black", alpha=0.09, linewidth=0)
    axis.axvline(base["accuracy"], color="black", linewidth=0.8)
    for k, name in enumerate(names):
        color = LOOKS[name][0]
        values = [run["accuracy"] for run in runs if run["method"] == name]
        axis.plot(values, [k + 0.25] * len(values), ".", color=color, alpha=0.55, markersize=5)
        row = summary[name]
        axis.errorbar(row["accuracy"], k, xerr=row["accuracy_std"], fmt="o", color=color, capsize=3, markersize=6)
        text = f"{row['accuracy']:.1f}"
        axis.annotate(
            text,
            (row["accuracy"], k),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6},
        )
    rows(axis, names)


def times(axis: Axes, names: list[str], summary: Summary) -> None:
    """Bars of milliseconds: gradients, and the optimizer's calls."""
    both = [[of[name] for of in summary.values() if name in of] for name in names]
    optimizer = [mean(row["optimizer_ms"] for row in pair) for pair in both]
    step = [mean(row["step_ms"] for row in pair) for pair in both]
    gradients = [a - b for a, b in zip(step, optimizer, strict=True)]
    axis.barh(range(len(names)), gradients, color="#c9ced6", height=0.6, label="gradients")
    axis.barh(range(len(names)), optimizer, left=gradients, color="#1b6ca8", height=0.6, label="optimizer")
    for k, value in enumerate(step):
        axis.annotate(f"{value:.1f}", (value, k), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xlim(0, 1.15 * max(step))
    axis.legend(frameon=False, loc="upper right", fontsize=9)
    rows(axis, names)


def curves(axis: Axes, names: list[str], runs: list[dict[str, Any]]) -> None:
    """Mean test accuracy against the share of training done; the first steep part is cut off."""
    lowest = 100.0
    for name in names:
        if name == "RWP rolling":  # lies on RWP
            continue
        of = [run["curve"] for run in runs if run["method"] == name]
        share = [100 * point["step"] / of[0][-1]["step"] for point in of[0]]
        values = [mean(points) for points in zip(*([p["accuracy"] for p in curve] for curve in of), strict=True)]
        color, line = LOOKS[name]
        width, order = (2.4, 3) if name == BASE else (1.5, 2)
        label = "RWP, and RWP rolling" if name == "RWP" and "RWP rolling" in names else name
        axis.plot(share, values, line, color=color, linewidth=width, label=label, zorder=order)
        lowest = min([lowest, *values[len(values) // 3 :]])
    axis.set_ylim(bottom=lowest - 1)
    axis.set_xlabel("training done (%)")
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
