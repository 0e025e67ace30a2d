"""A GPU that cannot be used is a failure; a test that loses it costs no other one.

Its worker ends and xdist starts another; where there are no workers, the session ends and says why.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import is_lost

SUITE = """
import os
from pathlib import Path
import pytest

def test_before(): pass

def test_loses(monkeypatch):
    Path({mark!r}).write_text(str(os.getpid()))
    {body}

@pytest.mark.parametrize("k", range(8))
def test_after(k):
    path = Path({mark!r})
    assert not path.exists() or path.read_text() != str(os.getpid()), "in the process that lost it"
"""
LOSS = """
    try: raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    except RuntimeError as error: raise ValueError("while it compares") from error"""


def test_which_errors_stay():
    for text in ("CUDA error: unspecified launch failure", "Triton Error [CUDA]: an illegal memory access"):
        assert is_lost(RuntimeError(text))
    assert is_lost(type("AcceleratorError", (RuntimeError,), {})("device-side assert"))
    assert not is_lost(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_lost(AssertionError("params[0]: 3 of 4 elements are further off"))


def run(folder, body, *arguments):
    """(exit status, what pytest prints, standard error) of a suite with our conftest.py."""
    for name in ("conftest.py", "covering.py", "interpreting.py"):
        (folder / name).write_text((Path(__file__).parent / name).read_text())
    (folder / "test_suite.py").write_text(SUITE.format(mark=str(folder / "mark"), body=body))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments, "test_suite.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.matrix
def test_a_worker_ends_and_another_goes_on(tmp_path):
    pytest.importorskip("xdist")
    status, out, err = run(tmp_path, LOSS, "-n", "2")
    assert status == 1
    assert len(set(re.findall(r"^PASSED (\S+)", out, re.MULTILINE))) == 9
    assert set(re.findall(r"^FAILED (\S+)", out, re.MULTILINE)) == {"test_suite.py::test_loses"}
    assert "while it compares" in out and "while it compares" in err
    assert "test_suite.py::test_loses lost the GPU" in err


@pytest.mark.matrix
def test_one_process_stops_and_says_why(tmp_path):
    status, out, err = run(tmp_path, LOSS, "-p", "no:xdist")
    assert status == 2
    assert "test_suite.py::test_loses lost the GPU" in out + err
    assert "an illegal memory access" in out
    assert "PASSED test_suite.py::test_before" in out and "test_after" not in out


@pytest.mark.matrix
def test_another_failure_stops_nothing(tmp_path):
    status, out, err = run(tmp_path, "assert 1 == 2", "-p", "no:xdist")
    assert status == 1 and "9 failed, 1 passed" in out
    assert "lost the GPU" not in out + err


@pytest.mark.matrix
@pytest.mark.parametrize(
    "seen, asked, reason",
    [
        (True, "", r"torch sees a GPU, but triton is not live: .+; .+"),
        (False, "RUN", r"torch \S+ sees no GPU"),
        (False, "DRY", "FLATKERN_GPU_DRY=1 needs TRITON_INTERPRET=1"),
    ],
)
def test_what_cannot_run_is_an_error(seen, asked, reason, tmp_path):
    """Of every test of Triton, where there should be a GPU; those of the CUDA kernels need nvcc besides."""
    if torch.cuda.is_available():
        pytest.skip("here it can")
    here = Path(__file__).parent
    arguments = [str(here / "test_gpu.py"), "-q", "-k", "radius and triton", "-p", "no:xdist", "-p", "no:cacheprovider"]
    code = f"import pytest, torch\ntorch.cuda.is_available = lambda: {seen}\nraise SystemExit(pytest.main({arguments}))"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FLATKERN", "TRITON"))}
    env |= {f"FLATKERN_GPU_{asked}": "1"} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here.parent, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout
    assert re.search(reason, done.stdout, re.DOTALL), done.stdout
    assert "1 error" in done.stdout and "skipped" not in done.stdout
