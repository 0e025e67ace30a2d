"""Triton's own launchers take pointers as integers: what they hand to libcuda is what they make of tensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6", reason="triton is not installed, so it has no launchers")
if torch.cuda.is_available():
    pytest.skip("another libcuda is loaded", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own, as a library cannot be unloaded.
PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import torch
from bench.gpu import host, stub_driver
try:
    driver = stub_driver.install()
except stub_driver.Unavailable as error:
    sys.exit(f"skip: {error}")
from flatkern.triton_kernels import launch
from triton import knobs
values = host.make("sgd_update_", "momentum_buffers backups noise", [(64, 16)]) | {"grad_scale": torch.tensor(1.0)}
run, _ = host.caller("sgd_update_", "triton")
found = {"parameters": []}
def call():
    count = driver.count
    run(values)
    found["parameters"].append(driver.parameters(COUNT))
    return driver.count - count
COUNT = 12
driver.keep_parameters(COUNT)
found["launches"] = [call() for _ in range(3)]
(last,) = launch._caches["sgd_update_"].last_calls.values()
kept = [last.plan.groups[0].tiles, last.plan.tensors, *last.tables.values(), values["grad_scale"]]
found["pointers"] = [t.data_ptr() for t in kept]
found["repeated"] = last.bound is not None
heard = []
knobs.runtime.launch_enter_hook.add(heard.append)
call()
found["heard"] = [each.get()["name"] for each in heard]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr[6:].strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_integers_arrive_as_tensors_do(found):
    """By Triton itself, then directly with the same pointers, again, and by Triton's runner for a profiler."""
    assert found["repeated"] and found["launches"] == [1, 1, 1]
    first, *others = found["parameters"]
    assert len(others) == 3
    for parameters in (first, *others):
        assert set(found["pointers"]) <= set(parameters)
        assert [p % 2**32 for p in parameters] == [p % 2**32 for p in first]  # numbers have four bytes


def test_a_profiler_hears_of_a_launch(found):
    assert found["heard"] == ["update_kernel"]
