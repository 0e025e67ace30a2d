"""Training steps in other processes, whose allocator can be chosen, and which tell what their memory costs.

glibc gives freed memory back to the system where a block is large or at the end of the heap, so that the gradients and
activations of a step may be new pages, which the kernel clears one fault after the other. Who meets that is a matter
of what lies behind a block. Candidates are measured by themselves twice, therefore, by turns: with the allocator as
the system has it, and with one that keeps all memory. A server for each has torch loaded, and forks for every
candidate, so that all begin with the same heap.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..timing.harness import Clock
from .networks import NETWORKS
from .race import race
from .steps import Training, Who

# glibc reads them when a process starts: no block is a mapping of its own, and the heap gives back nothing below 4 GiB.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
ALLOCATORS: dict[str, dict[str, str]] = {"system": {}, "keeping": KEEPING}
PAUSE = 0.02  # seconds: for as long threads of the other process may wait for work by spinning, on cores of this one
WARM = 3  # steps before the first that counts


class Failed(Exception):
    """What went wrong in another process."""


def impossible() -> str:
    """Why there can be no such process here; empty where there can."""
    if not sys.platform.startswith("linux"):
        return f"page faults and resident memory are asked of Linux; this is {sys.platform}"
    return ""


# ---- in the server


def serve(connection: Connection, threads: int) -> None:
    """Fork for every order; the new process talks through the same connection until it ends."""
    # The first optimizer imports a good part of torch, which every new process would do again.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    while True:
        try:
            task, *order = connection.recv()
        except (EOFError, ConnectionError):
            return
        child = os.fork()
        if not child:
            work(connection, {"race": in_race, "alone": alone}[task], order, threads)
        _, status = os.waitpid(child, 0)
        if status:
            connection.send(f"its process ended by {signal.Signals(status & 127).name}")


def work(connection: Connection, task: Callable[..., None], order: list, threads: int) -> None:
    """A task's process, from its beginning to its end; text is said where something failed."""
    try:
        torch.set_num_threads(threads)
        task(connection, *order)
    except (EOFError, ConnectionError):
        pass  # nobody asks any more
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def in_race(connection: Connection, name: str, everybody: list[tuple[str, str]], rounds: int) -> None:
    """Says (turns, all turns) again and again, and at last rows and failures, as a list."""
    found = race(name, [Who(*who) for who in everybody], rounds, lambda *turns: connection.send(turns))
    connection.send(list(found))


def alone(connection: Connection, name: str, who: tuple[str, str]) -> None:
    """Says nanoseconds by call and page faults of the steps that it is asked for, and at last the peak of memory."""
    before, training = resident(), None
    for count in iter(connection.recv, 0):
        training = training or Training(NETWORKS[name], Who(*who))  # a failure is an answer, and so has to be asked for
        connection.send([training.step(FaultClock()) for _ in range(count)])
    after = resident()
    # Pages of files, which libraries are, stay once they are there.
    connection.send(after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before["RssAnon"])


class FaultClock(Clock):
    """The host's clock, which counts page faults, too."""

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        import resource  # which not every system has

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        super().time(name, call, share)
        self.add("faults", share * (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


def resident() -> dict[str, int]:
    """Bytes of memory that this process has, and has had at most, by Linux' names."""
    with open("/proc/self/status") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(found[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}


# ---- of whoever asks


class Server:
    """A process with an allocator, which forks for what it is asked."""

    def __init__(self, allocator: str) -> None:
        self.connection, theirs = Pipe()
        paths = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(torch.get_num_threads())],
                env={**os.environ, **ALLOCATORS[allocator], "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for who asks, and the connection's end for the server
            )
        self.working = False

    def start(self, *order: Any) -> None:
        if self.working:  # the same candidate has failed elsewhere
            self.finish()
        self.say(order)
        self.working = True

    def steps(self, count: int) -> list[dict[str, int]]:
        self.say(count)
        return self.answer()

    def finish(self) -> int:
        """The most bytes that were resident, beyond those of a process that has torch loaded."""
        self.say(0)
        peak = self.answer()
        self.working = False
        return peak

    def say(self, what: Any) -> None:
        try:
            self.connection.send(what)
        except OSError as error:
            raise Failed(f"its server has ended ({error})") from None

    def answer(self) -> Any:
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            said = "its server has ended"
        if isinstance(said, str):
            self.working = False
            raise Failed(said)
        return said

    def close(self) -> None:
        """Whatever goes on there ends with the next word that it wants to say or hear."""
        self.connection.close()
        self.process.wait()


class Servers:
    """One server per allocator, while a `with` lasts."""

    def __enter__(self) -> Servers:
        self.servers = {allocator: Server(allocator) for allocator in ALLOCATORS}
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.close()

    def race(self, name: str, everybody: list[Who], rounds: int, tick: Callable[[int, int], None]) -> list[list[dict]]:
        """Rows and failures of a race where memory is kept."""
        server = self.servers["keeping"]
        server.start("race", name, [tuple(who) for who in everybody], rounds)
        while isinstance(said := server.answer(), tuple):
            tick(*said)
        server.working = False
        return said

    def alone(self, name: str, who: Who, count: int) -> dict[str, dict]:
        """By allocator: `count` steps, which take turns, and the peak."""
        for server in self.servers.values():
            server.start("alone", name, tuple(who))
        for server in self.servers.values():
            server.steps(WARM)
        steps: dict[str, list[dict[str, int]]] = {allocator: [] for allocator in self.servers}
        for turn in range(count):
            for allocator in list(ALLOCATORS)[:: 1 if turn % 2 else -1]:
                time.sleep(PAUSE)
                steps[allocator] += self.servers[allocator].steps(1)
        return {a: {"steps": steps[a], "peak_bytes": server.finish()} for a, server in self.servers.items()}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
