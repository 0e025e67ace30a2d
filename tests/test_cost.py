"""`flatkern.cost` states the floors: bytes per parameter, their multiple of the base, op calls, memory.

And those calls go where they should: a named backend serves all of them, falling back to eager is said once.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import step
from test_errors import METHODS, cycle, fill
from test_errors import make as in_two_buckets

import flatkern
from flatkern import ASAM, RWP, SAM, SGD, Adam, AdamW, dispatch
from flatkern.ops import OPS

N = 64 * 48
BF16 = {"dtype": torch.bfloat16, "master_weights": True}

# What must be read and written, in bytes per float32 parameter for SGD with momentum and for AdamW. The plain base:
# read w, g and the moments, write w and the moments: 20 and 28. m: RWP with a mixed gradient reads a second one.
FLOORS = {
    "plain": (None, {}, 20, 28, 1.00, 1.00),
    "plain, bf16 + master": (None, BF16, 20, 28, 1.00, 1.00),
    "RWP rolling": (RWP(rolling=True), {}, 24, 32, 1.20, 1.14),
    "ARWP rolling": (RWP(rolling=True, eta=1.0), {}, 24, 32, 1.20, 1.14),
    "RWP rolling, bf16 + master": (RWP(rolling=True), BF16, 20, 28, 1.00, 1.00),
    "RWP": (RWP(), {}, 32, 40, 1.60, 1.43),
    "ARWP": (RWP(eta=1.0), {}, 32, 40, 1.60, 1.43),
    "m-RWP": (RWP(lam=0.5), {}, 36, 44, 1.80, 1.57),
    "m-ARWP": (RWP(lam=0.5, eta=1.0), {}, 36, 44, 1.80, 1.57),
    "SAM": (SAM(), {}, 40, 48, 2.00, 1.71),
    "ASAM": (ASAM(), {}, 44, 52, 2.20, 1.86),
    "SAM, bf16 + master": (SAM(), BF16, 30, 38, 1.50, 1.36),
    "mixed SAM": (SAM(lam=0.5), {}, 44, 52, 2.20, 1.86),
    "SAM every 5 steps": (SAM(interval=5), {}, 24, 32, 1.20, 1.14),
    "GSAM": (flatkern.GSAM(), {}, 52, 60, 2.60, 2.14),
    "Friendly-SAM": (flatkern.FriendlySAM(), {}, 52, 60, 2.60, 2.14),
    "LookSAM": (flatkern.LookSAM(), {}, 34.4, 42.4, 1.72, 1.51),
    "Momentum-SAM": (flatkern.MomentumSAM(), {}, 40, 48, 2.00, 1.71),
    "Momentum-SAM rolling": (flatkern.MomentumSAM(rolling=True), {}, 36, 44, 1.80, 1.57),
    "Momentum-SAM rolling, bf16 + master": (flatkern.MomentumSAM(rolling=True), BF16, 34, 42, 1.70, 1.50),
    "RWP rolling, absolute": (RWP(rolling=True, scale="absolute"), {}, 32, 40, 1.60, 1.43),
}


def make(rule, method, dtype=torch.float32, shapes=((64, 48),), **own):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return rule(params, perturb=method, **({"momentum": 0.9} if rule is SGD else {}), **own)


@pytest.mark.parametrize("row", FLOORS)
def test_floors(row):
    method, own, sgd, adamw, sgd_multiple, adamw_multiple = FLOORS[row]
    for rule, floor, base, multiple in ((SGD, sgd, 20, sgd_multiple), (AdamW, adamw, 28, adamw_multiple),
                                        (Adam, adamw, 28, adamw_multiple)):  # fmt: skip
        stated = flatkern.cost(make(rule, method, **own))
        assert stated.parameters == N
        assert stated.bytes_moved == round(floor * N)
        assert stated.base_bytes == base * N
        assert round(stated.multiple_of_base, 2) == multiple


@pytest.mark.parametrize("row", FLOORS)
def test_memory(row):
    """The saved copy is 4 bytes per parameter, with masters none; m-RWP keeps a gradient, as SAM's kin that mix do;
    ARWP a float per filter; Friendly-SAM two means, of which one is saved; LookSAM a direction."""
    method, own, *_ = FLOORS[row]
    for rule, moments in ((SGD, 1), (AdamW, 2)):
        stated = flatkern.cost(make(rule, method, **own))
        history = 4 * 64 if "ARWP" in row else 0
        kept = 4 * N if row in ("Friendly-SAM", "LookSAM") else 0
        assert stated.state_bytes == 4 * moments * N + (4 * N if own else 0) + history + kept
        copy = 0 if method is None or own else 4 * N
        more = row.startswith("m-") or row in ("mixed SAM", "GSAM", "Friendly-SAM", "LookSAM")
        assert stated.scratch_bytes == copy + (4 * N if more else 0)


def test_without_momentum_and_half_precision():
    assert flatkern.cost(make(SGD, None)).state_bytes == 4 * N
    plain = SGD([torch.nn.Parameter(torch.randn(64, 48))])
    assert (flatkern.cost(plain).bytes_moved, flatkern.cost(plain).state_bytes) == (12 * N, 0)
    half = make(SGD, RWP(), torch.bfloat16)
    assert (flatkern.cost(half).bytes_moved, flatkern.cost(half).scratch_bytes) == (16 * N, 2 * N)


def test_what_takes_no_part():
    """Frozen parameters move nothing; those that are not perturbed only what the base moves; ASAM spares rank 1."""
    params = [torch.nn.Parameter(torch.randn(64, 48)) for _ in range(3)]
    params[0].requires_grad_(False)
    groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
    stated = flatkern.cost(SGD(groups, momentum=0.9, perturb=RWP()))
    assert (stated.parameters, stated.bytes_moved, stated.base_bytes) == (2 * N, (32 + 20) * N, 2 * 20 * N)
    assert stated.scratch_bytes == 4 * N
    bias = make(SGD, ASAM(), shapes=[(100,)])
    assert flatkern.cost(bias).bytes_moved == 40 * 100
    assert flatkern.cost(make(SGD, ASAM(all_tensors=True), shapes=[(100,)])).bytes_moved == 44 * 100


def test_clipping_reads_the_gradients_once_more():
    for method, more in ((None, 4), (RWP(), 4), (RWP(lam=0.5), 8)):
        without, clipped = (flatkern.cost(make(SGD, method, max_grad_norm=c)) for c in (None, 1.0))
        assert clipped.launches == without.launches + 1
        assert clipped.bytes_moved == without.bytes_moved + more * N


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that run, in order, by backend: the functions themselves are watched."""
    names = {"eager": [], "cpp": []}

    def spy(backend, owner, name):
        original = getattr(owner, name)

        def run(*args, **kwargs):
            names[backend].append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    for op in OPS.values():
        spy("eager", importlib.import_module(f"flatkern.reference.{op.family}"), op.name)
        if flatkern.backends()["cpp"]["live"]:
            spy("cpp", dispatch.compiled_module("cpp"), op.name)
    dispatch.resolve.cache_clear()
    yield names
    dispatch.resolve.cache_clear()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("row", FLOORS)
