"""What a GPU should make of the Triton backend's calls, by their compiled code. Nothing here was measured.

Each call on the tensors of a model is compiled for sm_90 and kept by a driver that launches nothing; one program of
each kind is executed on the CPU, instruction by instruction (triton_code.py), and counts as often as there are such
programs.

    instructions  issued for a useful element: those of warps, times 32
    lanes         for a useful element: what programs have room for
    registers, occupancy of the kernel that has most of the instructions
    launches      of the call; behind +, of torch between its operations
    H100, H200    predicted time, and share of a copy's rate: the bytes that have to move at that rate, over the time.
                  A launch takes

                      4 us + max(bytes / copy rate, cycles of the busiest pipe / 0.8)

                  and no less than its programs by themselves: the longest of them, or all, as many at a time as the
                  multiprocessors hold. In brackets the same where only issuing counts, and neither pipes nor waiting.

    python bench/gpu/model.py [--calls NAME ...] [--models NAME ...] [--kernels] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.gpu import sass, sass_time, silent_driver
from bench.gpu.calls import CALLS, Part, arguments, fill
from bench.gpu.host import caller
from bench.gpu.triton_code import Launch, launches
from bench.models import MODELS
from flatkern import dispatch, selection

RESULTS = Path(__file__).resolve().parents[1] / "results" / "model.json"
MAIN = ("gpt2", "resnet50", "vit_b16", "llama_1b")
COPY = {"h100": 3.0e12, "h200": 4.3e12}  # bytes a second, read and written
MULTIPROCESSORS, CLOCK, EFFICIENCY = 132, 1.755e9, 0.8  # of all cycles
LAUNCH = 4e-6
ASSUMED = {
    "copy, bytes a second": COPY, "multiprocessors": MULTIPROCESSORS, "clock": CLOCK, "efficiency": EFFICIENCY,
    "seconds of a launch": LAUNCH, "cycles of an instruction": sass_time.THROUGHPUT,
    "cycles until there is a result": sass_time.LATENCY | {"others": sass_time.ORDINARY},
}  # fmt: skip


@dataclass
class Counted:
    """A launch: what its programs take together."""

    launch: Launch
    programs: int = 0
    elements: int = 0
    lanes: int = 0  # elements that there is room for
    issued: Any = 0  # how often warps issued each instruction,
    passes: Any = 0  # and how often each asked shared memory
    bytes: int = 0  # of the sectors that a program reads and writes
    latency: float = 0.0  # seconds that the longest program takes by itself,
    waited: float = 0.0  # and all of them, one after the other

    @property
    def instructions(self) -> int:
        return int(self.issued.sum())

    @cached_property
    def cycles(self) -> dict[str, float]:
        """Of multiprocessors, by what they are spent on."""
        return sass_time.cycles(self.launch.code.instructions, self.issued, self.passes)

    def seconds(self, bytes_: float, copy: float, only_issuing: bool = False) -> float:
        cycles = self.cycles
        busiest = cycles["issue"] if only_issuing else max(cycles.values())
        taken = LAUNCH + max(bytes_ / copy, busiest / (EFFICIENCY * MULTIPROCESSORS * CLOCK))
        if only_issuing:
            return taken
        return max(taken, self.latency, self.waited / (MULTIPROCESSORS * self.launch.resident))


def counted(launch: Launch, values: dict[str, Any], memory: sass.Memory) -> Counted:
    found = Counted(launch)
    for kind in launch.kinds():
        if kind.tensor is not None:
            fill(values, kind.tensor, kind.start, kind.elements)
        elif "partials" in launch.arguments:
            launch.arguments["partials"].fill_(1.0)
        block = launch.run(memory, kind.index, trace=True)
        alone = sass_time.latency(launch.code.instructions, block.trace or [], launch.warps) / CLOCK
        found.programs += kind.programs
        found.elements += kind.programs * kind.elements
        found.lanes += kind.programs * launch.lanes(kind)
        found.issued = found.issued + kind.programs * block.counts.sum(axis=1)
        found.passes = found.passes + kind.programs * block.passes
        found.bytes += kind.programs * 32 * (len(block.read) + len(block.written))
        found.latency = max(found.latency, alone)
        found.waited += kind.programs * alone
    return found


class TorchLaunches(TorchDispatchMode):
    """Counts what torch would launch on a GPU: all but views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [r.alias_info for r in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        name = function._schema.name.removeprefix("aten::")
        self.count += not (
            is_view or name.startswith(("empty", "new_empty", "_local_scalar_dense", "lift", "detach", "_unsafe_view"))
        )
        return function(*args, **(kwargs or {}))


def launches_of_selection() -> int:
    """What torch launches to find IRE's threshold, besides the operations that count."""

    def resolve(name: str, *_: object) -> Any:
        def call(*args: Any) -> None:
            with _disable_current_modes():
                dispatch.load(dispatch.OPS[name], "eager")(*args)

        return call

    given = torch.randn(selection.SAMPLED, generator=torch.Generator().manual_seed(0))
    before, selection.resolve = selection.resolve, resolve  # type: ignore[assignment]
    try:
        with TorchLaunches() as mode:
            selection.kth_smallest_magnitude(selection.shards_of([given]), len(given), len(given) * 4 // 5, None)
    finally:
        selection.resolve = before
    return mode.count


def executed(call: str, model: str, driver: silent_driver.Driver) -> list[tuple[Part, list[Counted], int]]:
    """Of each part of a call its launches, and how many torch makes besides."""
    shapes, memory, found = MODELS[model].shapes(), sass.Memory(), []
    for part in CALLS[call]:
        values = arguments(part, shapes)
        run, _ = caller(part.op, "triton")
        made = launches(driver, lambda run=run, values=values: run(values))  # type: ignore[misc]
        memory.look()
        counts = [counted(launch, values, memory) for launch in made]
        with TorchLaunches() as mode:  # now that the tables are there
            run(values)
        found.append((part, counts, mode.count))
    return found


def modelled(call: str, model: str, parts: list[tuple[Part, list[Counted], int]]) -> dict[str, Any]:
    """A row of the table, of what was executed."""
    elements = MODELS[model].numel
    by_torch, between = sum(count for *_, count in parts), launches_of_selection() if call == "mask" else 0
    every = [c for _, counts, _ in parts for c in counts]
    bytes_ = sum(part.bytes for part, *_ in parts)
    largest = max(every, key=lambda c: c.instructions)

    def seconds(copy: float, only_issuing: bool) -> float:
        ours = sum(c.seconds(part.bytes * c.elements, copy, only_issuing) for part, counts, _ in parts for c in counts)
        return ours + LAUNCH * (by_torch + between)

    def of_copy(only_issuing: bool) -> dict[str, float]:
        return {gpu: round(bytes_ * elements / copy / seconds(copy, only_issuing), 3) for gpu, copy in COPY.items()}

    kernels: dict[str, list[Counted]] = {}
    for c in every:
        kernels.setdefault(c.launch.name, []).append(c)
    return {
        "call": call,
        "model": model,
        "instructions": round(sum(c.instructions for c in every) * sass.WARP / elements, 2),
        "lanes": round(sum(c.lanes for c in every) / sum(c.elements for c in every), 3),
        "registers": largest.launch.registers,
        "occupancy": round(largest.launch.occupancy, 3),
        "launches": len(every) + by_torch,
        "launches between": between,
        "bytes": bytes_,
        "us": {gpu: round(1e6 * seconds(copy, False), 1) for gpu, copy in COPY.items()},
        "of_copy": of_copy(False),
        "of_copy, only issuing": of_copy(True),
        "kernels": {name: of_kernel(each) for name, each in kernels.items()},
    }


def of_kernel(counts: list[Counted]) -> dict[str, Any]:
    """Lists have an entry a launch."""
    elements = sum(c.elements for c in counts)
    largest = max(counts, key=lambda c: c.instructions)
    pipes = largest.cycles
    found = {
        "programs": [c.programs for c in counts],
        "warps": [c.launch.warps for c in counts],
        "registers": [c.launch.registers for c in counts],
        "shared": [c.launch.shared for c in counts],
        "occupancy": [round(c.launch.occupancy, 3) for c in counts],
        "spilled": max(c.launch.code.used["STACK"] for c in counts),
        "us of a program": [round(1e6 * c.latency, 2) for c in counts],
        "pipes": {name: round(each / pipes["issue"], 3) for name, each in sorted(pipes.items())},
    }
    if elements:
        found["instructions"] = round(sum(c.instructions for c in counts) * sass.WARP / elements, 2)
    else:
        found["instructions of a program"] = round(largest.instructions / largest.programs)
    return found


HEADER = (
    f"{'':26}{'':10}{'instructions':>13}{'lanes':>7}{'registers':>10}{'occupancy':>10}{'launches':>9}"
    f"{'H100':>22}{'H200':>22}"
)


def line(row: dict[str, Any]) -> str:
    gpus = "".join(
        f"{row['us'][gpu]:.0f} us {row['of_copy'][gpu]:.0%} ({row['of_copy, only issuing'][gpu]:.0%})".rjust(22)
        for gpu in COPY
    )
    count = f"{row['launches']}" + (f"+{row['launches between']}" if row["launches between"] else "")
    return (
        f"{row['call']:26}{row['model']:10}{row['instructions']:13.1f}{row['lanes']:7.2f}{row['registers']:10}"
        f"{row['occupancy']:10.0%}{count:>9}{gpus}"
    )


def write(path: Path, version: str, rows: list[dict[str, Any]]) -> None:
    """The rows of this Triton, those of others left as they are."""
    found = json.loads(path.read_text()) if path.exists() else {}
    versions = found.get("triton", {}) | {version: rows}
    sections = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, versions[name])) + "\n]" for name in sorted(versions)
    )
    path.write_text(f'{{"assumed": {json.dumps(ASSUMED)},\n"triton": {{\n{sections}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MAIN, choices=MODELS, metavar="NAME")
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=CALLS, metavar="NAME", help=str(list(CALLS)))
    parser.add_argument("--kernels", action="store_true", help="and what each kernel has")
    parser.add_argument("--json", type=Path, help="write everything here, beside what other versions of Triton make")
    args = parser.parse_args()
    driver, rows, begun = silent_driver.install(), [], time.monotonic()
    import triton

    print(f"by Triton {triton.__version__}; nothing was measured")
    print(HEADER)
    for call in args.calls:
        for model in args.models:
            row = modelled(call, model, executed(call, model, driver))
            rows.append(row)
            print(line(row), flush=True)
            if args.kernels:
                for name, each in row["kernels"].items():
                    print(f"    {name}: " + ", ".join(f"{key} {value}" for key, value in each.items()))
    print(f"{time.monotonic() - begun:.0f} s")
    if args.json:
        write(args.json, triton.__version__, rows)


if __name__ == "__main__":
    main()
