"""What a run shows while it goes on, and its tables: by rich where that is installed, else as plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .tables import Table, loud

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table as RichTable
except ImportError:
    Console = None


class Screen:
    """Plain lines: one per race, so that a log tells how far an unattended run has come."""

    def __init__(self) -> None:
        self.started, self.done, self.total = time.monotonic(), 0, 0

    def note(self, text: str, alarming: bool = False) -> None:
        print(text, flush=True)

    def table(self, table: Table) -> None:
        lines = [table.header, *([cell.strip("*") for cell in row] for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        self.note(f"\n{table.title}")
        for line in lines:
            cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            self.note("  " + "  ".join(cells))
        if table.note:
            self.note(table.note)

    @contextmanager
    def races(self, total: int) -> Iterator[None]:
        """While races are run."""
        self.total = total
        yield

    def race(self, title: str) -> None:
        """The next race begins."""
        self.done += 1
        self.note(f"{time.monotonic() - self.started:5.0f} s  {self.done}/{self.total}  {title}")

    def tick(self, done: int, total: int) -> None:
        """Turns of the race under way."""


class RichScreen(Screen):
    """Progress bars and coloured tables."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self.bars = None

    def note(self, text: str, alarming: bool = False) -> None:
        self.console.print(f"[red]{escape(text)}[/red]" if alarming else escape(text))

    def table(self, table: Table) -> None:
        shown = RichTable(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
        for i, head in enumerate(table.header):
            shown.add_column(head, justify="left" if i == 0 else "right")
        for row in table.rows:
            shown.add_row(*(f"[red]{escape(c.strip('*'))}[/red]" if loud(c) else escape(c) for c in row))
        self.console.print(shown)

    @contextmanager
    def races(self, total: int) -> Iterator[None]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console) as self.bars:
            self.overall = self.bars.add_task("races", total=total)
            self.turns = self.bars.add_task("", total=None)
            yield

    def race(self, title: str) -> None:
        self.bars.update(self.overall, completed=self.done)
        self.done += 1
        self.bars.reset(self.turns, description=title)

    def tick(self, done: int, total: int) -> None:
        self.bars.update(self.turns, completed=done, total=total)


def screen() -> Screen:
    """Bars for those who watch; lines for logs, and where rich is not installed."""
    if Console is not None and Console().is_terminal:
        return RichScreen()
    return Screen()
