"""The machine code of the CUDA module that `make test-cuda` has built: disassembled once, for all test processes."""

import os
import pickle
import sys
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.append(str(Path(__file__).parents[1]))
from bench.gpu.disassembly import read_library


@cache
def kernels_of(architecture):
    """Its kernels by their names; skips the test where there are none."""
    built = Path(os.environ["FLATKERN_CUDA_BUILD"])
    (library,) = (built / "lib" / "flatkern").glob("_CUDA*.so")
    kept = built / f"{architecture}.{library.stat().st_mtime_ns}.pickle"
    with FileLock(built / f"{architecture}.lock"):
        if kept.exists():
            return pickle.loads(kept.read_bytes())
        try:
            codes = read_library(library, architecture)
        except FileNotFoundError as error:
            pytest.skip(f"nothing is disassembled: {error}")
        if not codes:
            pytest.skip(f"the module is not built for {architecture}; FLATKERN_CUDA_ARCHS names those that are")
        for old in built.glob(f"{architecture}.*.pickle"):
            old.unlink()
        kept.write_bytes(pickle.dumps(codes))
    return codes
