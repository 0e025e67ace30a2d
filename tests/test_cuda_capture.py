"""CUDA graphs of the CUDA backend, emulated: what a captured call needs, what it has of its own, what is refused.

A graph is a tape of launches (capturing.py). Whole training steps are in test_capturable.py.
"""

import copy
import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from capturing import Tape
from compare import assert_within
from emulated import CUDA, every_op, needs_emulation
from test_backends import assert_same_bits, make, run
from walks import richest

import flatkern
from flatkern import cuda
from flatkern.ops import OPS

pytestmark = needs_emulation

# Short rows, and long ones, whose sums need the memory of a call.
SHAPES = [(6, 16), (2, 33000), (29,), (0,)]


def captured(op, values, monkeypatch):
    """A tape of one call, which has had no effect."""
    tape = Tape(monkeypatch, runs=False)
    with tape:
        run(op, "cuda", values)
    return tape


def warmed(op, shapes=SHAPES, words=None):
    """Arguments of a call like one that has run."""
    values = make(op, shapes, "float32", richest(op) if words is None else words)
    run(op, "cuda", copy.deepcopy(values))
    return values


def move_on(values, round_):
    """Other numbers in the tensors that are there."""
    if values.get("noise") is not None:
        values["noise"][2] = round_
    for name in ("grads", "clean_grads", "means", "lrs", "sigmas", "component", "grad_scale", "clip"):
        value = values.get(name)
        for t in value if isinstance(value, list) else [] if value is None else [value]:
            t.mul_(0.75)


def assert_replays(op, tape, values, round_=1):
    """A replay does what a call would."""
    move_on(values, round_)
    want = copy.deepcopy(values)
    tape.replay()
    assert_within(op, values, run(op, "eager", want))


@pytest.fixture
def device(emulated, monkeypatch):
    """Memory and streams as a GPU has them: the current stream may change, and everything that is given is noted."""
    here = SimpleNamespace(stream=1, uploads=0, allocated=[])
    allocate, upload, _ = cuda._on_the_cpu()

    def noted_upload(index, data):
        here.uploads += 1
        return upload(index, data)

    def noted_allocate(index, size):
        here.allocated.append(allocate(index, size))
        return here.allocated[-1]

    emulated.use_torch(noted_allocate, noted_upload, lambda index: here.stream)
    yield here
    emulated.use_torch(*cuda._on_the_cpu())


# What a replay does.


@every_op
def test_a_captured_call_replays(op, emulated, monkeypatch):
    """With what is in its tensors then: noise, rates and scales on the device, gradients, weights. A capture does
    nothing, and memory of the graph's own may hold anything in the beginning."""
    emulated.noise_is_on_device(True)
    values = warmed(op, words=f"{richest(op)} lrs sigmas")
    before = copy.deepcopy(values)
    tape = captured(op, values, monkeypatch)
    assert_same_bits(op, values, before)
    for round_ in range(2):
        assert_replays(op, tape, values, round_)


@every_op
def test_graphs_and_calls_share_nothing(op, device, emulated, monkeypatch):
    """Two graphs and a call outside, of the same shapes, launch by launch in turn, as if at the same time."""
    emulated.noise_is_on_device(True)
    runs = [warmed(op) for _ in range(3)]
    for k, values in enumerate(runs):  # each has sums of its own
        for name in ("params", "backups", "masters", "grads", "clean_grads"):
            for t in values.get(name) or []:
                t.mul_(1 + k)
    tapes = [captured(op, values, monkeypatch) for values in runs[:2]]
    outside = []
    emulated.watch(lambda *launch: outside.append(lambda: emulated.run_again(*launch)))
    emulated.launch_nothing(True)
    run(op, "cuda", runs[2])
    emulated.launch_nothing(False)
    emulated.watch(None)
    want = [run(op, "eager", copy.deepcopy(values)) for values in runs]
    # Outside there is no launch that clears, and no memory that torch allocates.
    lanes = [*(tape.calls for tape in tapes), [None] * (len(tapes[0].calls) - len(outside)) + outside]
    for launches in zip(*lanes, strict=True):
        for launch in filter(None, launches):
            launch()
    for got, wanted in zip(runs, want, strict=True):
        assert_within(op, got, wanted)


