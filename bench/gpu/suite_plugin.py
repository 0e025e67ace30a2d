"""What pytest tells stage tests while it runs: tests that begin, their reports, and what went wrong with pytest itself.

Loaded with `-p bench.gpu.suite_plugin`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from bench.gpu.suite import PIPE

MESSAGE = 1000  # characters of it, so that a line is written at once


def pytest_configure(config: pytest.Config) -> None:
    if PIPE in os.environ and not hasattr(config, "workerinput"):  # workers of pytest-xdist tell their controller
        config.pluginmanager.register(Teller(int(os.environ[PIPE])))


class Teller:
    """Writes what happens to a pipe, a JSON object a line."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        os.set_inheritable(pipe, False)

    def tell(self, event: str, name: str, **what: Any) -> None:
        os.write(self.pipe, (json.dumps({"event": event, "name": name, **what}) + "\n").encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell("begin", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tell(
            "report", report.nodeid, when=report.when, outcome=report.outcome,
            seconds=round(report.duration, 3), detail=message(report),
        )  # fmt: skip
        if report.when not in ("setup", "call", "teardown"):  # the worker crashed
            self.tell("end", report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tell("end", nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:
            self.tell(
                "report", report.nodeid, when="collect", outcome=report.outcome, seconds=0.0, detail=message(report)
            )
            self.tell("end", report.nodeid)

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.tell("trouble", "pytest", detail=last_line(str(excrepr)))


def message(report: Any) -> str:
    """What a report complains about, in a line."""
    about = report.longrepr
    if not about:
        return ""
    if isinstance(about, tuple):  # of a skipped test: path, line, reason
        return str(about[2])[:MESSAGE]
    crash = getattr(about, "reprcrash", None)
    if crash is not None:
        return " ".join(crash.message.split())[:MESSAGE]
    return last_line(str(about))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return ((errors or lines or [""])[-1])[:MESSAGE]
