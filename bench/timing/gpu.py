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
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import torch

from .harness import HOST, LOOP, Clock, Timed

STEPS_IN_LOOP = 5  # at least; a call that comes once in ten steps makes it ten
LEAST_AHEAD, MOST_AHEAD = 50_000, 30_000_000  # nanoseconds that the device is kept busy before a call
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


class Gpu:
    """The current CUDA device."""

    device = torch.device("cuda")
    burst = 3  # steps in a turn of a small model, besides those of the loop

    def __init__(self) -> None:
        self.scratch = torch.zeros(self.l2_bytes(), dtype=torch.float32, device=self.device)  # four times the cache
        self.cycles_per_nanosecond = 0.0
        # The first loads the kernel, and an idle device takes milliseconds to reach its clock: measured before, waits
        # would be too short.
        for _ in range(8):
            start, end = self.event(), self.event()
            start.record()
            self.spin(4_000_000)
            end.record()
            self.synchronize()
            rate = 4_000_000 / max(1.0, start.elapsed_time(end) * 1e6)
            self.cycles_per_nanosecond = max(rate, self.cycles_per_nanosecond)

    # ---- torch.cuda

    def event(self):
        return torch.cuda.Event(enable_timing=True)

    def spin(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def profile(self, on: bool) -> None:
        """Profilers that were told to wait, as ncu is, look from here on, or no longer."""
        runtime = torch.cuda.cudart()
        runtime.cudaProfilerStart() if on else runtime.cudaProfilerStop()

    def free_bytes(self) -> int | None:
        """What tensors can have: free memory, and what torch's allocator holds without using it."""
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held

    def l2_bytes(self) -> int:
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 * 2**20

    # ---- turns

    def steps_in_loop(self, candidate) -> int:
        return max(STEPS_IN_LOOP, *(round(1 / turn.share) for turn in candidate.method.cycle))

    def flush(self) -> None:
        self.scratch.sum()

    def keep_busy(self, nanoseconds: float) -> None:
        self.spin(int(min(nanoseconds, MOST_AHEAD) * self.cycles_per_nanosecond))

    def turn(self, candidate, count: int) -> dict[str, int]:
        host = HostClock(self)
        returned = candidate.steps(host, count)
        found = candidate.steps(DeviceClock(self, host.longest), count)
        found |= {HOST + name: ns for name, ns in returned.items()}
        steps = self.steps_in_loop(candidate)
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

    def release(self) -> None:
        """Give what a race has left back to torch's allocator, where the next one gets it without a cudaMalloc."""
        gc.collect()


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
