"""`python -m flatkern bench compare BEFORE.json AFTER.json`: what became faster or slower, as far as one can say.

Times of two runs are those of two minutes, and often of two speeds of the memory. So each time is divided by that of
torch's fused optimizer in its own race, whose steps took turns with it. The quotient of two runs is held against

  its interval   99 % of the quotients of medians of rounds that are drawn anew from both runs (bootstrap)
  the noise      how far the same quotients moved of code that is not flatkern's, which is the same in both runs

A row is faster or slower if its interval leaves 1 out and it moved further than the noise; it is the same if it moved
less and its interval is narrow; else the two are not told apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np

from . import results
from .screen import screen
from .tables import Table, duration, lost

REFERENCE = "torch fused"
LEVEL, DRAWS = 0.99, 2000
QUANTILE = 0.9  # of the movements of others' code
LEAST_NOISE, UNKNOWN_NOISE = 0.02, 0.05  # the latter where too few rows of others are in both files
FEWEST = 5
NARROW = 0.05  # half of an interval's width, if that is not wider than the noise
FACTS = ("processor", "cores", "threads", "torch", "torch_cpu_capability", "flatkern_cpp")


class NotComparable(Exception):
    """Why two files cannot be compared."""


@dataclass(frozen=True)
class Row:
    """A row of both files: AFTER's time as a multiple of BEFORE's, in steps of the reference where it has one."""

    name: str
    before: float  # seconds
    after: float
    ratio: float
    low: float  # of the interval
    high: float
    related: bool  # whether a reference took turns with it
    ours: bool

    def verdict(self, noise: float) -> str:
        moved, width = abs(log(self.ratio)), log(self.high / self.low) / 2
        if moved > log(1 + noise) and not self.low <= 1 <= self.high:
            return "faster" if self.ratio < 1 else "slower"
        same = moved <= log(1 + noise) and width <= log(1 + max(noise, NARROW))
        return "the same" if same else "not told apart"


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        NotComparable: it is none.
    """
    try:
        found = results.read(path)
    except OSError as error:
        raise NotComparable(f"{path}: {error.strerror}; name a file that `python -m flatkern bench` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotComparable(f"{path} is not JSON ({error})") from None
    rows = found.get("benchmarks") if isinstance(found, dict) else None
    ours = [b for b in rows or [] if isinstance(b, dict) and "table" in b.get("extra_info", {})]
    if not ours:
        program = "pytest-benchmark's; compare it by `pytest-benchmark compare`" if rows else "another program's"
        raise NotComparable(f"{path} is not a file of `python -m flatkern bench`: it is {program}")
    return found


def by_name(found: dict[str, Any]) -> dict[str, dict]:
    """Rows by their names; of rows of one name the first."""
    rows: dict[str, dict] = {}
    for b in found["benchmarks"]:
        rows.setdefault(b["name"], b)
    return rows


def references(found: dict[str, Any]) -> dict[str, float]:
    """The median of torch's fused step of each race, in float32 if it has several."""
    seconds: dict[str, float] = {}
    for b in found["benchmarks"]:
        if b["params"].get("candidate") == REFERENCE and "times_plain" in b["extra_info"]:
            seconds.setdefault(b["group"], b["stats"]["median"])
    return seconds


def common(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Row]:
    """The rows that both files have, without the references."""
    generator = np.random.default_rng(0)
    new, old = by_name(after), by_name(before)
    reference_before, reference_after = references(before), references(after)
    for name, b in old.items():
        a, group = new.get(name), b["group"]
        if a is None or b["params"].get("candidate") == REFERENCE:
            continue
        related = group in reference_before and group in reference_after
        unit = reference_before[group] / reference_after[group] if related else 1.0
        drawn = unit * medians(a, generator) / medians(b, generator)
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        medians_of = b["stats"]["median"], a["stats"]["median"]
        ratio = unit * medians_of[1] / max(medians_of[0], 1e-12)
        ours = str(b["params"].get("candidate", "flatkern")).startswith("flatkern")
        yield Row(name, *medians_of, ratio, min(float(low), ratio), max(float(high), ratio), related, ours)


def medians(b: dict, generator: np.random.Generator) -> np.ndarray:
    """Medians of rounds that are drawn anew."""
    data = np.maximum(np.asarray(b["stats"]["data"], dtype=float), 1e-12)
    return np.median(generator.choice(data, (DRAWS, len(data))), axis=1)


def noise_of(rows: list[Row]) -> tuple[float, int]:
    """How far rows moved whose code is the same, and how many they are."""
    moved = [abs(log(row.ratio)) for row in rows if not row.ours and row.related]
    if len(moved) < FEWEST:
        return UNKNOWN_NOISE, len(moved)
    return max(LEAST_NOISE, exp(float(np.quantile(moved, QUANTILE))) - 1), len(moved)


def differing_machines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same of the machines and versions."""
    one, other = before.get("machine_info", {}), after.get("machine_info", {})
    return [f"{fact}: {one.get(fact)} / {other.get(fact)}" for fact in FACTS if one.get(fact) != other.get(fact)]


def table(rows: list[Row], noise: float, every: bool) -> Table:
    """The rows of ours, or of all."""
    header = ["row", "before", "after", "after / before", "interval", "verdict"]
    made = Table("compare", "Before and after, in steps of torch's fused optimizer", header)
    for row in rows:
        if not (row.ours or every):
            continue
        verdict = row.verdict(noise)
        shown = lost(f"{row.ratio:.2f}x", "slower") if verdict == "slower" else f"{row.ratio:.2f}x"
        cells = [row.name, duration(row.before), duration(row.after), shown, f"{row.low:.2f} to {row.high:.2f}"]
        made.rows.append([*cells, verdict if row.related else f"{verdict} (no reference)"])
    return made


def document(before: dict[str, Any], after: dict[str, Any], rows: list[Row], noise: float) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "before": {key: before.get(key) for key in ("datetime", "command", "commit_info")},
        "after": {key: after.get(key) for key in ("datetime", "command", "commit_info")},
        "different_machine": differing_machines(before, after),
        "noise": noise,
        "rows": [{**vars(row), "verdict": row.verdict(noise)} for row in rows],
    }


def compared(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Row], float, int]:
    """Rows, noise, and how many rows of others it was taken of.

    Raises:
        NotComparable: the files have no row in common.
    """
    rows = list(common(before, after))
    if not rows:
        raise NotComparable("the two files have no row in common: they are of other models, methods or candidates")
    return rows, *noise_of(rows)


def main(arguments: list[str]) -> int:
    """The command; the exit status is 1 with --fail where a row of ours became slower."""
    parser = argparse.ArgumentParser(
        prog="python -m flatkern bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--all", action="store_true", help="rows of others, too")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if a row of flatkern's became slower")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the comparison as JSON")
    args = parser.parse_args(arguments)
    show = screen()
    try:
        before, after = read(args.before), read(args.after)
        rows, noise, others = compared(before, after)
    except NotComparable as reason:
        parser.error(str(reason))
    for fact in differing_machines(before, after):
        show.note(f"not the same machine: {fact}", alarming=True)
    show.table(table(rows, noise, args.all))
    show.note(said(rows, noise, others))
    if args.json:
        args.json.write_text(json.dumps(document(before, after, rows, noise), indent=1) + "\n")
    return int(args.fail and any(row.ours and row.verdict(noise) == "slower" for row in rows))


def said(rows: list[Row], noise: float, others: int) -> str:
    """The result in words."""
    ours = [row.verdict(noise) for row in rows if row.ours]
    counts = ", ".join(f"{ours.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(ours)))
    source = (
        f"{100 * QUANTILE:.0f} % of {others} rows of others' code moved by less"
        if others >= FEWEST
        else f"assumed, as only {others} rows of others' code are in both files"
    )
    return f"{counts or 'no row of ours'}; noise ±{100 * noise:.0f} % ({source})"
