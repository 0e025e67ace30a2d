"""Stage tests: pytest on tests/test_gpu.py, on all cores, with a finding for each test when it ends.

pytest is a process of its own, so that a crash is a finding too, and tells through a pipe what happens. All that it
prints goes to stderr, the log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

from bench.gpu import stage
from bench.gpu.stage import DRY, cores, emit, say

PIPE = "FLATKERN_GPU_REPORTS"  # environment variable: the file descriptor that takes what the plugin tells
SELECTION = "FLATKERN_GPU_TESTS"  # environment variable: an expression for pytest's -k
EXCUSED = "but cuda is not live: "  # in the reason of a test that test_gpu.py skips, where it may
RANKS = ("passed", "skipped", "failed", "error")  # a test is what the worst of its phases is
NAMED = 8  # tests in the sentence
CHILD = "--pytest"  # this module as the process that is pytest


class Ended(Exception):
    """The stage is to end."""


class Tests:
    """What has been told of each test."""

    def __init__(self) -> None:
        self.open: dict[str, dict] = {}  # those that have begun
        self.outcomes: dict[str, str] = {}
        self.stopped: list[str] = []  # those that were running at the end of the stage's time
        self.excused, self.excuse = 0, ""  # those of the CUDA kernels, where these are not there, and why
        self.trouble = ""

    def take(self, told: dict) -> None:
        # A file that cannot be collected has no test's name; its own does not depend on where this tree lies.
        file, _, test = told["name"].partition("::")
        name = test or file.rsplit("/", 1)[-1]
        if told["event"] == "trouble":
            self.trouble = told["detail"]
        elif told["event"] == "begin":
            self.open[name] = {"outcome": "", "seconds": 0.0, "detail": ""}
        elif told["event"] == "report":
            test = self.open.setdefault(name, {"outcome": "", "seconds": 0.0, "detail": ""})
            outcome = told["outcome"]
            if outcome == "failed" and told["when"] in ("setup", "teardown", "collect"):
                outcome = "error"
            if not test["outcome"] or RANKS.index(outcome) > RANKS.index(test["outcome"]):
                test["outcome"] = outcome
            test["detail"] = test["detail"] or told["detail"]
            test["seconds"] = round(test["seconds"] + told["seconds"], 3)
        elif name in self.open:
            self.close(name)

    def close(self, name: str) -> None:
        test = self.open.pop(name)
        if test["outcome"] == "skipped" and EXCUSED in test["detail"]:
            # They are one finding: there are hundreds.
            self.excused += 1
            self.excuse = self.excuse or test["detail"].partition(EXCUSED)[2]
            return
        before = self.outcomes.get(name)
        if before is not None and RANKS.index(before) >= RANKS.index(test["outcome"]):
            return  # its worker ended after it had failed
        self.outcomes[name] = test["outcome"]
        emit("test", name=name, **test)

    def close_all(self, why: str) -> None:
        """Tests that have begun and will not end."""
        for name, test in list(self.open.items()):
            test.update(outcome="error", detail=test["detail"] or why)
            self.close(name)

    def stop(self) -> None:
        self.stopped = [name for name, test in self.open.items() if test["outcome"] != "failed"]
        self.close_all("had not ended when the stage was stopped")

    def sentence(self) -> str:
        count = Counter(self.outcomes.values())
        bad = [name for name, outcome in self.outcomes.items() if outcome != "passed"]
        failed = count["failed"] + count["error"] - len(self.stopped)
        text = f"{count['passed']} passed, {failed} failed, {count['skipped']} skipped"
        text += f", {len(self.stopped)} stopped" if self.stopped else ""
        text += f"; {self.excused} tests WITHOUT CUDA kernels left out ({self.excuse[:200]})" if self.excused else ""
        if bad:
            text += f": {', '.join(bad[:NAMED])}" + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        return text


def pytest_arguments(paths: list[str]) -> list[str]:
    """Options of a plugin only where it is."""

    def has(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    words = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-p", "bench.gpu.suite_plugin"]
    if has("xdist"):
        words += ["-n", str(min(cores(), 2) if DRY else cores())]
    if has("pytest_timeout"):
        # A test that waits for the device cannot be interrupted, only ended with its process, which xdist replaces.
        words += ["--timeout", "90", *(["--timeout-method", "thread"] if has("xdist") else [])]
    if has("pytest_benchmark"):
        words += ["--benchmark-disable"]
    return words + paths


def main(arguments: list[str]) -> int:
    if arguments[:1] == [CHILD]:
        import pytest

        return int(pytest.main(arguments[1:]))
    if importlib.util.find_spec("pytest") is None:
        say("pytest is not installed: pip install pytest pytest-xdist pytest-timeout")
        return 1

    def end(number, frame) -> None:
        raise Ended

    signal.signal(signal.SIGTERM, end)
    tests = Tests()
    try:
        return run(arguments or ["tests/test_gpu.py", *selected()], tests)
    except Ended:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tests.stop()
        say(tests.sentence())
        return 1


def selected() -> list[str]:
    """Some tests only, after a repair: those that pytest's -k selects."""
    words = os.environ.get(SELECTION, "")
    return ["-k", words] if words else []


def run(paths: list[str], tests: Tests) -> int:
    reading, writing = os.pipe()
    env = os.environ | {PIPE: str(writing)}
    if not DRY:
        env["FLATKERN_GPU_RUN"] = "1"  # a GPU that is missing is a failure, not a reason to skip
    command = [sys.executable, stage.__file__, "suite", CHILD, *pytest_arguments(paths)]
    child = subprocess.Popen(command, env=env, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, pass_fds=[writing])
    os.close(writing)
    complaints: list[str] = []
    forward = threading.Thread(target=copy_errors, args=(child.stderr, complaints), daemon=True)
    forward.start()
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        for line in pipe:
            tests.take(json.loads(line))
    status = child.wait()
    forward.join(timeout=1)
    tests.close_all("pytest ended while it ran")
    text = tests.sentence() + (f" (of those that -k {paths[-1]!r} selects)" if paths[-2:-1] == ["-k"] else "")
    if tests.excused:
        emit("test", name="tests of the CUDA kernels", outcome="left out", seconds=0.0, detail=tests.excuse)
    if not tests.outcomes or status not in (0, 1):
        why = tests.trouble or (complaints[-1] if complaints else "")
        text += f"; pytest ended with exit status {status}" + (f": {why}" if why else "")
    say(text)
    return 0 if status == 0 and set(tests.outcomes.values()) == {"passed"} else 1


def copy_errors(pipe, complaints: list[str]) -> None:
    """pytest says on stderr what it cannot do with its arguments."""
    for raw in pipe:
        line = raw.decode(errors="backslashreplace")
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith("ERROR: ") or ": error: " in line:
            complaints.append(line.strip())
