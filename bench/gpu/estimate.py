"""How long the lists of `make gpu` take on a machine with 16 cores, estimated on one without a GPU.

    python bench/gpu/estimate.py [--cores 16] [--every 10 | --all]

Kernels are compiled for sm_90 with a driver that launches nothing, into an empty cache, every tenth of each stage
unless told otherwise; processor seconds of this machine stand for those of the other one. Compiling is divided among
the cores (what runs side by side shares them); what a process does before it compiles is not. Stages of races are given
with the fewest turns: bytes at 3 TB/s, the host's part, setting up. For developers: no stage reads this.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("smoke", "tests", "warm")  # of the first list
CONTEXT = 3.0  # seconds until a process can use a GPU
# Seconds: torch.compile, graphs and checks; what a test takes for each kernel; a call of the CUDA kernels, most of
# which is eager on the CPU; a launcher that gcc compiles on a GPU, of which four kernels have one (52 for 660 kernels
# of triton 3.6).
SMOKE_ELSE, TEST, CUDA_TEST, GCC = 25.0, 0.1, 0.2, 0.2
BYTES, HOST, SLOW_HOST = 3e12, 1e-3, 2e-2  # a second; seconds of the host for a step, and for one of a loop in Python
STEPS = 11  # in a turn: one for the host's clock, one for events, and the loop; a burst of three


def cpu() -> float:
    """Processor seconds of this process and of those that it waited for, as ptxas."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Cost(NamedTuple):
    kernels: int
    seconds: float  # of a processor, to compile them
    before: float  # seconds of one process until it begins with it
    failed: int = 0


def compiled(jobs: list[Any], every: int) -> tuple[float, int]:
    """Processor seconds of all jobs, from every n-th; how many failed."""
    sample, failed = jobs[::every], 0
    began = cpu()
    for job in sample:
        try:
            job.compile()
        except Exception as error:
            print(f"{job.name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return (cpu() - began) * len(jobs) / max(1, len(sample)) + GCC * len(jobs) / 4, failed


def listed(make: Callable[[], list[Any]]) -> tuple[list[Any], float]:
    began = perf_counter()
    return make(), perf_counter() - began


def jobs_of_tests() -> list[Any]:
    """What tests/test_gpu.py launches: its calls, and its networks in training."""
    import capturing
    import cases
    import gpu_cases

    from flatkern import compilation, dispatch

    found = []
    with compilation.recording() as recorded:
        for case in gpu_cases.CASES:
            cases.call(dispatch.load(case.op, "triton"), case.op, case.make("cpu"))
        for rule in ("SGD", "AdamW"):
            for method in capturing.METHODS:
                for capturable in (True, False):
                    found += compilation.jobs_of(capturing.Run(rule, method, capturable).opt)
    return list({job.key: job for job in [*recorded, *found]}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=16, help="of the machine that is estimated")
    parser.add_argument("--every", type=int, default=10, help="compile every n-th kernel")
    parser.add_argument("--all", action="store_true", help="compile all of them")
    options = parser.parse_args()
    every = 1 if options.all else options.every
    os.environ["FLATKERN_GPU_DRY"] = "1"  # tensors on the CPU
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        began = perf_counter()
        from bench.gpu import smoke, warm, workers

        workers.pretend()
        imports = perf_counter() - began
        smoke.DRY, smoke.COLUMNS, warm.DRY = False, 8208, False  # the whole lists
        report(measure(every), imports, options.cores)


def measure(every: int) -> dict[str, Cost]:
    """By stage; of warm, by the stage that it is for, without what those before it need too."""
    from bench.gpu import smoke, warm

    def failed(what: str, error: Exception) -> None:
        print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)

    found, seen = {}, set()
    parts = {f"warm for {name}": (lambda name=name: warm.jobs_for([name], failed)) for name in warm.STAGES}
    for name, make in {**parts, "smoke": lambda: smoke.jobs(brief=False), "tests": jobs_of_tests}.items():
        jobs, before = listed(make)
        if name in parts:
            jobs = [job for job in jobs if job.key not in seen]
            seen |= {job.key for job in jobs}
        seconds, broken = compiled(jobs, every)
        found[name] = Cost(len(jobs), seconds, before, broken)
        print(f"{name}: {len(jobs)} kernels, {seconds:.0f} s of a processor", file=sys.stderr)
    return found


