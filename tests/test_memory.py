"""Memory as stated, by counting the bytes of every tensor that is alive: state, scratch, and nothing that grows."""

import gc

import pytest
import torch
from compare import copies
from steps import begins_clean, perturb
from torch.utils._python_dispatch import TorchDispatchMode

import flatkern
from flatkern import ASAM, RWP, SAM, SGD, AdamW, Wrap
from flatkern.cost import cost

SHAPES = [(40, 30), (25, 4, 3, 3), (50,)]
N = sum(torch.Size(s).numel() for s in SHAPES)
FILTERS = 40 + 25 + 50  # ARWP's history: one float per filter, per element for tensors of rank 1
SLACK = 256  # norms, flags and noise keys: numbers, not a copy of anything

METHODS = {
    "plain": None,
    "RWP": RWP(),
    "ARWP": RWP(eta=1.0),
    "m-RWP": RWP(lam=0.5),
    "m-ARWP": RWP(lam=0.5, eta=1.0),
    "SAM": SAM(),
    "ASAM": ASAM(),
    "rolling": RWP(rolling=True),
    "rolling ARWP": RWP(rolling=True, eta=1.0),
}
BASES = {
    "SGD": lambda params, **own: SGD(params, momentum=0.9, **own),
    "AdamW": AdamW,
    "Wrap": lambda params, **own: Wrap(torch.optim.SGD(params, momentum=0.9), **own),
}
MOMENTS = {"SGD": 1, "AdamW": 2, "Wrap": 1}
PRECISIONS = {"fp32": (torch.float32, {}), "bf16": (torch.bfloat16, {}),
              "masters": (torch.bfloat16, {"master_weights": True})}  # fmt: skip
CASES = [(m, b, p) for m in METHODS for b in BASES for p in PRECISIONS if (b, p) != ("Wrap", "masters")]

pytestmark = pytest.mark.filterwarnings("ignore:.*ascends on")


@pytest.fixture(autouse=True)
def only_ours():
    """What is alive before a test is out of the collector's sight, which also makes looking fast."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def thaw():
    yield
    gc.unfreeze()


def live():
    """Bytes of all new tensors that Python can reach, each memory once; and how many tensors there are."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(sizes.values()), len(tensors)


def model(dtype):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def give(params, missing=None):
    for k, p in enumerate(params):
        p.grad = None if k == missing else torch.randn_like(p)


def drop(params):
    for p in params:
        p.grad = None


def step(opt, params, look=lambda: None, missing=None):
    """One step of the method, after which no gradient is left; `look` is called where the optimizer keeps some."""
    perturb(opt, lambda: give(params, missing))
    if opt.is_perturbed and not opt.rolling:
        look()
    give(params)
    opt.step()
    drop(params)


@pytest.mark.parametrize(("method", "base", "precision"), CASES)
def test_bytes(method, base, precision, backend):
    """State and scratch after a step, the first gradient of m-RWP while it waits, and nothing after `release()`."""
    dtype, own = PRECISIONS[precision]
    params = model(dtype)
    item = dtype.itemsize
    start, _ = live()
    opt = BASES[base](params, perturb=METHODS[method], backend=backend, **own)
    assert live()[0] - start < SLACK
    opt.train()
    waiting = []
    for _ in range(3):
        step(opt, params, lambda: waiting.append(live()[0] - start))
    masters = precision == "masters"
    state = N * MOMENTS[base] * (4 if masters else item) + 4 * N * masters + 4 * FILTERS * ("ARWP" in method)
    saved_copy = 0 if method == "plain" or masters else N * item
    assert 0 <= live()[0] - start - state - saved_copy < SLACK
    if waiting:
        first = N * item if METHODS[method] is not None and getattr(METHODS[method], "lam", None) else 0
        assert 0 <= waiting[-1] - state - saved_copy - first < SLACK
    opt.eval()
    opt.release()
    assert 0 <= live()[0] - start - state < SLACK
    step(opt, params)
    opt.eval()
    del opt
    assert live()[0] - start < SLACK


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_cost_states_the_same_bytes(method, precision, backend):
    """`flatkern.cost` and the count agree: state, and scratch with the gradient that m-RWP keeps."""
    dtype, own = PRECISIONS[precision]
    params = model(dtype)
    start, _ = live()
    opt = SGD(params, momentum=0.9, perturb=METHODS[method], backend=backend, **own)
    seen = []
    for _ in range(2):
        step(opt, params, lambda: seen.append(live()[0] - start))
    stated = cost(opt)
    most = max([*seen, live()[0] - start])
    assert 0 <= most - stated.state_bytes - stated.scratch_bytes < SLACK


