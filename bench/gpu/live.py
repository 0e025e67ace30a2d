"""Second half of stage build: what this machine is, and whether Triton is live on it, by launching a kernel of ours.

The finding comes first, so that it is kept whatever is missing; what is missing is said so that a user can act on it.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import traceback
from pathlib import Path
from typing import Any

from bench.gpu import compiled
from bench.gpu.stage import DRY, cores, emit, say

ROOT = Path(__file__).resolve().parents[2]
NOISE, INDEX, OFFSET = (7, 1, 2), 3, 5  # seed, stream, round; which normals


class Missing(Exception):
    """Triton is not live. The text is a sentence that says what to do."""


def main(arguments: list[str]) -> int:
    if DRY:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        emit("machine", **facts(None))
        say(f"torch cannot be imported ({first_line(error)}): install torch for CUDA, as pytorch.org/get-started says")
        return 1
    machine = facts(torch)
    emit("machine", **machine)
    try:
        remark = launch(torch)
    except Missing as missing:
        say(str(missing))
        return 1
    remark += cuda_remark(torch)
    where = machine["gpu"] if DRY else f"{machine['gpu']}, driver {machine['driver']}"
    say(f"{where}, torch {machine['torch']}, triton {machine['triton']}: a kernel has run{remark}{without_native()}")
    return 0


def without_native() -> str:
    """A remark where the host has to do without C++, which makes its part of a call longer."""
    from flatkern.dispatch import refuse

    why = refuse("restore_", "cpp", "cpu")
    return "" if why is None else f"; WITHOUT flatkern._C, so that host times are Python's ({why})"


# What the machine is.


def facts(torch: Any) -> dict[str, Any]:
    """The finding; no serial numbers. What cannot be known is None."""
    found = {
        "gpu": "dry run" if DRY else None,
        **dict.fromkeys(["compute_capability", "memory_bytes", "l2_bytes", "multiprocessors", "driver", "cuda"]),
        "nvcc": compiled.toolkit(),
        "torch": None if torch is None else str(torch.__version__),
        "triton": version("triton"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "flatkern": flatkern_version(),
        **commit(),
        "date": datetime.date.today().isoformat(),
        "cores": cores(),
        "nvidia_smi": {},
        "dry": DRY,
    }
    if torch is None:
        return found
    found["cuda"] = torch.version.cuda
    if DRY:
        return found
    try:
        return found | device_facts(torch)
    except Exception as error:  # the rest of the finding is worth keeping
        traceback.print_exception(error)
        return found


def device_facts(torch: Any) -> dict[str, Any]:
    from bench.timing import gpu as machine

    smi = dict(machine.smi())
    found = {"driver": smi.pop("driver_version", None) or machine.driver_of_kernel_module(), "nvidia_smi": smi}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def flatkern_version() -> str | None:
    try:
        return importlib.import_module("flatkern").__version__
    except Exception:  # it needs torch; why it cannot be imported is said below
        return version("flatkern")


def commit() -> dict[str, Any]:
    """Which commit this is; a tree without git is told by FLATKERN_COMMIT."""
    told = os.environ.get("FLATKERN_COMMIT")
    if told:
        return {"commit": told, "dirty": False}

    def git(*words: str) -> str:
        # A tree that was copied belongs to somebody else, which git refuses unless it is told.
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # What a run or a report of an earlier one leaves in the tree changes no code.
        written = [f":!{path}" for path in ("README.md", "docs/benchmarks.md", "bench/results")]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unversioned", "dirty": False}


# Whether Triton is live.


def launch(torch: Any) -> str:
    """Compile a kernel, launch it, and look at what it wrote. A remark if that is not eager's: what is wrong is for the
    later stages to find out, which are not run if this one fails."""
    if not DRY:
        check_cuda(torch)
    if version("triton") is None and importlib.util.find_spec("triton") is None:
        raise Missing("triton is not installed: pip install 'triton>=3.6', or a torch for CUDA, which brings it along")
    if not DRY and os.environ.get("TRITON_INTERPRET") == "1":
        raise Missing("TRITON_INTERPRET=1 is set, so kernels would not run on the GPU: unset it")
    try:
        import flatkern
        from flatkern.dispatch import resolve
    except Exception as error:
        raise Missing(
            f"flatkern cannot be imported ({first_line(error)}): `make build NO_VENV=1`, and PYTHONPATH=build/tree"
        ) from error
    state = flatkern.backends()["triton"]
    if not state["live"]:
        raise Missing(remedy(state["reason"]))
    try:
        got, want = drawn(torch, resolve, "triton")
    except Exception as error:
        raise Missing(remedy(f"{type(error).__name__}: {error}")) from error
    if not got.any():
        raise Missing("fill_normal_ was launched, but wrote nothing: this Triton does not work with this GPU's driver")
    return compared(torch, got, want)


def drawn(torch: Any, resolve: Any, backend: str) -> tuple[Any, Any]:
    """Normals that a backend draws here, and eager's."""
    device = "cpu" if DRY else "cuda"
    got, want = torch.zeros(3, 21, device=device), torch.zeros(3, 21)
    for t, where, name in ((got, device, backend), (want, "cpu", "eager")):
        resolve("fill_normal_", where, name)([t], torch.tensor(NOISE), index=[INDEX], offset=[OFFSET])
    return got.cpu(), want  # waits


