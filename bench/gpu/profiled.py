"""Stage host: where the host's time goes in the calls of an optimizer, on a list of many tensors.

Of each candidate three loops of whole steps, with gradients that are handed over: by the clock, where the device is
awaited before each call, as in a race, and where it is not, as in a training; and once more under cProfile, whose own
price is largest for small functions. `arithmetic_us` is what a loop of plain Python takes, to compare machines by.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import statistics
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter_ns

from ..candidates import Candidate
from ..races import Race
from ..timing.gpu import Gpu, HostClock
from ..timing.harness import Clock
from . import stand_in, wanted
from .racing import Racer, named, with_live
from .stage import DRY, WITH_CUDA, each, emit, left, say
from .stages import most_seconds

STEPS = 2 if DRY else 200
BATCH = 10  # steps between two looks at the time, and as many as the rarest call needs
FUNCTIONS = 25  # of a candidate that are named
DELIVERED = "gradients"  # no call of an optimizer: what the loop hands over


def main(arguments: list[str]) -> int:
    if DRY:
        stand_in.prepare()
    races, absent = with_live(wanted.host())
    machine = stand_in.StandIn() if DRY else Gpu()
    usual = most_seconds()["host"]
    runner = Racer(machine, usual, usual)
    items = [(race, entry) for race in races for entry in race.entries]
    missed, words = 0, []

    def failed(item: tuple, error: Exception) -> None:
        nonlocal missed
        missed += 1
        race, entry = item
        emit("miss", **named(race), candidate=entry.label, reason=f"{type(error).__name__}: {error}"[:300])

    for position, attempt in enumerate(each(items, failed)):
        with attempt as (race, entry):
            seconds = max(0.0, runner.left()) / max(1, len(items) - position)
            weights, gradients = runner.inputs(race, entry.dtype)
            candidate, _ = runner.prepare(race, entry, weights, gradients)
            words.append(measure(machine, race, candidate, seconds))
            say(f"{usual - left(usual):5.0f} s  {words[-1]}")
    words.append(f"WITHOUT CUDA kernels ({absent})" if absent else "")
    say("; ".join(filter(None, words)))
    return 1 if missed or (absent and WITH_CUDA) else 0


class Calls(Clock):
    """Every time of every call, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[int]] = {}

    def add(self, name: str, nanoseconds: float) -> None:
        self.times.setdefault(name, []).append(int(nanoseconds))

    def microseconds(self, name: str) -> float:
        return round(statistics.median(self.times[name]) / 1000, 1)


class Alone(Calls, HostClock):
    """The same, each begun on an idle device."""

    def __init__(self, gpu: Gpu) -> None:
        HostClock.__init__(self, gpu)
        self.times = {}


def measure(machine: Gpu, race: Race, candidate: Candidate, seconds: float) -> str:
    """Emit what a candidate's calls take; returns the sentence about it."""
    machine.flush()
    loop, alone, profile = Calls(), Alone(machine), cProfile.Profile()
    walk(machine, candidate, alone, seconds / 4)
    walk(machine, candidate, loop, seconds / 4)
    steps = walk(machine, candidate, Profiled(profile), seconds / 4)
    arithmetic = min(timeit.repeat("for i in range(10000): i + i", number=1, repeat=5))
    about = {**named(race), "candidate": candidate.label}
    for name in loop.times:
        emit(
            "host", **about, call=name, us=loop.microseconds(name), alone_us=alone.microseconds(name),
            calls=len(loop.times[name]), tensors=len(candidate.params), arithmetic_us=round(1e6 * arithmetic, 1),
        )  # fmt: skip
    for rank, (where, calls, own, whole) in enumerate(dearest(profile)):
        emit(
            "function", **about, rank=rank, function=where, calls=round(calls / steps, 2),
            own_us=round(1e6 * own / steps, 2), whole_us=round(1e6 * whole / steps, 2),
        )  # fmt: skip
    said = ", ".join(f"{name} {loop.microseconds(name):.0f} us" for name in loop.times if name != DELIVERED)
    return f"{race.method} {candidate.label}: {said}"


class Profiled(Clock):
    """No clock: calls run under a profiler."""

    def __init__(self, profile: cProfile.Profile) -> None:
        super().__init__()
        self.profile = profile

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        if name == DELIVERED:
            call()
        else:
            self.profile.runcall(call)


def walk(machine: Gpu, candidate: Candidate, clock: Clock, seconds: float) -> int:
    """Steps on a clock, as Candidate.walk makes them, for so long; returns how many.

    The device is awaited between batches, so that no call waits because its queue is full.
    """
    begun, done, deliver = perf_counter_ns(), 0, candidate.gradients.deliver
    gc.collect()
    gc.disable()
    while done < STEPS and (done < BATCH or perf_counter_ns() < begun + 1e9 * seconds):
        machine.synchronize()
        for i in range(done, done + min(BATCH, STEPS)):
            for kind, name, share in candidate.method.cycle:
                if i % round(1 / share) == 0:
                    clock.time(DELIVERED, partial(deliver, candidate.params, kind, i, fresh=False))
                    clock.time(name, getattr(candidate.optimizer, name))
        done += min(BATCH, STEPS)
    machine.synchronize()
    gc.enable()
    return done


def dearest(profile: cProfile.Profile) -> Iterator[tuple[str, int, float, float]]:
    """The functions that take longest without those that they call: name, calls, own and whole seconds."""
    found = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    for (path, line, name), (_, calls, own, whole, _) in sorted(found, key=lambda row: -row[1][2])[:FUNCTIONS]:
        yield name if path == "~" else f"{'/'.join(Path(path).parts[-2:])}:{line} {name}", calls, own, whole
