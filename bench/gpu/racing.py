"""Races of a stage of `make gpu`: each has its share of the seconds that are left, and its findings are out at once."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic

import flatkern

from ..models import MODELS
from ..races import Entry, Race
from ..runner import Runner
from ..timing.gpu import Gpu
from . import stand_in
from .goals import CUDA
from .stage import BEGAN, DRY, WITH_CUDA, each, emit, is_lost, left, say

TURNS, LEAST = 50, 3  # of a candidate; five times as many where a model is small
SETTING_UP = 0.3  # seconds that a candidate takes before its first turn
RESERVE = 2.0  # seconds before the end of the stage that nothing is timed in
COMPILING = 12.0  # the fewest seconds that torch.compile is tried in
LARGE = 500_000_000  # weights of a model that the inputs of others make room for
MISSED = "FLATKERN_GPU_MISSED"  # environment variable: races that a lost context cost


class OutOfTime(Exception):
    """The stage is over."""


class Lost(Exception):
    """The context is lost; who had a part in it has been named."""


class Racer(Runner):
    """A runner that keeps inputs for later races on the same model, and has an eye on the clock.

    `usual` are the stage's seconds where nobody says; no candidate has its turns for longer than `most`.
    """

    least = LEAST

    def __init__(self, machine: Gpu, usual: float, most: float) -> None:
        super().__init__(1 if DRY else TURNS, most, machine=machine)
        self.usual, self.most = usual, most
        self.found: list[dict] = []  # by this process

    def left(self) -> float:
        return left(self.usual) - RESERVE

    def make_room(self, race: Race) -> None:
        models = {race.model, *(model for model, _ in self.kept)}
        if len(models) > 1 and max(MODELS[model].numel for model in models) > LARGE:
            self.kept.clear()
            self.machine.release()

    def prepare(self, race: Race, entry: Entry, weights, gradients):
        say(f"{monotonic() - BEGAN:7.1f} s  {entry.label}")
        if entry.label != "compiled":
            return super().prepare(race, entry, weights, gradients)
        with at_most(self.left() - COMPILING / 2):
            return super().prepare(race, entry, weights, gradients)

    def go(self, position: int, race: Race, share: float) -> None:
        """One race, in its share of what is left; emits what it finds."""
        seconds, count = self.left(), len(race.entries)
        if seconds < (COMPILING if compiles(race) else count * SETTING_UP) and not DRY:
            raise OutOfTime(f"{max(0.0, seconds):.0f} s were left, which is too little for this race")
        self.seconds = 0.0 if DRY else max(0.0, min(self.most, share * seconds / count - SETTING_UP))
        self.benchmarks, self.failures = [], []
        try:
            self.run(race)
        finally:
            for b in self.benchmarks:
                found = {"kind": "race", "race": position, **finding(b)}
                self.found.append(found)
                emit(**found)
            for failure in self.failures:
                emit("miss", **{k: v for k, v in failure.items() if k != "table"})
        lost = [failure["reason"] for failure in self.failures if is_lost(RuntimeError(failure["reason"]))]
        if lost:
            raise Lost(lost[0])


def compiles(race: Race) -> bool:
    return any(entry.label == "compiled" for entry in race.entries)


def with_live(races: list[Race]) -> tuple[list[Race], str]:
    """Races without the candidates of CUDA kernels that are not live, and why they are not."""
    state = flatkern.backends()["cuda"]
    rest = [replace(race, entries=tuple(e for e in race.entries if CUDA not in e.label)) for race in races]
    if state["live"] or rest == races:
        return races, ""
    return rest, " ".join(state["reason"].split())[:300]


def run(
    races: list[Race],
    *,
    usual: float,
    most: float,
    racer: type[Racer] = Racer,
    sentence: Callable[[list[dict]], str] = lambda found: "",
) -> int:
    """The stage: 0 if every candidate of ours had its turns, but for races that torch.compile left no time for, and
    for CUDA kernels on a machine without nvcc.

    Arguments:
        sentence: what there is to say about the results of all races, behind how many there are.
    """
    if DRY:
        stand_in.prepare()
    races, absent = with_live(races)
    if absent:
        emit("miss", model="all", method="all", base="all", candidate=CUDA, reason=absent)
    # What is compiled here, in spite of stage warm, is named in the log.
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(relativeCreated)d ms  %(message)s")
    runner = racer(stand_in.StandIn() if DRY else Gpu(), usual, most)
    gc.collect()
    gc.freeze()  # every race collects, and would look through torch each time
    missed, late = int(os.environ.get(MISSED, 0)), 0

    def failed(item: tuple[int, Race], error: Exception) -> None:
        nonlocal missed, late
        if isinstance(error, OutOfTime) and compiles(item[1]):
            late += 1
        else:
            missed += 1
        os.environ[MISSED] = str(missed)  # for the process that goes on behind a lost context
        if not isinstance(error, Lost):
            reason = str(error) if isinstance(error, OutOfTime) else f"{type(error).__name__}: {error}"
            emit("miss", **named(item[1]), candidate="all", reason=reason[:300])

    for attempt in each(list(enumerate(races)), failed):
        with attempt as (position, race):
            rest = sum(len(later.entries) for later in races[position:])
            say(f"{usual - left(usual):5.0f} s  {position + 1}/{len(races)}  {race.title}")
            runner.go(position, race, len(race.entries) / rest)
            for failure in runner.failures:
                say(f"         {failure['candidate']} did not run: {failure['reason'].splitlines()[0]}")
            missed += any("flatkern" in failure["candidate"] for failure in runner.failures)
    words = [f"{len(races) - missed - late} of {len(races)} races", sentence(runner.found)]
    words.append(f"WITHOUT CUDA kernels ({absent})" if absent else "")
    say("; ".join(filter(None, words)))
    return 1 if missed or (absent and WITH_CUDA) else 0


def named(race: Race) -> dict:
    return {"model": race.model, "method": race.method, "base": race.base}


def finding(b: dict) -> dict:
    """A result as `make gpu` reports it: microseconds, GB/s, bytes a weight; device time unless it says otherwise."""
    params, info, stats = b["params"], b["extra_info"], b["stats"]
    model = MODELS[params["model"]]
    copy = info.get("copy_gigabytes_per_second")
    cached = model.small or not copy  # a rate means nothing then

    def call(name: str) -> dict:
        floor, seconds = info["call_floors"].get(name, 0.0), info["calls"][name]
        rate = floor * model.numel / max(seconds, 1e-9) / 1e9
        return {
            "us": micro(seconds),
            "host_us": micro(info["host"]["calls"][name]),
            "floor_bytes": floor,
            "gbs": rounded(rate),
            "of_copy": None if cached else rounded(rate / copy),
        }

    return {
        **params,
        "us": micro(stats["median"]),
        "host_us": micro(info["host"]["median"]),
        "loop_us": micro(info["loop"]["median"]),
        "spread": rounded((stats["q3"] - stats["q1"]) / max(stats["median"], 1e-9)),
        "turns": stats["rounds"],
        "calls": {name: call(name) for name in info["calls"]},
        "floor_bytes": info["floor_bytes"],
        "gbs": rounded(info["gigabytes_per_second"]),
        "of_copy": None if cached else rounded(info["share_of_copy"]),
        "copy_gbs": rounded(copy) if copy else None,
        "held_bytes": rounded(info["held_bytes"]),
        "tensors": model.tensors,
        **({"tuning": info["tuning"]} if "tuning" in info else {}),
    }


def micro(seconds: float) -> float:
    return rounded(1e6 * seconds)


def rounded(value: float) -> float:
    """Five digits are more than any clock here has."""
    return float(f"{value:.5g}")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when they are over: in Python code, which torch.compile is."""

    def over(*_) -> None:
        raise TimeoutError(f"not ready within {max(0.0, seconds):.0f} s")

    if seconds <= 0:
        over()
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