def report(costs: dict[str, Cost], imports: float, cores: int) -> None:
    from bench.gpu.stages import LISTS, USUAL
    from bench.gpu.workers import MOST_PROCESSES

    warm = {name.removeprefix("warm for "): cost for name, cost in costs.items() if name.startswith("warm for ")}

    def total(names: tuple[str, ...]) -> Cost:
        chosen = [warm[name] for name in names if name in warm]
        return Cost(sum(c.kernels for c in chosen), sum(c.seconds for c in chosen), sum(c.before for c in chosen))

    print(f"importing torch and flatkern takes {imports:.1f} s here; a context on a GPU is taken to be {CONTEXT:.0f} s")
    print(f"{'list':8}{'stage':12}{'kernels':>9}{'cpu s':>9}{f's, {cores} cores':>14}{'allowed':>9}")
    for which, allowed in LISTS.items():
        each = {"warm": total(tuple(name for name in warm if name in allowed))}
        if "smoke" in allowed:
            each |= {"smoke": costs["smoke"], "tests": costs["tests"]}
        beside = sum(cost.seconds for cost in each.values())
        spent = 0.0
        for stage, limit in allowed.items():
            cost = each.get(stage)
            if cost is None:
                seconds = races(stage)
                seconds = None if seconds is None else seconds + imports + CONTEXT
                shown = f"{'-':>9}{'-':>9}" + (f"{seconds:14.0f}" if seconds is not None else f"{'-':>14}")
                spent += limit if seconds is None else min(seconds, limit)
            else:
                # All cores are shared by what runs side by side, in the worst case until the end.
                workers = min(MOST_PROCESSES, cores - 2)
                rest = {"smoke": SMOKE_ELSE, "tests": TEST * cost.kernels + cuda_tests() / workers}.get(stage, 0.0)
                own = cost.seconds / min(workers, cores)
                seconds = imports + CONTEXT + cost.before + max(own, beside / cores) + rest
                shown = f"{cost.kernels:9}{cost.seconds:9.0f}{seconds:14.0f}"
                spent += 0 if stage in BESIDE and "smoke" in allowed else seconds
            print(f"{which:8}{stage:12}{shown}{limit:9}")
        if "smoke" in allowed:
            spent += max(imports + CONTEXT + beside / cores + c.before for c in each.values())
        print(f"{which:8}{'all':12}{'':18}{spent:14.0f}{USUAL:9.0f}")


def cuda_tests() -> float:
    """Seconds of a processor: every call by the CUDA kernels, next to eager and once more."""
    import gpu_cases

    return 2 * CUDA_TEST * len(gpu_cases.cases_by("cuda"))


def races(stage: str) -> float | None:
    """The fewest seconds of a stage of races, with as few turns as do; it divides all that it has among them."""
    from bench.candidates import floors
    from bench.gpu import racing, wanted
    from bench.models import MODELS

    if stage not in ("keys", "rivals", "hints", "sweep"):
        return None
    seconds = 0.0
    for race in wanted.hints() if stage == "hints" else wanted.STAGES[stage]():
        for entry in race.entries:
            if entry.label == "compiled":
                seconds += racing.COMPILING
                continue
            slow = entry.label in ("loop", "papers", "foreach")
            bytes_ = sum(floors(entry.label, race.method, race.base, entry.dtype, entry.masters).values())
            step = (5 if slow else 1) * bytes_ * MODELS[race.model].numel / BYTES + (SLOW_HOST if slow else HOST)
            seconds += racing.SETTING_UP + racing.LEAST * STEPS * step
    return seconds


if __name__ == "__main__":
    main()
