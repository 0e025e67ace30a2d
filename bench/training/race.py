"""The race of one network: everybody in one process, a step each in every round, and their rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from ..candidates import FLOOR
from ..methods import METHODS
from ..report import results
from ..timing.harness import Timings, interleave
from .networks import NETWORKS
from .steps import PASSES, Training, Who, passes_of

TABLE = "train"


def race(
    name: str, everybody: Iterable[Who], rounds: int, tick: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[dict], list[dict]]:
    """Rows and failures."""
    entrants = {who.key: who for who in everybody}
    trainings: dict[str, Training] = {}
    reasons: dict[str, str] = {}
    for key, who in entrants.items():
        try:
            trainings[key] = Training(NETWORKS[name], who)
        except Exception as error:  # reported in the results; the others go on
            reasons[key] = f"{type(error).__name__}: {error}"
    timings, failed = interleave(trainings, rounds=rounds, least=rounds, tick=tick)
    rows = [row(name, entrants[key], measured) for key, measured in timings.items()]
    results.compare(rows, FLOOR)
    return rows, [failure(name, entrants[key], reason) for key, reason in {**reasons, **failed}.items()]


def params_of(name: str, who: Who) -> dict:
    """As of all rows: what was run, on which weights, by whom."""
    named = {"model": name, "method": who.method, "base": NETWORKS[name].base}
    return {**named, "dtype": "float32", "candidate": who.label, "masters": False}


def failure(name: str, who: Who, reason: str) -> dict:
    return {**params_of(name, who), "table": TABLE, "reason": reason[:300]}


def row(name: str, who: Who, measured: Timings) -> dict:
    passes = passes_of(METHODS[who.method])
    shares, seconds = [], []
    for spent in measured.rounds:
        computing = sum(spent[call] for call in PASSES)
        shares.append(1 - computing / sum(spent.values()))
        seconds.append(computing / passes / 1e9)
    info = {"optimizer_share": statistics.median(shares), "passes": passes, "pass": statistics.median(seconds)}
    return results.entry(TABLE, params_of(name, who), measured, NETWORKS[name].numel, **info)
