"""What the tests of the emulated CUDA backend share: its operations."""

import os

import cases
import pytest
from test_backends import name_of

from flatkern import cuda
from flatkern.ops import OPS

needs_emulation = pytest.mark.skipif(
    not os.environ.get(cuda.EMULATION), reason=f"{cuda.EMULATION} is not set; `make test-cuda` sets it and runs these"
)

CUDA = [op for op in OPS.values() if "cuda" in op.backends.split()]
VARIANTS = [(op, words) for op in CUDA for words in cases.VARIANTS[op.name]]
every_op = pytest.mark.parametrize("op", CUDA, ids=name_of)
