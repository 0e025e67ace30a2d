"""A GPU's races in processes of their own.

A kernel that goes wrong takes its whole process with it, and one that never ends cannot be interrupted; a run that
nobody watches must survive both. So this process runs nothing on the device. First several workers compile kernels
side by side and count launches, with no clock running; then one worker at a time runs the races. A worker that is
lost costs its race, and another takes its place.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait

import torch

import flatkern

from . import stand_in
from .gpu import Gpu
from .races import Race, plan
from .results import key
from .runner import Runner

SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
START = 120.0  # seconds that a worker may need to be ready
RACE = {"compiled": 150.0}  # seconds that a race may take; torch.compile needs most of them
USUAL = 60.0
SURVEY = 120.0  # seconds for compiling and counting
OVERTIME = 20.0  # seconds that the last race may go on when the budget is spent


class Lost(Exception):
    """A worker has died, or does not answer; says which."""


def serve(connection, args) -> None:
    """A worker: says what its device is, then answers questions (kind, race) until it is told None or killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(args.threads)
    try:
        machine = device_of(args)
        connection.send(machine.info())
        gc.freeze()  # every race collects, and would look through torch each time
    except Exception as error:
        connection.send(Lost(f"{type(error).__name__}: {error}"))
        return
    while (question := connection.recv()) is not None:
        kind, race = question
        runner = Runner(args.rounds, args.seconds, machine=machine)
        answer: dict = {"broken": False}
        try:
            if kind == "survey":
                answer["found"] = runner.survey(race)
            else:
                runner.run(race)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        try:
            machine.synchronize()
            machine.release()
        except Exception:  # after an illegal access nothing on this device works for this process
            answer["broken"] = True
        connection.send(answer | {"benchmarks": runner.benchmarks, "failures": runner.failures})


def device_of(args):
    """The machine of a worker."""
    if args.dry_run:
        stand_in.prepare()
        return stand_in.StandIn()
    for name in args.backends:
        state = flatkern.backends()[name]
        if not state["live"]:
            raise RuntimeError(f"flatkern's {name} backend is not live: {state['reason']}; {state['remedy']}")
    return Gpu()


