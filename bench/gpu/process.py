"""A stage's process and all that it starts: a process group with a time limit, whose output is read as it comes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE = 3.0  # seconds from SIGTERM to SIGKILL
GIVE_UP = 2.0  # seconds in which a killed process must be gone, and in which what it wrote last is read
LONGEST = 2**20  # bytes of a line; what is longer becomes several


def group_members(group: int) -> list[int]:
    """Processes of a group that are not dead; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may end meanwhile
            state, _parent, its_group = path.read_text(errors="replace").rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return sorted(found)


class Lines:
    """The lines of a pipe, without waiting for any."""

    def __init__(self, pipe) -> None:
        self.pipe, self.rest, self.open = pipe, b"", True
        os.set_blocking(pipe.fileno(), False)

    def fileno(self) -> int:
        return self.pipe.fileno()

    def read(self) -> list[str]:
        """What has come; at most a piece, so that a flood here does not keep others waiting."""
        try:
            piece = os.read(self.fileno(), 2**18)
        except BlockingIOError:
            return []
        except OSError:
            piece = b""
        self.open = bool(piece)
        *whole, self.rest = (self.rest + piece).split(b"\n")
        if self.rest and (not piece or len(self.rest) > LONGEST):
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode(errors="backslashreplace") for line in whole]

    def close(self) -> None:
        self.open = False
        self.pipe.close()


class Child:
    """A command in a process group of its own, until `limit` on the clock that `tend` is given."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, begun: float, limit: float) -> None:
        self.begun, self.limit = begun, limit
        self.asked: float | None = None  # when SIGTERM was sent,
        self.forced: float | None = None  # when SIGKILL was sent,
        self.gone: float | None = None  # and when its process was seen to have ended
        self.left_behind: list[int] = []  # what is still there after SIGKILL: stuck in a driver
        # Not a session of its own: whoever ends all processes of this session then ends these too.
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=os.setpgrp,
        )  # fmt: skip
        self.out, self.err = Lines(self.process.stdout), Lines(self.process.stderr)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Exit status, -N if signal N ended it, None if nothing did."""
        return self.process.returncode

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def has_ended(self) -> bool:
        # It stays a zombie until `tend` is done with its group, whose number then cannot be anybody else's.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def tend(self, now: float) -> bool:
        """Do what is due; whether this is over."""
        if self.gone is None and self.has_ended():
            self.gone = now
            self.signal(signal.SIGKILL)  # whatever it left running
        if self.gone is not None:
            # A process that left the group may hold a pipe for ever.
            if now < self.gone + GIVE_UP and (self.out.open or self.err.open or group_members(self.pid)):
                return False
        elif self.asked is None:
            if now < self.limit:
                return False
            self.signal(signal.SIGTERM)
            self.asked = now
            return False
        elif self.forced is None:
            if now < self.asked + GRACE:
                return False
            self.signal(signal.SIGKILL)
            self.forced = now
            return False
        elif now < self.forced + GIVE_UP:
            return False
        self.left_behind = group_members(self.pid)
        self.out.close()
        self.err.close()
        if self.gone is not None:
            self.process.wait()
        return True
