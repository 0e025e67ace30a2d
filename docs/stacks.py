"""Writes the table of docs/stacks.md: which methods are tested in which training library, by the tests' names.

    make stacks-page                       (or python docs/stacks.py, with the libraries and pytest installed)

It collects tests/stacks and runs none of them. tests/stacks/test_stacks_page.py compares the page with what it makes.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "stacks.md"
TESTS = ROOT / "tests" / "stacks"
BEGIN, END = "<!-- tests -->\n", "<!-- /tests -->\n"

# Files of tests, by the beginning of their names; the longest that fits counts.
STACKS = {
    "test_lightning": "Lightning",
    "test_transformers": "Transformers' Trainer",
    "test_peft": "PEFT",
    "test_accelerate": "Accelerate",
    "test_accelerate_distributed": "Accelerate: DDP, FSDP2",
    "test_timm": "timm",
    "test_skorch": "skorch",
    "test_wrapped": "schedule-free, bitsandbytes, torchao in `Wrap`",
    "test_averaging": "averages: torch's, diffusers'",
}


def stack_of(file):
    """The row of a file of tests; None for files that are of no stack."""
    fitting = [prefix for prefix in STACKS if file.startswith(prefix)]
    return STACKS[max(fitting, key=len)] if fitting else None


def table(tests):
    """The table and the lists below it.

    Arguments:
        tests: (file, function, method or None) of every collected test.
    """
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    from common import EVERY

    found = {stack: {} for stack in STACKS.values()}
    for file, function, method in tests:
        stack = stack_of(file)
        if stack is not None:
            found[stack].setdefault(function, set()).add(method)
    lines = ["| | " + " | ".join(EVERY) + " |", "| --- |" + " ---: |" * len(EVERY)]
    for stack, functions in found.items():
        if functions:
            counts = [sum(method in methods for methods in functions.values()) for method in EVERY]
            lines.append(f"| {stack} | " + " | ".join(str(n) if n else "-" for n in counts) + " |")
    lines.append("")
    for stack, functions in found.items():
        with_method = sorted(f for f, methods in functions.items() if methods != {None})
        if with_method:
            lines.append(f"- **{stack}**: " + "; ".join(f.removeprefix("test_").replace("_", " ") for f in with_method))
    return "\n".join(lines) + "\n"


def replaced(page, text):
    """The page with another table."""
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: text, page)


def described(item):
    """Of a test that pytest has collected: its file, its function, its method or None."""
    method = item.callspec.params.get("method") if hasattr(item, "callspec") else None
    return item.path.name, getattr(item, "originalname", item.name), method


class Writer:
    """A plugin of pytest that writes the page when everything is collected."""

    def pytest_collection_finish(self, session):
        page = PAGE.read_text()
        PAGE.write_text(replaced(page, table(map(described, session.items))))


def main():
    import pytest

    os.environ["FLATKERN_STACKS"] = "1"
    return pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(TESTS)], plugins=[Writer()])


if __name__ == "__main__":
    sys.exit(main())
