"""Instructions that the CUDA kernels issue for an element, by executing their machine code. No GPU is needed.

The emulated library (tests/cuda_emulation) cuts a model's tensors into tiles and tells the arguments of each launch;
nvcc compiles the kernels; one block of each kind of tile is then executed, instruction by instruction (sass.py), and
counts as often as there are such tiles. "whole" are tiles of whole eights whose rows are not cut into segments, and
warps that have a row; "all" is everything. An instruction counts once a warp. Where they go is told by the line of the
source that each belongs to.

    python tests/cuda_emulation/build.py module
    FLATKERN_CUDA_EMULATION=build/cuda-emulation/_CUDA_emul... python bench/gpu/counted.py [--arch 90] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(ROOT))

import flatkern  # noqa: E402
from bench.gpu import sass  # noqa: E402
from bench.models import MODELS  # noqa: E402
from flatkern import dispatch  # noqa: E402
from flatkern.ops import OPS  # noqa: E402

KERNELS = ROOT / "csrc" / "cuda"
TILE = np.dtype(  # as in csrc/cuda/tile.h
    [
        ("start", "i8"), ("tensor", "u4"), ("length", "u2"), ("last", "u2"), ("teams", "u2"), ("flags", "u2"),
        ("warps", "u1"), ("log_lanes", "u1"), ("reciprocal", "u2"), ("row", "u4"), ("long_row", "u4"),
        ("counter_row", "u4"), ("counter_eight", "u4"), ("index", "u4"), ("segment", "u4"),
    ]
)  # fmt: skip
KIND = ["length", "last", "teams", "flags", "warps", "log_lanes"]
WHOLE, SEGMENTS = 1, 2
# What an instruction is for, by the function of csrc in which its line is; the innermost one that is named here.
PURPOSES = {
    "decode": "Team number_in is_there leads row history_in span for_each_eight for_each_eight_in_turn Counters",
    "memory": "load store get put Elements Quads load_once store_once values set of pack unpack round rounded forget",
    "noise": "draw philox4x32 multiply high exclusive_or normals radius angle horner refined_root",
    "sums": "sum_squares take sum fold_lanes fold_several row_sum add_chunk sum_chunks sum_of_chunks chunk_of",
    "rule": "apply take_step sgd adam adam_moments adam_step ordinary_adam_step quotient ordinary_quotient scalars_of "
    "root has_ordinary_quotient is_moderate exponent_of rare_quotient count_step Adam Sgd FinalGradient mixed",
    "segments": "add_segment sum_partials",
}
PURPOSE = {name: purpose for purpose, names in PURPOSES.items() for name in names.split()}


@dataclass
class Case:
    op: str
    optional: tuple[str, ...]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


F32 = {"": torch.float32}
BF16 = {"": torch.float32, "params": torch.bfloat16, "grads": torch.bfloat16}
CASES = {
    "perturb": Case("perturb_gaussian_", ("backups",), F32),
    "perturb from masters": Case("perturb_gaussian_", ("masters",), BF16),
    "sgd": Case("sgd_update_", ("momentum_buffers",), F32),
    "sgd, rolling": Case("sgd_update_", ("momentum_buffers", "backups", "noise"), F32),
    "adamw": Case("adamw_update_", (), F32),
    "adamw, rolling": Case("adamw_update_", ("backups", "noise"), F32),
    "adamw bf16, rolling, masters": Case("adamw_update_", ("masters", "noise"), BF16),
}
NUMBERS = {
    "sigma": 0.01, "eta": -1.0, "beta": 0.99, "grad_weight": 1.0, "clean_weight": 0.0, "lr": 1e-3, "momentum": 0.9,
    "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "offset": 0,
    "kappa": 2.0,
}  # fmt: skip


@dataclass
class Launch:
    kernel: str
    arguments: bytes
    grid: int
    block: int

    def tiles(self) -> Any:
        at = int.from_bytes(self.arguments[:8], "little")
        return np.frombuffer(MEMORY().bytes[at - sass.Memory.BASE :][: self.grid * TILE.itemsize].tobytes(), TILE)


@cache
def MEMORY() -> sass.Memory:
    return sass.Memory()


def tool(name: str) -> str:
    """A disassembler: CUDA's own, or the one that Triton brings along."""
    import shutil

    for folder in [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]:
        if found := shutil.which(name, path=folder):
            return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def plain(demangled: str) -> str:
    """A kernel's name without what nvcc and g++ write differently."""
    demangled = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r">\(.*", ">", demangled.replace("flatkern::cuda::", "")).replace("ul>", ">").replace("ul ", " ")


