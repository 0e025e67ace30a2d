"""Triton's own CUDA driver and launchers on a libcuda that does nothing, for a GPU that is not there.

With it a launch costs the host what it costs on a GPU, apart from the CUDA driver's own part: Triton's launcher, which
is C and not the same in every version, reads each argument and asks the driver about each pointer. The library is
compiled when it is needed, by the C compiler that Triton needs for its launchers anyway.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia

from . import silent_driver

SOURCE = Path(__file__).with_name("stub_libcuda.c")


class Unavailable(RuntimeError):
    """The library cannot be compiled here; the text says why."""


class Driver(silent_driver.Driver):
    """sm_90, as an H100 has. `library` counts launches and keeps parameters, see stub_libcuda.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    @property
    def count(self) -> int:
        """Launches so far."""
        return ctypes.c_int64.in_dll(self.library, "flatkern_launches").value

    def keep_parameters(self, count: int) -> None:
        """Keep so many parameters of every launch."""
        ctypes.c_int64.in_dll(self.library, "flatkern_wanted").value = count

    def parameters(self, count: int) -> list[int]:
        """The first parameters of the last launch. Of what is shorter than a pointer, the lowest bytes count."""
        return list((ctypes.c_uint64 * count).in_dll(self.library, "flatkern_parameters"))


def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    named = shlex.split(os.environ.get("CC", ""))
    compiler = [*filter(shutil.which, named[:1] or ("gcc", "clang"))][:1] + named[1:]
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable("there is no C compiler ($CC, gcc, clang), by which Triton makes its launchers")
    target = folder / "libcuda.so.1"
    flags = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{target.name}", f"-I{Path(nvidia.dirname) / 'include'}"]
    command = [*compiler, *flags, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return target


def install() -> Driver:
    """Make it Triton's driver in this process, which must not have loaded another libcuda; Unavailable where it cannot
    be compiled."""
    folder = Path(tempfile.mkdtemp(prefix="flatkern-libcuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Launchers are linked to, and look for, a library of this name; the one that is loaded is found.
    library = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = str(folder)
    driver: Any = Driver(library)
    triton.runtime.driver.set_active(driver)
    return driver