@pytest.mark.filterwarnings("ignore:.*ascends on")
def test_launches(row, clip, calls):
    """As many op calls as stated, for one tensor and one group as for forty tensors in four groups."""
    method, own, *_ = FLOORS[row]
    for shapes, groups in (([(3, 2)], 1), ([(3, 2), (4,)] * 20, 4)):
        own = {"dtype": torch.float32} | own
        params = [torch.nn.Parameter(torch.randn(shape).to(own["dtype"])) for shape in shapes]
        split = [{"params": params[k::groups], "lr": 0.1 / (k + 1)} for k in range(groups)]
        opt = SGD(split, momentum=0.9, perturb=method, backend="eager", max_grad_norm=clip,
                  master_weights=own.get("master_weights", False))  # fmt: skip
        opt.train()
        for _ in range(2):
            calls["eager"].clear()
            for group in opt.param_groups if opt.perturbation.has_interval else ():
                group["perturb_count"] = 0  # a step that ascends
            step(opt, lambda params=params: fill(params))
            opt.zero_grad()
        assert len(calls["eager"]) == flatkern.cost(opt).launches, calls


def test_as_dict_and_wrap():
    stated = flatkern.cost(make(SGD, RWP()))
    assert stated.as_dict() == {
        "parameters": N, "bytes_moved": 32 * N, "base_bytes": 20 * N, "launches": 2, "state_bytes": 4 * N,
        "scratch_bytes": 4 * N, "multiple_of_base": 1.6,
    }  # fmt: skip
    base = torch.optim.SGD([torch.nn.Parameter(torch.randn(64, 48))], momentum=0.9)
    assert flatkern.cost(flatkern.Wrap(base, RWP())).scratch_bytes == 4 * N


