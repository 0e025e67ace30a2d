"""A GPU as the place of a race. A turn of a candidate measures three things, each on an empty queue:

    host    nanoseconds until a call returns; nobody waits for the device. The price in Python and launches.
    device  CUDA events around a call while the device is kept busy before the first one, so that launches
            are queued ahead of it: what the kernels take, without the gaps of a slow host. A candidate
            that waits for the device inside a call has those gaps left, and they are its own.
    loop    steps one after the other, then one wait: what a training loop sees of both, per step.

Device times begin with an L2 that holds none of the operands. It is emptied by reading: written lines would be
written back at the expense of the call. Host time begins on an idle device. Everything is on the default stream.
All use of torch.cuda is here, in methods of a line or two, which stand_in.py replaces to run the rest anywhere.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import torch

from .harness import HOST, LOOP, Clock, Timed

STEPS_IN_LOOP = 5  # at least; a call that comes once in ten steps makes it ten
LEAST_AHEAD, MOST_AHEAD = 50_000, 30_000_000  # nanoseconds that the device is kept busy before a call
MARKER = "spin_kernel"  # what torch.cuda._sleep runs
SMI = ("driver_version", "power.limit", "power.draw", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")


class HostClock(Clock):
    """Nanoseconds until a call returns, each begun on an idle device."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.longest: dict[str, int] = {}

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        self.gpu.synchronize()
        start = perf_counter_ns()
        call()
        took = perf_counter_ns() - start
        self.longest[name] = max(took, self.longest.get(name, 0))
        self.add(name, share * took)


class DeviceClock(Clock):
    """Nanoseconds on the device; `ahead` says how long the host needs for a call."""

    def __init__(self, gpu: Gpu, ahead: dict[str, int]) -> None:
        super().__init__()
        self.gpu, self.ahead = gpu, ahead
        self.laps: list[tuple] = []

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        start, end = self.gpu.event(), self.gpu.event()
        self.gpu.flush()
        self.gpu.keep_busy(1.5 * self.ahead.get(name, 0) + LEAST_AHEAD)
        start.record()
        call()
        end.record()
        self.laps.append((name, share, start, end))

    def read(self) -> dict[str, int]:
        self.gpu.synchronize()
        for name, share, start, end in self.laps:
            self.add(name, share * start.elapsed_time(end) * 1e6)
        self.laps.clear()
        return super().read()


class Markers(Clock):
    """A marker before and after each call: a stream keeps the order, so what is between them belongs to the call."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.calls: list[tuple[str, float]] = []

    def time(self, name: str, call: Callable[[], object], share: float = 1.0) -> None:
        self.gpu.spin(1)
        call()
        self.gpu.spin(1)
        self.calls.append((name, share))


class Gpu:
    """The current CUDA device."""

    device = torch.device("cuda")
    burst = 3  # steps in a turn of a small model, besides those of the loop

    def __init__(self) -> None:
        self.cycles_per_nanosecond = 1.0
        self.scratch = torch.zeros(self.l2_bytes(), dtype=torch.float32, device=self.device)  # four times the cache
        for _ in range(2):  # the first loads the kernel
            start, end = self.event(), self.event()
            start.record()
            self.spin(4_000_000)
            end.record()
            self.synchronize()
            self.cycles_per_nanosecond = 4_000_000 / max(1.0, start.elapsed_time(end) * 1e6)
        empty = DeviceClock(self, {})
        empty.time("nothing", lambda: None)
        self.nothing = empty.read()["nothing"]  # what events measure around nothing; not subtracted anywhere

    # ---- torch.cuda

    def event(self):
        return torch.cuda.Event(enable_timing=True)

    def spin(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info()[0]

    def l2_bytes(self) -> int:
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 * 2**20

    def trace(self, run: Callable[[], object]) -> list[str]:
        """The names of everything that `run` starts on the device, in order."""
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU, kind.CUDA]) as profile:
            run()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return on_device(json.loads(path.read_text()))

    def info(self) -> dict:
        """What the results say about the device; no serial numbers."""
        properties = torch.cuda.get_device_properties(self.device)
        found = smi()
        return {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes(),
            "driver": found.pop("driver_version", None) or driver_of_kernel_module() or "unknown",
            "cuda": torch.version.cuda,
            "nvidia_smi": found,
            "events_around_nothing_ns": self.nothing,
        }

    # ---- turns

    def flush(self) -> None:
        self.scratch.sum()

    def keep_busy(self, nanoseconds: float) -> None:
        self.spin(int(min(nanoseconds, MOST_AHEAD) * self.cycles_per_nanosecond))

    def turn(self, candidate, count: int) -> dict[str, int]:
        host = HostClock(self)
        returned = candidate.steps(host, count)
        found = candidate.steps(DeviceClock(self, host.longest), count)
        found |= {HOST + name: ns for name, ns in returned.items()}
        steps = max(STEPS_IN_LOOP, *(round(1 / turn.share) for turn in candidate.method.cycle))
        self.synchronize()
        start = perf_counter_ns()
        candidate.walk(steps)
        self.synchronize()
        found[LOOP] = (perf_counter_ns() - start) // steps
        return found

    def timed(self, call: Callable[[], object]) -> Timed:
        """A candidate that is a single call."""

        def candidate(count: int) -> dict[str, int]:
            host = HostClock(self)
            host.time("call", call)
            device = DeviceClock(self, host.longest)
            device.time("call", call)
            return device.read() | {HOST + "call": host.read()["call"]}

        return candidate

    def launches(self, candidate) -> dict[str, float] | None:
        """Kernels, copies and fills by call of a step, rare calls with their share; None where nothing can be seen."""
        try:
            return self.launches_seen(candidate) or self.launches_seen(candidate)  # a first trace may come out empty
        except Exception:  # profiling needs rights and libraries that a machine may lack; the tables say "-" then
            return None

    def launches_seen(self, candidate) -> dict[str, float] | None:
        markers = Markers(self)
        pieces = [0]
        for name in self.trace(lambda: candidate.steps(markers, 0)):
            if MARKER in name:
                pieces.append(0)
            else:
                pieces[-1] += 1
        if len(pieces) != 2 * len(markers.calls) + 1:
            return None
        found: dict[str, float] = {}
        for (name, share), count in zip(markers.calls, pieces[1::2], strict=True):
            found[name] = found.get(name, 0) + share * count
        return found

    def release(self) -> None:
        gc.collect()
        self.empty_cache()


def missing() -> str | None:
    """What this machine lacks for GPU benchmarks, in a sentence; None if it lacks nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU (no device, or no driver for CUDA {torch.version.cuda})"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None  # the rest takes a context on the device, which is the workers'


def on_device(trace: dict) -> list[str]:
    """Names of kernels, copies and fills of a Chrome trace, in the order in which they began."""
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    events = [event for event in trace["traceEvents"] if event.get("cat") in kinds]
    return [event["name"] for event in sorted(events, key=lambda event: event["ts"])]


def slug(name: str) -> str:
    """NVIDIA H200 -> h200, the name of result files and the beginning of the names of their tables."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|geforce|tesla", "", name.lower())).strip("-") or "gpu"


def smi() -> dict[str, str]:
    """Driver, power and clocks, where nvidia-smi tells."""
    which = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_smi(done.stdout)


def parse_smi(text: str) -> dict[str, str]:
    values = [value.strip() for value in text.strip().splitlines()[:1] for value in value.split(",")]
    return {name: value for name, value in zip(SMI, values, strict=False) if value and "N/A" not in value}


def driver_of_kernel_module() -> str | None:
    """The driver's version from the system, where nvidia-smi is not installed."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found and found[0]
