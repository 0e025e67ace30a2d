"""What the demos share: options that are checked before anything is trained, the screen, interrupts, files."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__, dispatch, doctor
from ..checks import check_backend

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
NARROWEST = 60  # columns that every table fits into
WIDE = 80  # from here on, tables stand beside each other

# ---- options


def usable_backend(named: str | None, device: str) -> str | None:
    """The backend to pass on, refused where it is not live; None takes the best one."""
    source = "--backend" if named else "FLATKERN_BACKEND"
    try:
        name = check_backend(named)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=source) from None
    if name is not None:
        served_by, refusals = dispatch.served_by("sgd_update_", device, name)
        if served_by is None:
            raise typer.BadParameter("; ".join(refusals), param_hint=source)
    return name


def usable_device(name: str) -> torch.device:
    """Refused where torch cannot compute on it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="--device") from None
    return device


def writable_folder(path: Path, *names: str) -> Path:
    """`path`, created; refused where the files `names` cannot be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for name in names:
            if (path / name).exists():
                with (path / name).open("ab"):
                    pass
    except OSError as error:
        text = f"nothing can be written to {path} ({error.strerror}: {error.filename}); name another folder"
        raise typer.BadParameter(text, param_hint="--out") from None
    return path


# ---- screen


def make_console() -> Console:
    """No escape codes in a pipe, on a dumb terminal, and with NO_COLOR, which is asked for by readers of plain text."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
    console = Console(highlight=False, **({"force_terminal": False, "color_system": None} if plain else {}))  # type: ignore[arg-type]
    if console.width < NARROWEST:
        console.width = NARROWEST  # the terminal wraps lines then, which cuts off no number
    return console


def make_progress(console: Console) -> Progress:
    """Bar, percentage, elapsed and remaining time, as wide as the terminal."""
    return Progress(
        BarColumn(None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )


def make_table(title: str, heads: tuple[str, ...], width: int) -> Table:
    """Names at the left, numbers at the right of their columns; nothing is shortened to make it fit."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2 if width >= WIDE else 1, 0, 0),
    )
    lines = max(head.count("\n") for head in heads)
    for k, head in enumerate(heads):
        above = "\n" * (lines - head.count("\n"))
        table.add_column(above + head, justify="right" if k else "left", no_wrap=True)
    return table


# ---- interrupts and files


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, so that what was finished is kept either way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def until_interrupted(work: Callable[[], None]) -> bool:
    """Whether `work` came to its end."""
    try:
        with sigterm_as_ctrl_c():
            work()
    except KeyboardInterrupt:
        return False
    return True


def keep_finished(console: Console, runs: list[Any], planned: int, work: Callable[[], None]) -> str | None:
    """Do `work`, which fills `runs`; how it was interrupted, or None. Ends here where nothing is finished."""
    if until_interrupted(work):
        return None
    if not runs:
        console.print(f"interrupted before the first of {planned} runs was finished: nothing to show")
        raise typer.Exit(INTERRUPTED)
    return f"interrupted: {len(runs)} of {planned} runs"


def circumstances(command: str, device: str, backend: str | None) -> dict[str, Any]:
    """When, where and with what: a file says it of its numbers."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m flatkern {command}", *sys.argv[2:]]),
        "commit": doctor.git("rev-parse", "HEAD") or None,
        # torch's own word: that of its installation lacks the build (+cu130) as a rule.
        "versions": {"flatkern": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "machine": {
            "processor": doctor.processor(),
            "device": device,
            "threads": torch.get_num_threads(),
            "backend": backend or next(iter(doctor.serving(torch.device(device).type))),
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: an interrupt leaves the file of an earlier run whole."""
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def run_app(app: typer.Typer, arguments: list[str], name: str) -> int:
    """Run a command; the exit status."""
    try:
        app(arguments, prog_name=f"python -m flatkern {name}")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