@dataclass
class Compiled:
    codes: dict[str, sass.Code]
    registers: dict[str, int]


def compiled(source: str, arch: str) -> Compiled:
    """Kernels by their plain names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        nvcc = os.environ.get("FLATKERN_NVCC", "nvcc")
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-lineinfo", f"-arch=sm_{arch}", "-cubin"]
        output(nvcc, *flags, "-o", cubin, str(KERNELS / source))
        codes = sass.read(output(tool("nvdisasm"), "-c", "-gi", cubin))
        usage = output(tool("cuobjdump"), "-res-usage", cubin)
    registers = {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    names = dict(zip(codes, output("c++filt", *codes).splitlines(), strict=True))
    return Compiled(
        {plain(names[name]): code for name, code in codes.items()},
        {plain(names[name]): registers[name] for name in codes},
    )


def launches(case: Case, values: dict[str, Any]) -> list[Launch]:
    module, found = dispatch.compiled_module("cuda"), []
    names = symbols(module.__file__)

    def see(place: int, arguments: bytes, grid: int, block: int) -> None:
        found.append(Launch(names[place], arguments, grid, block))

    module.launch_nothing(True)
    module.watch(see)
    op, run = OPS[case.op], dispatch.load(OPS[case.op], "cuda")
    run(
        *[values[a.name] for a in op.arguments if not a.keyword_only],
        **{a.name: values[a.name] for a in op.arguments if a.keyword_only},
    )
    module.watch(None)
    return found


@cache
def symbols(library: str) -> dict[int, str]:
    """Kernels of the emulated library by their places."""
    lines = re.findall(r"^(\w+) [tT] (void flatkern::cuda::.*)$", output("nm", "-C", library), re.MULTILINE)
    return {int(place, 16): plain(name) for place, name in lines}


def arguments(case: Case, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Values of all arguments; nothing is written into the tensors yet, so that they take no memory."""
    values: dict[str, Any] = {}
    for a in OPS[case.op].arguments:
        dtype = case.dtypes.get(a.name, case.dtypes[""])
        if a.type.endswith("?") and a.name not in case.optional:
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name == "steps":
            values[a.name] = [torch.tensor(7.0) for _ in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.empty(shape, dtype=dtype) for shape in shapes]
        else:
            values[a.name] = list(range(len(shapes))) if a.name == "index" else [NUMBERS[a.name]] * len(shapes)
    if case.op == "perturb_gaussian_" and values.get("noise") is None:
        values["noise"] = torch.tensor([1, 2, 3])
    return values


def fill(case: Case, values: dict[str, Any], tensor: int, start: int, count: int) -> None:
    """Ordinary numbers, where a block reads."""
    generator = torch.Generator().manual_seed(1)
    for name, each in values.items():
        if isinstance(each, list) and isinstance(each[0], torch.Tensor) and each[0].dim() > 0 or name == "params":
            part = each[tensor].view(-1)[start : start + count]
            part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
            if name == "exp_avg_sqs":
                part.abs_().add_(1e-4)


@dataclass
class Counts:
    """Of tiles of one kind."""

    kernel: str
    tiles: int
    elements: int  # of one tile
    whole: bool
    cut: bool
    issued: int  # of one tile, by warps that have a row
    idle: int  # by the others
    purposes: Counter[str]
    columns: int


