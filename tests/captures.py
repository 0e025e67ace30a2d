"""What tests of captures without a GPU share: the backends that run here, and what says that one is under way."""

import functools

import pytest
import torch
from capturing import Run, runs_on_the_cpu

BACKENDS = [name for name in ("triton", "cuda") if runs_on_the_cpu(name)]
if not BACKENDS:
    pytest.skip(
        "needs TRITON_INTERPRET=1, as make test-triton sets it, or FLATKERN_CUDA_EMULATION, as make test-cuda does",
        allow_module_level=True,
    )

# Rows that are cut into segments.
LONG = {"triton": 8208, "cuda": 32776}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Noise is read by its kernels where it lies, as on a GPU."""
    if request.param == "cuda":
        request.getfixturevalue("emulated").noise_is_on_device(True)
    else:
        from flatkern.triton_kernels import devices

        monkeypatch.setattr(devices, "on_host", lambda noise: False)
    return request.param


@pytest.fixture
def training(backend):
    return functools.partial(Run, backend=backend)


def say_that_it_is_captured(monkeypatch):
    """What the optimizers ask before they do what a graph must not repeat."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
