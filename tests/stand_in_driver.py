"""The driver that launches nothing (bench/gpu/silent_driver.py), for tests of what is launched and compiled.

Whoever imports this is left out where there is no Triton, where kernels are interpreted, and where there is a GPU.
"""

import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6", reason="triton is not installed, so nothing is launched by it")
if torch.cuda.is_available():
    pytest.skip("kernels that are compiled for the stand-in would be launched on the GPU", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted, so nothing is compiled", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind everything: only bench/ is looked for there
from bench.gpu import silent_driver  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def driver(tmp_path_factory):
    """The stand-in, with a cache of its own for what it compiles."""
    before = triton.runtime.driver._active
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield silent_driver.install()
    triton.runtime.driver.set_active(before)
