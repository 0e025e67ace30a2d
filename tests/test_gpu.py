"""What only a GPU can show: the kernels as compiled, the noise's bits on its arithmetic, graphs, no waiting.

Everything else about them is in test_triton.py, in Triton's interpreter, and in test_cuda.py, emulated. Skipped where
torch sees no GPU. Where it sees one, Triton that is not live is a failure of each of its tests; CUDA kernels that are
not live are a reason to skip theirs, and a failure with FLATKERN_GPU_CUDA=1, as `make gpu` sets it where there is an
nvcc. With FLATKERN_GPU_RUN=1, which `make gpu` always sets, a GPU that is not seen is a failure, too. With
FLATKERN_GPU_DRY=1 and TRITON_INTERPRET=1 the bodies run on the CPU, on little (gpu_stand_in.py), those for the CUDA
kernels with FLATKERN_CUDA_EMULATION.
"""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import cases
import gpu_cases
import gpu_stand_in
import pytest
import torch
from capturing import METHODS as CAPTURED
from capturing import TRAINED, Run, assert_close, capture, into, nobody_waits, trained
from compare import assert_same, assert_ulp, assert_within, bits
from conftest import INTERPRETING

import flatkern
from flatkern.dispatch import compiled_module, resolve
from flatkern.ops import OPS

DRY, RUN, NVCC = (os.environ.get(f"FLATKERN_GPU_{name}") == "1" for name in ("DRY", "RUN", "CUDA"))
DEVICE = "cpu" if DRY else "cuda"
if not (torch.cuda.is_available() or DRY or RUN):
    pytest.skip("torch sees no GPU", allow_module_level=True)

# Arithmetic with what is infinite, or not a number, on which NumPy would remark.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def refusal(backend):
    """Why a backend cannot run here; None if it can."""
    if DRY and backend == "triton":
        return None if INTERPRETING else "FLATKERN_GPU_DRY=1 needs TRITON_INTERPRET=1"
    if not (DRY or torch.cuda.is_available()):
        return f"torch {torch.__version__} sees no GPU"
    state = flatkern.backends()[backend]
    where = "this is a dry run" if DRY else "torch sees a GPU"
    return None if state["live"] else f"{where}, but {backend} is not live: {state['reason']}; {state['remedy']}"


BACKENDS = ("triton", "cuda")
REFUSALS = {backend: refusal(backend) for backend in BACKENDS}


@pytest.fixture(autouse=True)
def gpu(backend, monkeypatch):
    """The GPU, or what stands in for it."""
    if REFUSALS[backend] is not None:
        if backend == "cuda" and not NVCC and (DRY or torch.cuda.is_available()):
            pytest.skip(REFUSALS[backend])
        pytest.fail(REFUSALS[backend], pytrace=False)
    with gpu_stand_in.installed(monkeypatch) if DRY else contextlib.nullcontext():
        yield


CASES = {backend: gpu_cases.cases_by(backend) for backend in BACKENDS}
SHAPES, COLUMNS, TURNS = {}, {}, 3
if DRY:  # a call of each op, the one with most words, of few elements
    for backend, found in CASES.items():
        richest = sorted((case for case in found if case.repeats), key=lambda case: -len(case.words.split()))
        ops = dict.fromkeys(case.op.name for case in found)
        CASES[backend] = [next(case for case in richest if case.op.name == name) for name in ops]
    SHAPES = {"shapes": [(3, 16), (24,), (), (0,), (1, 8208)]}
    COLUMNS, TURNS = {"columns": 64}, 2
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def calls(chosen=lambda case: True):
    """Each case by every backend that has its op."""
    pairs = [(case, backend) for backend in BACKENDS for case in CASES[backend] if chosen(case)]
    return pytest.mark.parametrize("case, backend", pairs, ids=str)


def call(op, values, backend, device=DEVICE):
    cases.call(resolve(op.name, device, backend), op, values)
    return values


def copied(values, device=None):
    """Other memory, on `device` or where it was, laid out as it is: strides, and what is between elements."""
    if isinstance(values, dict):
        return {name: copied(value, device) for name, value in values.items()}
    if isinstance(values, list):
        return [copied(value, device) for value in values]
    if not isinstance(values, torch.Tensor):
        return values
    whole = torch.empty(0, dtype=torch.uint8, device=values.device).set_(values.untyped_storage())
    there = whole.to(device or values.device, copy=True).untyped_storage()
    layout = values.storage_offset(), values.size(), values.stride()
    return torch.empty(0, dtype=values.dtype, device=there.device).set_(there, *layout)


# The kernels.


@calls()
def test_matches_eager(case, backend):
    """Eager on the CPU, which is the definition: there every operation is as IEEE has it."""
    got, want = case.make(DEVICE, **SHAPES), case.make("cpu", **SHAPES)
    call(case.op, want, "eager", "cpu")
    assert_within(case.op, copied(call(case.op, got, backend), "cpu"), want)