def test_what_is_cleared(emulated, monkeypatch):
    """A launch more where something is counted off: rows that are cut, steps, totals."""
    rows, short, vector = [(6, 16), (2, 33000)], [(6, 16), (9,)], [(40000,)]
    for name, words, shapes, more in [
        ("restore_", "", rows, 0),
        ("fill_normal_", "", rows, 0),
        ("sgd_update_", "momentum_buffers", rows, 0),
        ("sgd_update_", "backups noise", short, 0),
        ("sgd_update_", "backups noise", rows, 1),
        ("perturb_gaussian_", "backups", short, 0),
        ("perturb_gaussian_", "backups", vector, 1),
        ("filter_norms_", "", rows, 1),
        ("gradient_norm_", "", short, 1),
        ("adamw_update_", "", short, 1),
    ]:
        op = OPS[name]
        values = warmed(op, shapes, words)
        counts = []
        for capturing in (False, True):
            before = emulated.launch_count()
            emulated.capturing(capturing)
            run(op, "cuda", values)
            emulated.capturing(False)
            counts.append(emulated.launch_count() - before)
        assert counts[1] - counts[0] == more, (name, words, shapes)


# Tables.


def test_tables_that_are_not_there_are_refused(emulated, device):
    """Nothing is uploaded inside a capture. The same call outside is the remedy, on whatever stream."""
    op = OPS["adamw_update_"]
    values = make(op, [(6, 33), (11,)], "float32", richest(op))
    before, count, versions = copy.deepcopy(values), emulated.launch_count(), [p._version for p in values["params"]]
    emulated.capturing(True)
    with pytest.raises(
        emulated.LaunchError, match=r"^adamw_update_: .* tables are not on the device yet; run the same steps on the"
    ):
        run(op, "cuda", values)
    assert_same_bits(op, values, before)
    assert versions == [p._version for p in values["params"]]
    assert (emulated.launch_count(), device.uploads, device.allocated) == (count, 0, [])
    emulated.capturing(False)
    run(op, "cuda", copy.deepcopy(values))
    uploads, device.stream = device.uploads, 2
    emulated.capturing(True)
    run(op, "cuda", values)
    emulated.capturing(False)
    assert device.uploads == uploads == 1
    assert_within(op, values, run(op, "eager", before))


def test_streams_have_tables_of_their_own(device):
    """Nobody says that one of them waits for what another one uploads."""
    op = OPS["restore_"]
    for device.stream in (1, 2, 1, 2):
        run(op, "cuda", make(op, [(3, 47)], "float32", ""))
    assert device.uploads == 2


def test_tables_of_a_graph_stay(device, monkeypatch):
    """Whatever is called afterwards; of other calls the last 32 are kept, however many graphs there are."""
    op = OPS["filter_norms_"]
    graphs = []
    for size in range(1500, 1540):
        values = warmed(op, [(2, size)])
        graphs.append((captured(op, values, monkeypatch), values))
    for size in range(2000, 2040):
        warmed(op, [(2, size)])
    gc.collect()
    torch.full((100_000,), 77.0)
    for tape, values in graphs:
        assert_replays(op, tape, values)
    before = device.uploads
    for values in [warmed(op, [(2, size)]) for size in (*range(1500, 1540), *range(2008, 2040))]:
        captured(op, values, monkeypatch)
    assert device.uploads == before
    warmed(op, [(2, 2007)])
    assert device.uploads == before + 1


def test_memory_of_a_graph_is_allocated_in_its_capture(device, monkeypatch):
    """Torch then takes it from the graph's pool, and keeps it there; nobody else holds it."""
    op = OPS["gradient_norm_"]
    values = warmed(op)
    outside = len(device.allocated)
    captured(op, values, monkeypatch)
    captured(op, values, monkeypatch)
    assert len(device.allocated) == outside + 2
    assert len({t.data_ptr() for t in device.allocated}) == outside + 2
    run(op, "cuda", values)
    assert len(device.allocated) == outside + 2


