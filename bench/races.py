"""What is raced against what on the CPU: the default plan, and the command line's variants. GPUs have gpu/wanted.py.

A race is one method on one model, with everybody who can do it; candidates of a race are interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True)
class Race:
    """One method on one model; `table` says where its results are shown."""

    table: str  # methods, dtypes, calls, copy; gpu
    model: str
    method: str
    base: str
    entries: tuple[Entry, ...] = ()

    @property
    def title(self) -> str:
        if self.table == "copy":
            return f"{MODELS[self.model].title}, copying"
        return f"{MODELS[self.model].title}, {METHODS[self.method].title}, {self.base}"


def by_method(model: str, methods: list[str], bases: list[str], dtype: str, args) -> Iterator[Race]:
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
