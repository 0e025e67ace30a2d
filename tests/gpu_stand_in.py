"""Stands in for a GPU: bodies of test_gpu.py run on the CPU (FLATKERN_GPU_DRY=1), interpreted by Triton or emulated.

A stream is a number, a graph a tape of what ran inside, and waiting what a watch sees of torch's operators. As on a
GPU, streams share no tables, nothing is uploaded inside a capture, and kernels read noise where it lies. What kernels
compute is then the interpreter's or the emulation's, and nothing is said about a GPU.
"""

import contextlib
import itertools

import torch
from capturing import Tape, Watch
from torch.utils._python_dispatch import _disable_current_modes

from flatkern import cuda, dispatch


class Stream:
    numbers = itertools.count(1)

    def __init__(self):
        self.cuda_stream = next(self.numbers)

    def wait_stream(self, other):
        pass


class Graph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self):
        self.tape = None

    def replay(self):
        self.tape.replay()


class Device:
    """What is under way on it."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.streams, self.of_graphs = [Stream()], Stream()
        self.capturing, self.watch, self.unwatched = False, None, False

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        """As torch.cuda.graph."""
        graph.tape = Tape(self.monkeypatch, runs=False)
        with self.stream(stream or self.of_graphs), graph.tape:
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False

    def set_sync_debug_mode(self, mode):
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
        self.watch = Watch() if mode == "error" else None
        if self.watch is not None:
            self.watch.__enter__()

    def looking(self, function):
        """`function` may look at tensors: it does not on a GPU, or is the interpreter."""

        def looks(*args, **kwargs):
            before, self.unwatched = self.unwatched, True
            try:
                with _disable_current_modes():
                    return function(*args, **kwargs)
            finally:
                self.unwatched = before

        return looks

    def tolist(self, t, tolist=torch.Tensor.tolist):
        if self.watch is not None and not self.unwatched:
            raise AssertionError("tolist() makes the host wait")
        return tolist(t)


@contextlib.contextmanager
def installed(monkeypatch):
    """For one test."""
    from flatkern.triton_kernels import devices, launch, update

    here, set_aside = Device(monkeypatch), devices.set_aside
    replaced = {
        torch.cuda: dict(
            Stream=Stream, CUDAGraph=Graph, graph=here.graph, stream=here.stream,
            current_stream=lambda device=None: here.streams[-1], synchronize=lambda device=None: None,
            set_sync_debug_mode=here.set_sync_debug_mode, mem_get_info=lambda device=None: (2**40, 2**40),
            empty_cache=lambda: None, is_initialized=lambda: True, is_current_stream_capturing=lambda: here.capturing,
        ),
        torch.Tensor: dict(tolist=lambda t: here.tolist(t), is_cpu=property(lambda t: False)),
        launch.Call: dict(start=here.looking(launch.Call.start)),
        launch: dict(check=here.looking(launch.check)),
        devices: dict(
            on_host=lambda noise: False, capturing=lambda device: here.capturing,
            current_stream=lambda device: here.streams[-1].cuda_stream,
            pinned=lambda shape, dtype: torch.empty(shape, dtype=dtype),
            set_aside=lambda plan, tables, device: set_aside(plan, tables, torch.device("cuda")),
        ),
        update: dict(capturing=lambda device: here.capturing),
    }  # fmt: skip
    for where, values in replaced.items():
        for name, value in values.items():
            monkeypatch.setattr(where, name, value)
    with emulated(here) if cuda.is_emulated() else contextlib.nullcontext():
        yield here


@contextlib.contextmanager
def emulated(device):
    """The CUDA kernels read noise where it lies, and know the streams."""
    module = dispatch.compiled_module("cuda")
    allocate, upload, stream = cuda._on_the_cpu()
    module.noise_is_on_device(True)
    module.use_torch(allocate, upload, lambda index: device.streams[-1].cuda_stream)
    try:
        yield
    finally:
        module.use_torch(allocate, upload, stream)
        module.noise_is_on_device(False)
