"""Timing: candidates take turns in one process, and only the optimizer's own calls are on the clock.

pytest-benchmark runs one candidate after the other. On a shared machine that compares two different
minutes, and whoever runs first pays for cold caches and fresh pages; so rounds are owned here: in each
round every candidate makes one step, in an order in which everybody follows everybody else equally
often. Statistics and result files are pytest-benchmark's own (see results.py), so that
`pytest-benchmark compare` reads them; `pytest bench --benchmark-only` has single ops the usual way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from time import perf_counter_ns

import torch
from pytest_benchmark.stats import Stats
from torch import Tensor

from .methods import Turn

Timed = Callable[[int], dict[str, int]]  # round -> nanoseconds by call


class Gradients:
    """Preset gradients, delivered the way a backward pass would: freshly written, into `.grad`.

    All candidates get the same buffers. With two `sets` the addresses change from step to step, as
    they do after `zero_grad(set_to_none=True)`; large models make do with one.
    """

    def __init__(self, params: list[Tensor], sets: int = 1) -> None:
        generator = torch.Generator().manual_seed(7)
        kinds = "clean", "noisy"
        self.sources = {k: [torch.empty_like(p).normal_(0, 0.01, generator=generator) for p in params] for k in kinds}
        self.buffers = [{k: [torch.empty_like(p) for p in params] for k in kinds} for _ in range(sets)]

    @torch.no_grad()
    def deliver(self, params: list[Tensor], kind: str, count: int) -> int:
        """Make the gradients of `kind` arrive; returns the nanoseconds of autograd's addition, if any."""
        if kind == "keep":
            return 0
        if kind == "none":
            for p in params:
                p.grad = None
            return 0
        if kind == "add" and params[0].grad is not None:
            start = perf_counter_ns()
            for p, g in zip(params, self.sources["noisy"], strict=True):
                p.grad.add_(g)
            return perf_counter_ns() - start
        kind = "noisy" if kind == "add" else kind
        fresh = self.buffers[count % len(self.buffers)][kind]
        torch._foreach_copy_(fresh, self.sources[kind])
        for p, g in zip(params, fresh, strict=True):
            p.grad = g
        return 0

    def history(self, k: int, beta: float, steps: int) -> Tensor:
        """ARWP's F of parameter `k` after `steps` equal gradients."""
        squares = self.sources["noisy"][k].float().square()
        once = squares.flatten(1).sum(dim=1) if squares.dim() >= 2 else squares
        return once * sum(beta**i for i in range(steps))


def run_cycle(
    optimizer, params: list[Tensor], cycle: Iterable[Turn], gradients: Gradients, count: int = 0
) -> dict[str, int]:
    """One optimizer step; returns the nanoseconds spent in each call (its share), and in "accumulate" (autograd's)."""
    spent: dict[str, int] = {}
    for kind, name, share in cycle:
        added = gradients.deliver(params, kind, count)
        if added:
            spent["accumulate"] = spent.get("accumulate", 0) + added
        call = getattr(optimizer, name)
        start = perf_counter_ns()
        call()
        spent[name] = spent.get(name, 0) + int(share * (perf_counter_ns() - start))
    return spent


def timed(call: Callable[[], object], name: str = "call") -> Timed:
    """A candidate that is a single call."""

    def candidate(count: int) -> dict[str, int]:
        start = perf_counter_ns()
        call()
        return {name: perf_counter_ns() - start}

    return candidate


class Timings:
    """What one candidate measured: nanoseconds by call, one entry per round."""

    def __init__(self, rounds: list[dict[str, int]]) -> None:
        self.rounds = rounds

    def stats(self, *without: str) -> Stats:
        """pytest-benchmark's statistics, in seconds, of all calls `without` some."""
        stats = Stats()
        for spent in self.rounds:
            stats.update(sum(ns for name, ns in spent.items() if name not in without) / 1e9)
        return stats

    def medians(self) -> dict[str, float]:
        """Median seconds by call."""
        names = self.rounds[0]
        return {name: Timings([{name: r[name]} for r in self.rounds]).stats().median for name in names}


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