@calls()
def test_same_bits_again(case, backend):
    given = case.make(DEVICE, **SHAPES)
    first, second = (call(case.op, copied(given), backend) for _ in range(2))
    for name, a in first.items():
        tensors = zip(a, second[name], strict=True) if isinstance(a, list) else [(a, second[name])]
        assert all(torch.equal(bits(x), bits(y)) for x, y in tensors if isinstance(x, torch.Tensor)), name


@pytest.mark.parametrize("backend", ["triton"])
def test_every_radius_and_angle(backend):
    """rsqrt is an approximation here, and fma is one instruction."""
    import circle

    circle.assert_every_radius_and_angle(DEVICE, 1024)


@pytest.mark.parametrize("backend", ["cuda"])
def test_as_many_normals_as_have_every_radius_and_angle(backend):
    """The CUDA kernels have no other way to them: two million words, each with one of 65536 of both."""
    shape, words = (32, 48) if DRY else (256, 16384), dict(index=[3], offset=[0])
    got, want = torch.zeros(shape, device=DEVICE), torch.zeros(shape)
    resolve("fill_normal_", DEVICE, backend)([got], torch.tensor([1, 2, 3]), **words)
    resolve("fill_normal_", "cpu")([want], torch.tensor([1, 2, 3]), **words)
    assert_ulp("normals", got.cpu(), want)


@every_backend
def test_beyond_two_billion_elements(backend):
    """Offsets need 64 bits: the last rows of a tensor of more than 2^31 elements are the ones they should be."""
    rows, columns = (16 if DRY else 2**20) + 8, 2048
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * columns:
        pytest.skip("the GPU has not enough free memory")
    big = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    saved = None
    try:
        resolve("fill_normal_", DEVICE, backend)([big], torch.tensor([1, 2, 3]), index=[4], offset=[0])
        last = torch.zeros(8, columns, dtype=torch.bfloat16)
        resolve("fill_normal_", "cpu", "eager")([last], torch.tensor([1, 2, 3]), index=[4], offset=[rows - 8])
        assert_ulp("the last rows", big[-8:].cpu(), last)
        saved = torch.empty_like(big)
        resolve("restore_", DEVICE, backend)([saved], [big])
        assert torch.equal(saved, big)
    finally:
        del big, saved
        gc.collect()
        torch.cuda.empty_cache()


# Launches, graphs, waiting.


@pytest.fixture
def launched(backend, request):
    """How many kernels a backend has launched."""
    if backend == "cuda":
        return compiled_module("cuda").launch_count
    names = request.getfixturevalue("launches")
    return lambda: len(names)


@calls(lambda case: case.repeats)
def test_launches_do_not_grow_with_tensors(case, backend, launched):
    counts = []
    for times in (1, 2 if DRY else 5):
        before = launched()
        call(case.op, case.make(DEVICE, times, **SHAPES), backend)
        counts.append(launched() - before)
    assert counts[0] == counts[1] > 0


