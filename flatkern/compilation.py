"""warm_up(): the kernels that an optimizer will launch are compiled and loaded before the first step, side by side.

Which of Triton's they are is found out by recording an optimizer of the same kind in training, on tensors of a few
elements. Those of the CUDA backend are compiled already, and are all loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch

from . import cuda, dtensor, rehearsal
from .dispatch import compiled_module, served_by
from .jobs import Job, recording
from .optim.base import FlatOptimizer
from .optim.scalars import is_capturing
from .values import check_flag, is_number

__all__ = ["Job", "jobs_of", "recording", "warm_up"]

log = logging.getLogger("flatkern")


def warm_up(opt: torch.optim.Optimizer, *, scaled: bool = False, rounds: int = 1, threads: int | None = None) -> int:
    """Compile all Triton kernels that an optimizer will launch, in parallel, and load them on its devices.

    Where the CUDA backend serves it, its kernels are loaded there, which takes no compiler.

        torch.distributed.init_process_group("nccl")
        model = fully_shard(model)
        opt = flatkern.AdamW(model.parameters(), lr=1e-3, perturb=flatkern.RWP(sigma=0.01, lam=0.5))
        flatkern.warm_up(opt)  # on every rank, before the first step

    Without it a kernel is compiled at its first launch, a third of a second or more each, one after the other, inside
    a step: ranks that are faster wait in a collective, and may run out of time. Triton keeps on disk what it compiled,
    so that a second start of a training only loads it. What is captured in a CUDA graph has to be loaded before; the
    steps that torch asks for before a capture do that, too.

    What is compiled is what the method's cycle takes with the groups as they are: perturb(), restore(), clean(), and
    step(), at perturbed weights or after restore(); train() and eval() of a rolling optimizer; update_mask(). Left to
    the first launch is what other groups would need (eta from 0, a group added later), a step without the perturbation
    that the optimizer has, and gradients that begin at no multiple of 16 bytes, unless they are in `.grad` now (DDP
    with gradient_as_bucket_view=True makes some).

    Nothing changes: no weight, no state, no group, no round and no random number. It may be called at any time, between
    perturb() and step() too. A terminal shows how far it is, if rich is installed, and the logger "flatkern" names
    every kernel at level INFO.

    Arguments:
        opt: flatkern.SGD, Adam, AdamW or Wrap. DTensors (FSDP2) are compiled for as this rank has them.
        scaled: a torch.amp.GradScaler will be in use.
        rounds: of perturb() before a step, for mSAM and for accumulated gradients.
        threads: how many kernels are compiled at a time; None: one for each processor that this rank may use.

    Returns:
        The number of kernels that are there now, compiled and loaded, for all devices together; 0 where neither Triton
        nor the CUDA backend serves a parameter.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: a CUDA graph is being captured; kernels that cannot be compiled, by name, after all others were.
    """
    opt = _checked("warm_up", opt, scaled, rounds)
    if threads is not None and not _is_count(threads):
        raise ValueError(f"warm_up: threads is {threads!r}, but should be an integer >= 1, or None")
    if is_capturing():
        raise RuntimeError("warm_up: a CUDA graph is being captured; warm up before the capture")
    loaded, work = 0, []
    params = [p for group in opt.param_groups for p in group["params"]]
    for device in dict.fromkeys(dtensor.local(p).device for p in params):
        backend = served_by("restore_", device.type, opt.backend)[0]
        if backend == "cuda":
            loaded += _load(device)
        elif backend == "triton" and not compiled_module("triton").interpreting():
            with _current(device):
                work += [(device, job) for job in rehearsal.record(opt, scaled, rounds, device)]
    _compile_all(work, threads)
    return loaded + len(work)


def _load(device: torch.device) -> int:
    """Load the CUDA backend's kernels on a device; how many there are."""
    start = time.perf_counter()
    count = cuda.load_kernels(compiled_module("cuda"), device)
    log.info("warm_up: %d kernels loaded on %s in %.1f s", count, device, time.perf_counter() - start)
    return count


def _compile_all(work: list[tuple[torch.device, Job]], threads: int | None) -> None:
    """Compile and load Triton's kernels, side by side."""
    start = time.perf_counter()
    failed: list[tuple[str, BaseException]] = []
    with _shown(len(work)) as tick, ThreadPoolExecutor(max(1, min(threads or _processors(), len(work)))) as pool:
        running = {pool.submit(_compile, *each): each for each in work}
        try:
            for done in as_completed(running):
                error = done.exception()
                if error is not None:
                    failed.append((running[done][1].name, error))
                tick()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        names, first = "; ".join(name for name, _ in failed), failed[0][1]
        raise RuntimeError(
            f"warm_up: {len(failed)} of {len(work)} kernels could not be compiled: {names}. The first one: "
            f"{type(first).__name__}: {first}"
        ) from first
    if work:
        log.info("warm_up: %d kernels in %.1f s", len(work), time.perf_counter() - start)


def jobs_of(opt: torch.optim.Optimizer, *, scaled: bool = False, rounds: int = 1) -> list[Job]:
    """What `warm_up` would compile on the current device, wherever the parameters are; their values are not looked at.

    Raises:
        TypeError, ValueError: an argument is wrong.
        ImportError: there is no Triton, or nothing that it could compile for.
    """
    return rehearsal.record(_checked("jobs_of", opt, scaled, rounds), scaled, rounds)


def _checked(where: str, opt: Any, scaled: Any, rounds: Any) -> FlatOptimizer:
    if not isinstance(opt, FlatOptimizer):
        inner = isinstance(getattr(opt, "optimizer", None), FlatOptimizer)
        remedy = "pass its attribute optimizer" if inner else "pass flatkern.SGD, Adam, AdamW or Wrap"
        kind = type(opt).__qualname__
        if isinstance(opt, torch.optim.Optimizer):  # there is more than one SGD
            kind = f"{type(opt).__module__}.{kind}"
        raise TypeError(f"{where}: opt is {kind}, which is no optimizer of flatkern's; {remedy}")
    check_flag(where, "scaled", scaled)
    if not _is_count(rounds):
        raise ValueError(f"{where}: rounds is {rounds!r}, but should be an integer >= 1")
    return opt


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 1


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _compile(device: torch.device, job: Job) -> None:
    with _current(device):  # of this thread
        job.compile()


def _processors() -> int:
    """Those of this process; ranks of one machine start at the same time and share them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, count // max(1, int(ranks) if ranks.isdigit() else 1))


@contextmanager
def _shown(count: int) -> Iterator[Callable[[], None]]:
    """A bar on the first rank's terminal; yields what to call when one is done."""
    first = os.environ.get("RANK", "0") == "0"
    if not (count and first and sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=count)
        yield lambda: bar.advance(task)
