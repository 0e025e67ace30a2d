"""What the weights are while perturbed: noise, climb, group values; and who sees them: clean(), other owners."""

import gc
import warnings
from functools import partial

import pytest
import torch
from compare import assert_same, same
from patterns import BASES, METHODS, SEED, STREAM, Training, backends, noise, train
from steps import plain
from torch import nn

import flatkern

PRECISIONS = {
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 masters": (torch.bfloat16, {"master_weights": True}),
}


def drawn(weights, sigma, round, backend):
    """`weights` with the noise of one round, by the functional op in float32, rounded once."""
    result = [w.to(torch.float32, copy=True) for w in weights]
    flatkern.perturb_(result, sigma, seed=SEED, stream=STREAM, round=round, backend=backend)
    return [r.to(w.dtype) for r, w in zip(result, weights, strict=True)]


def trainable(run, tensors):
    return [t for t, p in zip(tensors, run.net.parameters(), strict=True) if p.requires_grad]


# --- noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_noise_of_successive_rounds(precision, backend):
    """Keyed by (seed, stream, round, index), `frozen` counted but not perturbed; only perturb() advances the round."""
    dtype, options = PRECISIONS[precision]
    run = Training(noise(sigma=0.1), dtype=dtype, backend=backend, **options)
    seen = []
    for round in range(3):
        assert run.opt.param_groups[0]["round"] == round
        expected = trainable(run, drawn(run.start, 0.1, round, backend))
        run.opt.perturb()
        now = trainable(run, run.weights())
        assert_same(now, expected)
        assert_same([run.net.frozen], run.start[:1])
        assert not any(same(now, other) for other in seen)
        seen.append(now)
        run.opt.restore()
        run.opt.step()


@pytest.mark.parametrize("key", ["seed", "stream"])
def test_noise_key(key, backend):
    """Another seed or another stream is other noise."""
    for kind in ({"sigma": 0.1}, {"sigma": 0.1, "lam": 0.5}, {"sigma": 0.1, "rolling": True}):
        runs = [Training(flatkern.RWP(**kind, **own), backend=backend) for own in ({}, {key: 2**32 - 1})]
        for run in runs:
            run.opt.train() if run.opt.rolling else run.opt.perturb()
        assert not same([runs[0].net.hidden], [runs[1].net.hidden])
        assert_same([runs[0].net.frozen], [runs[1].net.frozen])


def grouped(perturb, backend, *own, make=flatkern.SGD, **options):
    """A run whose optimizer has the parameters in three groups with values of their own."""
    run = Training(None)
    params = list(run.net.parameters())
    parts = params[:3], params[3:5], params[5:]
    groups = [{"params": part} | values for part, values in zip(parts, own, strict=True)]
    run.opt = make(groups, perturb=perturb, backend=backend, **options)
    return run, parts


def split(tensors):
    return tensors[:3], tensors[3:5], tensors[5:]


def test_sigma_per_group_changes_during_training(backend):
    run, parts = grouped(noise(sigma=0.1), backend, {}, {"sigma": 0.3}, {"perturb": False})
    for round in range(2):
        expected = [
            split(drawn(run.start, group["sigma"], round, backend))[k] for k, group in enumerate(run.opt.param_groups)
        ]
        expected[2 if round == 0 else 0] = split(run.start)[2 if round == 0 else 0]
        run.opt.perturb()
        assert_same(parts[0][1:], expected[0][1:])
        assert_same(parts[1], expected[1])
        assert_same(parts[2], expected[2])
        run.opt.restore()
        run.opt.param_groups[0]["perturb"], run.opt.param_groups[2]["perturb"] = False, True
        run.opt.param_groups[1]["sigma"] = 0.0


def test_history_per_group(backend):
    """e = sigma ||w_f|| / sqrt(1 + eta F_f) z, F <- beta F + sum of g^2, per filter, or element for rank 1."""
    run, _ = grouped(noise(sigma=0.1, eta=2.0, beta=0.5), backend, {}, {}, {"eta": 0.5, "beta": 0.9}, lr=0.0)
    checked = {run.net.hidden: (2.0, 0.5), run.net.head: (0.5, 0.9), run.net.bias: (2.0, 0.5)}
    history = {p: 0.0 for p in checked}
    position = {p: k for k, p in enumerate(run.net.parameters())}
    for round in range(3):
        run.opt.perturb()
        plain_noise = [a - b for a, b in zip(drawn(run.start, 0.1, round, backend), run.start, strict=True)]
        for p, (eta, _) in checked.items():
            factor = (1 + eta * torch.as_tensor(history[p])).rsqrt()
            expected = plain_noise[position[p]] * (factor[:, None] if factor.dim() and p.dim() == 2 else factor)
            assert torch.allclose(p - run.start[position[p]], expected, rtol=1e-4, atol=1e-6)
        run.backward(round)
        for p, (_, beta) in checked.items():
            squares = p.grad.square()
            history[p] = beta * history[p] + (squares.sum(1) if p.dim() == 2 else squares)
        run.opt.step()
        run.opt.zero_grad()
        run.opt.param_groups[0]["beta"], checked[run.net.hidden], checked[run.net.bias] = 0.25, (2.0, 0.25), (2.0, 0.25)


