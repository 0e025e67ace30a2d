"""Stage parameters: what a kernel's arguments cost, by value in blocks of 0.1, 4, 16 and 32 KB, launched and replayed.

    python bench/gpu/stage.py parameters                      starts the following, each in a process of its own
    python bench/gpu/stage.py parameters --inside launch      all sizes, in turns
    python bench/gpu/stage.py parameters --inside replay 4096 a graph with one size

Some drivers crash when a graph has arguments of more than 4 KB, which then costs that one line. The question: is a
block of 32 KB worth it, against several launches with 4 KB each?
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import compiled
from .stage import DRY, MARK, WITH_CUDA, emit, left, say
from .stages import most_seconds

SIZES = (128, 4096, 16384, 32760)  # bytes
SMALL, LARGE = SIZES[1], SIZES[-1]
# Tensors that fit the smallest block, so that what differs is the size alone; and as many as fit the largest.
FEW, MANY = 15, 4094
# Launches, and bytes of theirs, that may wait for the device: the driver's queue has room for about a thousand.
PENDING, PENDING_BYTES = 800, 2**20
TURNS = 2 if DRY else 20
LEAST, RESERVE = 1.0, 1.0  # seconds of a process, and at the end
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--inside"]:
        return inside(*arguments[1:])
    if not DRY and compiled.nvcc() is None:
        emit("parameters", how="launch", bytes=None, reason="nvcc is not installed")
        say("skipped: nvcc is not installed; it comes with the CUDA toolkit")
        return 1 if WITH_CUDA else 0
    try:
        compiled.parameters()
    except compiled.NotCompiled as error:
        emit("parameters", how="launch", bytes=None, reason=str(error))
        say(str(error))
        return 1
    found = outside("launch", None, 2)
    for k, size in enumerate(SIZES):
        found += outside("replay", size, len(SIZES) - k)
    say(sentence(found))
    return 1 if any(row.get("reason") and row["how"] == "launch" for row in found) else 0


def outside(how: str, size: int | None, processes: int) -> list[dict]:
    """Findings of one process, the first of so many that share the time; what crashed or hung is one, too."""
    command = [sys.executable, sys.argv[0], "parameters", "--inside", how, *([] if size is None else [str(size)])]
    seconds = max(LEAST, (left(most_seconds()["parameters"]) - RESERVE) / processes)
    reason, said = "", ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
        said = done.stdout
        if done.returncode:
            last = [line for line in said.splitlines() if not line.startswith(MARK)][-1:]
            reason = f"ended with status {done.returncode}{': ' if last else ''}{''.join(last)}"[:300]
    except subprocess.TimeoutExpired as error:
        said, reason = (error.stdout or b"").decode(errors="replace"), f"not ready within {seconds:.0f} s"
    found = [json.loads(line.removeprefix(MARK)) for line in said.splitlines() if line.startswith(MARK)]
    if reason:
        found.append({"kind": "parameters", "how": how, "bytes": size, "reason": reason})
    for row in found:
        emit(**row)
    return found


# ---- in a process


class Cuda:
    """The functions of parameters.cu."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(compiled.PARAMETERS_LIBRARY))

    def call(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")

    def turn(self, how: str, size: int, tensors: int) -> tuple[float, float, int]:
        """Microseconds of the host and of the device for a pass, and how many launches it is."""
        host, device, launches = ctypes.c_double(), ctypes.c_double(), ctypes.c_int()
        each = -(-tensors // ((size - 8) // 8))
        count = 1 if DRY else max(1, min(50, PENDING // each, PENDING_BYTES // (each * size)))
        results = ctypes.byref(host), ctypes.byref(device), ctypes.byref(launches)
        self.call({"launch": "by_launches", "replay": "by_graph"}[how], size, tensors, count, *results)
        return host.value, device.value, launches.value


def inside(how: str, size: str = "") -> int:
    library = Cuda()
    library.call("prepare", MANY)
    todo = [(int(s), tensors) for s in ([size] if size else SIZES) for tensors in (FEW, MANY)]
    turns: dict[tuple[int, int], list[tuple[float, float, int]]] = {key: [] for key in todo}
    for k in range(TURNS):
        for key in todo if k % 2 else reversed(todo):
            turns[key].append(library.turn(how, *key))
    wrong = ctypes.c_int()
    library.call("count_wrong", FEW, ctypes.byref(wrong))
    for (bytes_, tensors), found in turns.items():
        host, device, launches = zip(*found, strict=True)
        emit(
            "parameters", how=how, bytes=bytes_, tensors=tensors, launches=launches[0], turns=TURNS,
            host_us=round(statistics.median(host), 2), device_us=round(statistics.median(device), 2),
            reason=f"{wrong.value} elements are wrong" if wrong.value else "",
        )  # fmt: skip
    return 1 if wrong.value else 0


# ---- what follows


def of(findings: list[dict], how: str, size: int, tensors: int) -> dict | None:
    named = (how, size, tensors)
    rows = [f for f in findings if (f["how"], f["bytes"], f.get("tensors")) == named and not f.get("reason")]
    return rows[-1] if rows else None


def sentence(findings: list[dict]) -> str:
    """Whether one large block is faster than several small ones, launched and replayed, and what crashed."""
    words = []
    for how in ("launch", "replay"):
        small, large = (of(findings, how, size, MANY) for size in (SMALL, LARGE))
        if small is None or large is None:
            continue
        # A call is as slow as the slower of the two: the host that launches, or the device.
        took = [max(row["host_us"], row["device_us"]) for row in (large, small)]
        words.append(
            f"{how}: {large['launches']} of {LARGE / 1024:.0f} KB takes {took[0]:.1f} us, "
            f"{small['launches']} of {SMALL / 1024:.0f} KB {took[1]:.1f}"
        )
    bad = [f"{f['how']} of {f['bytes'] or 'all'} bytes: {f['reason']}" for f in findings if f.get("reason")]
    return "; ".join([*words, *bad]) or "nothing was measured"
