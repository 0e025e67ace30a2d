"""A kernel as Triton's compiler sees it: what it is compiled for, its key and name, and compiling it without a launch.

A kernel is another one for every set of constants, warps, dtypes and absent arguments, and for nothing else: numbers
are never compiled in, and all that is behind an argument is tables and scalars, which are read one by one, so that
their alignment is worth nothing. (How the tensors themselves are aligned is a constant, EVEN.)
"""

import functools
import inspect
import logging
import threading

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

from flatkern.jobs import Job

NUMBERS = ("count", "padding", "lr_stride", "sigma_stride", "seed", "stream", "round_")
DTYPES = {tl.float32: "float32", tl.float16: "float16", tl.int16: "bfloat16", tl.uint8: "uint8"}
SHOWN = ("RULE", "KNOWN")  # constants that mean something to people, though no types and no flags
PLACES = ("NORM", "HISTORY")  # a list by its number, or None; to people, a flag
OPTIONAL = ("lrs", "sigmas", "noise", "component", "grad_scale", "clip", "found_inf")  # arguments that may be absent
INT32 = 2**31
ATTEMPTS = 5  # at a kernel that another thread's compilation disturbs

log = logging.getLogger("flatkern")
# Triton makes its caches of a kernel on a device at the first use, and two threads would make two.
_binding = threading.Lock()


def kernel(function, aligned=()):
    """The decorator of a kernel that is launched. `aligned` are arguments that are always at a multiple of 16 bytes."""
    given = [n for n, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    numbers, pointers = [n for n in given if n in NUMBERS], [n for n in given if n not in aligned]
    return triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=pointers)


def options_of(warps, constants):
    """What Triton takes by keyword. A fusion would change a rounding from one machine to the next; where one is meant,
    tl.fma says so."""
    return dict(constants, num_warps=warps, enable_fp_fusion=False, **limits_of(constants))


def limits_of(constants):
    """Adam's rule with everything around it would take 200 registers, so that an eighth of the warps would fit that a
    multiprocessor can hold. With 128 it is a quarter, and nothing is spilled. Others take fewer when not told."""
    is_adam = constants.get("RULE", "sgd") != "sgd"
    return {"maxnreg": 128} if is_adam and not torch.version.hip else {}


def job(kernel, warps, arguments, constants):
    """The job of a launch."""
    # A dtype stands for a pointer, in Triton's own words, and a number for all of its size.
    given = [_seen(a) for a in arguments]
    key = repr((kernel.fn.__name__, warps, given, sorted((name, str(value)) for name, value in constants.items())))
    name = _name(kernel, arguments, constants)
    return Job(key, name, functools.partial(_compile, kernel, key, name, given, options_of(warps, constants)))


def _seen(argument):
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return None if argument is None else 0 if -INT32 <= argument < INT32 else INT32


def _name(kernel, arguments, constants):
    parts = [kernel.fn.__name__]
    for name, value in constants.items():
        if value is True or (name in PLACES and isinstance(value, int)):
            parts.append(name)
        elif isinstance(value, tl.dtype):
            parts.append(f"{name}={DTYPES[value]}")
        elif name == "SHAPES":
            parts.append("SHAPES=" + ",".join(f"{rows}x{columns}" for rows, columns in value))
        elif name in SHOWN:
            parts.append(f"{name}={value}")
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    return " ".join(parts + [name for name in OPTIONAL if given.get(name) is not None])


def _compile(kernel, key, name, given, options):
    if not isinstance(kernel, triton.JITFunction):
        return  # interpreted
    device = driver.active.get_current_device()
    announce(key, name, device)
    with _binding:
        kernel.device_caches[device]  # a defaultdict
    compiled = _warmed(kernel, given, options)
    if isinstance(compiled, CompiledKernel):
        compiled[1, 1, 1]  # loads it, and makes what launches it


def _warmed(kernel, given, options):
    """The compiled kernel. When the collector calls a finalizer inside a parse, another thread may begin one; CPython
    3.11, which counts the depth of all trees in one number, raises SystemError at the end of either."""
    for _ in range(ATTEMPTS - 1):
        try:
            return kernel.warmup(*given, grid=(1,), **options)
        except Exception as error:
            if not any(isinstance(cause, SystemError) for cause in _causes(error)):
                raise
    return kernel.warmup(*given, grid=(1,), **options)


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def announce_launch(kernel, warps, arguments, constants):
    """Say which kernel a first launch waits for, if somebody listens."""
    if log.isEnabledFor(logging.INFO) and isinstance(kernel, triton.JITFunction):
        made = job(kernel, warps, arguments, constants)
        announce(made.key, made.name, driver.active.get_current_device())


@functools.cache
def announce(key, name, device):
    """Once for each kernel and device."""
    log.info("device %s: compiling %s, or loading it from Triton's cache", device, name)
