"""Lets the tests of this folder import `bench`, which is no installed package."""

import importlib.util
import sys
from pathlib import Path

# At the end: flatkern stays the installed one, and our triton_kernels/ hides nobody's.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.covering import (  # noqa: F401  (its hooks)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_terminal_summary,
    pytest_testnodedown,
)

HARNESS = importlib.util.find_spec("pytest_benchmark") is not None
collect_ignore = [] if HARNESS else ["test_bench.py"]


def pytest_report_header() -> str | None:
    return None if HARNESS else "bench/test_bench.py is left out: pytest-benchmark is not installed"
