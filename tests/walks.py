"""With which shapes and variants each backend is tested: those at which its walks over memory can go wrong.

The kernels of the CPU are fast. The CUDA kernels' emulation pays by thread, and Triton's interpreter by program, so
that their lists are short and dense.
"""

import cases
from conftest import BACKENDS, compiled

from flatkern.ops import Op

# CUDA, blocks of 256 threads: nothing, ends of eights, many rows to a warp, a row to some warps, to all eight.
SHORT = [
    *[(0,), (3, 5), (0, 4), (5, 0), (), (1,), (17,), (7, 1), (3, 16), (2, 17), (70, 9), (513, 2), (8, 3, 3, 3)],
    *[(8,), (256,)],  # vectors of whole eights
    *[(40, k) for k in (3, 24, 25)],
    *[(3, 256), (3, 257), (1023,), (8, 1024), (2, 1025), (3, 2049)],
]
# Longer rows, for which blocks are as large as they need, and what is cut into segments; beside short ones.
LONG = [
    *[(2, 6152), (300, 3), (1, 8192), (2, 8200), (257,), (20000,), (5, 0)],
    *[(1, 20003), (1, 32768), (2, 32769), (1, 70001)],
]
# Triton: empty, short, odd, a chunk's ends, even and odd rows longer than a program holds, vectors as long.
PROGRAMS = [
    *[(3, 5), (0,), (64, 3, 3, 3), (), (33,), (4, 0), (7, 1), (2, 17)],
    *[(3, 1024), (2, 8200), (1025,), (1, 8203), (8203,)],
]
SHAPES = {"cpp": cases.SHAPES, "cuda": {"short": SHORT, "long": LONG}, "triton": {"programs": PROGRAMS}}
# What depends on a dtype is the same for long rows; and programs of one dtype are compared in few shapes.
SOME_DTYPES = {"long rows": ("float32", "mixed"), "long": ("float32", "bfloat16", "mixed"), "programs": ("mixed",)}
# Every way in one list, for the CPU enough of it for three threads.
EVERY_WAY = {
    "cpp": [shape for name in ("mixed ranks", "short rows", "chunk ends", "long rows") for shape in cases.SHAPES[name]],
    "cuda": SHORT + LONG,
    "triton": PROGRAMS,
}
EVERY_WAY["eager"] = EVERY_WAY["cpp"]
FEW = [(3, 16), (17,), (5, 4, 3), (300,), (2, 4104)]

# Variants that need the least have CUDA kernels of their own, and cases.py has few of these.
LEAST = {
    "sgd_update_": "momentum_buffers unit, momentum_buffers masters noise clip, masters clean_grads, masters skip",
    "adam_update_": "masters clean_grads clip, masters noise grad_scale, backups grad_scale, masters noise skip",
    "adamw_update_": "masters grad_scale, masters noise clip, backups clean_grads clip, backups skip",
}


def variants(op, backend):
    """Words of cases.py, for all ways through a backend's kernels."""
    return cases.VARIANTS[op.name] + (LEAST[op.name].split(", ") if backend == "cuda" and op.name in LEAST else [])


def grid(backend):
    """Names of shapes, and of dtypes, that each variant is run with."""
    return [(name, dtype) for name in SHAPES[backend] for dtype in SOME_DTYPES.get(name, cases.DTYPES)]


def richest(op):
    """A variant with almost every argument; norms are measured inside, and nothing is read that only a graph gives."""
    words = {a.name for a in op.arguments if a.type.endswith("?")} - {"norms", "lrs", "sigmas"}
    if "masters" in words:
        words -= {"backups"} if op.family == "update" else set()
    return " ".join([*sorted(words), "offset", "wide"])


def rows(found, interpreted):
    """(backend, *row) for every backend of this process, if a row begins with an operation for those compiled ones that
    have it; of Triton's, which is interpreted, some."""

    def is_for(backend, row):
        has_op = backend in compiled(row[0]) if isinstance(row[0], Op) else True
        return has_op and (backend != "triton" or interpreted(*row))

    return [(backend, *row) for backend in BACKENDS for row in found if is_for(backend, row)]
