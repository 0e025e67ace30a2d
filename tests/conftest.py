"""Fixtures: a test per backend, and the thread counts and instruction sets of the compiled one."""

import os

import pytest
import torch

import flatkern
from flatkern import dispatch

# The test models are tiny and tests run side by side: several threads each would only wait for one another.
torch.set_num_threads(1)

BACKENDS = ("eager", "cpp")  # those that run on the CPU; the dispatcher's checks are in front of each

# Triton's interpreter has to be on before triton is imported, and compiling needs it off: processes of their own.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_triton_compile.py", "test_host.py", "test_gpu.py"] if INTERPRETING else ["test_triton.py"]


def compiled(op):
    """The compiled backends of `op` that are tested like this on the CPU."""
    return [name for name in op.backends.split() if name in BACKENDS]


def live(name):
    """Skip the test where a backend is not live, with the reason that users are given."""
    state = flatkern.backends()[name]
    if not state["live"]:
        pytest.skip(f"{name} is not live: {state['reason']}; {state['remedy']}")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request):
    return live(request.param)


@pytest.fixture
def native():
    """The compiled module."""
    live("cpp")
    return dispatch.compiled_module("cpp")


@pytest.fixture
def set_threads(native):
    """Sets how many threads the compiled kernels may use, which are torch's; the test ends with the old number."""
    before = torch.get_num_threads()

    def set_(count):
        torch.set_num_threads(count)
        if native.max_threads() != count:
            pytest.skip(f"the kernels may use {native.max_threads()} threads after torch was given {count}")

    yield set_
    torch.set_num_threads(before)


@pytest.fixture
def set_isa(native):
    """Sets the instruction set that runs; the test ends with the old one."""
    before = native.isa()
    yield native.set_isa
    native.set_isa(before)


@pytest.fixture
def launches(monkeypatch):
    """The names of the Triton kernels that are launched."""
    from flatkern.triton_kernels import launch

    names, start = [], launch.Call.start

    def counted(call, kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        start(call, kernel, *args, **kwargs)

    monkeypatch.setattr(launch.Call, "start", counted)
    return names
