"""`python -m flatkern bench compare BEFORE.json AFTER.json`: what became faster or slower, as far as one can say.

Times of two runs are those of two minutes, and often of two speeds of the memory. So each time is divided by that of
torch's fused optimizer in its own race, whose steps took turns with it. The quotient of two runs is held against

  its interval   99 % of the quotients of medians of rounds that are drawn anew from both runs (bootstrap)
  the noise      how far the same quotients moved of code that is not flatkern's, which is the same in both runs

A row is faster or slower if its interval leaves 1 out and it moved further than the noise; it is the same if its
interval lies within 5 % of 1; else the two are not told apart, as with few rounds (--quick) or on a machine that is
not quiet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from math import prod as product
from pathlib import Path
from typing import Any

import numpy as np

from ..candidates import FLOOR as REFERENCE
from . import quiet, results
from .screen import screen
from .tables import Table, duration, lost

LEVEL, DRAWS = 0.99, 2000
QUANTILE = 0.9  # of the movements of others' code
LEAST_NOISE, UNKNOWN_NOISE = 0.02, 0.05  # the latter where too few rows of others are in both files
FEWEST = 5
SAME = 0.05  # an interval that leaves 1 by no more
TOO_MUCH = 0.15  # noise beyond which a slower row would not be seen
FAIL = "exit with 1 if a row of flatkern's became slower, with 3 if the noise is so large that none would be seen"
FACTS = ("processor", "cores", "threads", "python_version", "torch", "torch_cpu_capability", "flatkern", "flatkern_cpp")


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
        if abs(log(self.ratio)) > log(1 + noise) and not self.low <= 1 <= self.high:
            return "faster" if self.ratio < 1 else "slower"
        return "the same" if max(-log(self.low), log(self.high)) <= log(1 + SAME) else "not told apart"


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
    if not (isinstance(rows, list) and rows and all(isinstance(b, dict) for b in rows)):
        raise NotComparable(f"{path} is not a file of `python -m flatkern bench`: it is another program's")
    if not any("table" in (b.get("extra_info") or {}) for b in rows):
        program = "pytest-benchmark's; compare it by `pytest-benchmark compare`"
        raise NotComparable(f"{path} is not a file of `python -m flatkern bench`: it is {program}")
    if broken := [b.get("name") for b in rows if not is_whole(b)]:
        raise NotComparable(f"{path}: {len(broken)} rows are incomplete, the first is {broken[0]!r}; measure again")
    return found


def is_whole(b: dict) -> bool:
    """Whether a row has all that is looked at."""
    stats = b.get("stats") or {}
    measured = isinstance(stats.get("median"), float) and isinstance(stats.get("data"), list) and bool(stats["data"])
    described = all(isinstance(b.get(key), dict) for key in ("params", "extra_info"))
    return measured and described and {"name", "group"} <= b.keys()


def by_name(found: dict[str, Any]) -> dict[str, dict]:
    """Rows by their names; of rows of one name the first."""
    rows: dict[str, dict] = {}
    for b in found["benchmarks"]:
        rows.setdefault(b["name"], b)
    return rows


def references(found: dict[str, Any]) -> dict[str, dict]:
    """The row of torch's fused step of each race, in float32 if it has several."""
    rows: dict[str, dict] = {}
    for b in found["benchmarks"]:
        if b["params"].get("candidate") == REFERENCE and "times_plain" in b["extra_info"]:
            rows.setdefault(b["group"], b)
    return rows


def common(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Row]:
    """The rows that both files have, without the references."""
    generator = np.random.default_rng(0)
    new, old = by_name(after), by_name(before)
    of_before, of_after = references(before), references(after)
    for name, b in old.items():
        a, group = new.get(name), b["group"]
        if a is None or b["params"].get("candidate") == REFERENCE:
            continue
        related = group in of_before and group in of_after
        above, below = ([a, of_before[group]], [b, of_after[group]]) if related else ([a], [b])
        drawn = product(medians(row, generator) for row in above) / product(medians(row, generator) for row in below)
        ratio = product(least(row) for row in above) / product(least(row) for row in below)
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        ours = str(b["params"].get("candidate", "flatkern")).startswith("flatkern")
        seconds = b["stats"]["median"], a["stats"]["median"]
        yield Row(name, *seconds, ratio, min(float(low), ratio), max(float(high), ratio), related, ours)


def least(row: dict) -> float:
    """Its median; no clock measures less than that."""
    return max(row["stats"]["median"], 1e-12)


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
    one, other = before.get("machine_info") or {}, after.get("machine_info") or {}
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


def about(name: str, found: dict[str, Any]) -> str:
    """When, of which commit and how a file came about, and whether the machine was quiet."""
    commit = (found.get("commit_info") or {}).get("id", "")[:10]
    said = [f"{name}: {found.get('datetime', 'no date')}, commit {commit or 'unknown'}, {found.get('command', '')}"]
    return "; ".join([*said, *quiet.remarks(found)])


def main(arguments: list[str]) -> int:
    """The command; with --fail the exit status is 1 where a row of ours became slower, 3 where noise would hide it."""
    parser = argparse.ArgumentParser(
        prog="python -m flatkern bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--all", action="store_true", help="rows of others, too")
    parser.add_argument("--fail", action="store_true", help=FAIL)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the comparison as JSON")
    args = parser.parse_args(arguments)
    show = screen()
    try:
        before, after = read(args.before), read(args.after)
        rows, noise, others = compared(before, after)
    except NotComparable as reason:
        parser.error(str(reason))
    for name, found in (("before", before), ("after", after)):
        show.note(about(name, found))
    if before == after:
        show.note("the two files are of one run", alarming=True)
    for fact in differing_machines(before, after):
        show.note(f"not the same machine: {fact}", alarming=True)
    show.table(table(rows, noise, args.all))
    show.note(said(rows, noise, others))
    if noise > TOO_MUCH:
        show.note(f"with noise of ±{100 * noise:.0f} % a slower row would not be seen: measure again", alarming=True)
    if args.json:
        try:
            args.json.write_text(json.dumps(document(before, after, rows, noise), indent=1) + "\n")
        except OSError as error:
            parser.error(f"--json: {args.json} cannot be written ({error.strerror})")
    if not args.fail:
        return 0
    slower = any(row.ours and row.verdict(noise) == "slower" for row in rows)
    return 1 if slower else 3 * (noise > TOO_MUCH)


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