# --- climb ------------------------------------------------------------------------------------------


def scales(method, p):
    """T_w of one parameter."""
    if isinstance(method, flatkern.ASAM) and (p.dim() >= 2 or method.all_tensors):
        return p.abs() + method.eta
    return torch.ones_like(p)


CLIMBS = [flatkern.SAM(), flatkern.ASAM(), flatkern.ASAM(eta=0.0, all_tensors=True), flatkern.ASAM(all_tensors=True)]


@pytest.mark.parametrize("method", CLIMBS, ids=repr)
def test_climb(method, backend):
    """rho per group, the norm over all that is perturbed; frozen and excluded parameters stay out of both."""
    run, parts = grouped(method, backend, {"rho": 0.3}, {"rho": 0.1}, {"perturb": False})
    run.backward(0)
    climbers = [p for p in (*parts[0], *parts[1]) if p.grad is not None]
    grads = {p: p.grad.clone() for p in climbers}
    t = {p: scales(method, p.detach()) for p in climbers}
    norm = torch.cat([(t[p] * g).flatten() for p, g in grads.items()]).norm()
    before = {p: p.detach().clone() for p in run.net.parameters()}
    run.opt.perturb()
    assert run.opt.ascent_norm.dtype == torch.float32 and run.opt.ascent_norm.dim() == 0
    assert torch.allclose(run.opt.ascent_norm, norm, rtol=1e-6)
    for p in run.net.parameters():
        rho = 0.3 if any(p is q for q in parts[0]) else 0.1
        expected = before[p] + rho * t[p] ** 2 * grads[p] / norm if p in grads else before[p]
        assert torch.allclose(p, expected, rtol=1e-6, atol=1e-7)
        assert same([p], [before[p]]) is (p not in grads)
    assert all(p.grad is None for p in run.net.parameters())
    run.opt.restore()
    run.opt.param_groups[0]["rho"] = 0.0
    run.backward(0)
    run.opt.perturb()
    assert_same(parts[0], split(run.start)[0])


@pytest.mark.parametrize(("backend", "base"), backends(BASES, lambda base: base == "SGD"), indirect=["backend"])
@pytest.mark.parametrize("name", ["SAM", "ASAM", "mSAM", "RWP", "m-RWP"])
def test_maximize(name, base, backend):
    """Maximizing the negative loss is minimizing the loss; the climb turns over too."""
    runs = []
    for maximize in (False, True):
        run = Training(None)
        options = {"lr": 0.05, "maximize": maximize}
        perturb = {"perturb": METHODS[name].make(), "backend": backend}
        if base == "Wrap":
            run.opt = flatkern.Wrap(torch.optim.SGD(run.net.parameters(), **options), **perturb)
        else:
            run.opt = getattr(flatkern, base)(run.net.parameters(), **options, **perturb)
        if maximize:
            run.net.register_forward_hook(lambda net, args, loss: -loss)
        train(run, METHODS[name].user)
        runs.append(run)
    assert_same(runs[0].weights(), runs[1].weights())


def test_bfloat16_climb_warns_once(backend):
    """With the share of weights that moved; fp32 weights, noise, and a climb of zero give no reason to."""
    for method in (flatkern.SAM(rho=1e-4), flatkern.ASAM(rho=1e-4)):
        run = Training(method, dtype=torch.bfloat16, backend=backend)
        with pytest.warns(UserWarning, match=r"\d+%") as caught:
            train(run, METHODS["SAM"].user)
        assert len([w for w in caught if "moved" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Training(flatkern.SAM(rho=1e-4), backend=backend), METHODS["SAM"].user)
        train(Training(noise(sigma=1e-4), dtype=torch.bfloat16, backend=backend), METHODS["RWP"].user)
        train(Training(flatkern.SAM(rho=0.0), dtype=torch.bfloat16, backend=backend), METHODS["SAM"].user)


# --- group values that cannot be --------------------------------------------------------------------

BAD = [
    ("RWP", "sigma", -0.1), ("RWP", "sigma", float("nan")), ("ARWP", "eta", -1.0), ("ARWP", "beta", 1.0),
    ("m-RWP", "lam", 1.5), ("m-RWP", "lam", None), ("SAM", "rho", -0.1), ("SAM", "rho", float("inf")),
    ("ASAM", "eta", -1.0), ("RWP", "seed", -1), ("RWP", "round", 2**32), ("RWP", "lam", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), BAD)
def test_bad_values(name, key, value, backend):
    """Refused when a group is made, and when a value is changed later, by the next call, before anything is written."""
    with pytest.raises((ValueError, TypeError), match=key):
        grouped(METHODS[name].make(), backend, {}, {key: value}, {})
    run = Training(METHODS[name].make(), backend=backend)
    good = run.opt.param_groups[0][key]
    train(run, METHODS[name].user, 1)
    before = run.weights()
    run.opt.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError, RuntimeError), match=key):
        METHODS[name].user(run, 1)
    run.opt.param_groups[0][key] = good
    run.opt.restore()
    assert_same(run.weights(), before)


