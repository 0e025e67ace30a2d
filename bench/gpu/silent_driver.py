"""A Triton driver for a GPU that is not there: kernels are compiled for it, and what would be launched is kept.

With it, everything that the host does before a launch runs on CPU tensors: checks, tables, Triton's compiler and the
arguments of the launcher. Choose it before the first kernel runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Function:
    """A compiled kernel, which is another one for every set of types, constants and alignments."""

    def __init__(self, name: str, binary: bytes, shared: int) -> None:
        self.name = name
        self.binary = binary  # its cubin
        self.shared = shared  # bytes of memory that a program's threads share


class Launch(NamedTuple):
    """What a launcher was given."""

    function: Function
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]  # in the order of the kernel's signature, constants included
    signature: dict[str, str]  # Triton's types of them, by their names
    warps: int


class Utils:
    """What Triton asks of a device."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, Function, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return object(), Function(name, kernel, shared), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class Driver(DriverBase):
    """sm_90, as an H100 has. `launches` is None, or a list to which launches are appended."""

    def __init__(self) -> None:
        self.utils = Utils()
        self.launches: list[Launch] | None = None

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: Function, *rest: Any) -> None:
            if self.launches is not None:
                # Behind what describes the kernel, and the hooks, the kernel's own arguments.
                given = rest[4:]
                self.launches.append(Launch(function, (x, y, z), stream, given, source.signature, metadata.num_warps))

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return 9, 0

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


@cache
def the_driver() -> Driver:
    """One a process: kernels that were compiled for it stay in Triton's caches, and launch by it."""
    return Driver()


def install() -> Driver:
    """Make it Triton's driver in this process."""
    driver = the_driver()
    triton.runtime.driver.set_active(driver)
    return driver