def test_memory_that_cannot_be_had_in_a_capture(device, emulated):
    """The error is torch's; nothing is launched, and the next call does everything."""
    op = OPS["gradient_norm_"]
    values = warmed(op)
    allocate, upload, stream = cuda._on_the_cpu()

    def refuse(index, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    emulated.use_torch(refuse, upload, stream)
    emulated.capturing(True)
    count = emulated.launch_count()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(op, "cuda", values)
    assert emulated.launch_count() == count
    emulated.use_torch(allocate, upload, stream)
    run(op, "cuda", values)
    emulated.capturing(False)
    assert_within(op, values, run(op, "eager", copy.deepcopy(values)))


# Kernels.


@every_op
def test_a_kernel_that_is_not_loaded_is_refused(op, emulated):
    """The same call outside loads what a capture launches, and what only a capture does."""
    values = warmed(op)
    emulated.forget_kernels()
    before, count = copy.deepcopy(values), emulated.launch_count()
    emulated.capturing(True)
    with pytest.raises(
        emulated.LaunchError,
        match=r"a CUDA graph captures a kernel that is not loaded on device 0 yet; run the same steps before the "
        r"capture, or call flatkern.warm_up\(optimizer\)",
    ):
        run(op, "cuda", values)
    assert_same_bits(op, values, before)
    assert emulated.launch_count() == count and emulated.loaded_kernels() == 0
    emulated.capturing(False)
    shapes = [(7, 16), (2, 33008 + 8 * CUDA.index(op))]  # Adam and AdamW share tables
    values = warmed(op, shapes)
    loaded = emulated.loaded_kernels()
    emulated.capturing(True)
    run(op, "cuda", values)
    emulated.capturing(False)
    assert 0 < emulated.loaded_kernels() == loaded < emulated.load_kernels()


def test_warm_up_loads_all_kernels(emulated, caplog):
    """On the optimizer's device, whichever is current, and changes nothing else."""
    p = torch.nn.Parameter(torch.ones(3, 41))
    opt = flatkern.AdamW([p], lr=0.5, perturb=flatkern.RWP(), backend="cuda", capturable=True)
    p.grad = torch.ones_like(p)
    opt.step()
    before, state = p.detach().clone(), copy.deepcopy(opt.state_dict()["state"])
    emulated.forget_kernels()
    count, launched = emulated.load_kernels(), emulated.launch_count()
    emulated.forget_kernels()
    caplog.set_level(logging.INFO, logger="flatkern")
    for _ in range(2):
        assert flatkern.warm_up(opt) == count == emulated.loaded_kernels() > 80
    assert f"warm_up: {count} kernels loaded on cpu in" in caplog.text
    assert emulated.launch_count() == launched and torch.equal(p, before)
    assert all(torch.equal(a, state[0][key]) for key, a in opt.state_dict()["state"][0].items())
    emulated.set_current_device(1)
    assert emulated.loaded_kernels() == 0
    assert flatkern.warm_up(opt) == count and emulated.loaded_kernels() == 0
    emulated.set_current_device(0)
    emulated.capturing(True)
    opt.step()


def test_a_frozen_device_is_not_loaded_for(emulated):
    emulated.forget_kernels()
    assert flatkern.warm_up(flatkern.SGD([torch.nn.Parameter(torch.ones(3))], backend="eager")) == 0
    assert emulated.loaded_kernels() == 0


# Launches that fail, and what only a host can do.


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_launch_that_fails_in_a_capture(failing, emulated, monkeypatch):
    """Of the three that there are: one clears, the norms of long rows, their noise. What comes later is right."""
    emulated.noise_is_on_device(True)
    op = OPS["perturb_gaussian_"]
    values = warmed(op, words="backups")
    before, left = copy.deepcopy(values), [failing]

    def fail(*launch):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("no more launches")

    emulated.capturing(True)
    emulated.launch_nothing(True)
    emulated.watch(fail)
    with pytest.raises(RuntimeError, match="no more launches"):
        run(op, "cuda", values)
    emulated.watch(None)
    emulated.launch_nothing(False)
    emulated.capturing(False)
    assert_same_bits(op, values, before)
    assert_replays(op, captured(op, values, monkeypatch), values)
    assert_within(op, run(op, "cuda", copy.deepcopy(before)), run(op, "eager", before))


@pytest.mark.parametrize("name", ["adam_update_", "adamw_update_"])
def test_steps_on_the_host_are_not_captured(name, emulated):
    op = OPS[name]
    values = warmed(op)
    before, count = copy.deepcopy(values), emulated.launch_count()
    emulated.steps_are_on_host(True)
    emulated.capturing(True)
    with pytest.raises(
        emulated.LaunchError, match="steps are on the CPU, which a captured graph cannot count; move them beside the"
    ):
        run(op, "cuda", values)
    assert_same_bits(op, values, before)
    assert emulated.launch_count() == count


def test_numbers_of_the_host_are_those_of_the_capture(emulated, monkeypatch):
    """As torch has it for its own: lists of numbers, and noise on the CPU."""
    op = OPS["perturb_gaussian_"]
    values = warmed(op, words="backups")
    tape = captured(op, values, monkeypatch)
    want = run(op, "eager", copy.deepcopy(values))
    values["noise"][2] += 1
    values["sigma"][0] *= 2
    tape.replay()
    for p, q in zip(values["params"], want["params"], strict=True):
        torch.testing.assert_close(p, q)