def test_expected_pattern_is_shown_once(backend):
    run = Training(noise(sigma=0.1), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, plain, 9)
    with pytest.warns(UserWarning, match=r"perturb\(\).*step\(\)") as caught:
        train(run, plain, 25)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Training(None, backend=backend), plain, 12)
        for name in ("RWP", "SAM"):
            train(Training(METHODS[name].make(), backend=backend), METHODS[name].user, 12)
            train(Training(METHODS[name].make(), backend=backend), METHODS[name].closure, 12)


# --- who else may see the weights -------------------------------------------------------------------


def perturbed(name, backend, **options):
    run = Training(METHODS[name].make(), backend=backend, **options)
    if run.opt.rolling:
        run.opt.train()
    else:
        if name.endswith("SAM"):
            run.backward(0)
        run.opt.perturb()
    assert not same(run.weights(), run.start)
    return run


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage():
    """Makes a collection look at what these tests have made only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SOME = ("RWP", "m-RWP", "SAM", "ASAM", "rolling", "rolling ARWP")
GRAVE = [{}, {"dtype": torch.bfloat16, "master_weights": True}, {"dtype": torch.float16}, {"base": "Wrap"}]


CASES = backends([(name, options) for name in SOME for options in GRAVE], lambda name, options: not options)


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(("backend", "name", "options"), CASES, indirect=["backend"], ids=str)
def test_collected_while_perturbed(name, options, backend):
    run = perturbed(name, backend, **options)
    del run.opt
    gc.collect()
    assert_same(run.weights(), run.start)


@pytest.mark.parametrize("name", SOME)
def test_second_optimizer_of_perturbed_weights(name, backend):
    """Refused, and the first one goes on; on clean weights it is welcome."""
    run = perturbed(name, backend)
    now = run.weights()
    with pytest.raises(RuntimeError, match=r"restore\(\).*eval\(\).*step\(\)"):
        flatkern.AdamW(run.net.parameters(), backend=backend)
    with pytest.raises(RuntimeError, match=r"restore\(\).*eval\(\).*step\(\)"):
        flatkern.Wrap(torch.optim.SGD([run.net.head]), perturb=noise(), backend=backend)
    gc.collect()
    assert_same(run.weights(), now)
    run.opt.eval()
    assert_same(run.weights(), run.start)
    flatkern.AdamW(run.net.parameters(), backend=backend)


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(("backend", "name", "options"), CASES, indirect=["backend"], ids=str)
def test_clean(name, options, backend):
    """Clean inside, also when left by an exception; the same perturbed bits after, and the same step."""
    run, other = perturbed(name, backend, **options), perturbed(name, backend, **options)
    now = run.weights()
    with run.opt.clean():
        assert_same(run.weights(), run.start)
        assert not run.opt.is_perturbed
    assert run.opt.is_perturbed
    with pytest.raises(ZeroDivisionError), run.opt.clean():
        _ = 1 / 0
    assert_same(run.weights(), now)
    for r in (run, other):
        r.backward(1)
        with r.opt.clean():
            pass
        r.opt.eval()
        assert_same(r.weights(), r.start)
        with r.opt.clean():
            assert_same(r.weights(), r.start)
        assert not r.opt.is_perturbed


@pytest.mark.parametrize("name", SOME)
def test_calls_inside_clean(name, backend):
    """What would have to know which weights are meant is refused, and the perturbation is still there afterwards."""
    run = perturbed(name, backend)
    now = run.weights()
    with run.opt.clean():
        for call in (run.opt.perturb, run.opt.restore, run.opt.step):
            with pytest.raises(RuntimeError, match=r"clean\(\)|rolling"):
                call()
        assert_same(run.weights(), run.start)
    assert_same(run.weights(), now)


@pytest.mark.parametrize("name", ["RWP", "rolling"])
def test_first_perturbation_in_inference_mode(name, backend):
    """What is allocated there can be written outside."""
    run, other = (Training(METHODS[name].make(), backend=backend) for _ in range(2))
    with torch.inference_mode():
        run.opt.train() if name == "rolling" else run.opt.perturb()
        run.opt.eval()
    other.opt.param_groups[0]["round"] = run.opt.param_groups[0]["round"]
    for r in (run, other):
        train(r, METHODS[name].user)
        r.opt.eval()
    assert_same(run.weights(), other.weights())


def alive(shape):
    """How many tensors of a shape there are."""
    return sum(type(t) in (torch.Tensor, nn.Parameter) and t.shape == shape for t in gc.get_objects())


@pytest.mark.parametrize("name", ["RWP", "SAM", "rolling"])
def test_release(name, backend):
    """Frees the saved copies; refused while they are the only clean weights."""
    p = nn.Parameter(torch.randn(37, 41))
    opt = flatkern.SGD([p], lr=0.1, perturb=METHODS[name].make(), backend=backend)
    clean = p.detach().clone()

    def perturb():
        if opt.rolling:
            return opt.train()
        if name == "SAM":
            p.grad = torch.ones_like(p)
        return opt.perturb()

    without = alive(p.shape)
    for _ in range(2):
        perturb()
        moved = p.detach().clone()
        with pytest.raises(RuntimeError, match=r"restore\(\)|eval\(\)"):
            opt.release()
        assert torch.equal(p, moved)
        opt.eval()
        assert torch.equal(p, clean)
        opt.zero_grad()
        del moved
        assert alive(p.shape) == without + 1
        opt.release()
        assert alive(p.shape) == without


@pytest.mark.parametrize("name", ["RWP rounds", "m-ARWP", "mSAM", "rolling ARWP"])
def test_release_changes_no_trajectory(name, backend):
    runs = [Training(METHODS[name].make(), backend=backend) for _ in range(2)]
    for k, run in enumerate(runs):
        for t in range(3):
            train(run, METHODS[name].user, 1, start=t)
            if k:
                run.opt.eval()
                run.opt.release()
                run.opt.train()
        run.opt.eval()
    assert_same(runs[0].weights(), runs[1].weights())


WRITES = {
    "perturb": lambda run: run.opt.perturb(),
    "restore": lambda run: run.opt.restore(),
    "step": lambda run: run.opt.step(),
    "clean": lambda run: run.opt.clean().__enter__(),
    "perturb_": lambda run: flatkern.perturb_([run.net.head], 0.1, seed=0, round=0),
    "restore_": lambda run: flatkern.restore_([run.net.head], [torch.ones_like(run.net.head)]),
}


@pytest.mark.parametrize("write", WRITES)
def test_autograd_sees_every_write(write, backend):
    """A backward through weights that were written after the forward raises; gradients would be wrong in silence."""
    run = Training(noise(sigma=0.1), backend=backend)
    if write in ("restore", "clean"):
        run.opt.perturb()
    if write == "step":
        run.backward(0)
    loss = run.loss(1)
    WRITES[write](run)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- running statistics -----------------------------------------------------------------------------


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.9).add_(x.detach().mean((0, 2)), alpha=0.1)
        return x / 2


NORMS = {
    "BatchNorm": partial(nn.BatchNorm1d, 3),
    "momentum=None": partial(nn.BatchNorm1d, 3, momentum=None),
    "no statistics": partial(nn.BatchNorm1d, 3, track_running_stats=False),
    "InstanceNorm": partial(nn.InstanceNorm1d, 3, track_running_stats=True),
    "custom": Custom,
}


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_running_stats(norm):
    """Batch statistics as ever, the running ones of the first pass only; back to normal afterwards."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), NORMS[norm]())
    opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.SAM(rho=0.5))
    x = torch.randn(6, 2, 4)
    model(x).pow(3).mean().backward()
    opt.perturb()
    first = {name: value.clone() for name, value in model.named_buffers()}
    assert any(value.any() for value in first.values()) or norm == "no statistics"
    with flatkern.frozen_running_stats(model):
        inside = model(x)
        inside.pow(3).mean().backward()
    assert all(torch.equal(value, first[name]) for name, value in model.named_buffers())
    assert torch.equal(inside, model(x))
    second = dict(model.named_buffers())
    assert norm == "no statistics" or any(not torch.equal(value, first[name]) for name, value in second.items())
    model.eval()
    with flatkern.frozen_running_stats(model):
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_frozen_running_stats_of_sync_batch_norm():
    """In eval mode, where it needs no process group: running statistics are used inside as outside."""
    model = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3)).eval()
    model[1].running_mean += 0.5
    x = torch.randn(6, 4)
    with flatkern.frozen_running_stats(model):
        inside = model(x)
    assert torch.equal(inside, model(x))
    model.train()
    with pytest.raises(ZeroDivisionError), flatkern.frozen_running_stats(model):
        with flatkern.frozen_running_stats(model):
            pass
        _ = 1 / 0
    assert model[1].track_running_stats
