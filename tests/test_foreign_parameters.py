"""Parameters that no kernel walks: on meta, fake, or frozen ones of dtypes that we have no kernels for.

torch's optimizers take them, and so do ours: what is checked is what requires a gradient.
"""

import copy
import pickle
from itertools import product

import pytest
import torch
from compare import assert_same, copies, same
from patterns import backends
from steps import step
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from two_buckets import values
from unchanged import frozen, refused

import flatkern
from flatkern import ASAM, IRE, RWP, SAM, SGD, Adam, AdamW, Wrap

METHODS = {
    "plain": None,
    "RWP": RWP(sigma=0.1),
    "m-RWP": RWP(sigma=0.1, lam=0.5),
    "SAM": SAM(rho=0.3),
    "ASAM": ASAM(rho=0.6),
    "rolling": RWP(sigma=0.1, rolling=True),
}
RULES = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}
every_method = pytest.mark.parametrize("method", METHODS)
every_rule = pytest.mark.parametrize("rule", [*RULES, "Wrap"])


def make(params, method, rule, backend=None, **own):
    own |= {"perturb": METHODS[method], "backend": backend}
    if rule == "Wrap":
        return Wrap(torch.optim.SGD(params, lr=0.1, momentum=0.9), **own)
    return RULES[rule](params, lr=0.1, **own)


# --- without memory -------------------------------------------------------------------------------


@every_rule
@every_method
def test_meta(method, rule):
    """Several of one shape: they share no memory, since they have none."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in ((2, 2), (2, 2), (3,), (), (0,))]
    opt = make(params, method, rule, enhance=IRE(1.0))
    opt.add_param_group({"params": [Parameter(torch.empty(2, 2, device="meta"))]})
    opt.zero_grad()
    assert len(opt.state_dict()["param_groups"][1]["params"]) == 1
    assert not opt.state


@every_rule
@every_method
def test_meta_beside_others(method, rule):
    """A model whose layers get their memory one after the other."""
    p = Parameter(values((3, 2), 0))
    opt = make([Parameter(torch.empty(2, 2, device="meta")), p], method, rule)
    assert len(opt.param_groups[0]["params"]) == 2
    assert torch.equal(p, values((3, 2), 0))


def test_a_model_on_meta_is_materialized(backend):
    """The optimizer is made first, as scripts that shard large models do."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = SGD(net.parameters(), lr=0.1, perturb=RWP(sigma=0.1), backend=backend)
    net.to_empty(device="cpu")
    params = list(net.parameters())
    with torch.no_grad():
        for k, p in enumerate(params):
            p.copy_(values(p.shape, k))
    opt.param_groups[0]["params"] = params
    opt.perturb()
    assert not same(params, [values(p.shape, k) for k, p in enumerate(params)])
    opt.restore()
    assert_same(params, [values(p.shape, k) for k, p in enumerate(params)])


@every_rule
@every_method
def test_fake(method, rule):
    """Under FakeTensorMode, as memory estimators and exporters run a script."""
    with FakeTensorMode():
        params = [Parameter(torch.empty(2, 2)) for _ in range(3)]
        opt = make(params, method, rule)
        opt.add_param_group({"params": [Parameter(torch.empty(2, 2))]})
        opt.zero_grad()
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_views_are_still_told_apart_where_there_is_memory(device):
    """What has memory is checked as before, whoever stands beside it."""
    x = values((4, 3), 0)
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else torch.device("cpu"):
        other = Parameter(torch.empty(2, 2, device="meta" if device == "meta" else "cpu"))
    params = [other, Parameter(x[:2]), Parameter(x[1:])]
    with refused(ValueError, "shares memory with", params[1:]):
        SGD(params)


def test_a_parameter_on_meta_given_twice():
    p = Parameter(torch.empty(2, 2, device="meta"))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"shares memory|more than once"):
        SGD([p, p])


# --- frozen ---------------------------------------------------------------------------------------

FROZEN = {
    "uint8": lambda: torch.arange(6, dtype=torch.uint8),
    "int8": lambda: torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "int64": lambda: torch.arange(3),
    "bool": lambda: torch.tensor([True, False]),
    "float64": lambda: torch.randn(2, 3, dtype=torch.float64),
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "float8": lambda: torch.randn(2, 4).to(torch.float8_e4m3fn),
    "transposed": lambda: torch.randn(3, 2).t(),
    "gaps": lambda: torch.randn(6)[::2],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(2, 2, device="meta"),
}


class Run:
    """A frozen parameter between two that are trained."""

    def __init__(self, case, method, rule, backend, **own):
        torch.manual_seed(0)
        self.frozen = Parameter(FROZEN[case](), requires_grad=False)
        self.params = [Parameter(values((3, 2), 0)), self.frozen, Parameter(values((4,), 1))]
        self.opt = make(self.params, method, rule, backend, **own)
        self.trained, self.passes = [self.params[0], self.params[2]], 0

    def backward(self):
        self.passes += 1
        sum((p * values(p.shape, 10 * self.passes + k)).tanh().sum() for k, p in enumerate(self.trained)).backward()

    def step(self):
        step(self.opt, self.backward)
        self.opt.zero_grad()

    def weights(self):
        return copies(self.trained)


