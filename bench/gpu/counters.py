"""Stage ncu: counters of the main kernels, by Nsight Compute.

    python bench/gpu/stage.py counters             starts ncu on the following, and reads what it wrote
    python bench/gpu/stage.py counters --inside    makes the calls, each once, and marks what they launch of ours

Counters say what a time does not: whether a kernel is held up by memory, by instructions or by too few warps.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

from .stage import DRY, SECONDS, emit, left, say
from .stages import most_seconds

USUAL, RESERVE = most_seconds()["ncu"], 2.0
AROUND = 8.0  # seconds for ncu itself and for the last calls: a table is written at the end, or not at all
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
MICROSECONDS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}
CALL, KERNEL, LATE = "call: ", "kernel: ", "no time was left for "  # lines of --inside
OF_CUDA = "flatkern::cuda"  # the namespace of the CUDA kernels, which is known of them before ncu names them


def main(arguments: list[str]) -> int:
    return inside() if "--inside" in arguments else outside()


# ---- ncu


class NotCounted(Exception):
    """Why there are no counters, and what to do."""


def outside() -> int:
    out = Path(os.environ.get("FLATKERN_GPU_OUT") or "build/gpu")
    out.mkdir(parents=True, exist_ok=True)
    table, spoken = out / "ncu.csv", ""
    try:
        spoken = count(table)
        launches = list(read_table(table.read_text(errors="replace") if table.exists() else ""))
        if not launches:
            said = spoken.strip().splitlines()
            raise NotCounted(f"ncu counted nothing; it said: {said[-1] if said else 'nothing'}")
    except NotCounted as reason:
        say(str(reason))
        return 1
    started = read_started(spoken)
    for launch, label in zip(launches, labels([launch["kernel"] for launch in launches], started), strict=True):
        emit("counter", **launch, label=label)
    late = [line for line in spoken.splitlines() if line.startswith(LATE)]
    say("; ".join([f"{len(launches)} launches of {len(started)} counted", *late]))
    return 0 if len(launches) >= len(started) > 0 else 1


def count(table: Path) -> str:
    """Run ncu; returns what it and the calls have said. It writes `table`."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise NotCounted("ncu is not installed; it is Nsight Compute, which comes with the CUDA toolkit")
    command = [
        ncu, "--csv", "--profile-from-start", "off", "--clock-control", "none",
        "--metrics", ",".join(METRICS.values()), "--log-file", str(table),
        sys.executable, sys.argv[0], "counters", "--inside",
    ]  # fmt: skip
    table.unlink(missing_ok=True)
    seconds, late = max(0.0, left(USUAL) - RESERVE), False
    with tempfile.TemporaryFile() as output:  # whoever kept a pipe open would have to be waited for
        environment = {**os.environ, SECONDS: str(seconds - AROUND)}
        try:
            subprocess.run(command, stdout=output, stderr=output, check=False, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            late = True
        output.seek(0)
        spoken = output.read().decode(errors="replace")
    say(spoken)
    if "ERR_NVGPUCTRPERM" in spoken + (table.read_text(errors="replace") if table.exists() else ""):
        raise NotCounted(
            "this user may not read the GPU's counters (ERR_NVGPUCTRPERM); run as root, or load the kernel module "
            "nvidia with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if late:
        raise NotCounted(f"ncu was not ready in {seconds:.0f} s; it needs more: make gpu STAGES=ncu")
    return spoken


def read_table(text: str) -> Iterator[dict]:
    """Launches in the order of a CSV of ncu, which has a line a metric, and remarks of ncu's own between them."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    while lines and not lines[0].startswith('"ID"'):
        lines.pop(0)
    found: dict[str, dict] = {}
    names = {metric: name for name, metric in METRICS.items()}
    for row in csv.DictReader(lines):
        metric = names.get(row.get("Metric Name") or "")
        if metric is None:
            continue
        launch = found.setdefault(row["ID"], {"kernel": kernel_of(row["Kernel Name"]), **dict.fromkeys(METRICS)})
        launch[metric] = number(row["Metric Value"], unit_of(row["Metric Unit"]) if metric == "us" else 1)
    yield from found.values()


def kernel_of(name: str) -> str:
    """Without types and arguments, and namespaces that have no name."""
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    return name.split("(")[0].split("<")[0].removeprefix("void ").strip()


def unit_of(text: str) -> float:
    return MICROSECONDS[text.removesuffix("econd")]


def number(text: str, unit: float) -> float | None:
    try:
        return float(f"{unit * float(text.replace(',', '')):.6g}")
    except (AttributeError, ValueError):  # n/a
        return None


def read_started(spoken: str) -> list[tuple[str, str]]:
    """(call, kernel) of the launches in the calls, in their order."""
    call, found = "", []
    for line in spoken.splitlines():
        if line.startswith(CALL):
            call = line.removeprefix(CALL)
        elif line.startswith(KERNEL):
            found.append((call, line.removeprefix(KERNEL)))
    return found


def labels(counted: list[str], started: list[tuple[str, str]]) -> Iterator[str]:
    """Which call each counted launch belongs to; those that torch started belong to the call before them."""
    at, call = 0, started[0][0] if started else ""
    for kernel in counted:
        known = OF_CUDA if kernel.startswith(OF_CUDA) else kernel
        same = next((k for k in range(at, len(started)) if started[k][1] == known), None)
        if same is not None:
            at, call = same + 1, started[same][0]
        yield call


# ---- the calls


def inside() -> int:
    import flatkern

    from ..candidates import Candidate
    from ..methods import METHODS
    from ..models import MODELS
    from ..runner import Runner
    from ..timing.gpu import Gpu
    from ..timing.harness import Clock
    from . import stand_in, wanted
    from .goals import CUDA

    if DRY:
        stand_in.prepare()
    machine = stand_in.StandIn() if DRY else Gpu()
    runner, kind, inputs, longest = Runner(1, 0.0, machine=machine), None, (), 0.0
    cuda_is_live = flatkern.backends()["cuda"]["live"]
    for subject in wanted.counters():
        if subject.entry.label == CUDA and not cuda_is_live:
            continue  # stage keys says why
        # One that is cut off costs the table, and with it all that were before.
        if left(USUAL) < longest:
            say(f"{LATE}{' and '.join(subject.calls)}, {METHODS[subject.method].title}, {MODELS[subject.model].title}")
            return 0
        began, entry = monotonic(), subject.entry
        if kind != (kind := (subject.model, entry.dtype)):
            inputs = runner.inputs(subject, entry.dtype)
        candidate = Candidate(entry.label, *inputs, subject.method, subject.base, entry.masters, machine=machine)
        for k in range(1 if DRY else 2):
            candidate.steps(Clock(), k)
        for gradient, name, _ in candidate.method.cycle:
            candidate.gradients.deliver(candidate.params, gradient, 0)
            call = getattr(candidate.optimizer, name)
            if name in subject.calls:
                by_cuda = entry.label == CUDA
                kernels = (profiled_cuda if by_cuda else profiled)(call, machine)
                backend = ", by cuda" if by_cuda else ""
                say(f"{CALL}{name}, {candidate.method.title}, {MODELS[subject.model].title}{backend}")
                for kernel in kernels:
                    say(KERNEL + kernel)
            else:
                call()
        del candidate, call
        machine.release()
        longest = max(longest, monotonic() - began)
    return 0


def profiled_cuda(call: Callable[[], object], machine) -> list[str]:
    """The same of a call by the CUDA kernels. What torch launches in it is counted, too; ours are named by ncu."""
    from flatkern import dispatch

    count = dispatch.compiled_module("cuda").launch_count
    before = count()
    machine.synchronize()
    machine.profile(True)
    try:
        call()
        machine.synchronize()
    finally:
        machine.profile(False)
    return [OF_CUDA] * (count() - before)


def profiled(call: Callable[[], object], machine) -> list[str]:
    """Make a call with each of its launches between profiler marks; returns the names of the kernels.

    What torch launches for it is not counted: ncu runs a kernel once for each few metrics, and puts memory back as it
    was in between, and IRE's sample alone is a copy for every tensor.
    """
    from flatkern.triton_kernels import launch

    started, start = [], launch.Call.start

    def noted(self, kernel, *rest, **more):
        started.append(kernel.fn.__name__)
        machine.profile(True)
        try:
            return start(self, kernel, *rest, **more)
        finally:
            machine.profile(False)

    launch.Call.start = noted
    machine.synchronize()
    try:
        call()
        machine.synchronize()
    finally:
        launch.Call.start = start
    return started
