"""Running a race: building its candidates, timing them together, and turning their timings into results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from . import results
from .candidates import DTYPES, FLOOR, Candidate, prepare
from .harness import Clock, Cpu, Gradients, interleave
from .methods import METHODS, call_floors, is_plain
from .models import MODELS
from .races import Entry, Race


class Runner:
    """Runs races and collects their results; a candidate that fails costs its own line only."""

    def __init__(
        self,
        rounds: int,
        seconds: float,
        tick: Callable[[int, int], None] = lambda done, total: None,
        machine=None,
    ) -> None:
        self.rounds, self.seconds, self.tick = rounds, seconds, tick
        self.machine = machine or Cpu()
        self.benchmarks: list[dict] = []
        self.failures: list[dict] = []

    def run(self, race: Race) -> None:
        race = replace(race, entries=tuple(self.fitting(race)))
        (self.copies if race.table == "copy" else self.optimizers)(race)
        self.machine.release()

    def fitting(self, race: Race) -> Iterator[Entry]:
        """The entries that memory has room for: weights, two moments and three buffers each; gradients and a copy."""
        free, numel = self.machine.free_bytes(), MODELS[race.model].numel
        need = 6 * 4 * numel
        for entry in race.entries:
            # With masters there are no buffers, but half-precision weights beside them.
            need += (2 + 3 * 4 if entry.masters else 6 * DTYPES[entry.dtype].itemsize) * numel
            if free is None or need < 0.9 * free:
                yield entry
            else:
                self.fail(race, entry, f"needs about {need / 1e9:.0f} GB with the others, {free / 1e9:.0f} are free")

    def fail(self, race: Race, entry: Entry, reason: str) -> None:
        self.failures.append({**self.params(race, entry), "table": race.table, "reason": reason[:300]})

    def params(self, race: Race, entry: Entry) -> dict:
        named = {"model": race.model, "method": race.method, "base": race.base}
        return {**named, "dtype": entry.dtype, "candidate": entry.label, "masters": entry.masters}

    def interleave(self, race: Race, candidates: dict):
        # Small models are over in no time: more turns, for the same number of seconds.
        rounds = self.rounds * (5 if MODELS[race.model].small else 1)
        return interleave(candidates, rounds=rounds, least=min(5, rounds), seconds=self.seconds, tick=self.tick)

    def inputs(self, race: Race, dtype: str) -> tuple[list[torch.Tensor], Gradients]:
        """Weights and gradients, which the candidates of a race share."""
        torch.manual_seed(0)
        model, device = MODELS[race.model], self.machine.device
        weights = [(0.05 * torch.randn(s, device=device)).to(DTYPES[dtype]) for s in model.shapes()]
        return weights, Gradients(weights, sets=2 if model.small else 1)

    def optimizers(self, race: Race) -> None:
        """Race optimizers; inputs are shared per dtype."""
        model = MODELS[race.model]
        burst = self.machine.burst if model.small else 1
        inputs, candidates, held, entries = {}, {}, {}, {}
        for entry in race.entries:
            key = f"{entry.label} {entry.dtype} {entry.masters}"
            entries[key] = entry
            try:
                if entry.dtype not in inputs:
                    inputs[entry.dtype] = self.inputs(race, entry.dtype)
                candidates[key], held[key] = prepare(
                    entry.label, *inputs[entry.dtype], race.method, race.base, entry.masters, burst, self.machine
                )
            except Exception as error:  # reported in the results; the others go on
                self.fail(race, entry, f"{type(error).__name__}: {error}")
                self.machine.release()
        one, other = (torch.ones(model.numel, device=self.machine.device) for _ in range(2))
        copying = self.machine.timed(lambda: other.copy_(one))
        timings, failures = self.interleave(race, {**candidates, "copy": copying})
        for key, reason in failures.items():
            self.fail(race, entries.get(key, Entry(key)), reason)

        # What memory can do is measured in the same minute as what is held against it.
        copied = timings.pop("copy", None)
        rows = []
        for key, measured in timings.items():
            entry = entries[key]
            does = METHODS["plain" if is_plain(entry.label) else race.method]
            floors = call_floors(does, race.base, DTYPES[entry.dtype].itemsize, entry.masters)
            info = {
                "floor_bytes": sum(floors.values()),
                "call_floors": floors,
                "held_bytes": held[key] / model.numel,
            }
            rows.append(results.entry(race.table, self.params(race, entry), measured, model.numel, **info))
        results.compare(rows, FLOOR, 8 * model.numel / copied.calls().stats().median / 1e9 if copied else None)
        self.benchmarks += rows

    def survey(self, race: Race) -> dict[str, dict]:
        """Launches by call for each candidate, which has compiled its kernels then; no clock is read.

        The key is what results are found again by.
        """
        found = {}
        for entry in race.entries:
            key = results.key(self.params(race, entry))
            try:
                candidate = Candidate(
                    entry.label, *self.inputs(race, entry.dtype), race.method, race.base, entry.masters, 1, self.machine
                )
                candidate.steps(Clock(), 0)
                candidate.steps(Clock(), 1)
                found[key] = self.machine.launches(candidate)
            except Exception as error:  # the race itself will meet it again, and report it
                found[key] = {"error": f"{type(error).__name__}: {error}"}
            candidate = None
            self.machine.release()
        return found

    def copies(self, race: Race) -> None:
        """Measure what memory can do for this model's size, and what setting `.grad` costs."""
        device = self.machine.device
        shapes, numel = MODELS[race.model].shapes(), MODELS[race.model].numel
        params = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
        sources, targets = ([torch.ones(s, device=device) for s in shapes] for _ in range(2))
        one, other = (torch.ones(numel, device=device) for _ in range(2))

        def set_gradients() -> None:
            for p, g in zip(params, sources, strict=True):
                p.grad = g

        candidates = {
            "copy_": self.machine.timed(lambda: other.copy_(one)),
            "foreach_copy_": self.machine.timed(lambda: torch._foreach_copy_(targets, sources)),
            "set .grad": self.machine.timed(set_gradients),
        }
        timings, _ = self.interleave(race, candidates)
        for label, measured in timings.items():
            info = {"floor_bytes": 0 if label == "set .grad" else 8}
            self.benchmarks.append(results.entry("copy", self.params(race, Entry(label)), measured, numel, **info))
