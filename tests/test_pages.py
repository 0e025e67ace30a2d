"""Errors point to headings that the documentation has, and one place says where it is."""

import ast
import re
from pathlib import Path

import pytest
from test_docs import slugs

from flatkern import pages

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "flatkern"


def uses():
    """Every `page(name, anchor)` of the package: where, and with what."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "page":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", [ast.literal_eval(a) for a in node.args]


@pytest.mark.parametrize("name", pages.ANCHORS)
def test_every_anchor_is_a_heading(name):
    path = DOCS / f"{name}.md"
    assert path.exists(), f"there is no docs/{name}.md"
    missing = set(pages.ANCHORS[name]) - slugs(path.read_text())
    assert not missing, f"docs/{name}.md has no heading for {', '.join(sorted(missing))}"


def test_anchors_are_found():
    text = "# A page\n\n## SAM and ASAM\n\n```sh\n# no heading\n```\n### `x`, or y?\n"
    assert slugs(text) == {"a-page", "sam-and-asam", "x-or-y"}


def test_every_link_is_in_the_list():
    """Also those of errors that no test raises."""
    found = dict(uses())
    assert len(found) > 15
    wrong = {where: args for where, args in found.items() if args[1] not in pages.ANCHORS.get(args[0], ())}
    assert not wrong


def test_a_link():
    assert pages.page("cycle", "writes") == "see docs/cycle.md#writes"
    for name, anchor in (("cycle", "wrights"), ("cylce", "writes")):
        with pytest.raises(KeyError, match=f"{name}#{anchor}"):
            pages.page(name, anchor)


def test_only_one_place_knows_where_pages_are():
    """So that a hosted address can be put in there."""
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "pages.py" or not re.search(r"docs/\w+\.md", path.read_text()), path
