"""The folder that `make gpu` leaves: at most six files of at most 16 MiB, each written as things happen.

A write that fails stops nothing. The first error of each file is remembered, and nothing more is written there.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

RESULTS, LOG, SUMMARY, MACHINE = "results.jsonl", "log.txt", "summary.txt", "machine.json"
OTHERS = ("ncu.csv", "sanitizer.log")  # which stages write
NAMES = (RESULTS, LOG, SUMMARY, MACHINE, *OTHERS)
LARGEST = 16 * 2**20
# Ten stages' worth of either stay below that.
FINDINGS = 1_400_000  # bytes of a stage's findings
HEAD, TAIL = 1_200_000, 200_000  # bytes of a stage's log that are kept, of its begin and of its end
LINE = 4000  # characters of a line of the log
# What is written is committed: where this tree and its owner's files lie is nobody's business.
PLACES = {str(Path(__file__).resolve().parents[2]): ".", os.path.expanduser("~"): "~"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Refused(Exception):
    """What was asked for cannot be done; the text says what to ask for instead."""


class File:
    """A file that is appended to, unbuffered."""

    def __init__(self, path: Path) -> None:
        self.error: str | None = None
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            self.error = error.strerror or str(error)

    def append(self, text: str) -> bool:
        rest = memoryview(text.encode(errors="backslashreplace"))
        while rest and self.error is None:
            try:
                rest = rest[self.file.write(rest) :]
            except OSError as error:
                self.error = error.strerror or str(error)
        return self.error is None


def placeless(text: str) -> str:
    for place, short in PLACES.items():
        text = text.replace(place, short) if len(place) > 1 else text  # not of a home that is "/", or unknown
    return text


class HeadAndTail:
    """Of many lines the first, which are written at once, and the last, which are written at the end."""

    def __init__(self, head: int, tail: int) -> None:
        self.room, self.tail_room = head, tail
        self.tail: deque[str] = deque()
        self.left_out = 0

    def is_head(self, line: str) -> bool:
        if len(line) <= self.room and not self.tail:
            self.room -= len(line)
            return True
        self.tail.append(line)
        self.tail_room -= len(line)
        while self.tail_room < 0:
            self.tail_room += len(self.tail.popleft())
            self.left_out += 1
        return False

    def ending(self) -> str:
        text = f"... {self.left_out} lines are left out here ...\n" if self.left_out else ""
        return text + "".join(self.tail)


class OfStage:
    """How much of a stage is in the files."""

    def __init__(self) -> None:
        self.text = HeadAndTail(HEAD, TAIL)
        self.findings = self.findings_left_out = 0


def hold(folder: Path) -> int | None:
    """A file descriptor that keeps other runs out of a folder while it is open; None where that cannot be done."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise Refused(f"OUT: another make gpu writes to {folder}; wait for it, or name another folder") from None
    except OSError:  # some network file systems have no locks
        pass
    return held


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that has a run: a second list of stages must not cost what the first one found."""
    if not (folder / RESULTS).is_file():
        return None
    release(hold(folder))
    other = next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())
    try:
        folder.rename(other)
    except OSError as error:
        raise Refused(f"OUT: {folder} has a run and cannot be renamed ({error.strerror}); name another") from None
    return other


def release(held: int | None) -> None:
    if held is not None:
        os.close(held)


def prepare(folder: Path) -> list[str]:
    """Make the folder, and remove the files of an earlier run from it: their names are returned."""
    remedy = "name a folder that can be written, make gpu OUT=FOLDER"
    if folder.exists() and not folder.is_dir():
        raise Refused(f"OUT: {folder} is a file, but should be a folder; {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"OUT: {folder} cannot be made ({error.strerror}); {remedy}") from None
    release(hold(folder))
    earlier = [name for name in NAMES if (folder / name).is_file()]
    probe = folder / f"{SUMMARY}.new"
    try:
        probe.touch()
        for path in (probe, *(folder / name for name in earlier)):
            if path.is_file() and not path.is_symlink():  # a link is written through
                path.unlink()
    except OSError as error:
        if error.errno not in FULL:
            raise Refused(f"OUT: {folder} cannot be written ({error.strerror}); {remedy}") from None
    return earlier


class Out:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results, self.log = File(folder / RESULTS), File(folder / LOG)
        self.others: dict[str, str] = {}  # errors of the other files
        self.stages: dict[str, OfStage] = {}

    def of(self, stage: str) -> OfStage:
        return self.stages.setdefault(stage, OfStage())

    def finding(self, stage: str, found: dict) -> bool:
        """Whether it is in the file, or one of so many that it need not be."""
        line, so_far = json.dumps(found) + "\n", self.of(stage)
        if so_far.findings + len(line) > FINDINGS:
            so_far.findings_left_out += 1
            return True
        so_far.findings += len(line)
        return self.results.append(line)

    def text(self, stage: str, line: str) -> None:
        if len(line) > LINE:
            line = f"{line[:LINE]} ... ({len(line) - LINE} more characters)"
        line = f"[{stage}] {line}\n"
        if self.of(stage).text.is_head(line):
            self.log.append(line)

    def end_of(self, stage: str) -> None:
        self.log.append(self.of(stage).text.ending())
        for path in self.folder.glob("*"):
            self.cut(path)
            if path.name in OTHERS:
                self.rewrite(path)

    def cut(self, path: Path) -> None:
        """What other programs write here may have any size."""
        try:
            if not path.is_file() or (size := path.stat().st_size) <= LARGEST:
                return
            part = LARGEST // 2 - 1000
            with path.open("r+b") as file:
                file.seek(size - part)
                tail = file.read()
                file.seek(part)
                file.write(b"\n... %d bytes are left out here ...\n" % (size - 2 * part) + tail)
                file.truncate()
        except OSError as error:
            self.others.setdefault(path.name, error.strerror or str(error))

    def rewrite(self, path: Path) -> None:
        try:
            text = path.read_text(errors="backslashreplace")
        except OSError as error:
            self.others.setdefault(path.name, error.strerror or str(error))
            return
        if placeless(text) != text:
            self.replace(path.name, placeless(text))

    def replace(self, name: str, text: str) -> None:
        """Write a whole file: there is always the old one or the new one."""
        new = self.folder / f"{name}.new"
        try:
            new.write_text(text, errors="backslashreplace")
            os.replace(new, self.folder / name)
        except OSError as error:
            self.others.setdefault(name, error.strerror or str(error))
            with suppress(OSError):
                new.unlink()

    def errors(self) -> dict[str, str]:
        mine = {RESULTS: self.results.error, LOG: self.log.error}
        return {name: error for name, error in (mine | self.others).items() if error}
