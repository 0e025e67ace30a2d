"""What only a GPU can show: the kernels as compiled, the noise's bits on its arithmetic, graphs, no waiting.

Everything else about them is in test_triton.py, in Triton's interpreter.
"""

import copy
import gc

import cases
import pytest
import torch
from capturing import METHODS as CAPTURED
from capturing import Run
from compare import assert_ulp, assert_within, bits
from test_noise import strict_angles, strict_radii

import flatkern
from flatkern.dispatch import resolve
from flatkern.ops import OPS

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if not flatkern.backends()["triton"]["live"]:
    pytest.skip(flatkern.backends()["triton"]["reason"], allow_module_level=True)

import triton
import triton.language as tl
from flatkern.triton_kernels import noise

TRITON = [op for op in OPS.values() if "triton" in op.backends.split()]
VARIANTS = [(op, words) for op in TRITON for words in cases.VARIANTS[op.name]]
every_variant = pytest.mark.parametrize("op, words", VARIANTS, ids=lambda x: getattr(x, "name", x))
# Every way of walking memory; each kind of tensor and each mixture of dtypes compiles anew, so few of each.
SHAPES = [(3, 5), (0,), (64, 3, 3, 3), (), (33,), (4, 0), (2, 17), (3, 70001), (5, 9), (300000,)]
EVEN = [(64, 64, 3, 3), (256, 64), (64,), (8, 8192), (2, 65536), (4096,)]


def make(op, shapes, dtype, words, device="cuda"):
    return getattr(cases, op.name)(shapes, cases.DTYPES[dtype], device, words)


def run(op, backend, values):
    cases.call(resolve(op.name, "cpu" if backend == "cpp" else "cuda", backend), op, values)
    return values


def moved(values, device):
    """A copy on another device, in the same layout."""
    if isinstance(values, dict):
        return {name: moved(value, device) for name, value in values.items()}
    if isinstance(values, list):
        return [moved(value, device) for value in values]
    return values.to(device, copy=True) if isinstance(values, torch.Tensor) else values


# The kernels.


@pytest.mark.parametrize("shapes, dtype", [(SHAPES, "mixed"), (EVEN, "float32")], ids=["any", "multiples of 16 bytes"])
@every_variant
def test_matches_eager(op, words, shapes, dtype):
    """Eager on the CPU, which is the definition: there every operation is as IEEE has it."""
    got, want = make(op, shapes, dtype, words), make(op, shapes, dtype, words, "cpu")
    cases.call(resolve(op.name, "cpu", "eager"), op, want)
    assert_within(op, moved(run(op, "triton", got), "cpu"), want)


@every_variant
def test_same_bits_again(op, words):
    given = make(op, SHAPES, "mixed", words)
    first, second = (run(op, "triton", copy.deepcopy(given)) for _ in range(2))
    for name, a in first.items():
        tensors = zip(a, second[name], strict=True) if isinstance(a, list) else [(a, second[name])]
        assert all(torch.equal(bits(x), bits(y)) for x, y in tensors if isinstance(x, torch.Tensor)), name


@triton.jit
def circle_kernel(radii, cosines, sines, COUNT: tl.constexpr):
    """Radius of every low half of a word, and cosine and sine of every high half."""
    half = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(radii + half, noise.radius(half.to(tl.uint32)))
    cos, sin = noise.angle(half.to(tl.uint32) << 16)
    tl.store(cosines + half, cos)
    tl.store(sines + half, sin)


def test_every_radius_and_angle():
    """rsqrt is an approximation here, and fma is one instruction."""
    found = [torch.zeros(65536, device="cuda") for _ in range(3)]
    circle_kernel[(64,)](*found, COUNT=1024, enable_fp_fusion=False)
    for name, got, want in zip(("r", "cos", "sin"), found, (strict_radii(), *strict_angles()), strict=True):
        assert_ulp(name, got.cpu(), torch.from_numpy(want))