def count(case: Case, launch: Launch, code: sass.Code, values: dict[str, Any], first_tensor: int) -> list[Counts]:
    tiles, found = launch.tiles(), []
    MEMORY().look()
    kinds, places, numbers = np.unique(tiles[KIND], return_index=True, return_counts=True)
    for place, number in zip(places, numbers, strict=True):
        tile = tiles[place]
        elements = max(0, int(tile["teams"]) - 1) * int(tile["length"]) + int(tile["last"])
        fill(case, values, first_tensor + int(tile["tensor"]), int(tile["start"]), elements)
        parameters = bytes(0x210) + launch.arguments
        block = sass.Block(code, MEMORY(), parameters, launch.block, int(place))
        counts = block.run()
        moves = [re.match(r"[LS][DT]G\.E(\.\w+)*\.(64|128)\b", i.name) is not None for i in code.instructions]
        busy = counts[np.array(moves)].any(axis=0) if tile["flags"] & WHOLE else np.ones(counts.shape[1], bool)
        purposes: Counter[str] = Counter()
        for instruction, times in zip(code.instructions, counts[:, busy].sum(axis=1), strict=True):
            if times:
                purposes[purpose(instruction)] += int(times)
        flags = int(tile["flags"])
        found.append(
            Counts(
                launch.kernel, int(number), elements, bool(flags & WHOLE), bool(flags & SEGMENTS),
                int(counts[:, busy].sum()), int(counts[:, ~busy].sum()), purposes, int(tile["length"]),
            )
        )  # fmt: skip
    return found


def purpose(instruction: sass.Instruction) -> str:
    for file, line in instruction.source:
        if "/csrc/" in file:
            name = functions(file)[line]
            if name in PURPOSE:
                return PURPOSE[name]
    return "the rest"


@cache
def functions(file: str) -> dict[int, str]:
    """The function, by line: the last one that was begun. Constructors of nested structs are named as those."""
    found: dict[int, str] = defaultdict(lambda: "?")
    name = "?"
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        begun = re.match(r"\s*(?:FK_\w+|__global__|template <.*>\s+FK_\w+)\b.*?([A-Za-z_]\w*)\(", line)
        if begun and not line.lstrip().startswith("#"):
            name = begun[1]
        found[number] = name
    return found


def report(label: str, model: str, counts: list[Counts], registers: dict[str, int]) -> dict[str, Any]:
    useful = sum(c.tiles * c.elements for c in counts)
    whole = [c for c in counts if c.whole and not c.cut]
    elements = sum(c.tiles * c.elements for c in whole)
    purposes: Counter[str] = Counter()
    for c in whole:
        for name, times in c.purposes.items():
            purposes[name] += times * c.tiles * sass.WARP
    rest = sum(c.tiles * (c.issued + c.idle) for c in counts) * sass.WARP
    row = {
        "case": label,
        "model": model,
        "whole": sum(c.tiles * c.issued for c in whole) * sass.WARP / elements,
        "of": elements / useful,
        "all": rest / useful,
        "purposes": {name: times / elements for name, times in purposes.most_common()},
        "kernels": {c.kernel: registers[c.kernel] for c in counts},
        "by columns": {
            f"{c.columns}{'' if c.whole else ' not whole'}{' cut' if c.cut else ''}": [
                round(c.tiles * c.elements / useful, 4),
                round((c.issued + c.idle) * sass.WARP / max(1, c.elements), 1),
            ]
            for c in sorted(counts, key=lambda c: -c.tiles * c.elements)
        },
    }
    print(
        f"{label:30}{model:10}{row['whole']:8.1f}{row['of']:8.1%}{row['all']:8.1f}   "
        + ", ".join(f"{name} {times:.1f}" for name, times in row["purposes"].items()),
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90")
    parser.add_argument("--models", nargs="+", default=["gpt2", "resnet50"], choices=MODELS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    state = flatkern.backends()["cuda"]
    if not (state["live"] and state["about"]["emulated"]):
        sys.exit("error: FLATKERN_CUDA_EMULATION should be the library that `make test-cuda` builds")
    sources = {CASES[name].op.split("_")[0] for name in args.cases}
    kernels = Compiled({}, {})
    for source in sorted({"sgd": "sgd", "adamw": "adam", "perturb": "perturb"}[s] for s in sources | {"perturb"}):
        found = compiled(f"{source}.cu", args.arch)
        kernels.codes.update(found.codes)
        kernels.registers.update(found.registers)
    rows = []
    print(f"{'case':30}{'model':10}{'whole':>8}{'of':>8}{'all':>8}")
    for label in args.cases:
        for model in args.models:
            values = arguments(CASES[label], MODELS[model].shapes())
            counts = []
            for launch in launches(CASES[label], values):
                code = kernels.codes[launch.kernel]
                counts += count(CASES[label], launch, code, values, 0)
            rows.append(report(label, model, counts, kernels.registers))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