def compared(torch: Any, got: Any, want: Any) -> str:
    if not torch.allclose(got, want, rtol=0, atol=1e-3):
        wrote, expected = got.flatten()[:3].tolist(), want.flatten()[:3].tolist()
        return f", but WROTE {wrote} instead of {expected} (stage smoke says more)"
    return "" if torch.equal(got, want) else ", though not with eager's bits (stage smoke says more)"


def cuda_remark(torch: Any) -> str:
    """Whether the CUDA kernels are live, too; the later stages go by that, and do without."""
    import flatkern
    from flatkern.dispatch import resolve

    state = flatkern.backends()["cuda"]
    if not state["live"]:
        return f"; WITHOUT CUDA kernels ({' '.join(state['reason'].split())[:300]})"
    try:
        return f"; a CUDA kernel has run{compared(torch, *drawn(torch, resolve, 'cuda'))}"
    except Exception as error:
        return f"; the CUDA kernels FAIL ({type(error).__name__}: {first_line(error)})"


def check_cuda(torch: Any) -> None:
    name = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        raise Missing(f"{name} is built without CUDA: install the one for your driver, see pytorch.org/get-started")
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()  # is_available() swallows the reason
        reason = "it gives no reason"
    except Exception as error:
        reason = first_line(error)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "too old" in reason:
        what = f"update the NVIDIA driver, or install a torch for an older CUDA than {torch.version.cuda}"
    elif "no NVIDIA driver" in reason:
        what = "install the NVIDIA driver; in a container, start it with the GPU (docker run --gpus all)"
    elif hidden is not None:
        what = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or name a device that is there"
    else:
        what = "see what nvidia-smi says"
    raise Missing(f"{name} sees no GPU ({reason}): {what}")


def remedy(reason: str) -> str:
    """What Triton says, and what to do about it."""
    if "C compiler" in reason or (not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))):
        what = "Triton builds its driver module with a C compiler: install gcc, or set CC"
    elif "non-zero exit status" in reason:
        what = (
            "Triton's driver module does not compile, the log has the compiler's error; "
            "as a rule Python.h is missing: install python3-dev (python3-devel)"
        )
    elif "libcuda" in reason:
        what = "Triton needs libcuda.so.1 of the driver: run ldconfig, or set TRITON_LIBCUDA_PATH to its folder"
    elif "is not installed" in reason or "is too old" in reason:
        what = "pip install 'triton>=3.6'"
    else:
        what = "the log has the whole error"
    return f"Triton is not live ({' '.join(reason.split())[:300]}): {what}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
