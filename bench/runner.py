"""Running a race: building its candidates, timing them together, and turning their timings into results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .candidates import DTYPES, FLOOR, arriving, floors, held_at_most, prepare
from .equal import difference_of
from .methods import METHODS, is_plain
from .models import MODELS
from .races import ONE_THREAD, Entry, Race
from .report import results
from .timing.harness import Cpu, Gradients, Timed, interleave
from .timing.limits import RaceLimits
from .timing.stats import Stats


@contextmanager
def under(setting: str) -> Iterator[None]:
    """Inside, kernels run as a candidate's setting says."""
    if not setting:
        yield
    elif setting == ONE_THREAD:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
    else:
        from flatkern import _C

        usual = _C.set_isa(setting)
        try:
            yield
        finally:
            _C.set_isa(usual)


def is_ours(entry: Entry) -> bool:
    return entry.label.startswith("flatkern")


class Runner:
    """Runs races and collects their results; a candidate that fails costs its own line only."""

    least = 5  # turns of a candidate that takes long

    def __init__(
        self,
        rounds: int,
        seconds: float,
        tick: Callable[[int, int], None] = lambda done, total: None,
        machine=None,
        compares: bool = False,
        limits: bool = False,
    ) -> None:
        """With `compares` results say of every candidate where it leaves the reference (equal.py); with `limits`, of
        every call of ours what memory allows it (timing/limits.py).
        """
        self.rounds, self.seconds, self.tick, self.compares, self.limits = rounds, seconds, tick, compares, limits
        self.machine = machine or Cpu()
        self.kept: dict[tuple[str, str], tuple[list[torch.Tensor], Gradients]] = {}
        self.compared: dict[tuple[str, str, str], str] = {}
        self.benchmarks: list[dict] = []
        self.failures: list[dict] = []

    def run(self, race: Race) -> None:
        race = replace(race, entries=tuple(self.fitting(race)))
        (self.copies if race.table == "copy" else self.optimizers)(race)
        self.machine.release()

    def make_room(self, race: Race) -> None:
        """Weights and gradients are kept for the next race on the same model."""
        if any(model != race.model for model, _ in self.kept):
            self.release()

    def release(self) -> None:
        """Give back what was kept for a next race."""
        self.kept.clear()
        self.machine.release()

    def fitting(self, race: Race) -> Iterator[Entry]:
        """The entries that memory has room for, beside weights and gradients of each dtype and a copy."""
        self.make_room(race)
        free, numel = self.machine.free_bytes(), MODELS[race.model].numel
        dtypes = {arriving(entry.label, entry.dtype) for entry in race.entries}
        dtypes -= {dtype for model, dtype in self.kept if model == race.model}  # which are there already
        need = (2 * 4 + sum(5 * DTYPES[dtype].itemsize for dtype in dtypes)) * numel
        if kinds := self.limited(race):
            need += RaceLimits.held_bytes(METHODS[race.method], race.base, kinds) * numel
        for entry in race.entries:
            need += held_at_most(entry.label, race.method, race.base, entry.dtype, entry.masters) * numel
            if free is None or need < 0.9 * free:
                yield entry
            else:
                self.fail(race, entry, f"needs about {need / 1e9:.0f} GB with the others, {free / 1e9:.0f} are free")

    def fail(self, race: Race, entry: Entry, reason: str) -> None:
        self.failures.append({**self.params(race, entry), "table": race.table, "reason": reason[:300]})

    def params(self, race: Race, entry: Entry) -> dict:
        named = {"model": race.model, "method": race.method, "base": race.base}
        return {**named, "dtype": entry.dtype, "candidate": entry.name, "masters": entry.masters}

    def interleave(self, race: Race, candidates: dict):
        # Small models are over in no time: more turns, for the same number of seconds.
        rounds = self.rounds * (5 if MODELS[race.model].small else 1)
        return interleave(
            candidates, rounds=rounds, least=min(self.least, rounds), seconds=self.seconds, tick=self.tick
        )

    def inputs(self, race: Race, dtype: str) -> tuple[list[torch.Tensor], Gradients]:
        """Weights and gradients, which the candidates of a race share."""
        key = race.model, dtype
        if key not in self.kept:
            torch.manual_seed(0)
            model, device = MODELS[race.model], self.machine.device
            weights = [(0.05 * torch.randn(s, device=device)).to(DTYPES[dtype]) for s in model.shapes()]
            self.kept[key] = weights, Gradients(weights, sets=2 if model.small else 1)
        return self.kept[key]

    def difference(self, race: Race, entry: Entry) -> dict[str, str]:
        """What a candidate computes in place of the reference, if that was looked at."""
        stands_for_itself = is_plain(entry.label) and race.method != "plain"
        if not self.compares or stands_for_itself or entry.dtype != "float32" or entry.masters:
            return {}
        key = entry.label, race.method, race.base
        if key not in self.compared:
            self.compared[key] = difference_of(*key, device=self.machine.device)
        return {"differs": self.compared[key]}

    def prepare(self, race: Race, entry: Entry, weights: list[torch.Tensor], gradients: Gradients) -> tuple[Timed, int]:
        """A warm candidate, and the bytes that it holds."""
        burst = self.machine.burst if MODELS[race.model].small else 1
        with under(entry.setting):
            made = prepare(entry.label, weights, gradients, race.method, race.base, entry.masters, burst, self.machine)
        if not entry.setting:
            return made
        turn, held = made

        def with_setting(count: int) -> dict[str, int]:
            with under(entry.setting):
                return turn(count)

        return with_setting, held

    def optimizers(self, race: Race) -> None:
        """Race optimizers; inputs are shared per dtype."""
        model = MODELS[race.model]
        candidates, held, entries, differs = {}, {}, {}, {}
        for entry in race.entries:
            key = f"{entry.name} {entry.dtype} {entry.masters} {entry.tuning}"
            entries[key] = entry
            try:
                differs[key] = self.difference(race, entry)
                weights, gradients = self.inputs(race, arriving(entry.label, entry.dtype))
                candidates[key], held[key] = self.prepare(race, entry, weights, gradients)
            except Exception as error:  # reported in the results; the others go on
                self.fail(race, entry, f"{type(error).__name__}: {error}")
                self.machine.release()
        # What memory can do is measured in the same minute as what is held against it.
        one, other = (torch.ones(model.numel, device=self.machine.device) for _ in range(2))
        moves, limits = {"copy": lambda: other.copy_(one)}, self.race_limits(race)
        moves |= limits.candidates() if limits else {}
        moving = {key: self.machine.timed(move) for key, move in moves.items()}
        timings, failures = self.interleave(race, {**candidates, **moving})
        for key, reason in failures.items():
            self.fail(race, entries.get(key, Entry(key)), reason)
        moved = {key: timings.pop(key).calls().stats() for key in moves if key in timings}
        copied = moved.pop("copy", None)
        rows = []
        for key, measured in timings.items():
            entry = entries[key]
            least = floors(entry.label, race.method, race.base, entry.dtype, entry.masters)
            info = {
                "floor_bytes": sum(least.values()),
                "call_floors": least,
                "held_bytes": held[key] / model.numel,
                **differs[key],
                **self.limit_of(limits, entry, moved),
                **({"tuning": list(entry.tuning)} if entry.tuning else {}),
            }
            rows.append(results.entry(race.table, self.params(race, entry), measured, model.numel, **info))
        results.compare(rows, FLOOR, copied, model.numel)
        self.benchmarks += rows

    def limited(self, race: Race) -> list[tuple[torch.dtype, bool]]:
        """The kinds of weights whose limits are asked for: of a model that fits into a cache none, and with settings
        that would be those of other kernels."""
        if not self.limits or MODELS[race.model].small or race.table == "settings":
            return []
        return [(DTYPES[entry.dtype], entry.masters) for entry in race.entries if is_ours(entry)]

    def race_limits(self, race: Race) -> RaceLimits | None:
        """What memory allows the calls of a race."""
        kinds = self.limited(race)
        if not kinds:
            return None
        try:
            shapes = MODELS[race.model].shapes()
            return RaceLimits(METHODS[race.method], race.base, kinds, shapes, self.machine.device)
        except Exception as error:  # without compiled kernels there is none
            self.fail(race, Entry("the limit"), f"{type(error).__name__}: {error}")
            return None

    def limit_of(self, limits: RaceLimits | None, entry: Entry, moved: dict[str, Stats]) -> dict[str, dict[str, float]]:
        """The limits of a row of ours, by call."""
        if limits is None or not is_ours(entry) or not moved.keys() >= limits.candidates().keys():
            return {}
        seconds = {key: stats.median for key, stats in moved.items()}
        return {"limits": limits.seconds(seconds, DTYPES[entry.dtype], entry.masters)}

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
