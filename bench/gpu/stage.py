"""One stage of `make gpu`, in a process of its own, and what all of them share.

    python bench/gpu/stage.py keys

A stage prints text, which goes to the log, and findings: a line of "@ " and a JSON object, written the moment it is
known, so that a stage that is cut off leaves what it had. The last line of text is its sentence in the summary. A stage
that has no finding has failed, whatever its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

MARK = "@ "
CRASHED = 70  # exit status; 1 is that of a stage that went to its end and found something wrong
DRY = os.environ.get("FLATKERN_GPU_DRY") == "1"  # on the CPU, to see that the script works; numbers mean nothing

WITH_CUDA = os.environ.get("FLATKERN_GPU_CUDA") == "1"  # there is an nvcc: the CUDA kernels have to be live

BEGAN = time.monotonic()
SECONDS = "FLATKERN_STAGE_SECONDS"  # environment variable: after how many it is cut off


def left(usual: float) -> float:
    """Seconds until this stage is cut off; `usual` are those it has where nobody says."""
    return float(os.environ.get(SECONDS) or usual) - (time.monotonic() - BEGAN)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def emit(kind: str, **found: Any) -> None:
    """A finding."""
    say(MARK + json.dumps({"kind": kind, **found}))


def say(text: str) -> None:
    # One write for a line and its end, as several processes of a stage may share the pipe.
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# Torch's errors begin with the first; Triton's are "Triton Error [CUDA]: " and one of the others.
LOST = (
    "CUDA error", "illegal memory access", "illegal instruction", "illegal address", "misaligned address",
    "unspecified launch failure", "hardware stack error", "device-side assert", "invalid program counter",
)  # fmt: skip


def is_lost(error: BaseException) -> bool:
    """Whether nothing works on the device for this process any more; such errors stay."""
    return any(text in str(error) for text in LOST)


def go_on_behind(position: int) -> None:
    """Become a new process that begins with the next item: a lost context costs the item that lost it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get(SECONDS):
        os.environ[SECONDS] = str(left(0.0))
    kept = [word for word in sys.argv[1:] if not word.startswith("--from=")]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *kept, f"--from={position + 1}"])


def each(items: Iterable[Any], failed) -> Iterator[Any]:
    """Items of a stage, from the one that `--from=N` names. `failed(item, error)` emits what went wrong.

    To be used as `for attempt in each(items, failed): with attempt as item: ...`.
    """
    start = next((int(word.removeprefix("--from=")) for word in sys.argv if word.startswith("--from=")), 0)
    for position, item in enumerate(items):
        if position >= start:
            yield Attempt(position, item, failed)


class Attempt:
    """One item; an error in it is reported and stops nothing."""

    def __init__(self, position: int, item: Any, failed) -> None:
        self.position, self.item, self.failed = position, item, failed

    def __enter__(self) -> Any:
        return self.item

    def __exit__(self, kind, error, trace) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        self.failed(self.item, error)
        if is_lost(error):
            go_on_behind(self.position)
        return True


def main() -> int:
    name, *rest = sys.argv[1:]
    try:
        module = importlib.import_module(f"bench.gpu.{name}")
        return int(module.main([word for word in rest if not word.startswith("--from=")]) or 0)
    except Exception:
        traceback.print_exc()
        return CRASHED


if __name__ == "__main__":
    # The one that stage modules import, so that there are not two.
    sys.exit(importlib.import_module("bench.gpu.stage").main())
