"""docs/stacks.md says what is tested: its table is made of the tests' names."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
page = runpy.run_path(str(ROOT / "docs" / "stacks.py"))


def test_the_table_is_that_of_the_tests(request):
    tests = [page["described"](item) for item in request.session.items]
    files = {path.name for path in (ROOT / "tests" / "stacks").glob("test_*.py")}
    chosen = request.config.option.keyword or request.config.option.markexpr
    if chosen or files - {file for file, _, _ in tests}:
        pytest.skip("only some tests were collected; make test-stacks collects all, where every library is installed")
    text = page["PAGE"].read_text()
    assert text == page["replaced"](text, page["table"](tests)), "docs/stacks.md is stale: run make stacks-page"


def test_every_test_that_the_page_names_is_there():
    defined = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for path in [page["PAGE"], *(ROOT / "docs" / "stacks").glob("*.md")]:
        for name in re.findall(r"`(test_\w+)`", path.read_text()):
            assert f"def {name}(" in defined or (ROOT / "tests" / "stacks" / f"{name}.py").exists(), (path.name, name)


def test_every_file_of_tests_is_of_a_stack():
    files = {path.name for path in (ROOT / "tests" / "stacks").glob("test_*.py")}
    others = {"test_stacks_page.py", "test_stacks_examples.py"}
    assert not {file for file in files - others if page["stack_of"](file) is None}
