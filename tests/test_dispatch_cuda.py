"""What stands between the dispatcher and flatkern._CUDA: what it can run on, the current device, refusals, switches.

A stand-in takes the module's place; `make test-cuda` runs the real one, emulated.
"""

import contextlib
import dataclasses
import os
import traceback
from types import SimpleNamespace

import pytest
import torch

import flatkern
from flatkern import cuda, dispatch, library
from flatkern.ops import OPS


class Mismatch(ValueError):
    pass


class WrongDevice(RuntimeError):
    pass


class StandIn:
    """A module of two devices whose ops write nothing and need device 0."""

    emulated, toolkit, architectures, __file__ = True, "13.0", "80 90 100", "there.so"
    Mismatch, WrongDevice = Mismatch, WrongDevice

    def __init__(self):
        self.device, self.calls = 0, []
        for op in OPS.values():
            if "cuda" in op.backends.split():
                setattr(self, op.name, self.op(op.name))

    def op(self, name):
        def run(*args, **kwargs):
            if self.device != 0:
                raise WrongDevice("device 1 is current")
            self.calls.append(name)

        return run

    def current_device(self):
        return self.device

    def set_current_device(self, index):
        self.device = index

    def use_torch(self, allocate, upload, stream):
        self.torch = allocate, upload, stream

    def driver(self):
        return 0, 13000, 0, "no driver"


@pytest.fixture
def module(monkeypatch):
    """A module that the dispatcher takes for an emulated one; what it has found is forgotten afterwards."""
    stand_in = StandIn()
    monkeypatch.setitem(dispatch.DEVICES, "cuda", ["cpu"])
    monkeypatch.setattr(cuda, "load", lambda name: stand_in)
    dispatch.resolve.cache_clear()
    yield stand_in
    dispatch.resolve.cache_clear()


# ---- what it runs on

