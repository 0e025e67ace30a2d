"""What nvcc compiles for the stages, beside flatkern itself: libraries that are measured and not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from .out import MACHINE
from .stage import DRY

ROOT = Path(__file__).resolve().parents[2]
NO_HINTS = ROOT / "build" / "gpu-no-hints"
PARAMETERS = Path(__file__).with_name("parameters.cu")
PARAMETERS_LIBRARY = ROOT / "build" / "gpu-parameters.so"
STUB = Path(__file__).parent / "stub_cuda"  # in place of the toolkit's headers, in a dry run


class NotCompiled(Exception):
    """Says why."""


def no_hints() -> Path | None:
    """flatkern._CUDA without cache hints, if it has been built."""
    path = NO_HINTS / "lib" / "flatkern" / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def start_no_hints() -> subprocess.Popen:
    """Begin to build it; whoever waits for the process has its output, all of it in stdout."""
    environment = {
        **os.environ,
        "FLATKERN_BUILD": "skip",
        "FLATKERN_CUDA": "1",
        "FLATKERN_CUDA_ARCHS": architecture(),
        "NVCC_APPEND_FLAGS": "-DFK_NO_HINTS",
    }
    # An older one could be of other sources.
    if (old := no_hints()) is not None:
        old.unlink()
    folders = ["--build-lib", str(NO_HINTS / "lib"), "--build-temp", str(NO_HINTS / "temp")]
    return subprocess.Popen(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def architecture() -> str:
    """The compute capability of this machine's GPU, as stage build found it: "90"."""
    try:
        found = json.loads((Path(os.environ["FLATKERN_GPU_OUT"]) / MACHINE).read_text())["compute_capability"]
    except (KeyError, OSError, ValueError):
        found = None
    return (found or "9.0").replace(".", "")


def nvcc() -> str | None:
    """Where setup.py finds it; None without one."""
    found = found_by_setup()
    return found and found[0]


def toolkit() -> str | None:
    """The version of CUDA that nvcc is of."""
    found = found_by_setup()
    return found and found[1]


def found_by_setup() -> tuple[str, str] | None:
    """In another process, as setuptools replaces parts of the library that this one may have imported."""
    text = "s = runpy.run_path('setup.py'); nvcc = s['find_nvcc'](); print(nvcc); print(s['toolkit_version'](nvcc))"
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy; {text}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = done.stdout.splitlines()
    return (found[0], found[1]) if done.returncode == 0 and len(found) == 2 else None


def parameters() -> Path:
    """Compile parameters.cu; in a dry run against headers that launch nothing.

    Raises:
        NotCompiled: by no compiler.
    """
    PARAMETERS_LIBRARY.parent.mkdir(exist_ok=True)
    if DRY:
        command = ["g++", "-x", "c++", f"-I{STUB}", "-fPIC"]
    else:
        found = nvcc()
        if found is None:
            raise NotCompiled("nvcc is not installed; it comes with the CUDA toolkit")
        arch = architecture()
        command = [found, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xcompiler=-fPIC"]
    command += ["-std=c++17", "-O2", "-shared", str(PARAMETERS), "-o", str(PARAMETERS_LIBRARY)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotCompiled(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise NotCompiled(f"{PARAMETERS.name} does not compile: {said[0][:300]}")
    return PARAMETERS_LIBRARY