@every_backend
@pytest.mark.parametrize("name", gpu_cases.REPLAYED)
def test_a_captured_step_replays(name, backend):
    """Rolling: noise, gradients and device scalars are read where they lie, whatever they are at the replay."""
    case = gpu_cases.replayed(name)
    op, values = case.op, case.make(DEVICE, **SHAPES)
    expected = copied(values)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(op, copied(values), backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with into(graph, side):
        call(op, values, backend)
    for round_ in range(TURNS):
        for given in (values, expected):
            given["noise"][2] = round_
            given["grad_scale"].fill_(0.5 + round_)
            given["lrs"].mul_(0.5)
            given["sigmas"].mul_(1.5)
            for g in given["grads"]:
                g.mul_(-0.75)
        graph.replay()
        call(op, expected, backend)
    for key in op.writes:
        for a, b in zip(values[key] or [], expected[key] or [], strict=True):
            assert_ulp(key, a.cpu(), b.cpu())


@every_backend
@pytest.mark.parametrize("method", TRAINED)
def test_a_step_never_waits_for_the_device(method, backend):
    """And the weights are eager's, within what the matrix products of two devices differ by."""
    method = TRAINED[method]
    for got, want in zip(trained(method, DEVICE, backend, nobody_waits), trained(method, "cpu", "eager"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# Whole steps as graphs.


def training(rule, method, backend, capturable, **options):
    return Run(rule, method, capturable, device=DEVICE, backend=backend, **COLUMNS, **options)


def two_trainings(rule, method, backend, **options):
    """For graphs, and with numbers of the host."""
    return (training(rule, method, backend, capturable, **options) for capturable in (True, False))


CAPTURES = [(r, m, s) for s in ("warm", "its own") for m in CAPTURED for r in ("SGD", "AdamW")]
if DRY:  # every method once, with each rule and on each stream
    CAPTURES = [CAPTURES[(k * 2 * len(CAPTURED) + 2 * k + k // 2 % 2) % len(CAPTURES)] for k in range(len(CAPTURED))]


@every_backend
@pytest.mark.parametrize("rule, method, stream", CAPTURES)
def test_a_captured_training_step(rule, method, stream, backend):
    """Forward, backward, perturb() and step() in one graph, with schedules between the replays, go where a host's
    optimizer goes; so do steps outside, whose gradients are elsewhere, before the first replay and between two."""
    run, python = two_trainings(rule, method, backend)
    warm, steps = (1, 3) if DRY else (3, 6)
    graph = capture(run, warm, stream)
    python.train(warm)
    for step in range(steps):
        if step in (0, 3):
            run.train(1)
        else:
            graph.replay()
            run.schedule()
        python.train(1)
        assert_close(run, python)
    if run.opt.rolling:
        before = run.tensors()
        run.opt.eval()
        run.opt.train()  # the sigma that the replay drew with
        assert_same(run.tensors(), before)


@every_backend
def test_every_replay_draws_fresh_noise(backend):
    """At learning rate 0 the weights of a rolling step are the clean ones and its noise: never the same."""
    run = training("SGD", "rolling ARWP", backend, True, schedule=False)
    for group in run.opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0, eta=0.0)
    graph, seen = capture(run, warm=2), []
    for _ in range(4):
        graph.replay()
        seen.append(run.net.long.detach().clone())
    assert len({t.sum().item() for t in seen}) == 4
    assert run.opt.param_groups[0]["round"].item() == 2 + 4
    run.opt.eval()
    assert torch.equal(run.net.long, training("SGD", "plain", backend, False).net.long)


@every_backend
def test_a_number_reaches_the_graph_at_the_next_call(backend):
    """And what is filled in place, at the next replay."""
    run, python = two_trainings("AdamW", "RWP", backend, schedule=False)
    graph = capture(run, warm=2)
    python.train(2)
    for r in (run, python):
        r.opt.param_groups[0]["lr"] = 0.5
        r.train(1)
    graph.replay()
    python.train(1)
    assert_close(run, python)
    run.opt.param_groups[1]["lr"].fill_(0.25)
    python.opt.param_groups[1]["lr"] = 0.25
    graph.replay()
    python.train(1)
    assert_close(run, python)


@every_backend
def test_two_graphs_of_one_optimizer(backend):
    """Taken one after the other; what both replay in turn is one training."""
    run, python = two_trainings("SGD", "m-RWP", backend)
    graphs = [capture(run, warm=1), capture(run, warm=1)]
    python.train(2)
    for step in range(TURNS + 1):
        graphs[step % 2].replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)


@every_backend
def test_more_plans_than_are_kept_after_a_capture(backend):
    """The tables and the memory of a graph outlive any number of other calls."""
    run, python = two_trainings("AdamW", "rolling ARWP", backend)
    graph = capture(run, warm=2)
    python.train(2)
    for size in range(1, 4 if DRY else 40):
        values = cases.adamw_update_([(size,)], torch.float32, DEVICE, "backups noise history")
        call(OPS["adamw_update_"], values, backend)
    torch.cuda.empty_cache()
    for _ in range(TURNS):
        graph.replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)


@pytest.mark.parametrize("backend", ["cuda"])
def test_more_than_four_kilobytes_of_arguments_in_a_graph(backend):
    """Some drivers crash there (openxla/xla#19252), hence another process."""
    script = Path(__file__).with_name("gpu_large_graph.py")
    done = subprocess.run([sys.executable, str(script), backend], capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"


@every_backend
@pytest.mark.parametrize("method", list(CAPTURED)[:: 2 if DRY else 1])
def test_a_capturable_step_never_waits(method, backend):
    """Numbers of the host that move in are copied without waiting."""
    run = training("AdamW", method, backend, True).train(2)
    with nobody_waits():
        run.train(1)
        for group in run.opt.param_groups:
            group["lr"] = 0.02
        run.train(1)


@every_backend
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_cannot_be_captured_is_refused(backend):
    """A host's optimizer, which would repeat itself; a first step, whose tables are not there. Both work afterwards."""
    for capturable, text in ((False, "use flatkern.SGD, Adam or AdamW with capturable"), (True, "run the same steps")):
        odd = torch.nn.Parameter(torch.ones(77 + capturable, 13, device=DEVICE))
        opt = flatkern.SGD([odd], lr=0.5, backend=backend, capturable=capturable)
        odd.grad = torch.ones_like(odd)
        with pytest.raises(RuntimeError, match=text), into(torch.cuda.CUDAGraph()):
            opt.step()
        torch.cuda.synchronize()
        assert odd.eq(1).all()
        opt.step()
        assert odd.eq(0.5).all()


@every_backend
def test_a_compiled_network_in_a_captured_step(backend):
    """torch.compile makes the forward and the backward pass, the graph takes everything."""
    run, python = two_trainings("AdamW", "m-RWP", backend)
    run.net.forward = torch.compile(run.net.forward, backend="eager" if DRY else "inductor")
    graph = capture(run, warm=2)
    python.train(2)
    for _ in range(TURNS):
        graph.replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)
    torch._dynamo.reset()
