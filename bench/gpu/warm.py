"""Stage warm: compiles what later stages launch, in several processes (workers.py).

python bench/gpu/stage.py warm --for=keys,ncu
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu import compiled, workers
from bench.gpu.stage import DRY, WITH_CUDA, emit, say

STAGES = ("keys", "ncu", "host", "rivals", "e2e", "hints", "sweep", "sanitizer")
THIS_RUN = "FLATKERN_GPU_STAGES"  # environment variable: the names of all stages, with commas
KERNELS_IN_DRY = 4


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
    status = workers.run(names, workers.processes(), "bench.gpu.warm:jobs_for")
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
    if name == "sanitizer":
        from bench.gpu import smoke

        yield "smoke --brief", lambda: smoke.jobs(brief=True)
    elif name == "e2e":
        from bench.gpu import e2e

        for who, make in e2e.optimizers().items():
            yield who, lambda make=make: compilation.jobs_of(make())
    else:
        from bench.gpu import wanted

        # Each is to be listed before the next is made, as the tuning of its kernels is in effect until then.
        for label, opt in wanted.optimizers(name):
            yield label, lambda opt=opt: compilation.jobs_of(opt)