@pytest.mark.parametrize(
    ("backend", "case", "method"),
    backends(product(FROZEN, METHODS), lambda case, method: method in ("plain", "RWP")),
    indirect=["backend"],
)
def test_frozen(case, method, backend):
    """It is left as it is, has no state, and counts in the noise's index as one of float32 does."""
    FROZEN["float32"] = lambda: torch.randn(2, 3)
    run, other = Run(case, method, "SGD", backend), Run("float32", method, "SGD", backend)
    del FROZEN["float32"]
    before = frozen(run.frozen)
    for r in (run, other):
        r.step()
        r.step()
        r.opt.eval()
    assert_same(run.weights(), other.weights())
    assert frozen(run.frozen) == before
    assert run.frozen not in run.opt.state


@pytest.mark.parametrize(
    ("backend", "rule", "method", "case"),
    backends(product([*RULES, "Wrap"], ["plain", "RWP", "SAM"], ["uint8", "float64", "complex64"]),
             lambda rule, method, case: rule in ("SGD", "Wrap") and case == "uint8"),
    indirect=["backend"],
)  # fmt: skip
def test_everything_else(case, method, rule, backend):
    """Masks, masters, clipping, checkpoints, copies, new groups, and another optimizer on the rest."""
    own = {"enhance": IRE(1.0, 0.5), "max_grad_norm": 1.0} | ({} if rule == "Wrap" else {"master_weights": True})
    run = Run(case, method, rule, backend, **own)
    run.backward()
    run.opt.update_mask()
    run.step()
    run.opt.eval()
    saved = copy.deepcopy(run.opt.state_dict())
    assert 1 not in saved["state"]
    run.opt.load_state_dict(saved)
    pickle.loads(pickle.dumps(run.opt))
    copy.deepcopy(run.opt)
    run.opt.add_param_group({"params": [Parameter(FROZEN[case](), requires_grad=False)]})
    run.opt.release()
    before = run.weights()
    run.step()
    run.opt.eval()
    assert not same(run.weights(), before)
    assert flatkern.cost(run.opt) is not None


@every_rule
@pytest.mark.parametrize("method", ["plain", "RWP", "SAM"])
def test_unfrozen(method, rule, backend):
    """A parameter of float64 that requires a gradient after all: the first call that meets it says so."""
    run = Run("float64", method, rule, backend)
    run.step()
    run.frozen.requires_grad_(True)
    run.frozen.grad = torch.zeros_like(run.frozen)
    if method == "SAM":
        run.backward()
    call = run.opt.step if method == "plain" else run.opt.perturb
    if (method, rule) == ("plain", "Wrap"):
        call()  # nothing of ours walks it
        return
    if method == "RWP":
        run.frozen.grad = None
    with refused((TypeError, ValueError), "float64", run.params, run.opt):
        call()
    run.frozen.requires_grad_(False)
    run.frozen.grad = None
    run.opt.zero_grad()
    run.step()


@pytest.mark.parametrize("method", ["plain", "RWP"])
@pytest.mark.parametrize("case", ["float64", "complex64", "transposed", "gaps", "expanded", "sparse"])
def test_those_that_require_a_gradient_are_refused(case, method):
    """As before: in the constructor, and in a new group."""
    wrong = Parameter(FROZEN[case]())
    p = Parameter(values((3, 2), 0))
    if (case, method) != ("transposed", "plain"):  # plain rules need no filters
        for build in (lambda: make([p, wrong], method, "SGD"),
                      lambda: make([p], method, "SGD").add_param_group({"params": [wrong]})):  # fmt: skip
            with refused((TypeError, ValueError), "float64|complex64|contiguous|outermost|sparse", [p, wrong]):
                build()


def test_four_bit_models(backend):
    """Packed weights are uint8 and frozen, adapters are trained; as peft makes them."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    packed = nn.Module()
    packed.weight = Parameter(torch.randint(0, 255, (24, 1), dtype=torch.uint8), requires_grad=False)
    packed.absmax = Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)
    net.append(packed)
    opt = AdamW(net.parameters(), lr=0.1, perturb=RWP(sigma=0.1), backend=backend)
    before = frozen(packed.weight), frozen(packed.absmax)
    clean = copies(net[:2].parameters())
    for _ in range(2):
        opt.zero_grad()
        opt.perturb()
        net[:2](torch.randn(5, 4)).square().mean().backward()
        opt.step()
    assert (frozen(packed.weight), frozen(packed.absmax)) == before
    assert not any(same([a], [b]) for a, b in zip(net[:2].parameters(), clean, strict=True))
