"""resolve(op, device, backend) -> function, and call, which calls it. The only code that picks a backend."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from operator import is_
from pathlib import Path
from typing import Any

import torch

from . import cuda
from .checks import BACKENDS, check, check_backend
from .ops import OPS, Op
from .pages import page

PREFERENCE = {  # the first backend that is installed and has the op wins
    "cpu": ("cpp", "eager"),
    "cuda": ("triton", "cuda", "eager"),
}
DEVICES = {"eager": ["any"], "cpp": ["cpu"], "triton": ["cuda"], "cuda": ["cuda"]}
if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICES["triton"].append("cpu")  # for tests; it is never preferred there
if cuda.is_emulated():
    DEVICES["cuda"] = ["cpu"]  # for tests, too; and no memory of a GPU is given to what runs on the CPU
MODULES = {"cpp": "flatkern._C", "triton": "flatkern.triton_kernels", "cuda": "flatkern._CUDA"}
REMEDY = {
    "cpp": "install a C++17 compiler and reinstall; FLATKERN_BUILD=require shows why the build fails",
    "triton": "where torch sees a GPU, pip install 'flatkern[triton]'; Triton also needs a C compiler and the driver's "
    "libcuda; elsewhere use backend=None",
    "cuda": "it needs an NVIDIA GPU, torch for CUDA, and nvcc (12.1 or later) when flatkern is installed, where "
    "FLATKERN_CUDA=1 shows why the build fails; elsewhere use backend=None",
}


# The backend of an optimizer that is only recorded (see compilation.py), whose tensors are on the CPU. Nobody else can
# name it, so that what is cached for it is found by nobody else.
RECORDED = "triton, recorded"


@functools.cache
def resolve(op: str, device_type: str, backend: str | None = None) -> Callable[..., None]:
    """Return the function that runs `op`. A named `backend` is used or refused, never replaced.

    Without a name, ending at eager where compiled backends exist warns once, with the reasons.

    Its attribute `progress` says what tells how far a call came that was interrupted: "whole" (it writes all of its
    tensors or none), "versions" (the version of each tensor has changed if it was written), or "launches" (kernels are
    launched one after another, and versions change after the last one).
    """
    if backend == RECORDED:
        return load(OPS[op], "triton")
    name, refusals = served_by(op, device_type, backend)
    if name is not None:
        if name == "eager" and refusals:
            _warn_eager(device_type, "; ".join(refusals))
        return load(OPS[op], name)
    remedy = _remedy(op, device_type, backend)
    raise RuntimeError(f"{op}: no backend for {device_type}: {'; '.join(refusals)}; {remedy}")


def _remedy(op: str, device_type: str, backend: str | None) -> str:
    """What to do where a backend was refused."""
    if backend is None or device_type not in DEVICES[backend]:
        return "use backend=None or 'eager' on this device"
    if backend not in OPS[op].backends.split():
        return "use backend=None, which takes another one for it"
    return REMEDY[backend]


def call(op: str, device_type: str, backend: str | None, *args: Any, **kwargs: Any) -> None:
    """Run `op` where `resolve` says; autocast then casts the weights anew."""
    resolve(op, device_type, check_backend(backend))(*args, **kwargs)
    torch.clear_autocast_cache()


def served_by(op: str, device_type: str, backend: str | None = None) -> tuple[str | None, list[str]]:
    """The backend that runs `op`, None if there is none, and why those before it do not."""
    refusals: list[str] = []
    for name in (backend,) if backend else PREFERENCE.get(device_type, ("eager",)):
        reason = refuse(op, name, device_type)
        if reason is None:
            return name, refusals
        refusals.append(reason)
    return None, refusals


@functools.cache
def _warn_eager(device_type: str, reasons: str) -> None:
    """Once per device and reason, whatever the number of ops."""
    warnings.warn(
        f"flatkern runs in eager PyTorch on {device_type}: {reasons}. "
        "`python -m flatkern doctor` names the remedy; backend='eager' silences this; "
        f"{page('gpu', 'backends')}.",
        RuntimeWarning,
        stacklevel=4,
    )


def refuse(op: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run `op` on such a device; None if it can."""
    if backend == "eager":
        return None
    if backend not in OPS[op].backends.split():
        return f"{backend} has no such kernel in this version"
    if device_type not in DEVICES[backend]:
        return f"{backend} runs on {', '.join(DEVICES[backend])} only"
    try:
        compiled_module(backend)
    except ModuleNotFoundError as error:
        return f"{backend} is not installed ({error}{_why_not_built(backend)})"
    except ImportError as error:
        return f"{backend} cannot be used ({error})"
    return None


def _why_not_built(backend: str) -> str:
    """What setup.py has left in the place of a module that it did not build."""
    text = Path(__file__).with_name(f"{MODULES[backend].rpartition('.')[2]}.txt")
    return f"; not built: {text.read_text().strip()}" if text.is_file() else ""


def compiled_backends(op: str, device_type: str) -> list[str]:
    """Those that have the op for such a device, the preferred one first; whether they are live does not matter."""
    return [name for name in PREFERENCE[device_type] if name in OPS[op].backends.split()]


def is_installed(backend: str) -> bool:
    """Whether a compiled backend has files here; nothing of it is loaded."""
    return importlib.util.find_spec(MODULES[backend]) is not None


