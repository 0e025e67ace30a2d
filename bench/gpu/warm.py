"""Stage warm: compiles what later stages launch, in several processes, into the cache that all stages share.

    python bench/gpu/stage.py warm --for=keys,ncu

Every process makes the same list of kernels, and they take turns in it, as one kernel may take ten times as long as
another. On a GPU each compiles for it and loads what it compiled; nothing is launched.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from time import perf_counter
from typing import Any

from bench.gpu import compiled
from bench.gpu.stage import DRY, WITH_CUDA, cores, emit, say

STAGES = ("keys", "ncu", "host", "rivals", "e2e", "hints", "sweep", "sanitizer")
THIS_RUN = "FLATKERN_GPU_STAGES"  # environment variable: the names of all stages, with commas
MOST_PROCESSES = 12
KERNELS_IN_DRY = 4
SECONDS_BETWEEN_LINES = 5.0


def main(arguments: list[str]) -> int:
    chosen = [word.removeprefix("--for=") for word in arguments if word.startswith("--for=")]
    # Of the stages of this run, which are not all of those that have kernels to compile.
    asked = [name for name in os.environ.get(THIS_RUN, "").split(",") if name in STAGES]
    names = [name for name in chosen[0].split(",") if name] if chosen else asked or list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        say(f"warm: --for names {', '.join(unknown)}, but should name some of {', '.join(STAGES)}")
        return 2
    beside = compiled.start_no_hints() if "hints" in names and not DRY and WITH_CUDA else None
    status = run(names, processes())
    return status if beside is None else max(status, wait_for(beside))


def wait_for(compiler: subprocess.Popen) -> int:
    """The library of stage hints: its finding, and 1 if it was not built."""
    said, _ = compiler.communicate()
    failed = compiler.returncode != 0 or compiled.no_hints() is None
    last = (said.strip().splitlines() or ["nothing was said"])[-1][:300]
    emit("warm", library="CUDA kernels without hints", failed=int(failed), detail=last if failed else "")
    if failed:
        say(said)
        say(f"the CUDA kernels without hints were not built: {last}")
    return int(failed)


def processes() -> int:
    return max(1, min(MOST_PROCESSES, cores() - 2))


def run(names: list[str], count: int, source: str = "bench.gpu.warm:jobs_for") -> int:
    """Compile `source(names)` with `count` processes; 1 if a kernel failed or a process died."""
    began = perf_counter()
    context = multiprocessing.get_context("spawn")
    position, shares = context.Value("l", 0), [Share(context) for _ in range(count)]
    workers = [
        context.Process(target=work, args=(names, source, k, count, position, share), daemon=True)
        for k, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    alive = {worker.sentinel for worker in workers}
    while alive:
        alive -= set(wait(list(alive), SECONDS_BETWEEN_LINES))
        known = max(share.listed.value for share in shares)
        done = sum(share.done.value + share.failed.value for share in shares)
        if alive and known > 0:
            say(f"{done} of {known} kernels, {perf_counter() - began:.0f} s")
    dead = 0
    for k, (worker, share) in enumerate(zip(workers, shares, strict=True)):
        worker.join()
        if worker.exitcode:
            dead += 1
            share.failed.value += 1
            at = share.current.value.decode(errors="replace")
            say(f"[{k + 1}/{count}] {how_it_died(worker.exitcode)} while {at or 'starting'}; the others went on")
            share.report(k, count, perf_counter() - began)
    lists = {share.listed.value for share in shares if share.listed.value >= 0}
    if len(lists) > 1:
        say(f"the processes made lists of {' and '.join(map(str, sorted(lists)))} kernels: some are missing")
    kernels, failed = (sum(getattr(share, name).value for share in shares) for name in ("done", "failed"))
    say(f"{kernels} kernels in {perf_counter() - began:.0f} s by {plural(count, 'process')}, {failed} failed")
    return 1 if failed or dead or len(lists) > 1 else 0


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'es' if count != 1 else ''}"


def how_it_died(status: int) -> str:
    if status > 0:
        return f"the process ended with status {status}"
    try:
        return f"the process was ended by {signal.Signals(-status).name} (status {status})"
    except ValueError:
        return f"the process was ended by signal {-status}"


class Share:
    """What a process has done, where its parent sees it even after its death."""

    def __init__(self, context: Any) -> None:
        self.listed = context.Value("l", -1, lock=False)
        self.done = context.Value("l", 0, lock=False)
        self.failed = context.Value("l", 0, lock=False)
        self.current = context.Array("c", 200, lock=False)

    def now(self, what: str) -> None:
        self.current.value = what.encode()[:199]

    def report(self, k: int, count: int, seconds: float) -> None:
        """The finding of a process."""
        done, failed, share = self.done.value, self.failed.value, f"{k + 1}/{count}"
        emit("warm", kernels=done, failed=failed, seconds=round(seconds, 2), share=share)


# In a process.


def work(names: list[str], source: str, k: int, count: int, position: Any, share: Share) -> None:
    began = perf_counter()
    share.now("importing torch and triton")
    import torch

    torch.set_num_threads(1)
    if DRY:
        pretend()
    share.now("listing the kernels")
    module, _, function = source.partition(":")

    def unlisted(what: str, error: Exception) -> None:
        """Every process fails to list the same; the first says so."""
        if k == 0:
            traceback.print_exception(error)
            say(f"the kernels of {what} are not known: {type(error).__name__}: {error}")
            share.failed.value += 1

    todo = getattr(importlib.import_module(module), function)(names, unlisted)
    share.listed.value = len(todo)
    while True:
        with position.get_lock():
            at, position.value = position.value, position.value + 1
        if at >= len(todo):
            break
        share.now(f"compiling {todo[at].name}")
        try:
            todo[at].compile()
            share.done.value += 1
        except Exception as error:
            traceback.print_exception(error)
            say(f"{todo[at].name}: {type(error).__name__}: {error}")
            share.failed.value += 1
    share.report(k, count, perf_counter() - began)


def pretend() -> None:
    """Compile for a GPU that is not there. Optimizers whose tensors are on the CPU may then name Triton."""
    from bench.gpu import silent_driver
    from flatkern import dispatch

    silent_driver.install()
    dispatch.DEVICES["triton"].append("cpu")


def jobs_for(names: list[str], failed: Callable[[str, Exception], None]) -> list[Any]:
    """Distinct jobs of the stages `names`, in the same order in every process. `failed(what, error)` is told."""
    found: dict[Any, Any] = {}
    for name in names:
        try:
            for label, jobs in jobs_of_stage(name):
                try:
                    for job in jobs():
                        found.setdefault(job.key, job)
                except Exception as error:
                    failed(f"{name}, {label}", error)
        except Exception as error:
            failed(name, error)
    distinct = list(found.values())
    return distinct[:: max(1, len(distinct) // KERNELS_IN_DRY)][:KERNELS_IN_DRY] if DRY else distinct


def jobs_of_stage(name: str) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """Labelled parts of a stage's list."""
    from flatkern import compilation

    if name == "hints":
        return  # nvcc compiles what it launches
    if name in ("sanitizer", "smoke"):
        from bench.gpu import smoke

        yield name, lambda: smoke.jobs(brief=name == "sanitizer")
    elif name == "e2e":
        from bench.gpu import e2e

        for who, make in e2e.optimizers().items():
            yield who, lambda make=make: compilation.jobs_of(make())
    else:
        from bench.gpu import wanted

        # Each is to be listed before the next is made, as the tuning of its kernels is in effect until then.
        for label, opt in wanted.optimizers(name):
            yield label, lambda opt=opt: compilation.jobs_of(opt)
