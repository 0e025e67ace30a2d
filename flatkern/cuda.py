"""The Python side of the CUDA C++ backend: loads its module, which gets its memory and streams from torch.

What the module may not do itself: it has no torch, and never makes another device current.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

EMULATION = "FLATKERN_CUDA_EMULATION"  # environment variable: the path of the emulated library, which runs on the CPU
DRIVERS = {12010: 530, 13000: 580}  # the driver that came with a version of CUDA


def is_emulated() -> bool:
    """Whether kernels are to be emulated on the CPU."""
    return bool(os.environ.get(EMULATION))


@functools.cache
def load(name: str) -> Any:
    """The module `name`, ready to run.

    Raises:
        ImportError: it is absent, or there is nothing that it can run on; the text names what was found and is needed.
    """
    module = native(name)
    if module.emulated:
        module.use_torch(*_on_the_cpu())
    else:
        _check_gpus(module)
        module.use_torch(allocate, upload, stream)
    return module


@functools.cache
def native(name: str) -> Any:
    """The module `name`, or the emulated one in its place; whether there is a GPU does not matter."""
    path = os.environ.get(EMULATION)
    return _emulated(name, Path(path)) if path else importlib.import_module(name)


def _emulated(name: str, path: Path) -> ModuleType:
    remedy = "`make test-cuda` builds one; unset the variable to use a GPU"
    if not path.is_file():
        raise ImportError(f"{EMULATION} is {str(path)!r}, which is not there; {remedy}")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None, "a loader was given"
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"{EMULATION} is {str(path)!r}, which is no emulated library ({error}); {remedy}") from error
    if not getattr(module, "emulated", False):
        raise ImportError(f"{EMULATION} is {str(path)!r}, which is for a GPU and no emulated library; {remedy}")
    sys.modules[name] = module
    return module


# ---- what it runs on


def _check_gpus(module: Any) -> None:
    """ImportError where no GPU can run what was compiled."""
    if torch.version.hip is not None:
        raise ImportError(f"torch {torch.__version__} is built for ROCm, which Triton serves, and this is for CUDA")
    version, needed, devices, problem = module.driver()
    if problem or not devices or version < oldest_driver(needed):
        raise ImportError(_no_device(version, needed, problem))
    if torch.version.cuda is None:
        raise ImportError(f"torch {torch.__version__} is built without CUDA; install one that is built with it")
    compiled = [int(word) for word in module.architectures.split()]
    try:
        found = [torch.cuda.get_device_capability(k) for k in range(devices)]
    except RuntimeError as error:  # in a forked process, for example
        raise ImportError(f"torch cannot use the GPU: {error}") from error
    if not any(runs_on(compiled, *each) for each in found):
        gpus = ", ".join(f"{major}.{minor}" for major, minor in found)
        major, minor = found[0]
        raise ImportError(
            f"it is compiled for compute capability {capabilities(module.architectures)}, but the GPU has {gpus}; "
            f"FLATKERN_CUDA_ARCHS={major}{minor} FLATKERN_CUDA=1 pip install . compiles for that"
        )


def _no_device(version: int, needed: int, problem: str) -> str:
    """What is wrong with the driver."""
    if not version:
        return f"no NVIDIA driver is loaded, and it needs {driver_for(needed)}"
    if version < oldest_driver(needed):
        return (
            f"the NVIDIA driver is for CUDA {release(version)}, but it needs {driver_for(needed)}; update the driver, "
            "or build flatkern with an older nvcc"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
    return f"no GPU is there ({problem or 'the driver counts none'}{where})"


def release(version: int) -> str:
    """A version as CUDA counts it: 13000 is 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def oldest_driver(version: int) -> int:
    """For which CUDA a driver must be that runs programs of this one: the first of its generation.

    Of generation 12 it is 12.1, the first that passes more than 4 KB to a kernel.
    """
    return max(version // 1000 * 1000, 12010)


def driver_for(version: int) -> str:
    """The driver that a program of this CUDA version needs."""
    oldest = oldest_driver(version)
    return f"one for CUDA {release(oldest)}" + (f" ({DRIVERS[oldest]} or later)" if oldest in DRIVERS else "")


def capabilities(architectures: str) -> str:
    """Architectures as people know them: "80 100" is 8.0, 10.0."""
    return ", ".join(f"{word[:-1]}.{word[-1]}" for word in architectures.split())


def runs_on(architectures: list[int], major: int, minor: int) -> bool:
    """Whether a GPU runs what was compiled: code for its generation, or PTX, which there is of the highest."""
    return 10 * major + minor >= max(architectures) or any(
        arch // 10 == major and arch % 10 <= minor for arch in architectures
    )


# ---- memory and streams


def allocate(index: int, size: int) -> Tensor:
    """`size` bytes on a GPU; as torch's memory they may be used on its current stream."""
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")


def upload(index: int, data: bytes) -> Tensor:
    """`data` on a GPU. From pinned memory, so that the host does not wait for the copy."""
    host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return host.pin_memory().to(f"cuda:{index}", non_blocking=True)


def stream(index: int) -> int:
    """The handle of torch's current stream on a GPU."""
    return torch._C._cuda_getCurrentRawStream(index)


def _on_the_cpu() -> tuple[Callable[..., Any], ...]:
    """The three above, for kernels that are emulated."""
    return (
        lambda index, size: torch.empty(size, dtype=torch.uint8, device="cpu"),
        lambda index, data: torch.frombuffer(bytearray(data), dtype=torch.uint8).clone(),  # aligned as torch's
        lambda index: 0,
    )


# ---- the current device


def on_its_device(module: Any, function: Callable[..., None]) -> Callable[..., None]:
    """An op of `module` that makes the tensors' device current where another one is."""

    def run(*args: Any, **kwargs: Any) -> None:
        try:
            return function(*args, **kwargs)
        except module.WrongDevice:
            pass  # it has done nothing; the next error should not name this one
        with _current(module, _device_of(args)):
            return function(*args, **kwargs)

    return run


def _device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of an op's arguments, of which the first is written: a tensor, or a list."""
    first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
    return torch.device("cpu") if first is None else first.device


def _current(module: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return _emulated_device(module, device.index or 0) if module.emulated else torch.cuda.device(device)


@contextlib.contextmanager
def _emulated_device(module: Any, index: int) -> Any:
    before = module.current_device()
    module.set_current_device(index)
    try:
        yield
    finally:
        module.set_current_device(before)


# ---- before a capture


def load_kernels(module: Any, device: torch.device) -> int:
    """Load every kernel of `module` on a device, which its driver would do at the first launch, and must not inside of
    a capture; how many there are."""
    with _current(module, device):
        return module.load_kernels()  # type: ignore[no-any-return]


# ---- for debugging


def synchronized(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """An op that waits for its device, so that an error of the device is raised by the op that made it."""

    def run(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        device = _device_of(args)
        if device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: failed on {device}, or what ran there before it: {error}") from error

    return run


def in_nvtx_range(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """An op that profilers show under its name."""

    def run(*args: Any, **kwargs: Any) -> None:
        with torch.cuda.nvtx.range(f"flatkern::{name}"):
            function(*args, **kwargs)

    return run


# ---- for doctor


def about(name: str) -> dict[str, Any] | None:
    """What was compiled and which driver there is; None where the module is not installed or cannot be loaded."""
    try:
        module = native(name)
    except ImportError:
        return None
    version, needed, devices, problem = module.driver()
    return {
        "emulated": module.emulated,
        "file": module.__file__,
        "toolkit": module.toolkit,
        "capabilities": capabilities(module.architectures),
        "driver": release(version) if version else None,
        "needs": driver_for(needed),
        "devices": devices,
        "problem": problem,
    }
