"""Checkpoints: resuming in a new process is bit-identical, torch's checkpoints load and continue, nothing is lost."""

import copy
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import networks
import pytest
import torch
from conftest import BACKENDS
from covering import also
from steps import step
from test_optim import parameters
from torch.distributed.checkpoint import state_dict as dcp

import flatkern

pytestmark = pytest.mark.filterwarnings("ignore:.*ascends on")

BATCHES = networks.batches(10)
BEFORE, AFTER = 3, 2  # steps before and after the checkpoint

METHODS = {
    "plain": lambda: None,
    "RWP": lambda: flatkern.RWP(sigma=0.05, seed=3, stream=5),
    "ARWP": lambda: flatkern.RWP(sigma=0.05, eta=2.0, beta=0.9),
    "m-RWP": lambda: flatkern.RWP(sigma=0.05, lam=0.4),
    "m-ARWP": lambda: flatkern.RWP(sigma=0.05, lam=0.4, eta=2.0),
    "SAM": lambda: flatkern.SAM(rho=0.1),
    "ASAM": lambda: flatkern.ASAM(rho=0.3),
    "rolling": lambda: flatkern.RWP(sigma=0.05, rolling=True),
    "rolling ARWP": lambda: flatkern.RWP(sigma=0.05, eta=2.0, rolling=True),
}
BASES = {
    "SGD": lambda params, **own: flatkern.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, **own),
    "AdamW": lambda params, **own: flatkern.AdamW(params, lr=1e-2, weight_decay=0.1, **own),
    "Wrap": lambda params, **own: flatkern.Wrap(torch.optim.SGD(params, lr=0.05, momentum=0.9), **own),
}
PRECISIONS = {"fp32": (torch.float32, {}), "bf16": (torch.bfloat16, {}),
              "masters": (torch.bfloat16, {"master_weights": True})}  # fmt: skip
CASES = [(m, b, p) for m in METHODS for b in BASES for p in PRECISIONS if not (b == "Wrap" and p == "masters")]
TORCH_KEYS = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Wrap": {"momentum_buffer"}}


def make(method="plain", base="SGD", precision="fp32", backend=None, seed=0):
    """A network and its optimizer, in the two states that a script has before it loads a checkpoint."""
    dtype, own = PRECISIONS[precision]
    net, _ = networks.twins(seed=seed)
    net.to(dtype)
    return net, BASES[base](net.parameters(), perturb=METHODS[method](), backend=backend, **own)


def train(net, opt, start, count):
    """The pattern of the optimizer's method; every batch depends on the step alone."""

    def backward(i):
        net(BATCHES[i % len(BATCHES)]).backward()

    for t in range(start, start + count):
        clean = t + 1 if getattr(opt.method, "lam", None) is not None else t
        step(opt, partial(backward, t), partial(backward, clean))
        opt.zero_grad()
    opt.eval()


def snapshot(net, opt):
    """Everything that a run can differ in, as plain values."""
    return {
        "weights": OrderedDict((n, p.detach().clone()) for n, p in net.named_parameters()),
        "state": copy.deepcopy(opt.state_dict()["state"]),
        "rounds": [g.get("round") for g in opt.param_groups],
    }


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a == b


def resume(path):
    """In a new process: load every checkpoint of `path`, continue, and write where it got to."""
    saved = torch.load(path, weights_only=True)
    torch.set_num_threads(saved["threads"])  # forward and backward may round otherwise
    results = {}
    for k, (case, states) in enumerate(saved["checkpoints"].items()):
        net, opt = make(*case.split("/"), backend=saved["backend"], seed=1)
        pairs = list(zip((net, opt), states, strict=True))
        # The model or the optimizer first: scripts do both.
        for owner, state in pairs if k % 2 else reversed(pairs):
            owner.load_state_dict(state)
        train(net, opt, BEFORE, AFTER)
        results[case] = snapshot(net, opt)
    torch.save(results, path)


OTHERS = [(backend, share) for backend in BACKENDS for share in (0, 1) if (backend, share) != (BACKENDS[-1], 0)]


