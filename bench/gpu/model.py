"""What a GPU should make of the Triton backend's calls, by their compiled code. Nothing here was measured.

Each call on the tensors of a model is compiled for sm_90 and kept by a driver that launches nothing; one program of each
kind is executed on the CPU, instruction by instruction (triton_code.py), and counts as often as there are such programs.

    instructions  issued for a useful element: those of warps, times 32
    lanes         for a useful element: what programs have room for
    registers, occupancy of the kernel that has most of the instructions
    launches      of the call
    H100, H200    predicted share of a copy's rate: the bytes that have to move at that rate, over

                      sum over launches of max(bytes / copy rate, instructions / (0.8 issue rate)) + 4 us

    python bench/gpu/model.py [--calls NAME ...] [--models NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.gpu import sass, silent_driver
from bench.gpu.host import NUMBERS, caller
from bench.gpu.triton_code import Launch, launches
from bench.methods import METHODS, call_floors
from bench.models import MODELS
from flatkern.checks import MAGNITUDE_DIGITS
from flatkern.ops import OPS
from flatkern.tables import mask_shape

RESULTS = Path(__file__).resolve().parents[1] / "results" / "model.json"
COPY = {"h100": 3.0e12, "h200": 4.3e12}  # bytes a second, read and written
SCHEDULERS, CLOCK, EFFICIENCY = 132 * 4, 1.755e9, 0.8
LAUNCH = 4e-6
SCALE = 0.02  # of weights and gradients
MAIN = ("gpt2", "resnet50", "vit_b16", "llama_1b")


@dataclass(frozen=True)
class Part:
    """A call of an operation: the optional arguments that it is given, and the bytes that it has to move."""

    op: str
    bytes: float  # per element
    optional: str = ""
    bfloat16: str = ""  # lists that are not float32
    digits: int = 0  # of a magnitude that are known
    sample: int = 1  # one in so many elements is counted


MIXED = "params grads"
plain, two, sam = (call_floors(METHODS[name], "sgd", 4) for name in ("rwp", "m-rwp", "sam"))
COUNT = "count_magnitudes_"
CALLS = {
    "perturb": [Part("perturb_gaussian_", two["perturb"], "backups")],
    "perturb, masters": [
        Part("perturb_gaussian_", call_floors(METHODS["rwp"], "sgd", 2, True)["perturb"], "masters", MIXED)
    ],
    "sgd": [Part("sgd_update_", plain["step"], "momentum_buffers")],
    "sgd, restoring": [Part("sgd_update_", plain["step"], "momentum_buffers backups")],
    "sgd, two gradients": [Part("sgd_update_", two["step"], "momentum_buffers backups clean_grads")],
    "sgd, rolling": [
        Part("sgd_update_", call_floors(METHODS["rolling"], "sgd", 4)["step"], "momentum_buffers backups noise")
    ],
    "adamw": [Part("adamw_update_", call_floors(METHODS["plain"], "adamw", 4)["step"])],
    "adamw, masters": [Part("adamw_update_", call_floors(METHODS["plain"], "adamw", 2, True)["step"], "masters", MIXED)],
    "adamw, rolling, masters": [
        Part("adamw_update_", call_floors(METHODS["rolling"], "adamw", 2, True)["step"], "masters noise", MIXED)
    ],
    "sam": [Part("ascent_norm_", 4), Part("perturb_ascent_", sam["perturb"] - 4, "backups")],
    "asam": [Part("ascent_norm_", 8, "params"), Part("perturb_ascent_", sam["perturb"] - 4, "backups")],
    "mask": [
        Part(COUNT, 4 / 64, sample=64), Part(COUNT, 4, digits=1), Part(COUNT, 4, digits=2), Part("pack_mask_", 4 + 1 / 8)
    ],
    "adamw, IRE": [Part("adamw_update_", call_floors(METHODS["ire"], "adamw", 4)["step"], "masks")],
    "restore": [Part("restore_", 8)],
    "mix": [Part("mix_gradients_", 12, "clean_grads")],
}  # fmt: skip


def threshold(sharp_fraction: float = METHODS["ire"].sharp_fraction) -> float:
    """The magnitude below which all but a fraction of the gradients are."""
    return SCALE * 2**0.5 * float(torch.erfinv(torch.tensor(1 - sharp_fraction, dtype=torch.float64)))


def arguments(part: Part, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Values of all arguments. Large tensors are not written, so that they take no memory."""
    op, values = OPS[part.op], {}
    if part.sample > 1:
        shapes = [(sum(prod(shape) // (16 * part.sample) * 16 for shape in shapes),)]
    for a in op.arguments:
        dtype = torch.bfloat16 if a.name in part.bfloat16.split() else torch.float32
        if a.type.endswith("?") and a.name not in part.optional.split():
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name == "prefix":
            values[a.name] = torch.tensor(digits_of(threshold())[: part.digits], dtype=torch.int64)
        elif a.name == "counts":
            values[a.name] = torch.zeros(2 ** MAGNITUDE_DIGITS[part.digits] + 2, dtype=torch.int64)
        elif a.name in ("norm", "threshold"):
            values[a.name] = torch.tensor(threshold())
        elif a.name == "masks":
            values[a.name] = [torch.empty(mask_shape(torch.empty(s, device="meta")), dtype=torch.uint8) for s in shapes]
        elif a.name == "steps":
            values[a.name] = [torch.tensor(7.0) for _ in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.empty(shape, dtype=dtype) for shape in shapes]
        elif a.name == "index":
            values[a.name] = list(range(len(shapes)))
        else:
            values[a.name] = [{"rho": 0.05}.get(a.name) or NUMBERS[a.name]] * len(shapes)
    return values


def digits_of(magnitude: float) -> list[int]:
    bits, found = int(np.float32(magnitude).view(np.uint32)), []
    for width in reversed(MAGNITUDE_DIGITS):
        found.insert(0, bits & (1 << width) - 1)
        bits >>= width
    return found


def fill(values: dict[str, Any], tensor: int, start: int, count: int) -> None:
    """Normal numbers for some elements of a tensor and of those beside it, the same in every version of NumPy."""
    for seed, (name, each) in enumerate(values.items()):
        if name in ("steps", "masks") or not (isinstance(each, list) and isinstance(each[0], torch.Tensor)):
            continue
        words = np.random.Philox(key=[tensor, seed]).random_raw(count) >> np.uint64(11)
        uniform = torch.from_numpy((words.astype(np.float64) + 0.5) / 2**53)
        normal = SCALE * 2**0.5 * torch.erfinv(2 * uniform - 1)
        each[tensor].view(-1)[start : start + count] = normal.square() if name == "exp_avg_sqs" else normal


@dataclass
class Counted:
    """A launch: what its programs take together."""

    launch: Launch
    programs: int = 0
    elements: int = 0
    instructions: int = 0  # of warps
    bytes: int = 0  # of the sectors that a program reads and writes

    @property
    def lanes(self) -> int:
        return self.launch.lanes * self.programs


def counted(launch: Launch, values: dict[str, Any], memory: sass.Memory) -> Counted:
    found = Counted(launch)
    for kind in launch.kinds():
        if kind.tensor is not None:
            fill(values, kind.tensor, kind.start, kind.elements)
        elif "partials" in launch.arguments:
            launch.arguments["partials"].fill_(1.0)
        block = launch.run(memory, kind.index)
        found.programs += kind.programs
        found.elements += kind.programs * kind.elements
        found.instructions += kind.programs * int(block.counts.sum())
        found.bytes += kind.programs * 32 * (len(block.read) + len(block.written))
    return found


def seconds(counts: list[Counted], part: Part, elements: int, copy: float) -> float:
    """By the model of a part's launches; each moves its share of the bytes."""
    total = 0.0
    for c in counts:
        moved = part.bytes * c.elements if c.elements else c.bytes
        issued = c.instructions / (EFFICIENCY * SCHEDULERS * CLOCK)
        total += max(moved / copy, issued) + LAUNCH
    return total


def modelled(call: str, model: str, driver: silent_driver.Driver) -> dict[str, Any]:
    """A row of the table."""
    shapes, memory = MODELS[model].shapes(), sass.Memory()
    elements = sum(map(prod, shapes))
    parts: list[tuple[Part, list[Counted]]] = []
    for part in CALLS[call]:
        values = arguments(part, shapes)
        run, _ = caller(part.op, "triton")
        made = launches(driver, lambda run=run, values=values: run(values))  # type: ignore[misc]
        memory.look()
        parts.append((part, [counted(launch, values, memory) for launch in made]))
    every = [c for _, counts in parts for c in counts]
    bytes_ = sum(part.bytes for part, _ in parts)
    largest = max(every, key=lambda c: c.instructions)
    took = {gpu: sum(seconds(counts, part, elements, copy) for part, counts in parts) for gpu, copy in COPY.items()}
    kernels: dict[str, list[Counted]] = {}
    for c in every:
        kernels.setdefault(c.launch.name, []).append(c)
    return {
        "call": call,
        "model": model,
        "instructions": round(sum(c.instructions for c in every) * sass.WARP / elements, 2),
        "lanes": round(largest_lanes(every), 3),
        "registers": largest.launch.registers,
        "occupancy": round(largest.launch.occupancy, 3),
        "launches": len(every),
        "bytes": bytes_,
        "us": {gpu: round(1e6 * each, 1) for gpu, each in took.items()},
        "of_copy": {gpu: round(bytes_ * elements / COPY[gpu] / each, 3) for gpu, each in took.items()},
        "kernels": {name: of_kernel(each) for name, each in kernels.items()},
    }


def largest_lanes(every: list[Counted]) -> float:
    """Lanes for an element, of kernels that have one."""
    return sum(c.lanes for c in every) / sum(c.elements for c in every)


def of_kernel(counts: list[Counted]) -> dict[str, Any]:
    elements = sum(c.elements for c in counts)
    largest = max(counts, key=lambda c: c.instructions)
    found = {
        "launches": len(counts),
        "programs": [c.programs for c in counts],
        "registers": [c.launch.registers for c in counts],
        "occupancy": [round(c.launch.occupancy, 3) for c in counts],
        "spilled": max(c.launch.code.used["LOCAL"] for c in counts),
    }
    if elements:
        issued = sum(c.instructions for c in counts) * sass.WARP
        found["instructions"] = round(issued / elements, 2)
        found["bytes"] = round(sum(c.bytes for c in counts) / elements, 3)
    else:
        found["instructions of a program"] = round(largest.instructions / largest.programs)
    return found


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['call']:26}{row['model']:10}{row['instructions']:13.1f}{row['lanes']:7.2f}{row['registers']:10}"
        f"{row['occupancy']:10.0%}{row['launches']:9}"
        + "".join(f"{row['of_copy'][gpu]:6.0%} ({row['us'][gpu]:.0f} us)" .rjust(17) for gpu in COPY)
    )


HEADER = (
    f"{'':26}{'':10}{'instructions':>13}{'lanes':>7}{'registers':>10}{'occupancy':>10}{'launches':>9}"
    f"{'H100':>17}{'H200':>17}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MAIN, choices=MODELS, metavar="NAME")
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=CALLS, metavar="NAME", help=str(list(CALLS)))
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--kernels", action="store_true", help="and what each kernel has")
    args = parser.parse_args()
    driver, rows = silent_driver.install(), []
    begin = time.monotonic()
    print(HEADER)
    for call in args.calls:
        for model in args.models:
            row = modelled(call, model, driver)
            rows.append(row)
            print(line(row), flush=True)
            if args.kernels:
                for name, each in row["kernels"].items():
                    print(f"    {name}: " + ", ".join(f"{key} {value}" for key, value in each.items()))
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
