"""Result files: pytest-benchmark's JSON (`pytest-benchmark compare FILE...` reads them), with our numbers in
`extra_info`, the machine without its name, and what did not run and why.

What a number means: `stats` are seconds per optimizer step, without autograd's accumulation; `calls` are
median seconds by call; `gigabytes_per_second` divides the method's *floor* by the median, so that waste
shows as a low rate instead of a high one. Of a GPU all of these are device time; `host` has the same on the host,
`loop` seconds per step of a loop (timing/gpu.py says how), and `make gpu` writes its own files.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from flatkern.doctor import git, processor

from ..timing.harness import Timings
from ..timing.stats import Stats


def entry(table: str, params: dict, timings: Timings, numel: int, **info) -> dict:
    """One candidate's result. `info` may hold floor_bytes, call_floors and held_bytes per parameter."""
    calls, host, loop = timings.calls(), timings.host(), timings.loop()
    found = calls.stats("accumulate")
    stats = found.as_dict()
    if info.get("floor_bytes"):
        info["gigabytes_per_second"] = info["floor_bytes"] * numel / max(stats["median"], 1e-9) / 1e9
    if host:
        info["host"] = {"median": host.stats("accumulate").median, "calls": host.medians()}
    if loop:
        info["loop"] = {name: loop.stats().as_dict()[name] for name in ("median", "q1", "q3", "rounds")}
    name = "-".join(str(v) for k, v in params.items() if k != "masters") + ("-masters" if params["masters"] else "")
    group = " ".join(str(params[k]) for k in ("model", "method", "base"))
    return {
        "group": f"{table}: {group}",
        "name": f"{table}[{name}]",
        "fullname": f"flatkern.bench::{table}[{name}]",
        "params": params,
        "param": name,
        "extra_info": {"table": table, "calls": calls.medians(), **info},
        "options": {"timer": "CUDA events" if host else "perf_counter_ns", "interleaved": True, "gc": False},
        "stats": {**stats, "iterations": 1, "data": found.data},
    }


def spread(stats: dict) -> float:
    """Half of the interquartile range, of the median: half of all rounds are within it."""
    return (stats["q3"] - stats["q1"]) / 2 / max(stats["median"], 1e-9)


def compare(race: list[dict], reference: str, copied: Stats | None = None, numel: int = 0) -> None:
    """Add what only the whole race knows: multiples of the plain optimizer, and the share of copy bandwidth."""
    copy_rate = 8 * numel / copied.median / 1e9 if copied else None
    plain = {b["params"]["dtype"]: b for b in race if b["params"]["candidate"] == reference}
    for b in race:
        info = b["extra_info"]
        # Nothing in torch has master weights; those rows are read against plain float32.
        dtype = "float32" if b["params"]["masters"] and "float32" in plain else b["params"]["dtype"]
        if dtype in plain:
            info["times_plain"] = b["stats"]["median"] / plain[dtype]["stats"]["median"]
            if "loop" in info:
                info["loop_times_plain"] = info["loop"]["median"] / plain[dtype]["extra_info"]["loop"]["median"]
        if copy_rate:
            info["copy_gigabytes_per_second"] = copy_rate
            info["copy_spread"] = spread(copied.as_dict())
            info["share_of_copy"] = info["gigabytes_per_second"] / copy_rate


def compiled_backend() -> dict[str, str]:
    """What the C++ backend says about itself; empty where it is not built."""
    try:
        from flatkern import _C
    except ImportError:
        return {}
    said = {}
    for name in ("isa", "compiler"):
        value = getattr(_C, name, None)
        if value is not None:
            said[name] = str(value() if callable(value) else value)
    return said


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine_info(threads: int) -> dict:
    """Processor, system and versions; no host name."""
    try:
        import flatkern

        version = getattr(flatkern, "__version__", "unversioned")
    except ImportError:
        version = "not installed"
    return {
        "processor": processor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "flatkern": version,
        "flatkern_cpp": compiled_backend(),
        "cpu": {"brand_raw": processor(), "count": os.cpu_count()},
    }


def machine_line(threads: int) -> str:
    """The machine in a line, for people."""
    found = machine_info(threads)
    isa = found["flatkern_cpp"].get("isa")
    return (
        f"{threads} of {found['cores']} cores of {found['processor']}{f' ({isa})' if isa else ''}, Python "
        f"{found['python_version']}, torch {found['torch']}, flatkern {found['flatkern']}"
    )


def load() -> float:
    """How many processes wanted a core in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def document(
    benchmarks: list[dict],
    failures: list[dict],
    threads: int,
    seconds: float,
    busy: float = 0.0,
    command: str = "python -m flatkern bench",
    arguments: list[str] | None = None,
) -> dict:
    """The whole file; `busy` is the load before the first race, `command` what was run with these `arguments`, or with
    the program's.

    Where there is no git, FLATKERN_COMMIT names the commit.
    """
    return {
        "machine_info": {**machine_info(threads), "load_before": round(busy, 2)},
        "commit_info": {
            "id": git("rev-parse", "HEAD") or os.environ.get("FLATKERN_COMMIT") or "unversioned",
            "time": git("show", "-s", "--format=%cI") or None,
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "project": "flatkern",
            "branch": git("rev-parse", "--abbrev-ref", "HEAD") or "(unknown)",
        },
        "command": f"{command} {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip(),
        "seconds": round(seconds, 1),
        "benchmarks": benchmarks,
        "failures": failures,
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version_of("pytest-benchmark"),
    }


def write(path: str | Path, results: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())
