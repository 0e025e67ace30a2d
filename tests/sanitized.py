"""Programs that tests/cuda_emulation/build.py compiles with a sanitizer: how they are called, what they should say."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
BUILT = os.environ.get("FLATKERN_CUDA_SANITIZED")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # It keeps little of what each thread did before, as there are thousands.
    "TSAN_OPTIONS": "history_size=0",
}


def needs_sanitized(target):
    return pytest.mark.skipif(
        not BUILT, reason=f"FLATKERN_CUDA_SANITIZED is not set; `make {target}` sets it and runs these"
    )


def run(program, *words, **environment):
    """The exit status of one of the programs, and all that it says."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLATKERN_EMULATION")}
    done = subprocess.run(
        [f"{BUILT}/{program}", *words], env=env | OPTIONS | environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def cases(name):
    """The cases of a file of wrong kernels."""
    return re.findall(r"^CASE\((\w+)\)", (EMULATION / name).read_text(), re.MULTILINE)


def names_a_line(name, mark, text):
    """Whether `text` names a line of this file that ends in the comment `mark`."""
    lines = (EMULATION / name).read_text().splitlines()
    named = {int(n) for n in re.findall(rf"\b{re.escape(name)}:(\d+)", text)}
    return any(lines[n - 1].endswith(f"// {mark}") for n in named)
