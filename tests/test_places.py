"""docs/adding-an-operation.md names the files that know every operation; they know them, and no others do."""

import re
from pathlib import Path

import pytest

from flatkern.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flatkern", "csrc", "triton_kernels", "tests", "bench")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
FAMILIES = {op.family for op in OPS.values()}
# In C++ AdamW is Adam with a flag.
CALLED = {name: "adam_update_" if name == "adamw_update_" else name for name in OPS}
# They know an operation by the names of elements' functions and of kernels.
BY_OTHER_NAMES = {"csrc/math/F.h", "tests/test_triton_compile.py", "tests/test_cuda_compile.py"}
BY_OTHER_NAMES |= {"tests/cuda_emulation/driver/operations.h"}
# They know some operations.
OF_MANY = {f"tests/test_{name}.py" for name in ("reference", "reference_updates", "mask", "backends")}
OF_MANY |= {f"tests/wrong_{name}.py" for name in ("kernels", "methods")}
OF_MANY |= {"flatkern/checks.py", "bench/timing/limits.py"} | {f"bench/gpu/{name}.py" for name in ("calls", "counted")}


def places():
    """The files of code that the list names: of a family F, and "*" of any number."""
    text = (ROOT / "docs" / "adding-an-operation.md").read_text().split("\n1. ")[1]
    return set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/*]+\.\w+)`", text))


def read():
    """{path: the operations that it mentions}."""
    paths = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    words = {p.relative_to(ROOT).as_posix(): set(re.findall(r"\w+", p.read_text())) for p in paths}
    return {path: {op for op in OPS if {op, CALLED[op]} & found} for path, found in words.items()}


MENTIONED = read()


def as_listed(path):
    """A path as the list has it: with F for a family, "*" for any file of csrc/cuda."""
    stem = Path(path).stem
    if re.fullmatch(r"csrc/cuda/\w+\.cu", path):
        return "csrc/cuda/*.cu"
    return path.replace(f"/{stem}.", "/F.") if stem in FAMILIES and not path.startswith("tests/") else path


def files(place, op):
    """What a place stands for, of one operation."""
    if "*" in place:
        return [path for path in MENTIONED if as_listed(path) == place]
    return [place.replace("/F.", f"/{op.family}.")]


def is_for(place, op):
    backends = {"csrc/cpu": "cpp", "csrc/cuda": "cuda", "triton_kernels": "triton", "tests/test_cuda.py": "cuda"}
    return all(name in op.backends.split() for start, name in backends.items() if place.startswith(start))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_place_knows_every_operation(op):
    missing = [
        place
        for place in places() - BY_OTHER_NAMES - OF_MANY
        if is_for(place, op) and not any(op.name in MENTIONED[path] for path in files(place, op))
    ]
    assert not missing, (
        f"{op.name} is not in {missing}, which docs/adding-an-operation.md names as places of every operation"
    )


def test_every_place_is_there():
    for place in places():
        for op in OPS.values():
            assert all((ROOT / path).is_file() for path in files(place, op)), place
    assert places() >= BY_OTHER_NAMES | OF_MANY


def is_a_place(path, known):
    """Whether a file knows two operations of three, or all of its family, so that a new one is added there."""
    family = {op.name for op in OPS.values() if as_listed(path) != path and Path(path).stem == op.family}
    return 3 * len(known) > 2 * len(OPS) or (len(family) > 1 and family <= known)


def test_every_file_that_knows_most_operations_is_a_place():
    unnamed = {path for path, known in MENTIONED.items() if is_a_place(path, known)}
    unnamed = {path for path in unnamed if as_listed(path) not in places()}
    assert not unnamed, f"{unnamed} know most operations, but docs/adding-an-operation.md does not name them"