def compiled_module(backend: str) -> Any:
    """The module that holds a compiled backend's ops, imported on first use; ImportError if it is absent or has
    nothing to run on."""
    if backend == "cuda":
        return cuda.load(MODULES[backend])
    module = importlib.import_module(MODULES[backend])
    if backend == "triton":
        module.check_driver()
    return module


def load(op: Op, backend: str) -> Callable[..., None]:
    """The function of one backend, with the checks in front."""
    if backend == "eager":
        return _checked(op, getattr(importlib.import_module(f"flatkern.reference.{op.family}"), op.name))
    return _compiled(op, backend)


def bind(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip((a.name for a in op.arguments), args, strict=False)) | kwargs


def _checked(op: Op, function: Callable[..., None]) -> Callable[..., None]:
    @torch.no_grad()
    def run(*args: Any, **kwargs: Any) -> None:
        check(op, bind(op, args, kwargs))
        function(*args, **kwargs)

    run.progress = "versions"  # type: ignore[attr-defined]
    return run


def _compiled(op: Op, backend: str) -> Callable[..., None]:
    module = compiled_module(backend)
    function = getattr(module, op.name)
    if backend == "cuda":
        function = cuda.on_its_device(module, function)
    if backend in ("triton", "cuda"):
        function = _watched(op, function)
    # Raw writes are invisible to autograd; without new versions a write between forward and backward would give wrong
    # gradients in silence. C++ bumps them itself, in the call, where no signal handler can come between.
    names = [a.name for a in op.arguments]
    seen_by_autograd = [names.index(name) for name in ("outs", "params", "grads") if name in op.writes]
    to_bump = tuple(seen_by_autograd) if backend == "triton" else ()
    bump = version_bumper()

    def run(*args: Any, **kwargs: Any) -> None:
        """Arguments are positional up to the keyword-only scalars, in the schema's order."""
        try:
            function(*args, **kwargs)
        except (module.Mismatch, TypeError, RuntimeError):
            check(op, bind(op, args, kwargs))  # raises the same refusal with its remedy
            raise
        for k in to_bump:
            if args[k] is not None:
                bump(args[k])
                break  # gradients stay as they are where there are outs

    # A call of CUDA may be several launches: of many tensors, or of long filters.
    run.progress = "whole" if backend == "cpp" else "launches"  # type: ignore[attr-defined]
    return run


def _watched(op: Op, function: Callable[..., None]) -> Callable[..., None]:
    """An op for a GPU as FLATKERN_NVTX=1 and FLATKERN_CUDA_SYNC=1 want it; `function` itself without them."""
    for variable, wrap in (("FLATKERN_CUDA_SYNC", cuda.synchronized), ("FLATKERN_NVTX", cuda.in_nvtx_range)):
        if os.environ.get(variable, "0") not in ("", "0"):
            function = wrap(op.name, function)
    return function


def backends() -> dict[str, dict[str, Any]]:
    """What is live and why the rest is not: {name: {live, devices, reason, remedy}}.

    And `about` of cuda: what it was compiled for, and the driver that there is and that it needs; None where it is not
    installed.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        reason = ""
        if name != "eager":
            device = DEVICES[name][0]
            ops = [op for op in OPS.values() if name in op.backends.split()]
            reason = (refuse(ops[0].name, name, device) or "") if ops else f"{name} has no kernels in this version"
        report[name] = {
            "live": not reason,
            "devices": DEVICES[name],
            "reason": reason,
            "remedy": REMEDY[name] if reason else "",
        }
    report["cuda"]["about"] = cuda.about(MODULES["cuda"])
    return report


@functools.cache
def _native(name: str) -> Callable[..., Any] | None:
    """A function of flatkern._C that reads Python objects, whatever device tensors are on; None without it."""
    try:
        return getattr(compiled_module("cpp"), name)  # type: ignore[no-any-return]
    except ImportError:
        return None


def state_gatherer() -> Callable[[Any, list[torch.Tensor], tuple[str, ...]], list[list[torch.Tensor]] | None]:
    """gather(state, params, keys): for each key the list of `state[p][key]`; None if one of them is missing. It creates
    no entries."""
    return _native("gather_state") or _gather_in_python


def _gather_in_python(state: Any, params: list[torch.Tensor], keys: tuple[str, ...]) -> list[list[torch.Tensor]] | None:
    found = [state.get(p, {}) for p in params]
    lists = [[entry.get(key) for entry in found] for key in keys]
    return None if any(value is None for values in lists for value in values) else lists


def item_comparer() -> Callable[[tuple[list[Any], ...], tuple[list[Any], ...]], bool]:
    """same(lists, copies): whether each of some lists holds the very objects of its copy."""
    return _native("same_items") or _compare_in_python


def _compare_in_python(lists: tuple[list[Any], ...], copies: tuple[list[Any], ...]) -> bool:
    pairs = list(zip(lists, copies, strict=True))
    return all(len(a) == len(b) and all(map(is_, a, b)) for a, b in pairs)


def version_bumper() -> Callable[[list[torch.Tensor]], None]:
    """bump(tensors) tells autograd that they were written."""
    return _native("increment_version") or torch._C._increment_version


def layouts_of(args: Sequence[Any]) -> bytes | None:
    """Dtype, device, shape, strides of all tensors of a call, as bytes that are equal where those are; None where that
    cannot be told so fast, or where a check will say what is wrong."""
    read = _native("describe")
    if read is None:
        return None
    try:
        described = read(tuple(args), b"", b"", b"")
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if described is None else described[2]
