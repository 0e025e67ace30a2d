"""The suite `train`: whole training steps of every candidate on every network, as rows of a result file.

A row's `stats` are seconds of a step, its `extra_info` has medians by call, and

    optimizer_share    of a step: all that is not forward or backward
    passes, pass       forwards with backwards in a step, and the median seconds of one
    alone              by allocator ("system", "keeping"; see processes.py), in a process of its own: `seconds`, page
                       `faults` of a step, `peak_bytes` beyond those of a process that has torch loaded
    system_of_keeping  a step with the system's allocator in steps with the one that keeps memory, median of the turns

Where processes can be given an allocator, the race has the one that keeps memory: page faults come and go with what
lies behind a block in the heap, which is no candidate's merit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext

from ..timing.stats import Stats
from . import processes
from .networks import NETWORKS
from .race import failure, race
from .steps import Who, candidates

ROUNDS, ALONE = 7, 4  # steps that count: of everybody in the race, and with each allocator
QUICK = ("mlp",)


def run(
    names: Iterable[str] = tuple(NETWORKS),
    rounds: int = ROUNDS,
    *,
    rows: list[dict] | None = None,
    failures: list[dict] | None = None,
    part: Callable[[str], None] = lambda title: None,
    tick: Callable[[int, int], None] = lambda done, total: None,
    backend: str = "cpp",
    device: str = "cpu",
    alone: int = ALONE,
) -> tuple[list[dict], list[dict]]:
    """Measure these networks. `rows` and `failures` may be the caller's, so that an interrupt leaves what is in them;
    `part` hears the titles of `parts(names)`, `tick` the turns within each.

    Raises:
        ValueError: there is no such network, or this is about another device.
    """
    rows, failures = [] if rows is None else rows, [] if failures is None else failures
    if device != "cpu":
        raise ValueError("device: the suite train runs on the CPU; a GPU's whole steps are stage e2e of make gpu")
    names = list(names)
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"models: there is no network {name!r}; there are {', '.join(NETWORKS)}")
    with nullcontext() if processes.impossible() else processes.Servers() as servers:
        for name in names:
            titles = iter(parts([name]))
            part(next(titles))
            found = in_race(servers, name, candidates(NETWORKS[name], backend), rounds, failures, tick)
            rows += found
            if servers:
                part(next(titles))
                add_alone(servers, found, alone, failures, tick)
    return rows, failures


def parts(names: Iterable[str]) -> list[str]:
    """Titles of what is measured one after the other."""
    kinds = ["whole steps"] if processes.impossible() else ["whole steps", "allocators"]
    return [f"{NETWORKS[name].title}, {kind}" for name in names for kind in kinds]


def in_race(servers, name: str, everybody: list[Who], rounds: int, failures: list[dict], tick) -> list[dict]:
    """Rows of one network; a race whose process ends before it is over is nobody's but everybody's failure."""
    try:
        found, failed = servers.race(name, everybody, rounds, tick) if servers else race(name, everybody, rounds, tick)
    except processes.Failed as error:
        found, failed = [], [failure(name, who, str(error)) for who in everybody]
    failures += failed
    return found


def add_alone(servers, rows: list[dict], steps: int, failures: list[dict], tick) -> None:
    """What processes of their own tell; rows are complete one by one."""
    for done, found in enumerate(rows, 1):
        name, who = found["params"]["model"], Who(found["params"]["method"], found["params"]["candidate"])
        try:
            found["extra_info"] |= memory_of(servers.alone(name, who, steps))
        except processes.Failed as error:
            failures.append(failure(name, who, f"in a process of its own: {error}"))
        tick(done, len(rows))


def memory_of(measured: dict[str, dict]) -> dict:
    """What a row has of it. Steps are compared turn by turn, because the host's speed changes in between."""
    seconds = {allocator: list(map(seconds_of, one["steps"])) for allocator, one in measured.items()}
    ratios = [system / kept for system, kept in zip(seconds["system"], seconds["keeping"], strict=True)]
    alone = {
        allocator: {
            "seconds": {name: Stats(seconds[allocator]).as_dict()[name] for name in ("median", "q1", "q3", "rounds")},
            "faults": statistics.median(step["faults"] for step in one["steps"]),
            "peak_bytes": one["peak_bytes"],
        }
        for allocator, one in measured.items()
    }
    return {"alone": alone, "system_of_keeping": statistics.median(ratios)}


def seconds_of(step: dict[str, int]) -> float:
    return sum(ns for call, ns in step.items() if call != "faults") / 1e9