def test_beyond_two_billion_elements():
    """Offsets need 64 bits: the last rows of a tensor of more than 2^31 elements are the ones they should be."""
    rows, columns = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * columns:
        pytest.skip("the GPU has not enough free memory")
    big = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    fill = resolve("fill_normal_", "cuda", "triton")
    fill([big], torch.tensor([1, 2, 3]), index=[4], offset=[0])
    last = torch.zeros(8, columns, dtype=torch.bfloat16)
    resolve("fill_normal_", "cpu", "eager")([last], torch.tensor([1, 2, 3]), index=[4], offset=[rows - 8])
    assert_ulp("the last rows", big[-8:].cpu(), last)
    saved = torch.empty_like(big)
    resolve("restore_", "cuda", "triton")([saved], [big])
    assert torch.equal(saved, big)
    del big, saved
    gc.collect()
    torch.cuda.empty_cache()


# Launches, graphs, waiting.


@every_variant
def test_launches_do_not_grow_with_tensors(op, words, launches):
    counts = []
    for times in (1, 5):
        launches.clear()
        run(op, "triton", make(op, EVEN * times, "float32", words.replace("offset", "")))
        counts.append(len(launches))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["sgd_update_", "adamw_update_"])
def test_a_captured_step_replays(name):
    """Rolling: noise, gradients and device scalars are read where they lie, whatever they are at the replay."""
    op, words = OPS[name], "backups noise grad_scale found_inf history momentum_buffers lrs sigmas"
    values = make(op, EVEN, "float32", words)
    values["noise"] = values["noise"].cuda()
    expected = moved(values, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(op, "triton", moved(values, "cuda"))
        run(op, "triton", moved(values, "cuda"))
        graph = torch.cuda.CUDAGraph()
        warm = moved(values, "cuda")
        run(op, "triton", warm)
        with torch.cuda.graph(graph, stream=side):
            run(op, "triton", values)
    torch.cuda.current_stream().wait_stream(side)
    for round_ in range(3):
        for given in (values, expected):
            given["noise"][2] = round_
            given["grad_scale"].fill_(0.5 + round_)
            given["lrs"].mul_(0.5)
            given["sigmas"].mul_(1.5)
            for g in given["grads"]:
                g.mul_(-0.75)
        graph.replay()
        run(op, "triton", expected)
    for key in op.writes:
        for a, b in zip(values[key] or [], expected[key] or [], strict=True):
            assert_ulp(key, a.cpu(), b.cpu())


METHODS = {
    "RWP": flatkern.RWP(0.02),
    "ARWP, rolling": flatkern.RWP(0.02, eta=0.1, rolling=True),
    "m-RWP": flatkern.RWP(0.02, lam=0.5),
    "SAM": flatkern.SAM(0.05),
    "ASAM": flatkern.ASAM(0.5),
}


def trained(method, device, backend, watch=False):
    """Weights after four steps of a small network; with `watch` the last two may not wait for the device."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8))
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    model, x, y = model.to(device), x.to(device), y.to(device)
    opt = flatkern.SGD(model.parameters(), lr=0.05, momentum=0.9, perturb=method, backend=backend, max_grad_norm=1.0)

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    opt.train()
    for step in range(4):
        if watch and step == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step(closure)
        finally:
            if step == 3:
                torch.cuda.set_sync_debug_mode("default")
    opt.eval()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_never_waits_for_the_device(method):
    """And the weights are eager's, within what the matrix products of two devices differ by."""
    for got, want in zip(trained(method, "cuda", "triton", watch=True), trained(method, "cpu", "eager"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# Whole steps as graphs.


def capture(run, warm, stream=None):
    """A graph of one training step, after `warm` steps on another stream; a capture runs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.train(warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side if stream == "warm" else None):
        run.step()
    return graph


def assert_close(a, b):
    """Two devices' worth of matrix products apart; noise of another round would be a hundred times that."""
    for k, (s, t) in enumerate(zip(a.tensors(), b.tensors(), strict=True)):
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-5, msg=lambda text, k=k: f"tensor {k}: {text}")
    for g, h in zip(a.opt.param_groups, b.opt.param_groups, strict=True):
        for key in {"lr", "sigma", "round"} & g.keys():
            assert float(g[key]) == float(h[key]), key


@pytest.mark.parametrize("stream", ["warm", "its own"])
@pytest.mark.parametrize("method", CAPTURED)
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_captured_training_step(rule, method, stream):
    """Forward, backward, perturb() and step() in one graph, with schedules between the replays, go where a host's
    optimizer goes; so do steps outside, whose gradients are elsewhere, before the first replay and between two."""
    run, python = Run(rule, method, True, device="cuda"), Run(rule, method, False, device="cuda")
    graph = capture(run, warm=3, stream=stream)
    python.train(3)
    for step in range(6):
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
        assert all(torch.equal(s, t) for s, t in zip(run.tensors(), before, strict=True))


def test_every_replay_draws_fresh_noise():
    """At learning rate 0 the weights of a rolling step are the clean ones and its noise: never the same."""
    run = Run("SGD", "rolling ARWP", True, schedule=False, device="cuda")
    for group in run.opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0, eta=0.0)
    graph, seen = capture(run, warm=2), []
    for _ in range(4):
        graph.replay()
        seen.append(run.net.long.detach().clone())
    assert len({t.sum().item() for t in seen}) == 4
    assert run.opt.param_groups[0]["round"].item() == 2 + 4
    run.opt.eval()
    assert torch.equal(run.net.long, Run("SGD", "plain", False, device="cuda").net.long)


def test_a_number_reaches_the_graph_at_the_next_call():
    """And what is filled in place, at the next replay."""
    run, python = (Run("AdamW", "RWP", c, schedule=False, device="cuda") for c in (True, False))
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


def test_two_graphs_of_one_optimizer():
    """Taken one after the other; what both replay in turn is one training."""
    run, python = (Run("SGD", "m-RWP", c, device="cuda") for c in (True, False))
    graphs = [capture(run, warm=1), capture(run, warm=1)]
    python.train(2)
    for step in range(4):
        graphs[step % 2].replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)


