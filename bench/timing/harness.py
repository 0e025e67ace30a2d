"""Timing: candidates take turns in one process, and only the optimizer's own calls are on the clock.

pytest-benchmark runs one candidate after the other. On a shared machine that compares two different
minutes, and whoever runs first pays for cold caches and fresh pages; so rounds are owned here: in each
round every candidate makes one step, in an order in which everybody follows everybody else equally
often. Statistics and result files are those of pytest-benchmark (see stats.py, report/results.py), so that
`pytest-benchmark compare` reads them; `pytest bench --benchmark-only` has single ops the usual way.
What a turn measures is the machine's: here the host's clock, in gpu.py the device's beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from time import perf_counter_ns

import torch
from torch import Tensor

from ..methods import Turn
from .stats import Stats

Timed = Callable[[int], dict[str, int]]  # round -> nanoseconds by call
HOST, LOOP = "host ", "loop"  # prefix of the calls, and the name, of what else a turn on a GPU measures


class Clock:
    """The host's clock around calls."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        """Make a call; its nanoseconds count with their `share`."""
        start = perf_counter_ns()
        call()
        self.add(name, share * (perf_counter_ns() - start))

    def add(self, name: str, nanoseconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0) + int(nanoseconds)

    def read(self) -> dict[str, int]:
        """Nanoseconds by call since the last reading."""
        spent, self.spent = self.spent, {}
        return spent


class Cpu:
    """Where calls are over when they return."""

    device = torch.device("cpu")
    burst = 10  # steps in a turn of a small model

    def turn(self, candidate, count: int) -> dict[str, int]:
        """Nanoseconds by call of a step, or medians of a burst of them."""
        return candidate.steps(Clock(), count)

    def timed(self, call: Callable[[], object]) -> Timed:
        """A candidate that is a single call."""

        def candidate(count: int) -> dict[str, int]:
            clock = Clock()
            clock.time("call", call)
            return clock.read()

        return candidate

    def free_bytes(self) -> int | None:
        """Free memory, where the system tells."""
        try:
            with open("/proc/meminfo") as lines:
                return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return None

    def release(self) -> None:
        """Give back what a race has left."""


class Gradients:
    """Preset gradients, delivered the way a backward pass would: freshly written, into `.grad`.

    All candidates get the same buffers. With two `sets` the addresses change from step to step, as
    they do after `zero_grad(set_to_none=True)`; large models make do with one.
    """

    def __init__(self, params: list[Tensor], sets: int = 1) -> None:
        generator = torch.Generator(params[0].device).manual_seed(7)
        kinds = "clean", "noisy"
        self.sources = {k: [torch.empty_like(p).normal_(0, 0.01, generator=generator) for p in params] for k in kinds}
        # Numbers from the beginning: those that arrive without being fresh are taken as they are.
        self.buffers = [{k: [s.clone() for s in self.sources[k]] for k in kinds} for _ in range(sets)]

    @torch.no_grad()
    def deliver(self, params: list[Tensor], kind: str, count: int, clock: Clock | None = None, fresh=True) -> None:
        """Make the gradients of `kind` arrive; only autograd's addition, if any, is on the clock.

        Without `fresh` they are the old ones under a new version, which costs the host little and the device nothing.
        """
        if kind == "keep":
            return
        if kind == "none":
            for p in params:
                p.grad = None
            return
        if kind == "add" and params[0].grad is not None:
            (clock or Clock()).time("accumulate", lambda: self.add_to(params))
            return
        kind = "noisy" if kind == "add" else kind
        arriving = self.buffers[count % len(self.buffers)][kind]
        if fresh:
            torch._foreach_copy_(arriving, self.sources[kind])
        else:
            torch._C._increment_version(arriving)
        for p, g in zip(params, arriving, strict=True):
            p.grad = g

    def add_to(self, params: list[Tensor]) -> None:
        for p, g in zip(params, self.sources["noisy"], strict=True):
            p.grad.add_(g)

    def history(self, k: int, beta: float, steps: int) -> Tensor:
        """ARWP's F of parameter `k` after `steps` equal gradients."""
        squares = self.sources["noisy"][k].float().square()
        once = squares.flatten(1).sum(dim=1) if squares.dim() >= 2 else squares
        return once * sum(beta**i for i in range(steps))


