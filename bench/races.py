"""What is raced against what: the default plans, of the CPU and of a GPU, and the command line's variants.

A race is one method on one model, with everybody who can do it; candidates of a race are interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Race:
    """One method on one model; `table` says where its results are shown."""

    table: str  # methods, dtypes, calls, compiled, copy
    model: str
    method: str
    base: str
    entries: tuple[Entry, ...] = ()

    @property
    def title(self) -> str:
        if self.table == "copy":
            return f"{MODELS[self.model].title}, copying"
        compiled = ", torch.compile" if self.table == "compiled" else ""
        return f"{MODELS[self.model].title}, {METHODS[self.method].title}, {self.base}{compiled}"


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


def gpu_plan(args) -> list[Race]:
    """Under eight minutes on a GPU, what matters most first: the end may have to be left out."""
    every, few, half = list(METHODS), ["plain", "m-rwp", "sam", "rolling"], ["rwp", "plain", "rolling"]
    first = ["m-rwp", "sam", "asam"]
    return [
        *(Race("copy", model, "plain", "sgd") for model in ("gpt2", "resnet50", "llama_1b")),
        *by_method("gpt2", first, ["sgd"], "float32", args),
        *by_method("resnet50", first, ["sgd"], "float32", args),
        *by_layout("gpt2", "adamw", args.backends),
        *lean(by_method("llama_1b", ["m-rwp"], ["sgd"], "float32", args)),
        *by_method("many_small", few, ["sgd"], "float32", args),
        *by_method("vit_b16", ["m-rwp"], ["adamw"], "float32", args),
        *by_method("gpt2", ["plain", "m-rwp", "rolling", "ire"], ["adamw"], "float32", args),
        *by_method("resnet50", half, ["sgd"], "float32", args),
        *by_call(few, list(BASES), args.backends),
        *by_method("gpt2", half, ["sgd"], "float32", args),
        *lean(by_method("llama_1b", ["plain", "rolling"], ["adamw"], "float32", args)),
        *by_layout("llama_1b", "adamw", args.backends),
        *by_method("resnet50", [m for m in every if m not in (*first, *half)], ["sgd"], "float32", args),
        *by_compiler("resnet50", "m-rwp", "sgd", args.backends),
        *by_compiler("gpt2", "rolling", "adamw", args.backends),
        *by_dtype("gpt2", ["plain", "m-rwp"], "adamw", args.backends),
        *by_method("vit_b16", ["plain", "sam", "rolling"], ["adamw"], "float32", args),
        *by_dtype("resnet50", ["plain", "m-rwp", "rolling"], "sgd", args.backends),
        *by_method("resnet50", [*few, *(m for m in every if m not in few)], ["adamw"], "float32", args),
        *(Race("copy", model, "plain", "sgd") for model in ("vit_b16", "many_small")),
    ]


def lean(races: Iterator[Race]) -> Iterator[Race]:
    """Only those for whom a billion parameters leave room: no loops with their temporaries."""
    for race in races:
        who = tuple(e for e in race.entries if e.label not in ("papers", "loop", "torch loop"))
        yield replace(race, entries=who)


def by_layout(model: str, base: str, backends: list[str]) -> Iterator[Race]:
    """Rolling noise behind bfloat16 weights with float32 masters, against plain steps of that very layout."""
    for backend in backends:
        ours = [Entry(f"{plain}flatkern {backend}", "bfloat16", True) for plain in ("", "plain ")]
        yield Race("dtypes", model, "rolling", base, (*ours, Entry(f"flatkern {backend}"), Entry(FLOOR)))


def by_compiler(model: str, method: str, base: str, backends: list[str]) -> Iterator[Race]:
    """torch.compile, which takes so long to get ready that few races have it."""
    who = [*(f"flatkern {b}" for b in backends), FLOOR, "foreach", "compiled"]
    yield Race("compiled", model, method, base, tuple(map(Entry, who)))


def plan(args) -> list[Race]:
    """The default plan; or, where something was selected, the product of the selections."""
    if not args.selected:
        if args.device == "cuda" and not args.quick:
            return gpu_plan(args)
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