NEEDS_580 = "one for CUDA 13.0 (580 or later)"
DRIVERS = {  # what the module says of the driver, and what the error says of that
    "none": ((0, 13000, 0, "insufficient"), f"no NVIDIA driver is loaded, and it needs {NEEDS_580}"),
    "too old": ((12040, 13000, 0, "insufficient"), f"is for CUDA 12.4, but it needs {NEEDS_580}; update the driver"),
    "of a toolkit to come": ((13000, 14010, 0, "insufficient"), "is for CUDA 13.0, but it needs one for CUDA 14.0;"),
    "that takes 4 KB": ((12000, 12040, 1, ""), "is for CUDA 12.0, but it needs one for CUDA 12.1 (530 or later)"),
    "hidden": ((13000, 13000, 0, "no device"), r"no GPU is there (no device; CUDA_VISIBLE_DEVICES is '')"),
    "torch without CUDA": ((13000, 13000, 1, ""), f"torch {torch.__version__} is built without CUDA"),
}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
@pytest.mark.parametrize("found, message", DRIVERS.values(), ids=DRIVERS)
def test_a_driver_that_will_not_do_is_named(monkeypatch, found, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(cuda, "native", lambda name: SimpleNamespace(emulated=False, driver=lambda: found))
    with pytest.raises(ImportError) as caught:
        cuda.load.__wrapped__("flatkern._CUDA")
    assert message in str(caught.value)


def test_rocm_is_served_by_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(cuda, "native", lambda name: SimpleNamespace(emulated=False))
    with pytest.raises(ImportError, match="built for ROCm, which Triton serves"):
        cuda.load.__wrapped__("flatkern._CUDA")


@pytest.mark.parametrize(
    "compiled, runs, does_not",
    [
        ([80, 90, 100], ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.1"], ["7.5"]),
        ([80, 90], ["8.0", "9.0", "10.0"], ["7.0"]),
        ([86], ["8.6", "8.9", "9.0"], ["8.0"]),
        ([80, 100], ["8.6", "10.0"], ["9.0"]),
    ],
)
def test_code_runs_on_its_generation_and_ptx_on_newer_ones(compiled, runs, does_not):
    for number in runs + does_not:
        assert cuda.runs_on(compiled, *map(int, number.split("."))) is (number in runs), number


def test_a_gpu_that_nothing_was_compiled_for_is_refused(monkeypatch):
    found = SimpleNamespace(emulated=False, architectures="80 100", driver=lambda: (13000, 13000, 1, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: (7, 5))
    monkeypatch.setattr(cuda, "native", lambda name: found)
    with pytest.raises(ImportError, match=r"compiled for compute capability 8\.0, 10\.0, but the GPU has 7\.5; .*=75 "):
        cuda.load.__wrapped__("flatkern._CUDA")


@pytest.mark.parametrize("what", ["nothing", "text", "another module"])
def test_a_library_that_emulates_nothing_is_refused(monkeypatch, tmp_path, request, what):
    path = tmp_path / "library.so"
    if what == "text":
        path.write_text("no library")
    elif what == "another module":
        path = request.getfixturevalue("native").__file__
    monkeypatch.setenv("FLATKERN_CUDA_EMULATION", str(path))
    message = "is not there" if what == "nothing" else "is no emulated library"
    with pytest.raises(ImportError, match=f"FLATKERN_CUDA_EMULATION is '.*', which {message}.* `make test-cuda`"):
        cuda.native.__wrapped__("flatkern._CUDA")


def test_the_file_that_tells_why_it_was_not_built(monkeypatch, tmp_path):
    (tmp_path / "_CUDA.txt").write_text("no nvcc found\n")
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    assert dispatch._why_not_built("cuda") == "; not built: no nvcc found"
    assert dispatch._why_not_built("cpp") == ""


# ---- calls


def test_the_tensors_device_is_made_current_and_put_back(module):
    run = cuda.on_its_device(module, module.restore_)
    module.device = 1
    run([torch.zeros(2)], [torch.zeros(2)])
    assert module.calls == ["restore_"]
    assert module.device == 1


def test_an_error_behind_it_does_not_speak_of_the_device(module):
    def fails(*args):
        if module.device != 0:
            raise WrongDevice("device 1 is current")
        raise RuntimeError("launch failed")

    module.device = 1
    with pytest.raises(RuntimeError, match="launch failed") as caught:
        cuda.on_its_device(module, fails)(torch.zeros(()))
    assert "WrongDevice" not in "".join(traceback.format_exception(caught.value))
    assert module.device == 1


def test_an_interrupted_call_may_have_launched_some_kernels(module):
    """Many tensors are several launches, so all or nothing would be a lie."""
    assert dispatch.resolve("perturb_gaussian_", "cpu", "cuda").progress == "launches"


def test_versions_are_bumped_by_the_module_alone(module):
    p = torch.zeros(2)
    dispatch.resolve("restore_", "cpu", "cuda")([p], [torch.zeros(2)])
    assert p._version == 0


def test_what_the_module_is_given_by_an_emulation(monkeypatch):
    module = StandIn()
    monkeypatch.setattr(cuda, "native", lambda name: module)
    assert cuda.load.__wrapped__("flatkern._CUDA") is module
    allocate, upload, stream = module.torch
    assert allocate(0, 5).shape == (5,) and allocate(0, 5).dtype == torch.uint8
    assert upload(0, b"\x01\xff").tolist() == [1, 255]
    assert stream(0) == 0


# ---- optimizers


NEEDING = {
    "SAM": (lambda p: flatkern.SGD([p], perturb=flatkern.SAM(), backend="cuda"), "ascent_norm_"),
    "ASAM": (lambda p: flatkern.Adam([p], perturb=flatkern.ASAM(), backend="cuda"), "ascent_norm_"),
    "IRE": (lambda p: flatkern.AdamW([p], enhance=flatkern.IRE(kappa=2.0), backend="cuda"), "count_magnitudes_"),
    "Wrap": (lambda p: flatkern.Wrap(torch.optim.SGD([p]), flatkern.RWP(), backend="cuda"), "mix_gradients_"),
}


@pytest.mark.parametrize("make, op", NEEDING.values(), ids=NEEDING)
def test_a_method_that_needs_a_missing_op_is_refused_when_made(module, make, op, monkeypatch):
    """As a backend may be that has begun."""
    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], backends="cpp triton"))
    with pytest.raises(RuntimeError) as caught:
        make(torch.nn.Parameter(torch.ones(3, 4)))
    assert str(caught.value) == (
        f"{op}: no backend for cpu: cuda has no such kernel in this version; use backend=None, which takes another one "
        "for it"
    )
    assert not module.calls


