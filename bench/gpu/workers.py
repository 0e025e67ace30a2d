"""Compiling a list of kernels in several processes, into the cache that all stages share.

Every process makes the same list, and they take turns in it, as one kernel may take ten times as long as another. On a
GPU each compiles for it and loads what it compiled; nothing is launched.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import wait
from time import perf_counter
from typing import Any

from bench.gpu.stage import DRY, cores, emit, say

MOST_PROCESSES = 12
SECONDS_BETWEEN_LINES = 5.0


def processes() -> int:
    return max(1, min(MOST_PROCESSES, cores() - 2))


def run(names: list[str], count: int, source: str) -> int:
    """Compile the jobs of `source(names, failed)`, a "module:function", with `count` processes; 1 if a kernel failed or
    a process died. `failed(what, error)` is to be told of what cannot be listed."""
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