class Worker:
    """A worker as its parent sees it."""

    def __init__(self, args) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, kind: str, race: Race) -> None:
        try:
            self.connection.send((kind, race))
        except OSError as error:
            raise Lost(f"the process of this race ended ({self.ending()})") from error

    def answer(self, seconds: float) -> dict:
        """The next answer; Lost if none comes in time, or none can come."""
        if not self.connection.poll(max(0.0, seconds)):
            raise Lost(f"no answer within {seconds:.0f} s")
        try:
            found = self.connection.recv()
        except (EOFError, OSError) as error:
            raise Lost(f"the process of this race ended ({self.ending()})") from error
        if isinstance(found, Lost):
            raise found
        return found

    def ending(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


class Measurement:
    """All races of a run, within a budget of seconds. What it has found so far is always whole."""

    def __init__(self, args, screen) -> None:
        self.args, self.screen = args, screen
        self.deadline = time.monotonic() + 60 * args.minutes
        self.races = plan(args)
        self.benchmarks: list[dict] = []
        self.failures: list[dict] = []
        self.launches: dict[str, dict | None] = {}
        self.device: dict | None = None
        self.workers: list[Worker] = []
        self.hopeless: str | None = None  # why no worker ever gets ready

    def run(self) -> Iterator[None]:
        """Yields after each race."""
        try:
            if self.args.workers:
                self.survey()
            with self.screen.races(len(self.races)):
                yield from self.time_races()
        finally:
            for worker in self.workers:
                worker.stop()
            self.workers.clear()

    def start(self) -> Worker:
        """A worker that is about to be ready."""
        worker = Worker(self.args)
        self.workers.append(worker)
        return worker

    def stop(self, worker: Worker) -> None:
        worker.stop()
        if worker in self.workers:
            self.workers.remove(worker)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    # ---- before the clock

    def survey(self) -> None:
        """Compile what the races need, side by side, and count launches; what fails here costs no race."""
        started = time.monotonic()
        until = started + min(SURVEY, self.left() / 3)
        # torch.compile first: it takes longest.
        todo = [race for race in self.races if race.table != "copy"]
        todo.sort(key=lambda race: race.table != "compiled")
        count = min(self.args.workers, len(todo))
        self.screen.note(f"compiling kernels and counting launches in {count} processes")
        queue, again, errors = deque(todo), set(), 0
        doing: dict[Worker, Race] = {}
        busy = {worker.connection: worker for worker in (self.start() for _ in range(count))}
        while busy and time.monotonic() < until:
            for connection in wait(list(busy), max(0.0, until - time.monotonic())):
                worker = busy[connection]
                try:
                    answer = worker.answer(0)
                    errors += self.note_survey(answer)
                    if "OutOfMemory" in str(answer.get("found")) and doing[worker] not in again:
                        again.add(doing[worker])  # when fewer are at work
                        queue.append(doing[worker])
                    if answer.get("broken"):
                        raise Lost("broken")
                    if queue:
                        doing[worker] = queue.popleft()
                        worker.ask("survey", doing[worker])
                    else:
                        del busy[connection]
                except Lost:
                    del busy[connection]
                    self.stop(worker)
                    errors += 1
                    # Not for ever, and only where one of them got ready at all.
                    if self.device is not None and errors < 2 * count and time.monotonic() < until - 20:
                        worker = self.start()
                        busy[worker.connection] = worker
        for worker in list(self.workers):
            self.stop(worker)
        text = f"{len(self.launches)} counted in {time.monotonic() - started:.0f} s"
        self.screen.note(text + (f"; {errors} went wrong, which the races will report" if errors else ""))

    def note_survey(self, answer: dict) -> int:
        """Keep what was counted; returns how many candidates went wrong."""
        if "name" in answer:  # the worker has only said what its device is
            self.device = self.device or answer
            return 0
        found = answer.get("found", {})
        wrong = {key for key, counts in found.items() if counts is not None and "error" in counts}
        self.launches |= {key: counts for key, counts in found.items() if key not in wrong}
        return len(wrong) + ("error" in answer)

    # ---- on the clock

    def time_races(self) -> Iterator[None]:
        worker: Worker | None = None
        for race in self.races:
            if self.hopeless or self.left() <= 0:
                self.miss(race, self.hopeless or f"time budget of {self.args.minutes:g} minutes")
                yield
                continue
            self.screen.race(race.title)
            for attempt in attempts(race):
                worker, answer = self.time(worker, attempt)
                if answer is not None and not (answer["broken"] and not answer["benchmarks"]):
                    break
                if self.hopeless or self.left() <= 0:
                    break
            yield

    def time(self, worker: Worker | None, race: Race) -> tuple[Worker | None, dict | None]:
        """Run a race in `worker`, or in a new one; returns the worker of the next race, and the answer."""
        try:
            if worker is None:
                worker = self.start()
                self.device = worker.answer(START)
            worker.ask("time", race)
            answer = worker.answer(min(RACE.get(race.table, USUAL), self.left() + OVERTIME))
        except Lost as reason:
            self.miss(race, str(reason))
            self.stop(worker)
            if self.device is None:
                self.hopeless = str(reason)
            return None, None
        self.benchmarks += answer["benchmarks"]
        self.failures += answer["failures"]
        if "error" in answer:
            self.miss(race, answer["error"])
        if answer["broken"]:
            self.stop(worker)
            worker = None
        return worker, answer

    def miss(self, race: Race, reason: str) -> None:
        """A race, or what is left of it, did not run."""
        named = {"table": race.table, "model": race.model, "method": race.method, "base": race.base}
        everybody = {"dtype": "", "candidate": "all", "masters": False}
        self.failures.append({**named, **everybody, "reason": reason})

    def results(self) -> list[dict]:
        """The benchmarks, with the launches that were counted for them."""
        for b in self.benchmarks:
            b["extra_info"]["launches"] = self.launches.get(key(b["params"]))
        return self.benchmarks


def attempts(race: Race) -> Iterator[Race]:
    """The race; where everything in it is lost, once more without flatkern, so that the others have their numbers."""
    yield race
    others = tuple(entry for entry in race.entries if "flatkern" not in entry.label)
    if others and others != race.entries:
        yield replace(race, entries=others)


def default_workers() -> int:
    """Two cores are left for the system and the parent."""
    return max(1, min(12, (os.cpu_count() or 2) - 2))
