"""Stage sanitizer: one call of every operation by Triton's and by the CUDA kernels under compute-sanitizer.

Its tools look for accesses out of bounds, for races in a block's memory, for barriers that not all threads reach, and
for memory that is read before anybody has written it. They run side by side, as most of it is the host's work, and each
has all of the stage's time. What they print goes to sanitizer.log.
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
from bench.gpu.process import Child, Lines
from bench.gpu.stage import emit, say

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit status that stands for errors found
PROGRAM = (sys.executable, "bench/gpu/stage.py", "smoke", "--brief")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
HEAD, TAIL = 2_500_000, 500_000  # bytes of the log of one tool that are kept, of its begin and of its end
WHERE = "/usr/local/cuda/bin/compute-sanitizer"


class Ended(Exception):
    """The stage is to end."""


def main(arguments: list[str]) -> int:
    tool = shutil.which("compute-sanitizer") or shutil.which(WHERE)
    begun = monotonic()
    seconds = 0.95 * float(os.environ.get("FLATKERN_STAGE_SECONDS", "600"))

    def end(number, frame) -> None:
        raise Ended

    signal.signal(signal.SIGTERM, end)  # the tools are groups of their own, which end with this process
    log = File(Path(os.environ.get("FLATKERN_GPU_OUT", ROOT / "build")) / "sanitizer.log")
    if tool is None:
        reason = "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        ends = {name: (None, reason, begun) for name in TOOLS}
    else:
        ends = check_all({name: [tool, *options(name), *PROGRAM] for name in TOOLS}, seconds, log)
    sentences = []
    for name, (errors, reason, ended) in ends.items():
        emit("sanitizer", tool=name, errors=errors, seconds=round(ended - begun, 1), reason=reason)
        sentences.append(f"{name}: {reason if errors is None else f'{errors} errors'}")
    if tool is None:
        sentences = [reason]
    if log.error:
        sentences.append(f"sanitizer.log could not be written ({log.error})")
    say("; ".join(sentences))
    return 0 if all(errors == 0 for errors, *_ in ends.values()) else 1


def options(name: str) -> list[str]:
    found = ["--tool", name, "--error-exitcode", str(FOUND), "--target-processes", "all", "--print-limit", "50"]
    # Libraries ask the driver for what an older one does not have, and go on without: no error, as memcheck would say.
    # A call of ours that fails is an exception, with which smoke ends.
    return [*found, "--report-api-errors", "no"] if name == "memcheck" else found


class Tool:
    """A tool that runs, and what it has said."""

    def __init__(self, name: str, command: list[str], seconds: float, log: File) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self.kept = HeadAndTail(HEAD, TAIL)
        self.counts: list[int] = []
        self.last = ""
        now = monotonic()
        # Every allocation by itself, so that what is outside of a tensor is outside of an allocation, and what another
        # tensor has left in memory counts as written by nobody.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log.append(f"[{name}] $ {' '.join(command)}\n")
        self.child = Child(command, env, ROOT, now, now + seconds)

    def read(self, lines: Lines) -> None:
        for line in lines.read():
            text = f"[{self.name}] {line}\n"
            if self.kept.is_head(text):
                self.log.append(text)
            found = SUMMARY.search(line)
            if found:
                self.counts.append(int(found[1] or found[2]))
            elif line.strip() and not line.startswith("@ "):
                self.last = line.strip()

    def judged(self) -> tuple[int | None, str]:
        """Number of errors; or None, and why it is not known."""
        self.log.append(self.kept.ending())
        if any(self.counts):
            return max(self.counts), ""
        if self.child.asked is not None:
            return None, f"stopped after {self.seconds:.0f} s"
        if self.child.status != 0:
            return None, f"smoke --brief failed under it (exit status {self.child.status}): {self.last[:200]}"
        return (0, "") if self.counts else (None, "printed no summary")


def check_all(commands: dict[str, list[str]], seconds: float, log: File) -> dict[str, tuple[int | None, str, float]]:
    """Of each command the number of errors, or None and why it is not known; and when it had ended."""
    ends: dict[str, tuple[int | None, str, float]] = {}
    running: list[Tool] = []
    try:
        for name, command in commands.items():
            try:
                running.append(Tool(name, command, seconds, log))
            except (OSError, subprocess.SubprocessError) as error:
                ends[name] = None, f"cannot be started: {error}", monotonic()
        while running:
            with DefaultSelector() as selector:
                for tool in running:
                    for lines in (tool.child.out, tool.child.err):
                        if lines.open:
                            selector.register(lines, EVENT_READ, (tool, lines))
                for key, _ in selector.select(0.05):
                    tool, lines = key.data
                    tool.read(lines)
            for tool in list(running):
                if tool.child.tend(monotonic()):
                    running.remove(tool)
                    ends[tool.name] = *tool.judged(), monotonic()
    finally:
        for tool in running:
            tool.child.signal(signal.SIGKILL)
    return {name: ends[name] for name in commands}
