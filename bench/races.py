"""What is raced against what: the default plan, its command-line variants, and running one race.

A race is one method on one model, with everybody who can do it; candidates of a race are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from . import results
from .candidates import DTYPES, FLOOR, TORCH, labels, prepare
from .harness import Gradients, interleave, timed
from .methods import BASES, METHODS, floor_bytes
from .models import MODELS

SMALL = 1_000_000  # parameters; below, calls cost more than memory traffic
BURST = 10  # steps in a turn of a small model


@dataclass(frozen=True)
class Entry:
    """One candidate of a race."""

    label: str
    dtype: str = "float32"
    masters: bool = False


@dataclass(frozen=True)
class Race:
    """One method on one model; `table` says where its results are shown."""

    table: str  # methods, dtypes, calls, copy
    model: str
    method: str
    base: str
    entries: tuple[Entry, ...] = ()

    @property
    def title(self) -> str:
        return f"{MODELS[self.model].title}, {METHODS[self.method].title}, {self.base}"


def by_method(model: str, methods: list[str], bases: list[str], dtype: str, args) -> Iterator[Race]:
    """flatkern against what users write, method by method."""
    for base, method in product(bases, methods):
        who = labels(method, args.backends, dtype, args.masters, args.compile)
        yield Race("methods", model, method, base, tuple(Entry(label, dtype, args.masters) for label in who))


def by_dtype(model: str, methods: list[str], base: str, backends: list[str]) -> Iterator[Race]:
    """float32 against bfloat16 weights, with and without float32 masters."""
    kinds = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
    for method in methods:
        ours = [Entry(f"flatkern {b}", dtype, masters) for b, (dtype, masters) in product(backends, kinds)]
        yield Race("dtypes", model, method, base, (*ours, Entry(FLOOR), Entry(FLOOR, "bfloat16")))


def by_call(methods: list[str], bases: list[str], backends: list[str]) -> Iterator[Race]:
    """Python's share: as many tensors as ResNet-50 has, and next to nothing in them."""
    for base, method in product(bases, methods):
        who = [*(f"flatkern {b}" for b in backends), FLOOR, "torch foreach" if method == "plain" else "foreach"]
        yield Race("calls", "tiny_160", method, base, tuple(map(Entry, who)))


def default_plan(args) -> list[Race]:
    """Minutes on two cores: one network with every method, larger and smaller ones with a subset."""
    if args.quick:
        return [
            *by_call(["plain", "m-rwp"], ["sgd"], args.backends),
            *by_method("resnet50", ["plain", "m-rwp", "sam", "rolling"], ["sgd"], "float32", args),
        ]
    return [
        *by_call(["plain", "m-rwp", "sam", "rolling"], ["sgd", "adamw"], args.backends),
        *by_method("many_small", ["plain", "m-rwp", "sam", "rolling"], ["sgd"], "float32", args),
        *by_method("resnet50", list(METHODS), list(BASES), "float32", args),
        *by_dtype("resnet50", ["plain", "m-rwp", "rolling"], "sgd", args.backends),
        *by_method("vit_b16", ["plain", "m-rwp", "sam"], ["adamw"], "float32", args),
        *by_method("gpt2", ["plain", "m-rwp", "rolling", "ire"], ["adamw"], "float32", args),
    ]


def plan(args) -> list[Race]:
    """The default plan; or, where something was selected, the product of the selections."""
    if not args.selected:
        races = default_plan(args)
    else:
        races = [
            race
            for model, dtype in product(args.models or ["resnet50"], args.dtype or ["float32"])
            for race in by_method(model, args.methods or list(METHODS), args.base or list(BASES), dtype, args)
        ]
    copies = [Race("copy", model, "plain", "sgd") for model in dict.fromkeys(race.model for race in races)]
    order = list(dict.fromkeys(race.model for race in races))
    return sorted([*copies, *races], key=lambda race: order.index(race.model))


