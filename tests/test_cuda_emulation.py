"""The emulation that executes the CUDA kernels on the CPU: its own tests, each a case of one executable.

They run where FLATKERN_CUDA_EMULATION is set, as `make test-cuda` does.
"""

import os
import re
import subprocess

import pytest
from cuda_emulation import build
from filelock import FileLock

pytestmark = pytest.mark.skipif(
    not os.environ.get("FLATKERN_CUDA_EMULATION"),
    reason="FLATKERN_CUDA_EMULATION is not set; `make test-cuda` sets it and runs these",
)

# Read from the sources, so that nothing is compiled to find out which tests there are.
CASES = re.findall(
    r"^CASE\((\w+)\)", "".join(path.read_text() for path in sorted(build.EMULATION.glob("test_*.cpp"))), re.MULTILINE
)


def run(*command):
    """Run the executable in an environment that says nothing about schedules."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLATKERN_")}
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def executable():
    folder = build.ROOT / "build"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "cuda-emulation.lock"):
        try:
            (path,) = build.build(["tests"])
        except build.MissingTool as error:
            pytest.skip(str(error))
    return path


@pytest.mark.parametrize("case", CASES)
def test_emulation(case, executable):
    done = run(executable, case)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_case_is_run(executable):
    assert sorted(run(executable, "--list").stdout.split()) == sorted(CASES)


def test_names_of_no_case_are_refused(executable):
    done = run(executable, "no_such_case")
    assert done.returncode == 1 and "no such case" in done.stdout
