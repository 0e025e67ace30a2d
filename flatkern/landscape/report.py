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


def number(value: float) -> str:
    """Of any magnitude, in the width of a column."""
    return f"{value:.4g}"


def cell(run: Run, name: str) -> str:
    """One measure in the table: empty where it has not been made, `failed` where it could not be."""
    found = run.get(name)
    if found is None:
        return ""
    if "error" in found:
        return "failed"
    match name:
        case "average_sharpness":
            return f"{number(found['increase'])} ± {number(found['standard_error'])}"
        case "ascent_sharpness":
            return number(found["increase"])
        case "largest_eigenvalue":
            return f"{'' if found['converged'] else '>= '}{number(found['value'])}"
        case _:
            losses = [loss for row in found["losses"] for loss in row]
            finite = [loss for loss in losses if math.isfinite(loss)]
            most = f"{number(max(finite))} at most"
            missing = len(losses) - len(finite)
            return f"not finite at {missing} of {len(losses)} points, {most} elsewhere" if missing else most


def table(runs: list[Run], settings: Settings, width: int) -> Table:
    """A row for each model."""
    heads = ("", "loss", f"average\nsigma {settings.sigma:g}", f"SAM\nrho {settings.rho:g}", "largest\neigenvalue")
    made = make_table("How much the loss rises around the weights", heads, width)
    for run in runs:
        loss = run.get("loss")
        cells = (cell(run, name) for name in ("average_sharpness", "ascent_sharpness", "largest_eigenvalue"))
        made.add_row(run["model"], "failed" if loss is None else number(loss), *cells)
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
        for name in ("line", "plane"):
            if "not finite" in (said := cell(run, name)):
                lines.append(f"{run['model']}: {TITLES[name]}: {said}.")
        found = run.get("largest_eigenvalue", {})
        if found.get("converged") is False:
            lines.append(
                f"{run['model']}: the eigenvalue has not converged in {found['products']} products with the Hessian "
                f"(residual {found['residual']:.2g}); it is not below {number(found['value'])}. --iterations allows "
                "more."
            )
        if (found.get("dominant") or 0.0) < 0:
            lines.append(
                f"{run['model']}: the eigenvalue of largest magnitude is negative: {number(found['dominant'])}."
            )
    return lines


def errors(run: Run) -> list[str]:
    """What could not be measured, and why; of the loss itself, and where it is not the same at every call, first."""
    of_loss = [f"{run['model']}: {run[key]}" for key in ("error", "warning") if key in run]
    return of_loss + [
        f"{run['model']}: {TITLES[name]}: {run[name]['error']}" for name in TITLES if "error" in run.get(name, {})
    ]


def failed(runs: list[Run]) -> bool:
    return any(errors(run) for run in runs)


def as_json(value: Any) -> Any:
    """With null for what JSON has no number for: a loss that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
