"""Fixtures: a test per backend, and the thread counts and instruction sets of the compiled one."""

import os

import pytest
import torch
from covering import (  # noqa: F401  (its hooks)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from interpreting import patch_once_a_launch

import flatkern
from flatkern import dispatch

# The test models are tiny and tests run side by side: several threads each would only wait for one another.
torch.set_num_threads(1)

# Triton's interpreter has to be on before triton is imported, and compiling needs it off: processes of their own.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EMULATING = bool(os.environ.get("FLATKERN_CUDA_EMULATION"))
# What the fixture `backend` gives, and `compiled`: those of the CPU; or one for GPUs, where this process executes its
# kernels on the CPU, so that `make test-triton` and `make test-cuda` run the same tests as `make test`.
FOR_GPUS = (*(["triton"] if INTERPRETING else []), *(["cuda"] if EMULATING else []))
BACKENDS = FOR_GPUS or ("eager", "cpp")

collect_ignore = ["test_triton.py", "test_triton_counts.py"]
if INTERPRETING:
    patch_once_a_launch()
    # What test_gpu.py does is interpreted only to try it without a GPU.
    dry = os.environ.get("FLATKERN_GPU_DRY") == "1"
    collect_ignore = ["test_triton_compile.py", "test_host.py", "test_gpu_plan.py", *([] if dry else ["test_gpu.py"])]

if not FOR_GPUS:
    collect_ignore += ["test_read_on_device.py"]

# Inside of training libraries: `make test-stacks` has an environment with them.
if not os.environ.get("FLATKERN_STACKS"):
    collect_ignore += ["stacks"]

# `make test-cuda` builds what these look at, and names it.
if not EMULATING:
    collect_ignore += [
        f"test_cuda{part}.py"
        for part in ("", "_capture", "_code", "_devices", "_emulation", "_failures", "_launches", "_optim", "_stacks")
    ]
if not os.environ.get("FLATKERN_CUDA_BUILD"):
    collect_ignore += ["test_cuda_compile.py", "test_cuda_code.py", "test_cuda_wheel.py"]
# The same for `make races-cuda`, `make sanitize-cuda` and `make matrix-cuda`.
if not os.environ.get("FLATKERN_CUDA_SANITIZED"):
    collect_ignore += ["test_cuda_races.py", "test_cuda_sanitized.py"]
if not os.environ.get("FLATKERN_CUDA_ARCHITECTURES"):
    collect_ignore += ["test_cuda_architectures.py"]


def compiled(op):
    """The compiled backends of `op` that this process tests."""
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


def _ranks(world):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from ranks import Ranks

    ranks = Ranks(world)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two():
    """Two ranks, for all tests that need some: each is a process that has to import torch."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four():
    yield from _ranks(4)


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
def emulated():
    """The emulated module of the cuda backend; a test ends with it as it was at the beginning."""
    live("cuda")
    module = dispatch.compiled_module("cuda")
    yield module
    module.set_schedule("")
    module.set_current_device(0)
    module.capturing(False)
    module.launch_nothing(False)
    module.watch(None)
    module.noise_is_on_device(False)
    module.steps_are_on_host(False)


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


# A CUDA error stays: whatever its process asks of the GPU afterwards fails too, and says nothing about the test.


def is_lost(error):
    """Whether the device is lost to this process."""
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if any(words in text for words in ("CUDA error", "AcceleratorError", "Triton Error [CUDA]", "illegal memory")):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if call.excinfo is not None and is_lost(call.excinfo.value):
        item.lost = report.longreprtext


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Behind a test that lost the device: its failure is reported, then this worker ends and xdist starts another."""
    yield
    if not hasattr(item, "lost"):
        return
    if hasattr(item.config, "workerinput"):
        # What has been reported arrives, and so does this; nothing of CUDA is asked to clean up.
        os.write(2, f"\n{item.nodeid} lost the GPU, and its worker ends:\n{item.lost}\n".encode())
        os._exit(1)
    pytest.exit(f"{item.nodeid} lost the GPU, and nothing behind it in this process could be believed; run with -n 1")
