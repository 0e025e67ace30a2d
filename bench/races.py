"""What is raced against what on the CPU: the default plan, and the command line's variants. GPUs have gpu/wanted.py.

A race is one method on one model, with everybody who can do it; candidates of a race are interleaved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from .candidates import FLOOR, labels
from .methods import BASES, METHODS
from .models import MODELS


@dataclass(frozen=True)
class Entry:
    """One candidate of a race."""

    label: str
    dtype: str = "float32"
    masters: bool = False
    tuning: tuple[int, ...] | None = None  # of the Triton kernels; None: theirs
    setting: str = ""  # an instruction set of the C++ kernels, or "1 thread"; empty: as usual

    @property
    def name(self) -> str:
        """As results name it."""
        return f"{self.label}, {self.setting}" if self.setting else self.label


@dataclass(frozen=True)
class Race:
    """One method on one model; `table` says where its results are shown."""

    table: str  # methods, dtypes, calls, limits, settings, copy; gpu
    model: str
    method: str
    base: str
    entries: tuple[Entry, ...] = ()

    @property
    def title(self) -> str:
        if self.table == "copy":
            return f"{MODELS[self.model].title}, copying"
        return f"{MODELS[self.model].title}, {METHODS[self.method].title}, {self.base}"


def by_method(model: str, methods: Iterable[str], bases: Iterable[str], dtype: str, args) -> Iterator[Race]:
    """flatkern against what users write, method by method."""
    for base, method in product(bases, methods):
        who = labels(method, base, args, dtype, args.masters)
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


def by_limit(model: str, methods: list[str], bases: list[str], backends: list[str]) -> Iterator[Race]:
    """Each call of ours beside what memory allows it."""
    for base, method in product(bases, methods):
        yield Race("limits", model, method, base, (*(Entry(f"flatkern {b}") for b in backends), Entry(FLOOR)))


ONE_THREAD = "1 thread"


def by_setting(model: str, methods: list[str], bases: list[str]) -> Iterator[Race]:
    """The C++ kernels compiled for AVX2 where AVX-512 is the usual, and everybody with one thread."""
    from flatkern.dispatch import refuse

    if refuse("sgd_update_", "cpp", "cpu"):
        return
    from flatkern import _C

    ours = "flatkern cpp"
    older = [Entry(ours, setting="avx2")] if "avx2" in _C.isas() and _C.isa() != "avx2" else []
    everybody = (Entry(ours), *older, Entry(ours, setting=ONE_THREAD), Entry(FLOOR), Entry(FLOOR, setting=ONE_THREAD))
    for base, method in product(bases, methods):
        yield Race("settings", model, method, base, everybody)


MAIN = ["plain", "m-rwp", "sam", "rolling"]


def call_races(args) -> list[Race]:
    """Suite `calls`: what a call costs where there is nothing to compute, and what it reaches where there is much."""
    if args.quick:
        return [
            *by_call(["plain", "m-rwp"], ["sgd"], args.backends),
            *by_limit("resnet50", MAIN, ["sgd"], args.backends),
        ]
    return [
        *by_call(MAIN, list(BASES), args.backends),
        *by_limit("resnet50", MAIN, list(BASES), args.backends),
        *by_dtype("resnet50", ["plain", "m-rwp", "rolling"], "sgd", args.backends),
        *(by_setting("resnet50", ["plain", "m-rwp", "rolling"], list(BASES)) if args.device == "cpu" else ()),
        *by_limit("gpt2", MAIN, list(BASES), args.backends),
        *by_limit("gpt2", ["ire"], ["adamw"], args.backends),
    ]


def method_races(args) -> list[Race]:
    """Suite `methods`: one network with every method, larger and smaller ones with a subset, beside the rivals."""
    if args.quick:
        return list(by_method("resnet50", MAIN, ["sgd"], "float32", args))
    return [
        *by_method("many_small", MAIN, ["sgd"], "float32", args),
        *by_method("resnet50", METHODS, ["sgd"], "float32", args),
        *by_method("resnet50", [*MAIN, "momentum-rolling", "ire"], ["adamw"], "float32", args),
        *by_method("vit_b16", ["sam"], ["adamw"], "float32", args),
    ]


SUITES = {"calls": call_races, "methods": method_races}


def selected(args) -> list[Race]:
    """The product of what was selected."""
    return [
        race
        for model, dtype in product(args.models or ["resnet50"], args.dtype or ["float32"])
        for race in by_method(model, args.methods or METHODS, args.base or BASES, dtype, args)
    ]


def plan(args) -> list[Race]:
    """The races of the suites; or, where something was selected, the product of the selections."""
    suites = [SUITES[suite] for suite in args.suite if suite in SUITES]
    races = [race for suite in suites for race in suite(args) if not args.models or race.model in args.models]
    races += selected(args) if args.selected else []
    order = list(dict.fromkeys(race.model for race in races))
    copies = [Race("copy", model, "plain", "sgd") for model in order]
    return sorted([*copies, *races], key=lambda race: order.index(race.model))
