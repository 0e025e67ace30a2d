"""The command's picture: the loss along directions, all models in one panel, and contours of a plane for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..demos.digits.plot import DPI, LOOKS
from .measures import Settings

OTHER = ("#034e7b", "-")  # of a user's model
LEVELS = 12
STEEP = 30  # the largest loss in units of the smallest, from which on the axis is logarithmic


def draw(runs: list[dict[str, Any]], settings: Settings, stopped: str | None = None) -> Figure:
    """The picture; `stopped` says how the command was interrupted."""
    lines = [run for run in runs if "losses" in run.get("line", {})]
    planes = [run for run in runs if "losses" in run.get("plane", {})]
    size = (max(8.0, 3.4 * len(planes)), 5 + 3.6 * bool(planes))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(5, 3.6)) if planes else [figure]
    curves(parts[0].subplots(), lines, settings)
    if planes:
        contours(parts[1], planes)
    title = "Loss along filter-normalised random directions" + (f"\n{stopped}" if stopped else "")
    figure.suptitle(title, fontsize=11)
    return figure


def curves(axis: Axes, runs: list[dict[str, Any]], settings: Settings) -> None:
    """Mean and standard deviation over the directions."""
    finite = []
    for run in runs:
        alphas, mean, std = (np.array(run["line"][key], dtype=float) for key in ("alphas", "mean", "std"))
        color, style = LOOKS.get(run["model"], OTHER)
        axis.fill_between(alphas, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        axis.plot(alphas, mean, style, color=color, linewidth=2, label=run["model"])
        finite += [value for value in mean.tolist() if np.isfinite(value)]
    if finite and 0 < STEEP * min(finite) < max(finite):
        axis.set_yscale("log")
    if runs:
        axis.legend(frameon=False)
    many = (
        f"mean ± standard deviation of {settings.directions} directions" if settings.directions > 1 else "1 direction"
    )
    axis.set(xlabel=f"alpha: L(w + alpha d), |d_f| = |w_f| for each filter; {many}", ylabel="loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)


def contours(figure: Any, runs: list[dict[str, Any]]) -> None:
    """The rise of the loss on a plane. All have the same levels, so that they can be compared."""
    rises = [np.array(run["plane"]["losses"], dtype=float) - run["plane"]["loss"] for run in runs]
    highest = max([float(rise[np.isfinite(rise)].max()) for rise in rises if np.isfinite(rise).any()] + [1e-12])
    # Squares, so that a bowl has rings of equal width.
    levels = highest * (np.arange(1, LEVELS + 1) / LEVELS) ** 2
    axes = np.atleast_1d(figure.subplots(1, len(runs), sharey=True))
    for axis, run, rise in zip(axes, runs, rises, strict=True):
        alphas = run["plane"]["alphas"]
        seen = np.ma.masked_invalid(rise.T)  # matplotlib's rows are vertical
        if seen.count() and levels[0] <= seen.max():  # or there is no line to draw
            drawn = axis.contour(alphas, alphas, seen, levels=levels, cmap="viridis", linewidths=1.2)
            axis.clabel(drawn, fontsize=7, fmt="%.2g")
        axis.plot(0, 0, "+", color="black", markersize=8)
        axis.set_aspect("equal")
        axis.set_title(f"{run['model']}: rise of the loss", fontsize=10)
        axis.set_xlabel("alpha")
    axes[0].set_ylabel("beta")