def test_more_plans_than_are_kept_after_a_capture():
    """The tables and the memory of a graph outlive any number of other calls."""
    run, python = (Run("AdamW", "rolling ARWP", c, device="cuda") for c in (True, False))
    graph = capture(run, warm=2)
    python.train(2)
    op = OPS["adamw_update_"]
    for size in range(1, 40):
        cases.call(resolve(op.name, "cuda", "triton"), op, make(op, [(size,)], "float32", "backups noise history"))
    torch.cuda.empty_cache()
    for _ in range(3):
        graph.replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)


@pytest.mark.parametrize("method", CAPTURED)
def test_a_capturable_step_never_waits(method):
    """Numbers of the host that move in are copied without waiting."""
    run = Run("AdamW", method, True, device="cuda").train(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train(1)
        for group in run.opt.param_groups:
            group["lr"] = 0.02
        run.train(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_cannot_be_captured_is_refused():
    """A host's optimizer, which would repeat itself; a first step, whose tables are not there. Both work afterwards."""
    for capturable, text in ((False, "use flatkern.SGD, Adam or AdamW with capturable"), (True, "run the same steps")):
        odd = torch.nn.Parameter(torch.ones(77 + capturable, 13, device="cuda"))
        opt = flatkern.SGD([odd], lr=0.5, backend="triton", capturable=capturable)
        odd.grad = torch.ones_like(odd)
        with pytest.raises(RuntimeError, match=text), torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()
        torch.cuda.synchronize()
        assert odd.eq(1).all()
        opt.step()
        assert odd.eq(0.5).all()


def test_a_compiled_network_in_a_captured_step():
    """torch.compile makes the forward and the backward pass, the graph takes everything."""
    run, python = (Run("AdamW", "m-RWP", c, device="cuda") for c in (True, False))
    run.net.forward = torch.compile(run.net.forward)
    graph = capture(run, warm=3)
    python.train(3)
    for _ in range(3):
        graph.replay()
        run.schedule()
        python.train(1)
        assert_close(run, python)
    torch._dynamo.reset()
