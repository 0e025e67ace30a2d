"""The chart of the start page, as SVG: the time of a step of each method beside what a user would take instead.

Text and rectangles that are made of a result file alone, so that a test can compare. The ground is the chart's own,
light or dark as the reader's system is: a page may have the other one.
"""

from __future__ import annotations

from html import escape

from ..methods import BASES, METHODS
from ..models import MODELS
from .tables import BRIEF_ROWS, SLOWER, copy_rates, median, pick, speedup

MODEL, BASE = "resnet50", "sgd"
OURS = "flatkern cpp"
# Candidates in the order of their bars: what the legend says, and who takes their place for the plain optimizer.
BARS = {
    OURS: ("flatkern", OURS),
    "loop": ("a careful loop", "torch loop"),
    "foreach": ("torch._foreach_*", "torch foreach"),
    "pytorch_optimizer": ("pytorch_optimizer", None),
}
BASELINE = "torch fused"
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 800, 176, 108, 96, 58
BAR, GAP, BETWEEN = 11, 2, 13  # heights, and the space between two methods

STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #24292f; }
  .title { font-size: 15px; font-weight: 600; } .small { font-size: 11px; fill: #57606a; } .name { text-anchor: end; }
  .ours { font-weight: 600; fill: #24292f; } .lost { fill: #b42318; font-weight: 600; }
  .ground { fill: #ffffff; stroke: #d0d7de; } .grid { stroke: #d8dee4; } .tick { stroke: #24292f; stroke-width: 2; }
  .b0 { fill: #1f6fb4; } .b1 { fill: #c97b63; } .b2 { fill: #e0a458; } .b3 { fill: #a55a86; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9da7b3; } .ours { fill: #e6edf3; } .lost { fill: #ff8a80; }
    .ground { fill: #161b22; stroke: #30363d; } .grid { stroke: #30363d; } .tick { stroke: #e6edf3; }
    .b0 { fill: #58a6ff; }
  }
"""


def speed(results: dict) -> str:
    """The chart.

    Raises:
        ValueError: the results lack a method that it shows.
    """
    rows = {method: bars_of(results, method) for method in BRIEF_ROWS}
    height = TOP + sum(len(bars) * (BAR + GAP) + BETWEEN for bars, _ in rows.values()) + BOTTOM
    longest = max(time for bars, _ in rows.values() for time in bars.values())
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [*heading(height), *grid(longest, scale, height)]
    y = TOP
    for method, (bars, baseline) in rows.items():
        parts += group(METHODS[method].title, bars, baseline, y, scale)
        y += len(bars) * (BAR + GAP) + BETWEEN
    parts += footer(results, height)
    title = f"Time of an optimizer step, {MODELS[MODEL].title}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def bars_of(results: dict, method: str) -> tuple[dict[str, float], float]:
    """Seconds by candidate, and those of the plain torch step of the same race."""
    found = pick(results, "methods", model=MODEL, base=BASE, dtype="float32", masters=False, method=method)
    times = {b["params"]["candidate"]: median(b) for b in found}
    if OURS not in times or BASELINE not in times:
        raise ValueError(f"the results have no {METHODS[method].title} of {OURS} and {BASELINE} on {MODEL}, {BASE}")
    names = {name: plain if method == "plain" else name for name, (_, plain) in BARS.items()}
    return {name: times[taken] for name, taken in names.items() if taken in times}, times[BASELINE]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(words)}</text>'


def heading(height: int) -> list[str]:
    parts = [
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        text(20, 30, f"Time of an optimizer step on {MODELS[MODEL].title}'s weights, {BASES[BASE]}", "title"),
    ]
    x = 20.0
    for k, (label, _) in enumerate(BARS.values()):
        parts += [f'<rect class="b{k}" x="{x:.1f}" y="45" width="12" height="12" rx="2"/>', text(x + 17, 55, label)]
        x += 38 + 7 * len(label)
    parts += [line("tick", x + 2, 44, x + 2, 58), text(x + 10, 55, "the plain step alone, torch fused")]
    return parts


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def grid(longest: float, scale: float, height: int) -> list[str]:
    """A line every 20 ms."""
    parts = []
    for ms in range(0, int(longest * 1e3) + 1, 20):
        x = LEFT + ms * 1e-3 * scale
        parts += [
            line("grid", x, TOP - 10, x, height - BOTTOM),
            text(x - 6, TOP - 16, f"{ms} ms" if ms else "0", "small"),
        ]
    return parts


def group(title: str, bars: dict[str, float], baseline: float, y: float, scale: float) -> list[str]:
    """One method: its name, a bar for each candidate, and the plain step."""
    tall = len(bars) * (BAR + GAP)
    parts = [text(LEFT - 10, y + tall / 2 + 3, title.removesuffix(", mean of 5"), "name")]
    for k, (name, time) in enumerate(bars.items()):
        top, width = y + k * (BAR + GAP), time * scale
        kind = list(BARS).index(name)
        parts.append(f'<rect class="b{kind}" x="{LEFT}" y="{top:.1f}" width="{width:.1f}" height="{BAR}" rx="1"/>')
        label, style = said(name, time, bars[OURS], baseline, title)
        parts.append(text(LEFT + width + 6, top + BAR - 1, label, f"small {style}".strip()))
    return [*parts, line("tick", LEFT + baseline * scale, y - 2, LEFT + baseline * scale, y + tall)]


def said(name: str, time: float, ours: float, baseline: float, title: str) -> tuple[str, str]:
    """What stands behind a bar, and how: a case that we lose is said to be one."""
    ms = f"{time * 1e3:.1f} ms"
    if name == OURS:
        lost = title == METHODS["plain"].title and round(ours / baseline, 2) > 1
        return (f"{ms}, {ours / baseline:.2f}x of torch fused ({SLOWER})", "lost") if lost else (ms, "ours")
    ratio = speedup(ours, time)
    return f"{ms}, {ratio.strip('*')}", "lost" if SLOWER in ratio else ""


def footer(results: dict, height: int) -> list[str]:
    """Where the numbers come from."""
    machine, copies = results["machine_info"], copy_rates(pick(results, "methods", model=MODEL))
    isa = machine["flatkern_cpp"].get("isa", "")
    source = (
        f"Medians; {machine['threads']} threads of {machine['processor']}{f' ({isa})' if isa else ''}, torch "
        f"{machine['torch']}, {copies}; {results['datetime'][:10]}."
    )
    meaning = (
        "Behind a bar: its time, and how many times faster flatkern is. Gradients are preset; no forward, no backward."
    )
    return [text(20, height - 32, meaning, "small"), text(20, height - 15, source, "small")]