@pytest.mark.parametrize(("backend", "share"), [(BACKENDS[-1], 0), *also(*OTHERS)], indirect=["backend"])
def test_resume_in_a_new_process(share, backend, tmp_path):
    """Save, load in a new process, continue: bit-identical to not having stopped; the file is weights_only-safe."""
    checkpoints, expected = {}, {}
    # Eager noise is slow, and the code around it is the same: one base for every method, one method for every base.
    cases = [c for c in CASES if backend == "cpp" or c[1:] == ("SGD", "fp32") or c[0] == "rolling ARWP"]
    cases = random.Random(0).sample(cases, len(cases))[share::2]
    for case in map("/".join, cases):
        net, opt = make(*case.split("/"), backend=backend)
        train(net, opt, 0, BEFORE)
        checkpoints[case] = copy.deepcopy((net.state_dict(), opt.state_dict()))
        train(net, opt, BEFORE, AFTER)
        expected[case] = snapshot(net, opt)
    path = tmp_path / "checkpoint.pt"
    torch.save({"backend": backend, "threads": torch.get_num_threads(), "checkpoints": checkpoints}, path)
    folders = [str(Path(__file__).parent), str(Path(flatkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "import sys, test_state; test_state.resume(sys.argv[1])", str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = torch.load(path, weights_only=False)
    assert [case for case in expected if not equal(results[case], expected[case])] == []


@pytest.mark.parametrize(("method", "base", "precision"), CASES)
def test_state_is_torchs_and_can_be_flattened(method, base, precision):
    """Torch's keys, plus `master` and `history` where there are any; tensors and numbers only; no scratch."""
    net, opt = make(method, base, precision)
    assert not opt.state
    train(net, opt, 0, 2)
    keys = TORCH_KEYS[base] | ({"master"} if precision == "masters" else set())
    for p in net.parameters():
        state = opt.state.get(p, {})
        if p.grad is not None or state:
            assert set(state) - {"history"} == (keys if set(state) & TORCH_KEYS[base] else set(state) & {"master"})
            assert all(isinstance(v, (torch.Tensor, int, float, bool, dict)) for v in state.values())
    used = [p for name, p in net.named_parameters() if name not in ("frozen", "unused", "sometimes")]
    expected = keys | ({"history"} if "ARWP" in method else set())
    assert {frozenset(opt.state[p]) for p in used} == {frozenset(expected)}
    for p in used:
        if "history" in expected:
            assert opt.state[p]["history"].shape == ((len(p),) if p.dim() > 1 else (p.numel(),))
            assert opt.state[p]["history"].dtype == torch.float32


# --- checkpoints of other optimizers --------------------------------------------------------------


def test_group_keys_that_torch_lacks_keep_their_values():
    """And those it has are taken: the checkpoint decides the base rule, this script the method."""
    params = parameters()
    groups = [{"params": params[:2], "sigma": 0.3, "perturb": False}, {"params": params[2:]}]
    opt = flatkern.SGD(groups, lr=0.1, perturb=flatkern.RWP(sigma=0.2, lam=0.4, seed=5, stream=6))
    base = torch.optim.SGD([{"params": parameters()[:2], "lr": 0.7, "tag": 1}, {"params": parameters()[2:]}], lr=0.6)
    opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["tag"] == 1
    kept = [[g[key] for key in ("sigma", "perturb", "lam", "seed", "stream", "round")] for g in opt.param_groups]
    assert kept == [[0.3, False, 0.4, 5, 6, 0], [0.2, True, 0.4, 5, 6, 0]]
    assert [g["lr"] for g in opt.param_groups] == [0.7, 0.6]


class Odd(torch.optim.Optimizer):
    """A base with state of every kind: float32 beside bfloat16 weights, int32, bool, a Python number."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state |= {"sum": torch.zeros_like(p, dtype=torch.float32), "count": torch.zeros(2, dtype=torch.int32)}
                state |= {"seen": torch.tensor(True), "calls": 0}
            state["sum"] += p.grad.float() / 3
            state["count"] += 70001
            state["calls"] += 1
            p -= 0.1 * state["sum"].to(p.dtype)


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "Wrap"])
def test_dtypes_survive(wrapped):
    params = [torch.nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))]
    twin = [torch.nn.Parameter(params[0].detach().clone())]

    def build(params):
        method = flatkern.RWP(eta=1.0)
        return flatkern.Wrap(Odd(params), method) if wrapped else flatkern.SGD(params, momentum=0.9, perturb=method)

    opt = build(params)
    opt.perturb()
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    if not wrapped:
        extra = {"sum": torch.rand(3, 4), "count": torch.full((2,), 70001, dtype=torch.int32), "calls": 1}
        opt.state[params[0]] |= extra | {"seen": torch.tensor(True)}
    state = opt.state[params[0]]
    loaded = build(twin)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert equal(loaded.state[twin[0]], dict(state))
    assert loaded.state[twin[0]]["history"].dtype == torch.float32


def kind(opt):
    """What tells the methods apart that share group keys: m-RWP has a lam, ARWP an eta."""
    groups = opt.param_groups
    return [(g["lam"] is None, g["eta"] > 0) for g in groups] if isinstance(opt.method, flatkern.RWP) else None


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("loaded", METHODS)
def test_checkpoint_of_another_method(loaded, base):
    """It loads and trains on, and the method stays what the script says; a history that is missing is named once."""
    for saved in METHODS:
        net, opt = make(saved, base)
        train(net, opt, 0, 2)
        other, into = make(loaded, base)
        before = kind(into)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            into.load_state_dict(opt.state_dict())
        assert kind(into) == before, saved
        missing = [w for w in caught if "no ARWP history; it starts empty" in str(w.message)]
        assert len(missing) == ("ARWP" in loaded and "ARWP" not in saved), saved
        train(other, into, 2, 2)
        conv = into.state[other.get_parameter("conv.weight")]
        assert "momentum_buffer" in conv
        assert "history" in conv or "ARWP" not in loaded


def test_loading_copies(backend):
    """Training on leaves the source as it was, and a refused checkpoint leaves the optimizer as it was."""
    net, opt = make("ARWP", backend=backend)
    train(net, opt, 0, 2)
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved)
    other, into = make("ARWP", backend=backend)
    into.load_state_dict(saved)
    train(other, into, 2, 2)
    assert equal(saved["state"], frozen["state"])
    into.load_state_dict(frozen)
    before = snapshot(other, into)
    train(net, opt, 2, 1)
    assert equal(snapshot(other, into), before)
    for groups in ([], [{**frozen["param_groups"][0], "params": [0]}]):
        with pytest.raises(ValueError, match="load_state_dict: "):
            into.load_state_dict({"state": {}, "param_groups": groups})
    assert equal(snapshot(other, into), before)


# --- masters -------------------------------------------------------------------------------------


def masters(opt, net):
    return {n: opt.state[p]["master"].clone() for n, p in net.named_parameters() if "master" in opt.state.get(p, {})}


def test_masters_are_dropped_where_none_are_used():
    net, opt = make("RWP", "SGD", "masters")
    train(net, opt, 0, 2)
    for precision in ("bf16", "fp32"):
        other, into = make("RWP", "SGD", precision)
        into.load_state_dict(opt.state_dict())
        assert not masters(into, other)
        assert into.state[other.get_parameter("conv.weight")]["momentum_buffer"].dtype == torch.float32
        train(other, into, 2, 2)
    other, into = make("RWP", "SGD", "masters")
    plain_net, plain = make("RWP", "SGD", "bf16")
    train(plain_net, plain, 0, 2)
    other.load_state_dict(plain_net.state_dict())
    into.load_state_dict(plain.state_dict())
    train(other, into, 2, 2)
    assert masters(into, other).keys() == masters(opt, net).keys()


@pytest.mark.parametrize("method", ["plain", "RWP", "SAM", "rolling"])
def test_master_of_an_overwritten_parameter_is_made_again(method, backend):
    """What others write into a weight stays; a master whose weight is what we wrote keeps its extra bits."""
    net, opt = make(method, "SGD", "masters", backend)
    train(net, opt, 0, 2)
    for group in opt.param_groups:
        group["lr"] = 0.0
    kept = masters(opt, net)
    overwritten = net.get_parameter("conv.weight")
    with torch.no_grad():
        overwritten.copy_(torch.full_like(overwritten, 0.625))
    net.load_state_dict(copy.deepcopy(net.state_dict()))  # the same values: their masters are still good
    train(net, opt, 2, 1)
    assert torch.equal(overwritten, torch.full_like(overwritten, 0.625))
    now = masters(opt, net)
    assert torch.equal(now["conv.weight"], torch.full_like(now["conv.weight"], 0.625))
    rest = kept.keys() - {"conv.weight"}
    assert all(torch.equal(now[name], kept[name]) for name in rest)
    assert any(not torch.equal(kept[n], net.get_parameter(n).float()) for n in rest)  # there are extra bits to lose


def test_loading_into_other_weights_keeps_them(backend):
    """Only the optimizer is loaded: the masters of the checkpoint belong to weights that are gone."""
    net, opt = make("RWP", "SGD", "masters", backend)
    train(net, opt, 0, 2)
    saved = copy.deepcopy(opt.state_dict())
    train(net, opt, 2, 2)
    weights = copy.deepcopy(net.state_dict())
    opt.load_state_dict(saved)
    opt.param_groups[0]["lr"] = 0.0
    train(net, opt, 4, 1)
    assert equal(net.state_dict(), weights)


# --- in the middle of a cycle --------------------------------------------------------------------

PERTURBED = [("RWP", "SGD", "fp32"), ("RWP", "AdamW", "masters"), ("SAM", "Wrap", "bf16"),
             ("rolling", "SGD", "masters"), ("rolling", "Wrap", "fp32"), ("m-RWP", "SGD", "fp32")]  # fmt: skip


def into_perturbed(net, opt):
    if opt.rolling:
        opt.train()
    else:
        if not isinstance(opt.method, flatkern.RWP) or opt.method.lam is not None:
            net(BATCHES[0]).backward()
        opt.perturb()
    assert opt.is_perturbed


@pytest.mark.parametrize(("method", "base", "precision"), PERTURBED)
def test_load_while_perturbed(method, base, precision, backend):
    """The perturbation ends: what others wrote since stays, every other weight is restored, bit for bit."""
    net, opt = make(method, base, precision, backend)
    train(net, opt, 0, 2)
    saved, clean = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    into_perturbed(net, opt)
    assert not equal(net.state_dict(), clean)
    with torch.no_grad():
        net.get_parameter("conv.weight").fill_(0.25)
    opt.load_state_dict(saved)
    assert not opt.is_perturbed
    clean["conv.weight"] = torch.full_like(clean["conv.weight"], 0.25)
    assert equal(net.state_dict(), clean)
    assert equal(opt.state_dict()["state"], saved["state"])
    opt.eval()
    assert equal(net.state_dict(), clean)
    net.zero_grad()
    train(net, opt, 2, 1)


def test_load_model_and_optimizer_while_perturbed(backend):
    """The whole checkpoint, in either order, as a script does that recovers from NaN: as if nothing had been on."""
    for order in (0, 1):
        net, opt = make("RWP", "SGD", "masters", backend)
        train(net, opt, 0, 2)
        states = copy.deepcopy((net.state_dict(), opt.state_dict()))
        train(net, opt, 2, 2)
        expected = snapshot(net, opt)
        into_perturbed(net, opt)
        pairs = list(zip((net, opt), states, strict=True))
        for owner, state in pairs if order else reversed(pairs):
            owner.load_state_dict(state)
        train(net, opt, 2, 2)
        assert equal(snapshot(net, opt), expected), order


SAVING = {
    "state_dict": lambda net, opt: opt.state_dict(),
    "pickle or deepcopy": lambda net, opt: pickle.dumps(opt),
    "deepcopy": lambda net, opt: copy.deepcopy((net, opt)),
    "add_param_group": lambda net, opt: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("call", SAVING)
@pytest.mark.parametrize(("method", "base", "precision"), PERTURBED)
def test_saving_is_refused_in_the_middle(method, base, precision, call):
    """On perturbed weights, naming the way back; while gradients are pending too. Nothing changes, and it goes on."""
    net, opt = make(method, base, precision)
    train(net, opt, 0, 1)
    into_perturbed(net, opt)
    noisy, groups = copy.deepcopy(net.state_dict()), len(opt.param_groups)
    way_back = "eval()" if opt.rolling else "restore()"
    with pytest.raises(RuntimeError, match=f"{call}: the weights are perturbed; call {re.escape(way_back)} first"):
        SAVING[call](net, opt)
    assert opt.is_perturbed
    assert equal(net.state_dict(), noisy)
    if opt.rolling:
        opt.eval()
    else:
        net(BATCHES[0]).backward()
        opt.restore()
        with pytest.raises(RuntimeError, match=f"{call}: gradients of an unfinished step are pending; call step"):
            SAVING[call](net, opt)
        opt.release()
    assert len(opt.param_groups) == groups
    SAVING[call](net, opt)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize(("method", "base", "precision"), [*PERTURBED, ("m-ARWP", "Wrap", "fp32")])
def test_copies_are_equal_and_independent(how, method, base, precision):
    net, opt = make(method, base, precision)
    train(net, opt, 0, 2)
    twin_net, twin = how((net, opt))
    before = snapshot(net, opt)
    train(twin_net, twin, 2, 2)
    assert equal(snapshot(net, opt), before)
    train(net, opt, 2, 2)
    assert equal(snapshot(net, opt), snapshot(twin_net, twin))
    assert twin.cycle is not opt.cycle
    assert {id(p) for g in twin.param_groups for p in g["params"]} == {id(p) for p in twin_net.parameters()}


# --- distributed checkpointing, schedulers, hooks ------------------------------------------------


DISTRIBUTED = [("RWP", "SGD", "fp32"), ("m-ARWP", "AdamW", "fp32"), ("rolling ARWP", "SGD", "fp32"),
               ("rolling", "AdamW", "masters"), ("rolling", "Wrap", "fp32"), ("ARWP", "Wrap", "fp32"),
               ("SAM", "Wrap", "fp32")]  # fmt: skip


@pytest.mark.parametrize(("method", "base", "precision"), DISTRIBUTED)
def test_distributed_checkpoint_round_trip(method, base, precision):
    """It creates the state by a step with lr 0, which changes nothing; loaded, the run is as if uninterrupted."""
    dtype, own = PRECISIONS[precision]
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)

    def build():
        # Flattening wants the same keys for every parameter, so each has a gradient in every step here.
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(48, 3))
        net.to(dtype)
        return net, BASES[base](net.parameters(), perturb=METHODS[method](), **own)

    def run(net, opt, start, steps):
        train(lambda batch: net(batch.image.to(dtype)).square().mean(), opt, start, steps)

    net, opt = build()
    run(net, opt, 0, 3)
    saved = copy.deepcopy((net.state_dict(), dcp.get_optimizer_state_dict(net, opt, options=options)))
    run(net, opt, 3, 2)
    other, into = build()
    fresh = copy.deepcopy(other.state_dict())
    dcp.get_optimizer_state_dict(other, into, options=options)
    assert equal(other.state_dict(), fresh)
    assert not into.is_perturbed
    assert [g.get("round", 0) for g in into.param_groups] == [0]
    other.load_state_dict(saved[0])
    dcp.set_optimizer_state_dict(other, into, saved[1], options=options)
    run(other, into, 3, 2)
    assert equal(snapshot(other, into), snapshot(net, opt))


@pytest.mark.parametrize("base", BASES)
def test_groups_stay_shared_after_loading(base):
    """A scheduler made before load_state_dict, on the wrapper or on its base, changes the lr that steps use."""
    net, opt = make("RWP", base)
    owner = opt.base if base == "Wrap" else opt
    scheduler = torch.optim.lr_scheduler.LambdaLR(owner, lambda t: float(t < 2))
    train(net, opt, 0, 1)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert owner.param_groups is opt.param_groups
    assert owner.state is opt.state
    scheduler.step()
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [0.0]
    before = copy.deepcopy(net.state_dict())
    train(net, opt, 1, 1)
    assert equal(net.state_dict(), before)


@pytest.mark.parametrize("base", BASES)
def test_state_dict_hooks(base):
    """Each fires once, with the optimizer it was registered on; a hook may replace the dictionary."""
    net, opt = make("RWP", base)
    train(net, opt, 0, 1)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(("save", o)))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, state: {**state, "param_groups": [
        {**g, "lr": 0.125} for g in state["param_groups"]]})  # fmt: skip
    opt.register_load_state_dict_post_hook(lambda o: calls.append(("load", o)))
    saved = opt.state_dict()
    assert saved["extra"] == 1
    opt.load_state_dict(saved)
    assert [g["lr"] for g in opt.param_groups] == [0.125]
    assert [(name, o is opt) for name, o in calls] == [("save", True), ("load", True)]