def run_cycle(
    optimizer, params: list[Tensor], cycle: Iterable[Turn], gradients: Gradients, count: int = 0, clock=None
) -> dict[str, int]:
    """One optimizer step; returns the nanoseconds spent in each call (its share), and in "accumulate" (autograd's)."""
    clock = Clock() if clock is None else clock
    for kind, name, share in cycle:
        gradients.deliver(params, kind, count, clock)
        clock.time(name, getattr(optimizer, name), share)
    return clock.read()


class Timings:
    """What one candidate measured: nanoseconds by call, one entry per round."""

    def __init__(self, rounds: list[dict[str, int]]) -> None:
        self.rounds = rounds

    def calls(self) -> Timings:
        """The calls themselves: on a GPU, on the device."""
        return self.picked(lambda name: name != LOOP and not name.startswith(HOST))

    def host(self) -> Timings | None:
        """The same calls on the host, where that is something else."""
        found = self.picked(lambda name: name.startswith(HOST), len(HOST))
        return found if found.rounds[0] else None

    def loop(self) -> Timings | None:
        """Steps in a loop, where that is something else."""
        return self.picked(lambda name: name == LOOP) if LOOP in self.rounds[0] else None

    def picked(self, wanted: Callable[[str], bool], start: int = 0) -> Timings:
        return Timings([{name[start:]: ns for name, ns in spent.items() if wanted(name)} for spent in self.rounds])

    def stats(self, *without: str) -> Stats:
        """Statistics, in seconds, of all calls `without` some."""
        return Stats([sum(ns for name, ns in spent.items() if name not in without) / 1e9 for spent in self.rounds])

    def medians(self) -> dict[str, float]:
        """Median seconds by call."""
        return {name: Stats([r[name] / 1e9 for r in self.rounds]).median for name in self.rounds[0]}


def balanced_orders(n: int) -> list[list[int]]:
    """A Williams design: `n` orders (2n for odd n) in which each follows each other one equally often."""
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    orders = [[(start + z) % n for z in zigzag] for start in range(n)]
    return orders if n % 2 == 0 else orders + [order[::-1] for order in orders]


def takes_part(turn: int, wanted: int, rounds: int) -> bool:
    """Spread `wanted` turns evenly over `rounds`."""
    return (turn + 1) * wanted // rounds > turn * wanted // rounds


def interleave(
    candidates: dict[str, Timed],
    *,
    rounds: int,
    least: int = 5,
    seconds: float = 2.0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Timings], dict[str, str]]:
    """Time all candidates together; returns their timings, and the reasons of those that failed.

    One warm-up step each, then `rounds` rounds. A candidate that would take longer than `seconds`
    sits some of them out, evenly spread, but has `least` turns. One that raises leaves the race.
    """
    failures: dict[str, str] = {}
    measured: dict[str, list[dict[str, int]]] = {}
    wanted: dict[str, int] = {}

    def attempt(label: str, count: int) -> dict[str, int] | None:
        try:
            return candidates[label](count)
        except Exception as error:  # whatever it is, the others go on and the reason is reported
            failures[label] = f"{type(error).__name__}: {error}"
            return None

    for label in candidates:
        start = perf_counter_ns()
        if attempt(label, 0) is not None:
            cost = (perf_counter_ns() - start) / 1e9
            wanted[label] = max(least, min(rounds, int(seconds / max(cost, 1e-9))))
            measured[label] = []
    rounds = max([rounds, *wanted.values()])

    labels = list(measured)
    orders = balanced_orders(len(labels))
    total, done = sum(wanted.values()), 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for position in orders[turn % len(orders)] if orders else ():
                label = labels[position]
                if label in failures or not takes_part(turn, wanted[label], rounds):
                    continue
                spent = attempt(label, turn)
                if spent is not None:
                    measured[label].append(spent)
                done += 1
                tick(done, total)
    finally:
        if collecting:
            gc.enable()
    return {k: Timings(v) for k, v in measured.items() if k not in failures and v}, failures
