"""The bar chart of a result file: time per optimizer step, as a multiple of the plain fused torch optimizer."""

from __future__ import annotations

from pathlib import Path

from ..methods import BASES, METHODS, floor_bytes
from ..models import MODELS
from .tables import VERSUS, median, pick, values

COLORS = {
    "flatkern cpp": "#1b6ca8",
    "flatkern triton": "#1b6ca8",
    "compiled": "#6b8f71",
    "foreach": "#e0a458",
    "loop": "#c97b63",
    "papers": "#8d6a9f",
    "pytorch_optimizer": "#b0516b",
    "heavyball": "#7a7a7a",
}


def plot(results: dict, path: str | Path) -> bool:
    """One panel per model and base, methods downwards; a black tick is what the bytes allow. Whether there were any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [b for b in pick(results, "methods", dtype="float32") if b["params"]["method"] != "plain"]
    shown = [b for b in shown if not MODELS[b["params"]["model"]].small and "times_plain" in b["extra_info"]]
    kinds = dict.fromkeys((b["params"]["model"], b["params"]["base"]) for b in shown)
    panels = {kind: [b for b in shown if (b["params"]["model"], b["params"]["base"]) == kind] for kind in kinds}
    if not panels:
        return False
    # A panel of one method would be lower than its title and its axis, and none would be laid out then.
    counts = [max(2, len(values(rows, "method"))) for rows in panels.values()]
    height = 1.5 + 0.6 * sum(counts) + 0.8 * len(panels)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, height), squeeze=False, height_ratios=counts, layout="constrained"
    )
    for axis, rows in zip(axes[:, 0], panels.values(), strict=True):
        panel(axis, rows)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("time per step, in steps of the plain fused torch optimizer (log scale)", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def panel(axis, rows: list[dict]) -> None:
    """Bars of one model and base."""
    model, base = rows[0]["params"]["model"], rows[0]["params"]["base"]
    methods = values(rows, "method")
    candidates = [c for c in COLORS if c in values(rows, "candidate")]
    height = 0.84 / len(candidates)
    for j, candidate in enumerate(candidates):
        bars = [b for b in rows if b["params"]["candidate"] == candidate]
        middle = (j - (len(candidates) - 1) / 2) * height
        places = [methods.index(b["params"]["method"]) + middle for b in bars]
        widths = [b["extra_info"]["times_plain"] for b in bars]
        axis.barh(places, widths, height, color=COLORS[candidate], label=VERSUS.get(candidate, candidate))
        for b, x, y in zip(bars, widths, places, strict=True):
            axis.text(x * 1.03, y, f"{x:.1f}x, {median(b) * 1e3:.3g} ms", va="center", fontsize=6)
    for i, method in enumerate(methods):
        floor = floor_bytes(METHODS[method], base, 4) / floor_bytes(METHODS["plain"], base, 4)
        label = "bytes allow" if i == 0 else None
        axis.plot([floor, floor], [i - 0.45, i + 0.45], color="black", linewidth=1.2, label=label)
    axis.set_xscale("log")
    least = min(1.0, *(b["extra_info"]["times_plain"] for b in rows))
    axis.set_xlim(0.8 * least, 1.6 * axis.get_xlim()[1])
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n < axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{n}x" for n in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(methods)), [METHODS[m].title for m in methods])
    axis.set_ylim(len(methods) - 0.45, -0.55)  # downwards
    axis.set_title(f"{MODELS[model].title}, {BASES[base]}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