METHODS = {
    "plain": {},
    "RWP": {"perturb": flatkern.RWP()},
    "ARWP": {"perturb": flatkern.RWP(eta=0.1)},
    "m-RWP": {"perturb": flatkern.RWP(lam=0.5)},
    "rolling": {"perturb": flatkern.RWP(rolling=True)},
    "clipped, masters": {"perturb": flatkern.RWP(), "max_grad_norm": 1.0, "master_weights": True},
    "SAM": {"perturb": flatkern.SAM()},
    "ASAM": {"perturb": flatkern.ASAM()},
    "IRE": {"enhance": flatkern.IRE(kappa=2.0)},
}


@pytest.mark.parametrize("rule", [flatkern.SGD, flatkern.Adam, flatkern.AdamW])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_every_method_is_made(module, rule, how):
    rule([torch.nn.Parameter(torch.ones(3, 4))], backend="cuda", **how)


def test_a_step_that_can_be_captured_is_made(module):
    assert flatkern.SGD([torch.nn.Parameter(torch.ones(3))], backend="cuda", capturable=True).capturable


# ---- registered ops


@pytest.mark.parametrize("live, op, expected", [
    ({"triton", "cuda"}, "restore_", "triton"),
    ({"cuda"}, "restore_", "cuda"),
    (set(), "restore_", "triton"),
])  # fmt: skip
def test_a_registered_op_takes_what_is_live(monkeypatch, live, op, expected):
    monkeypatch.setattr(library, "refuse", lambda op, name, device_type: None if name in live else "not live")
    assert library.backend_of.__wrapped__(op, "cuda") == expected


# ---- switches for debugging


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Arguments that say they are on a GPU."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    return ([SimpleNamespace(device=torch.device("cuda", 1))],), waited


def test_switches_that_are_off_cost_nothing(monkeypatch):
    for value in (None, "", "0"):
        for name in ("FLATKERN_NVTX", "FLATKERN_CUDA_SYNC"):
            monkeypatch.delenv(name) if value is None and name in os.environ else None
            if value is not None:
                monkeypatch.setenv(name, value)
        assert dispatch._watched(OPS["restore_"], print) is print


def test_sync_waits_for_the_device_and_names_the_op(monkeypatch, on_a_gpu):
    args, waited = on_a_gpu
    monkeypatch.setenv("FLATKERN_CUDA_SYNC", "1")
    run = dispatch._watched(OPS["restore_"], lambda *args, **kwargs: None)
    run(*args)
    assert waited == [torch.device("cuda", 1)]
    run([torch.zeros(1)])
    assert len(waited) == 1, "nothing of the CPU is waited for"

    def fails(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match=r"^restore_: failed on cuda:1, .*: an illegal memory access"):
        run(*args)


def test_nvtx_ranges_have_the_ops_names(monkeypatch):
    ranges = []

    @contextlib.contextmanager
    def noted(name):
        ranges.append(name)
        yield
        ranges.append("end")

    monkeypatch.setattr(torch.cuda.nvtx, "range", noted)
    monkeypatch.setenv("FLATKERN_NVTX", "1")
    dispatch._watched(OPS["restore_"], lambda *args: ranges.append("op"))([])
    assert ranges == ["flatkern::restore_", "op", "end"]