def available_bytes() -> int | None:
    """Free memory, where the system tells."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


class Runner:
    """Runs races and collects their results; a candidate that fails costs its own line only."""

    def __init__(self, rounds: int, seconds: float, tick: Callable[[int, int], None]) -> None:
        self.rounds, self.seconds, self.tick = rounds, seconds, tick
        self.benchmarks: list[dict] = []
        self.failures: list[dict] = []

    def run(self, race: Race) -> None:
        race = replace(race, entries=tuple(self.fitting(race)))
        (self.copies if race.table == "copy" else self.optimizers)(race)

    def fitting(self, race: Race) -> Iterator[Entry]:
        """The entries that memory has room for: weights, two moments and three buffers each; gradients and a copy."""
        free = available_bytes()
        need = 6 * 4 * MODELS[race.model].numel
        for entry in race.entries:
            need += 6 * 4 * MODELS[race.model].numel
            if free is None or need < 0.9 * free:
                yield entry
            else:
                self.fail(race, entry, f"needs about {need / 1e9:.0f} GB with the others, {free / 1e9:.0f} are free")

    def fail(self, race: Race, entry: Entry, reason: str) -> None:
        self.failures.append({**self.params(race, entry), "table": race.table, "reason": reason})

    def params(self, race: Race, entry: Entry) -> dict:
        named = {"model": race.model, "method": race.method, "base": race.base}
        return {**named, "dtype": entry.dtype, "candidate": entry.label, "masters": entry.masters}

    def interleave(self, race: Race, candidates: dict):
        # Small models are over in no time: more turns, for the same number of seconds.
        rounds = self.rounds if MODELS[race.model].numel > SMALL else 5 * self.rounds
        return interleave(candidates, rounds=rounds, seconds=self.seconds, tick=self.tick)

    def optimizers(self, race: Race) -> None:
        """Race optimizers; inputs are shared per dtype."""
        model, method = MODELS[race.model], METHODS[race.method]
        sets, burst = (1, 1) if model.numel > SMALL else (2, BURST)
        inputs, candidates, held, entries = {}, {}, {}, {}
        for entry in race.entries:
            key = f"{entry.label} {entry.dtype} {entry.masters}"
            entries[key] = entry
            try:
                if entry.dtype not in inputs:
                    torch.manual_seed(0)
                    weights = [(0.05 * torch.randn(s)).to(DTYPES[entry.dtype]) for s in model.shapes()]
                    inputs[entry.dtype] = weights, Gradients(weights, sets)
                weights, gradients = inputs[entry.dtype]
                candidates[key], held[key] = prepare(
                    entry.label, weights, gradients, race.method, race.base, entry.masters, burst
                )
            except Exception as error:  # reported in the results; the others go on
                self.fail(race, entry, f"{type(error).__name__}: {error}")
        one, other = torch.ones(model.numel), torch.ones(model.numel)
        timings, failures = self.interleave(race, {**candidates, "copy": timed(lambda: other.copy_(one))})
        for key, reason in failures.items():
            self.fail(race, entries[key], reason)

        # What memory can do is measured in the same minute as what is held against it.
        copy = 8 * model.numel / timings.pop("copy").stats().median / 1e9
        rows = []
        for key, measured in timings.items():
            entry = entries[key]
            param = DTYPES[entry.dtype].itemsize
            does = METHODS["plain"] if entry.label in TORCH else method
            info = {
                "floor_bytes": floor_bytes(does, race.base, param, entry.masters),
                "held_bytes": held[key] / model.numel,
            }
            rows.append(results.entry(race.table, self.params(race, entry), measured, model.numel, **info))
        results.compare(rows, FLOOR, copy)
        self.benchmarks += rows

    def copies(self, race: Race) -> None:
        """Measure what memory can do for this model's size, and what setting `.grad` costs."""
        shapes, numel = MODELS[race.model].shapes(), MODELS[race.model].numel
        params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        sources, targets = [torch.ones(s) for s in shapes], [torch.ones(s) for s in shapes]
        one, other = torch.ones(numel), torch.ones(numel)

        def set_gradients() -> None:
            for p, g in zip(params, sources, strict=True):
                p.grad = g

        candidates = {
            "copy_": timed(lambda: other.copy_(one)),
            "foreach_copy_": timed(lambda: torch._foreach_copy_(targets, sources)),
            "set .grad": timed(set_gradients),
        }
        timings, _ = self.interleave(race, candidates)
        for label, measured in timings.items():
            info = {"floor_bytes": 0 if label == "set .grad" else 8}
            self.benchmarks.append(results.entry("copy", self.params(race, Entry(label)), measured, numel, **info))
