"""AddressSanitizer and UndefinedBehaviorSanitizer on emulated CUDA kernels: what they see.

`make sanitize-cuda` runs tests of test_cuda.py under them, and these.
"""

import os
import re

import pytest
from sanitized import BUILT, cases, names_a_line, needs_sanitized, run

from flatkern import cuda

pytestmark = needs_sanitized("sanitize-cuda")


@pytest.mark.parametrize("case", cases("wrong_accesses.cpp"))
def test_wrong_accesses_are_seen(case):
    status, text = run("address-undefined/wrong", case)
    assert status == 1 and re.search("ERROR: AddressSanitizer|runtime error", text), text
    assert names_a_line("wrong_accesses.cpp", "wrong", text), text


def test_the_module_is_watched():
    """The tests beside these call kernels that are compiled for the sanitizers, which are there."""
    assert os.environ[cuda.EMULATION].startswith(f"{BUILT}/address-undefined/")
    with open("/proc/self/maps") as file:
        loaded = file.read()
    assert "libasan" in loaded and "libubsan" in loaded
