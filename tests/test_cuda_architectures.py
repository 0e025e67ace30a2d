"""What nvcc makes of every kernel for the architectures that a wheel has no code of: no warning, no spill.

Sources are compiled to PTX once for each way that they branch on __CUDA_ARCH__, and ptxas compiles that for every
architecture of that way that it knows. Those of a wheel are looked at in more detail by test_cuda_compile.py.
"""

import os
import re
import runpy
import subprocess
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
FOLDER = os.environ.get("FLATKERN_CUDA_ARCHITECTURES")
if not FOLDER:
    pytest.skip(
        "FLATKERN_CUDA_ARCHITECTURES is not set; `make matrix-cuda` sets it and runs these", allow_module_level=True
    )

SETUP = runpy.run_path(str(ROOT / "setup.py"))
NVCC = SETUP["find_nvcc"]()
SHIPPED = SETUP["CUDA_ARCHS"]
# Of the two sizes of arguments the large one: they differ in where the arguments of a tensor are.
FLAGS = [*SETUP["CUDA_DEVICE_FLAGS"], *SETUP["host_compiler"](), "-Werror=all-warnings", "-DFK_LARGE_ONLY"]
# Where device.cuh branches: [from, to) is compiled by the first one of them.
BRANCHES = (900, 1000)
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))


def nvcc(*words):
    done = subprocess.run([NVCC, *map(str, words)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


KNOWN = sorted({int(n) for n in re.findall(r"\bsm_(\d+)\b", nvcc("--list-gpu-code"))})
OTHERS = [n for n in KNOWN if n >= min(SHIPPED) and n not in SHIPPED]


def virtual(architecture):
    """The one whose PTX serves this architecture: the lowest that branches as it does."""
    way = sum(10 * architecture >= branch for branch in BRANCHES)
    return next(n for n in KNOWN if n >= min(SHIPPED) and sum(10 * n >= branch for branch in BRANCHES) == way)


@cache
def ptx(source, architecture):
    """The file of a source's PTX, and what its kernels are bounded by: threads of a block, and blocks."""
    target = Path(FOLDER) / f"{source}.{architecture}.ptx"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        newest = max(path.stat().st_mtime for path in [*KERNELS.glob("*"), *(ROOT / "csrc").glob("*/*.h")])
        if not target.exists() or target.stat().st_mtime < newest:
            made = target.with_suffix(".new")
            assert nvcc(*FLAGS, "-ptx", f"-arch=compute_{architecture}", "-o", made, KERNELS / source) == ""
            made.rename(target)
    bounds = {}
    for name, head in re.findall(r"\.entry (\w+)\((.*?)^\{", target.read_text(), re.MULTILINE | re.DOTALL):
        threads, blocks = re.search(r"\.maxntid (\d+)", head), re.search(r"\.minnctapersm (\d+)", head)
        bounds[name] = int(threads[1]), int(blocks[1]) if blocks else 1
    return target, bounds


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_fits(source, architecture, tmp_path):
    path, bounds = ptx(source, virtual(architecture))
    # Everything that ptxas says is an information, or a warning, which is an error here.
    options = "-Xptxas=-v,--warning-as-error,--warn-on-spills,--warn-on-local-memory-usage"
    said = nvcc("-cubin", f"-arch=sm_{architecture}", options, "-o", tmp_path / "x.cubin", path)
    used = re.findall(
        r"Function properties for (\w+)\n *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        said,
    )
    assert {name for name, *_ in used} == set(bounds) != set()
    for name, *spilled, registers in used:
        threads, blocks = bounds[name]
        assert spilled == ["0", "0", "0"], name
        # A multiprocessor has 65536 registers, and a thread gets a multiple of 8.
        assert int(registers) <= 65536 // (threads * blocks) // 8 * 8, name


def test_branches_are_known():
    """Another branch on __CUDA_ARCH__ would need PTX of its own."""
    texts = [path.read_text() for path in [*KERNELS.glob("*"), *(ROOT / "csrc" / "math").glob("*")]]
    found = {int(n) for text in texts for n in re.findall(r"__CUDA_ARCH__\s*[<>=!]+\s*(\d+)", text)}
    assert found == set(BRANCHES)


def test_there_are_others():
    """nvcc 12.8 and later know some on both sides of every branch."""
    assert OTHERS and all(n in KNOWN for n in map(virtual, OTHERS))
