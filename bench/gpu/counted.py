"""Instructions that the CUDA kernels issue for an element, by executing their machine code. No GPU is needed.

The emulated library (tests/cuda_emulation) cuts a model's tensors into tiles and tells the arguments of each launch;
nvcc compiles the kernels for sm_90; a block of each kind of tile is then executed, instruction by instruction
(sass.py), and counts as often as there are such tiles. An instruction counts once a warp, whatever it takes.

    whole      what is issued for an element of tiles of whole eights, whose rows are not cut, by warps that have a row
    of         the elements that are in such tiles
    all        the same of all tiles and warps
    occupancy  of the kernel that has most of the elements: threads that its registers leave room for

Then what they are for, by the functions whose lines they are compiled from.

    python tests/cuda_emulation/build.py module
    FLATKERN_CUDA_EMULATION=build/cuda-emulation/_CUDA_emul... python bench/gpu/counted.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

import flatkern
from bench.gpu import sass
from bench.gpu.disassembly import Code, output, plain, read
from bench.gpu.host import NUMBERS
from bench.models import MODELS
from flatkern import dispatch
from flatkern.ops import OPS
from flatkern.tables import mask_shape

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# Of a tile, what does not matter to what it takes.
PLACE = ("start", "tensor", "row", "long_row", "counter_row", "counter_eight", "index", "segment")
WHOLE, SEGMENTS = 1, 2  # of its flags
MOST_THREADS, REGISTERS = 2048, 65536  # of a multiprocessor
# The innermost function that is named here says what an instruction is for.
PURPOSES = {
    "tile": "Team number_in is_there leads row history_in span for_each_eight for_each_eight_in_turn for_each_tile "
    "Counters mask_byte mask_bits",
    "memory": "load store get put Elements Quads load_once store_once values of pack unpack round rounded",
    "noise": "draw philox4x32 multiply high exclusive_or normals radius angle horner",
    "sums": "sum_squares take sum fold_lanes fold_several row_sum",
    "rule": "ascend_tile take_mean direction new_mean perturb_ascent ascent_term sum_of_doubles add_products "
    "mix_tile count_tile magnitude_bits is_small amplified mixed apply take_step sgd adam adam_moments "
    "adam_step ordinary_adam_step quotient ordinary_quotient scalars_of has_ordinary_quotient is_moderate "
    "exponent_of rare_quotient count_step Adam Sgd FinalGradient mixing_weights",
}
PURPOSE = {name: purpose for purpose, names in PURPOSES.items() for name in names.split()}


@dataclass(frozen=True)
class Case:
    op: str
    source: str
    optional: tuple[str, ...] = ()
    bfloat16: tuple[str, ...] = ()  # lists that are not float32


MIXED = ("params", "grads")
CASES = {
    "perturb": Case("perturb_gaussian_", "perturb.cu", ("backups",)),
    "perturb from masters": Case("perturb_gaussian_", "perturb.cu", ("masters",), MIXED),
    "sgd": Case("sgd_update_", "sgd.cu", ("momentum_buffers",)),
    "sgd, rolling": Case("sgd_update_", "sgd.cu", ("momentum_buffers", "backups", "noise")),
    "adamw": Case("adamw_update_", "adam.cu"),
    "adamw, rolling": Case("adamw_update_", "adam.cu", ("backups", "noise")),
    "adamw, rolling, masters": Case("adamw_update_", "adam.cu", ("masters", "noise"), MIXED),
    "ascent norm": Case("ascent_norm_", "norm.cu"),
    "ascent": Case("perturb_ascent_", "perturb.cu", ("backups",)),
    "ascent norm, means": Case("ascent_norm_", "norm.cu", ("means",)),
    "ascent, means": Case("perturb_ascent_", "perturb.cu", ("backups", "new_means", "means")),
    "products": Case("gradient_products_", "norm.cu"),
    "mix": Case("mix_gradients_", "mix.cu", ("clean_grads",)),
    "mix, kept": Case("mix_gradients_", "mix.cu", ("outs", "clean_grads", "component", "found_inf")),
    "sgd, component": Case("sgd_update_", "sgd.cu", ("momentum_buffers", "backups", "clean_grads", "component")),
    "count": Case("count_magnitudes_", "mask.cu"),
    "pack": Case("pack_mask_", "mask.cu"),
    "amplify": Case("amplify_", "mask.cu"),
}
FIRST_DIGIT = 0x3BD  # of the magnitude that a quarter of the gradients of `fill` do not pass: 2 % of them have it


def arguments(case: Case, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Values of all arguments. Tensors are not written yet, so that they take no memory."""
    values: dict[str, Any] = {}
    for a in OPS[case.op].arguments:
        dtype = torch.bfloat16 if a.name in case.bfloat16 else torch.float32
        if a.type.endswith("?") and a.name not in case.optional:
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name == "steps":
            values[a.name] = [torch.tensor(7.0) for _ in shapes]
        elif a.name in ("norm", "threshold"):
            values[a.name] = torch.tensor(0.01)
        elif a.name == "component":
            values[a.name] = torch.tensor([0.8, -0.35])
        elif a.name == "found_inf":
            values[a.name] = torch.tensor(0.0)
        elif a.name == "products":
            values[a.name] = torch.zeros(3, dtype=torch.float64)
        elif a.name in ("prefix", "counts"):
            values[a.name] = torch.tensor([FIRST_DIGIT] if a.name == "prefix" else [0] * 1026)
        elif a.name == "masks":
            values[a.name] = [torch.full(mask_shape(torch.empty(shape)), 0x59, dtype=torch.uint8) for shape in shapes]
        elif a.name == "norms":
            values[a.name] = [torch.empty(shape[0] if len(shape) > 1 else 1) for shape in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.empty(shape, dtype=dtype) for shape in shapes]
        elif a.name == "clean_weight" and "clean_grads" in case.optional:
            values[a.name] = [0.5] * len(shapes)
        else:
            values[a.name] = list(range(len(shapes))) if a.name == "index" else [NUMBERS[a.name]] * len(shapes)
    return values


