"""Triton kernels, installed as flatkern.triton_kernels: every operation of the table, one module per family.

`tile` is how a kernel walks memory, `plan` what a call is cut into, `signature` what its arguments are, `cache` what
is remembered of it, `launch` and `launcher` how it is launched, `devices` what is asked of a device, `job` what a
kernel is compiled for; no other module knows.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "triton_kernels is installed as flatkern.triton_kernels; at top level the name belongs to other packages"
    )

import re as _re
from importlib import import_module as _import_module
from importlib import metadata as _metadata

OLDEST = (3, 6)


def _check_version():
    try:
        version = _metadata.version("triton")
    except _metadata.PackageNotFoundError:
        return  # a build of somebody's own; what it lacks shows below
    if tuple(int(n) for n in _re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ImportError(f"triton {version} is too old; {'.'.join(map(str, OLDEST))} or later is needed")


_check_version()
try:
    import triton as _triton
    import triton.language as _language  # noqa: F401
    import triton.runtime as _runtime
except ModuleNotFoundError as error:
    if error.name == "triton":
        raise
    raise ImportError(f"the triton that is installed cannot be used: {error}") from error

from flatkern.ops import OPS as _OPS  # noqa: E402

from .launch import Mismatch  # noqa: E402

__all__ = ["Mismatch", "check_driver", "interpreting"]


def __getattr__(name):
    """An operation of the table, out of its family's module."""
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_OPS[name].family}"), name)


def check_driver():
    """ImportError where there is no GPU to run on, and kernels are not interpreted (TRITON_INTERPRET=1)."""
    if interpreting():
        return
    try:
        _runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a driver finds wrong, it cannot be used
        raise ImportError(f"triton finds no GPU: {error}") from error


def interpreting():
    """True where kernels are interpreted, so that nothing is compiled."""
    return _triton.knobs.runtime.interpret
