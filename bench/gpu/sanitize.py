"""Stage sanitizer: one call of every operation under compute-sanitizer, which looks for wrong accesses, then for races.

Each tool has half of the stage's time. What they print goes to sanitizer.log.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from time import monotonic

from bench.gpu.out import File, HeadAndTail
from bench.gpu.process import Child
from bench.gpu.stage import emit, say

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit status that stands for errors found
PROGRAM = (sys.executable, "bench/gpu/stage.py", "smoke", "--brief")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
HEAD, TAIL = 5_000_000, 1_000_000  # bytes of the log of one tool that are kept, of its begin and of its end
WHERE = "/usr/local/cuda/bin/compute-sanitizer"


class Ended(Exception):
    """The stage is to end."""


def main(arguments: list[str]) -> int:
    tool = shutil.which("compute-sanitizer") or shutil.which(WHERE)
    deadline = monotonic() + 0.95 * float(os.environ.get("FLATKERN_STAGE_SECONDS", "600"))

    def end(number, frame) -> None:
        raise Ended

    signal.signal(signal.SIGTERM, end)  # the tools are a group of their own, which ends with this process
    log = File(Path(os.environ.get("FLATKERN_GPU_OUT", ROOT / "build")) / "sanitizer.log")
    sentences, right = [], True
    for k, name in enumerate(TOOLS):
        began = monotonic()
        errors, reason = None, "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        if tool is not None:
            # The last one has what the others have left.
            errors, reason = check([tool, *options(name), *PROGRAM], (deadline - began) / (len(TOOLS) - k), log)
        emit("sanitizer", tool=name, errors=errors, seconds=round(monotonic() - began, 1), reason=reason)
        sentences.append(f"{name}: {f'{errors} errors' if errors is not None else reason}")
        right = right and errors == 0
    if log.error:
        sentences.append(f"sanitizer.log could not be written ({log.error})")
    say("; ".join(dict.fromkeys(sentences)))
    return 0 if right else 1


def options(name: str) -> list[str]:
    found = ["--tool", name, "--error-exitcode", str(FOUND), "--target-processes", "all", "--print-limit", "50"]
    # Libraries ask the driver for what an older one does not have, and go on without: no error, as memcheck would say.
    # A call of ours that fails is an exception, with which smoke ends.
    return [*found, "--report-api-errors", "no"] if name == "memcheck" else found


def check(command: list[str], seconds: float, log: File) -> tuple[int | None, str]:
    """Number of errors; or None, and why it is not known."""
    log.append(f"$ {' '.join(command)}\n")
    kept = HeadAndTail(HEAD, TAIL)
    now = monotonic()
    # Every allocation by itself, so that what is outside of a tensor is outside of an allocation.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    counts: list[int] = []
    last = ""
    try:
        child = Child(command, env, ROOT, now, now + seconds)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"cannot be started: {error}"
    try:
        while not child.tend(monotonic()):
            with DefaultSelector() as selector:
                for lines in (child.out, child.err):
                    if lines.open:
                        selector.register(lines, EVENT_READ, lines)
                for key, _ in selector.select(0.05):
                    for line in key.data.read():
                        if kept.is_head(line + "\n"):
                            log.append(line + "\n")
                        found = SUMMARY.search(line)
                        if found:
                            counts.append(int(found[1] or found[2]))
                        elif line.strip() and not line.startswith("@ "):
                            last = line.strip()
    except BaseException:
        child.signal(signal.SIGKILL)
        raise
    finally:
        log.append(kept.ending())
    return judge(counts, child, seconds, last)


def judge(counts: list[int], child: Child, seconds: float, last: str) -> tuple[int | None, str]:
    if any(counts):
        return max(counts), ""
    if child.asked is not None:
        return None, f"stopped after {seconds:.0f} s"
    if child.status != 0:
        return None, f"smoke --brief failed under it (exit status {child.status}): {last[:200]}"
    return (0, "") if counts else (None, "printed no summary")