# --- who serves the calls --------------------------------------------------------------------------


def run_everything(backend):
    """Every kind of call that picks a backend."""
    weights = [torch.ones(3, 4)]
    flatkern.perturb_(weights, 0.1, seed=0, round=0, backend=backend)
    flatkern.restore_(weights, [torch.ones(3, 4)], backend=backend)
    for method in METHODS.values():
        opts = [in_two_buckets(method, rule, backend=backend, max_grad_norm=1.0)[1] for rule in (SGD, Adam, AdamW)]
        base = torch.optim.SGD([torch.nn.Parameter(torch.randn(3, 4))])
        for opt in [*opts, flatkern.Wrap(base, method, backend=backend, max_grad_norm=1.0)]:
            cycle(opt)
            opt.step()


def test_the_named_backend_runs(backend, calls, monkeypatch):
    """It alone, in every call of every method, whatever FLATKERN_BACKEND says."""
    other = {"eager": "cpp", "cpp": "eager"}[backend]
    monkeypatch.setenv("FLATKERN_BACKEND", other)
    run_everything(backend)
    assert len(calls[backend]) > 100
    assert calls[other] == []


def test_the_environment_sets_the_default(backend, calls, monkeypatch):
    monkeypatch.setenv("FLATKERN_BACKEND", backend)
    run_everything(None)
    flatkern.filter_norms([torch.ones(3, 4)])
    assert len(calls.pop(backend)) > 100
    assert list(calls.values()) == [[]]


WITHOUT_CPP = """
import json, sys, warnings
sys.modules["flatkern._C"] = None
import torch, flatkern
def said(call):
    p = torch.nn.Parameter(torch.ones(3, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(p)
            error = None
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
    return {"error": error, "warnings": [str(w.message) for w in caught], "clean": bool((p == 1).all())}
def train(backend):
    def call(p):
        opt = flatkern.SGD([p], lr=0.0, momentum=0.9, perturb=flatkern.RWP(), backend=backend)
        for _ in range(3):
            opt.perturb()
            p.grad = torch.ones(3, 4)
            opt.step()
            opt.zero_grad()
    return call
def functions(p):
    flatkern.perturb_([p.detach()], 0.0, seed=0, round=0)
    flatkern.filter_norms([p])
print(json.dumps({"cpp": said(train("cpp")), "eager": said(train("eager")), "none": said(train(None)),
                  "again": said(train(None)), "functions": said(functions)}))
"""


def test_falling_back_to_eager_is_said_once():
    """Without the compiled module: cpp is refused, eager is silent, the default warns once with reason and remedy."""
    source = str(Path(flatkern.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    env.pop("FLATKERN_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", WITHOUT_CPP], env=env, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "no backend for cpu: cpp is not installed (" in said["cpp"]["error"]
    assert all(case["clean"] for case in said.values())
    assert [case["error"] for name, case in said.items() if name != "cpp"] == [None] * 4
    assert said["eager"]["warnings"] == []
    assert len(said["none"]["warnings"]) == 1
    assert "in eager PyTorch on cpu: cpp is not installed (" in said["none"]["warnings"][0]
    assert "python -m flatkern doctor" in said["none"]["warnings"][0]
    assert said["again"]["warnings"] == said["functions"]["warnings"] == []