@pytest.mark.covering(1)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_grows(method, base, backend):
    """50 steps, with gradients that come and go, leave as many bytes, tensors and Python objects as 5 do."""
    params = model(torch.float32)
    opt = BASES[base](params, perturb=METHODS[method], backend=backend)
    opt.train()

    def some(steps):
        for k in range(steps):
            step(opt, params, missing=k % 4)
            opt.eval()
            opt.train()
        return *live(), len(gc.get_objects())

    before = some(5)
    after = some(50)
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 50


def test_excluded_parameters_cost_nothing(backend):
    """Frozen ones and groups with perturb=False have no saved copy; frozen ones no state either."""
    params = model(torch.float32)
    params[0].requires_grad_(False)
    groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
    start, _ = live()
    opt = SGD(groups, momentum=0.9, perturb=RWP(), backend=backend)
    opt.perturb()
    give(params[1:])
    opt.step()
    drop(params)
    assert 0 <= live()[0] - start - 4 * (900 + 50) - 4 * 900 < SLACK


def test_rounds_keep_one_sum(backend):
    """mSAM: between shards one set of gradients waits, however many shards there were."""
    params = model(torch.float32)
    opt = SGD(params, perturb=SAM(), backend=backend)
    start, _ = live()
    for shard in range(4):
        give(params)
        opt.perturb()
        if shard:
            assert all(p.grad is not None for p in params)
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.add_(1)
        opt.restore()
        assert 0 <= live()[0] - start - 8 * N < SLACK  # the saved copy and the sum
    opt.step()
    drop(params)
    assert 0 <= live()[0] - start - 4 * N < SLACK


@pytest.mark.parametrize("change", ["layout", "dtype"])
def test_scratch_is_replaced_not_added(change, backend):
    params = model(torch.float32)
    start, _ = live()
    opt = SGD(params, perturb=RWP(), backend=backend)
    step(opt, params)
    for p in params:
        if change == "dtype":
            p.data = p.data.bfloat16()
        elif p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    step(opt, params)
    shrunk = 2 * N if change == "dtype" else 0  # of the weights, and the saved copy with them
    assert 0 <= live()[0] - start + shrunk - (4 * N - shrunk) < SLACK


def test_release_while_perturbed_is_refused(backend):
    """The scratch holds the clean weights then."""
    for method, way_back in ((RWP(), "restore"), (RWP(rolling=True), "eval")):
        params = model(torch.float32)
        opt = SGD(params, perturb=method, backend=backend)
        clean = copies(params)
        opt.train() if method.rolling else opt.perturb()
        with pytest.raises(RuntimeError, match=rf"release: the weights are perturbed; call {way_back}\(\) first"):
            opt.release()
        opt.eval()
        assert all(torch.equal(p, c) for p, c in zip(params, clean, strict=True))


class Allocations(TorchDispatchMode):
    """Bytes of the results that are new memory."""

    def __init__(self):
        super().__init__()
        self.bytes, self.known = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in before:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("precision", ["fp32", "masters"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_allocates_no_weights(method, precision):
    """From the second step on the compiled backend works in what is there: page faults cost more than the math."""
    if not flatkern.backends()["cpp"]["live"]:
        pytest.skip(flatkern.backends()["cpp"]["reason"])
    dtype, own = PRECISIONS[precision]
    params = model(dtype)
    opt = AdamW(params, perturb=METHODS[method], backend="cpp", max_grad_norm=1.0, **own)
    opt.train()
    for _ in range(2):
        step(opt, params)
    if opt.method is not None and not opt.rolling:
        if begins_clean(opt):
            give(params)
        with Allocations() as first:
            opt.perturb()
        assert first.bytes < SLACK
    give(params)
    with Allocations() as second:
        opt.step()
    assert second.bytes < SLACK