def fill(values: dict[str, Any], tensor: int, start: int, end: int) -> None:
    """Ordinary numbers for some elements of a tensor and of those that stand beside it."""
    generator = torch.Generator().manual_seed(tensor)
    for name, each in values.items():
        if name in ("steps", "norms", "masks") or not (isinstance(each, list) and isinstance(each[0], torch.Tensor)):
            continue
        part = each[tensor].view(-1)[start:end]
        part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
        if name == "exp_avg_sqs":
            part.square_()


def call(case: Case, values: dict[str, Any]) -> None:
    op = OPS[case.op]
    numbers = {a.name: values[a.name] for a in op.arguments if a.keyword_only}
    dispatch.load(op, "cuda")(*[values[a.name] for a in op.arguments if not a.keyword_only], **numbers)


@dataclass(frozen=True)
class Launch:
    kernel: str
    arguments: bytes
    grid: int
    block: int

    @property
    def tiles(self) -> int:
        """Which it walks: one a block, or several."""
        walks = re.match(r"(ascent_norm|gradient_norm|gradient_products|count)_kernel", self.kernel)
        return int.from_bytes(self.arguments[8:12], "little") if walks else self.grid

    def run(self, code: Code, memory: sass.Memory, block: int, grid: int | None = None) -> Any:
        return sass.Block(code, memory, self.arguments, self.block, block, grid=grid or self.grid).run()


def launches(case: Case, values: dict[str, Any]) -> list[Launch]:
    """What a call would launch; nothing is run."""
    module, found = dispatch.compiled_module("cuda"), []
    names = kernels_of(module.__file__)
    module.launch_nothing(True)
    module.watch(lambda place, *rest: found.append(Launch(names[place], *rest)))
    try:
        call(case, values)
    finally:
        module.watch(None)
        module.launch_nothing(False)
    return found


@cache
def kernels_of(library: str) -> dict[int, str]:
    """Kernels of the emulated library by their places."""
    symbols = re.findall(r"^(\w+) [tT] (void flatkern::cuda::.*)$", output("nm", "-C", library), re.MULTILINE)
    return {int(place, 16): plain(name) for place, name in symbols}


