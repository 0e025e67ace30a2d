"""The command's table, what stands under it, and its numbers as JSON."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from ..demos.shared import make_table
from .measures import Settings

Run = dict[str, Any]  # of one model: its name, and what has been measured
TITLES = {
    "average_sharpness": "average sharpness",
    "ascent_sharpness": "SAM sharpness",
    "line": "loss along directions",
    "largest_eigenvalue": "largest eigenvalue",
    "plane": "loss on a plane",
}


def loss_of(run: Run) -> float | None:
    """The training loss: every measure begins with it."""
    return next((run[name]["loss"] for name in TITLES if "loss" in run.get(name, {})), None)


def cell(run: Run, name: str) -> str:
    """One measure in the table: empty where it has not been made, `failed` where it could not be."""
    found = run.get(name)
    if found is None:
        return ""
    if "error" in found:
        return "failed"
    match name:
        case "average_sharpness":
            return f"{found['increase']:.4f} ± {found['standard_error']:.4f}"
        case "ascent_sharpness":
            return f"{found['increase']:.4f}"
        case "largest_eigenvalue":
            return f"{'' if found['converged'] else '>= '}{found['value']:.4g}"
        case _:
            losses = [loss for row in found["losses"] for loss in row]
            return f"{max(losses):.4g} at most" if all(map(math.isfinite, losses)) else "not finite everywhere"


def table(runs: list[Run], settings: Settings, width: int) -> Table:
    """A row for each model."""
    heads = ("", "loss", f"average\nsigma {settings.sigma:g}", f"SAM\nrho {settings.rho:g}", "largest\neigenvalue")
    made = make_table("How much the loss rises around the weights", heads, width)
    for run in runs:
        loss = loss_of(run)
        cells = (cell(run, name) for name in ("average_sharpness", "ascent_sharpness", "largest_eigenvalue"))
        made.add_row(run["model"], "" if loss is None else f"{loss:.4f}", *cells)
    return made


def notes(runs: list[Run], settings: Settings, what: str | None) -> list[str]:
    """What the numbers are, and where one is not what it seems."""
    lines = [
        f"Average: mean of L(w + e) - L(w) over {settings.draws} draws of noise of {settings.sigma:g} times each "
        "filter's norm, ± its standard error (what RWP makes small). SAM: L(w + e) - L(w) for e of length "
        f"{settings.rho:g} along the gradient. Eigenvalue: of the Hessian of the loss.",
    ]
    if what:
        lines.append(what)
    for run in runs:
        found = run.get("largest_eigenvalue", {})
        if found.get("converged") is False:
            lines.append(
                f"{run['model']}: the eigenvalue has not converged in {found['products']} products with the Hessian "
                f"(residual {found['residual']:.2g}); it is not below {found['value']:.4g}. --iterations allows more."
            )
        if (found.get("dominant") or 0.0) < 0:
            lines.append(f"{run['model']}: the eigenvalue of largest magnitude is negative: {found['dominant']:.4g}.")
    return lines


def errors(run: Run) -> list[str]:
    """What could not be measured, and why."""
    return [f"{run['model']}: {TITLES[name]}: {run[name]['error']}" for name in TITLES if "error" in run.get(name, {})]


def failed(runs: list[Run]) -> bool:
    return any(errors(run) for run in runs)


def as_json(value: Any) -> Any:
    """With null for what JSON has no number for: a loss that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
