"""Docstrings as Markdown, for the pages of the API; an extension of griffe, which reads the sources.

A docstring is plain text: indented equations, and sections such as `Arguments:` whose entries are `name: what it is`.
Equations are code in Markdown already; sections become lists.
"""

from __future__ import annotations

import re
import textwrap

try:
    import griffe
except ImportError:  # the tests need the function alone
    griffe = None

ENTRY = re.compile(r"(\w[\w.]*(?:, \w[\w.]*)*):(?: (.*))?$")
PROSE = ("Returns", "Yields")  # sections without names


def as_markdown(text: str) -> str:
    """A docstring with its sections as lists."""
    lines, found = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        if not (is_title(line) and lines and lines[0].startswith(" ")):
            found.append(line)
            continue
        block = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            block.append(lines.pop(0))
        found += ["", f"**{line[0].upper()}{line[1:-1]}**", "", *entries(block, line[:-1] in PROSE), ""]
    return "\n".join(found)


def is_title(line: str) -> bool:
    return line.endswith(":") and not line.startswith(" ")


def entries(block: list[str], is_prose: bool) -> list[str]:
    """The lines of a section; what is indented beneath an entry stays beneath it."""
    lines = textwrap.dedent("\n".join(block)).strip("\n").splitlines()
    return lines if is_prose else [entry(line) if line[:1].strip() else line for line in lines]


def entry(line: str) -> str:
    names = ENTRY.match(line)
    if names is None:
        return f"- {line}"
    return f"- {', '.join(f'`{name}`' for name in names[1].split(', '))}: {names[2] or ''}"


if griffe is not None:

    class Docstrings(griffe.Extension):
        """Every docstring, before it is shown."""

        def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
            if obj.docstring:
                obj.docstring.value = as_markdown(obj.docstring.value)