@cache
def compiled(source: str) -> dict[str, Code]:
    """The kernels of a file, with the lines that they are made of."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-lineinfo", "-arch=sm_90", "-cubin"]
        output("nvcc", *flags, "-o", cubin, KERNELS / source)
        return read(cubin, lines=True)


@cache
def tile_type() -> np.dtype[Any]:
    """struct Tile of csrc/cuda/tile.h."""
    body = re.search(r"struct alignas\(16\) Tile \{(.*?)\n\};", (KERNELS / "tile.h").read_text(), re.DOTALL)
    fields = re.findall(r"^ *(u?int)(\d+)_t ([\w, ]+);", body[1] if body else "", re.MULTILINE)
    types = [(name, f"{kind[0]}{int(bits) // 8}") for kind, bits, names in fields for name in names.split(", ")]
    return np.dtype(types, align=True)


@dataclass
class Counts:
    """Of a kind of tiles: how many there are, and what one of them has and takes."""

    kernel: str
    code: Code
    threads: int
    tiles: int
    elements: int
    columns: str
    ordinary: bool
    busy: float  # instructions of warps that have a row
    idle: float  # and of the others
    purposes: Counter[str] = field(default_factory=Counter)


def counted(case: Case, launch: Launch, code: Code, values: dict[str, Any], memory: sass.Memory) -> Iterator[Counts]:
    at = int.from_bytes(launch.arguments[:8], "little")
    tiles = np.frombuffer(memory.read(at, launch.tiles * tile_type().itemsize), tile_type())
    kind = [name for name in tiles.dtype.names or () if name not in PLACE]
    has_rows = values.get("noise") is not None
    moves = np.array([re.match(r"LDG\.E\.EF|STG\.E.*\.(64|128)$", i.name) is not None for i in code.instructions])
    _, places, numbers = np.unique(tiles[kind], return_index=True, return_counts=True)
    for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
        tile = {name: int(tiles[place][name]) for name in tiles.dtype.names or ()}
        elements = max(0, tile["teams"] - 1) * tile["length"] + tile["last"]
        fill(values, tile["tensor"], tile["start"], tile["start"] + elements)
        issued = launch.run(code, memory, place, launch.tiles)
        if launch.tiles > launch.grid:  # what a block does once it does for several tiles
            once = replace(launch, arguments=launch.arguments[:8] + bytes(4) + launch.arguments[12:])
            issued = issued - (1 - launch.grid / launch.tiles) * once.run(code, memory, place, launch.tiles)
        whole, cut = bool(tile["flags"] & WHOLE), bool(tile["flags"] & SEGMENTS) and has_rows
        busy = issued[moves].any(axis=0) if whole else np.ones(issued.shape[1], bool)
        found = Counts(
            launch.kernel, code, launch.block, number, elements,
            f"{tile['length']}{'' if whole else ', not whole'}{', cut' if cut else ''}", whole and not cut,
            float(issued[:, busy].sum()), float(issued[:, ~busy].sum()),
        )  # fmt: skip
        for instruction, times in zip(code.instructions, issued[:, busy].sum(axis=1).tolist(), strict=True):
            found.purposes[purpose(instruction.source)] += times
        yield found


def purpose(source: tuple[tuple[str, int], ...]) -> str:
    names = [functions(file)[line - 1] for file, line in source if "/csrc/" in file]
    return next((PURPOSE[name] for name in names if name in PURPOSE), "the rest")


@cache
def functions(file: str) -> list[str]:
    """The function of each line: the one that began last."""
    found, name = [], "?"
    for line in Path(file).read_text().splitlines():
        begun = re.match(r"\s*(?:template <.*> )?(?:FK_DEVICE|FK_DEVICE_MEMBER|FK_HD|__global__)\b.*?(\w+)\(", line)
        name = begun[1] if begun else name
        found.append(name)
    return found


def occupancy(counts: Counts) -> float:
    registers = -(-counts.code.used["REG"] // 8) * 8
    return REGISTERS // (registers * counts.threads) * counts.threads / MOST_THREADS


def summary(label: str, model: str, counts: list[Counts]) -> dict[str, Any]:
    useful = sum(c.tiles * c.elements for c in counts)
    ordinary = [c for c in counts if c.ordinary]
    elements = sum(c.tiles * c.elements for c in ordinary)
    purposes: Counter[str] = Counter()
    columns: dict[str, list[float]] = {}
    for c in ordinary:
        for name, times in c.purposes.items():
            purposes[name] += times * c.tiles
    for c in counts:
        row = columns.setdefault(c.columns, [0.0, 0.0])
        row[0] += c.tiles * c.elements
        row[1] += c.tiles * (c.busy + c.idle) * sass.WARP
    largest = max(counts, key=lambda c: c.tiles * c.elements)
    return {
        "case": label,
        "model": model,
        "whole": sum(c.tiles * c.busy for c in ordinary) * sass.WARP / elements,
        "of": elements / useful,
        "all": sum(c.tiles * (c.busy + c.idle) for c in counts) * sass.WARP / useful,
        "registers": largest.code.used["REG"],
        "occupancy": occupancy(largest),
        "kernel": largest.kernel,
        "purposes": {name: times * sass.WARP / elements for name, times in purposes.most_common() if times},
        "columns": {
            name: {"of": here / useful, "all": issued / max(1, here)}
            for name, (here, issued) in sorted(columns.items(), key=lambda item: -item[1][0])
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "resnet50"], choices=MODELS, metavar="NAME")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME", help=str(list(CASES)))
    parser.add_argument("--json", type=Path, help="write everything here, by the length of rows too")
    args = parser.parse_args()
    state = flatkern.backends()["cuda"]
    if not (state["live"] and state["about"]["emulated"]):
        sys.exit("error: FLATKERN_CUDA_EMULATION should be the library that `make test-cuda` builds")
    rows, memory = [], sass.Memory()
    print(f"{'':26}{'':10}{'whole':>7}{'of':>7}{'all':>7}{'registers':>11}{'occupancy':>11}  what for")
    for label in args.cases:
        case = CASES[label]
        codes = compiled("perturb.cu") | compiled(case.source)
        for model in args.models:
            values, counts = arguments(case, MODELS[model].shapes()), []
            for launch in launches(case, values):
                memory.look()
                counts += counted(case, launch, codes[launch.kernel], values, memory)
            row = summary(label, model, counts)
            rows.append(row)
            print(
                f"{label:26}{model:10}{row['whole']:7.1f}{row['of']:7.0%}{row['all']:7.1f}{row['registers']:11}"
                f"{row['occupancy']:11.0%}  " + ", ".join(f"{name} {n:.1f}" for name, n in row["purposes"].items()),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
