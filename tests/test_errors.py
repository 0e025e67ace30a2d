"""What bad input gets: a clear error before anything is written. Messages are data here; nothing may have changed."""

import copy
import math
import re
from contextlib import contextmanager

import pytest
import torch
from compare import copies
from steps import begins_clean
from torch.nn import Parameter

import flatkern
from flatkern import ASAM, RWP, SAM, SGD, Adam, AdamW, Wrap, dispatch

NAN, INF, UINT32 = math.nan, math.inf, 2**32
X, DATA = torch.arange(12.0).view(3, 4), torch.arange(24.0)


@pytest.fixture(autouse=True)
def fresh():
    """The tensors that cases are made of, as they were: a call that should have been refused may have changed them."""
    X.copy_(torch.arange(12.0).view(3, 4))
    DATA.copy_(torch.arange(24.0))


def make(perturb=None, rule=SGD, **own):
    """Three parameters in two groups that no single op call can serve, with state and without gradients."""
    params = [Parameter(torch.randn(3, 2)), Parameter(torch.randn(4)), Parameter(torch.randn(2, 2))]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    groups[1] |= {"momentum": 0.9} if rule is SGD else {"decoupled_weight_decay": True}
    opt = rule(groups, lr=0.1, perturb=perturb, **own)
    if isinstance(perturb, RWP) and perturb.rolling:
        opt.train()
    for _ in range(2):
        cycle(opt)
        opt.step()
        opt.zero_grad()
    return params, opt


def fill(params):
    for p in params:
        p.grad = torch.randn_like(p)


def cycle(opt, perturb=True):
    """Everything before `step()`."""
    params = [p for g in opt.param_groups for p in g["params"]]
    if begins_clean(opt):
        fill(params)
    if perturb and opt.perturb_due:
        opt.perturb()
    if perturb or not opt.perturb_due:
        fill(params)


def picture(params, opt):
    grads = [None if p.grad is None else (p.grad, p.grad._version) for p in params]
    state = {} if opt is None else {k: copy.deepcopy(dict(opt.state.get(p, {}))) for k, p in enumerate(params)}
    method = None if opt is None else (opt.is_perturbed, [g.get("round") for g in opt.param_groups])
    return copies(params), grads, state, method


@contextmanager
def refused(error, message, params=(), opt=None):
    """The body raises exactly this, and weights, gradients, state and round are what they were, bit for bit."""
    weights, grads, state, method = picture(params, opt)
    with pytest.raises(error, match=re.escape(message)) as caught:
        yield
    assert "Exception raised from" not in str(caught.value), "a C++ stack trace is no message"
    after = picture(params, opt)
    assert all(torch.equal(a, b) for a, b in zip(weights, after[0], strict=True))
    same = [a is b if None in (a, b) else a[0] is b[0] and a[1] == b[1] for a, b in zip(grads, after[1], strict=True)]
    assert all(same)
    assert method == after[3]
    for k, entries in state.items():
        assert entries.keys() == after[2][k].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[2][k][n])) for n, v in entries.items())


# --- values --------------------------------------------------------------------------------------

RANGES = {  # key: the values that are refused, and how the message ends
    "lr": ((-1.0, NAN, INF), "Invalid learning rate: {} (lr should be >= 0 and finite)"),
    "momentum": ((-1.0, NAN, INF), "Invalid momentum value: {} (momentum should be >= 0 and finite)"),
    "dampening": ((NAN, INF), "dampening is {}, but should be a number that is finite"),
    "weight_decay": ((-1.0, NAN, INF), "Invalid weight_decay value: {} (weight_decay should be >= 0 and finite)"),
    "eps": ((-1.0, NAN, INF), "Invalid epsilon value: {} (eps should be >= 0 and finite)"),
    "sigma": ((-1.0, NAN, INF), "sigma is {}, but should be a number >= 0 and finite"),
    "rho": ((-1.0, NAN, INF), "rho is {}, but should be a number >= 0 and finite"),
    "eta": ((-1.0, NAN, INF), "eta is {}, but should be a number >= 0 and finite"),
    "beta": ((-1.0, NAN, 1.0), "beta is {}, but should be a number in [0, 1)"),
    "lam": ((-1.0, NAN, 1.5), "lam is {}, but should be a number in [0, 1]"),
    "betas": (
        ((-1.0, 0.9), (NAN, 0.9), (1.0, 0.9)),
        "Invalid beta parameter at index 0: {} (beta1 should be in [0, 1))",
    ),
    "seed": ((-1, UINT32, 1.5), "seed is {}, but should be an integer in [0, 2^32)"),
    "stream": ((-1, UINT32, 1.5), "stream is {}, but should be an integer in [0, 2^32)"),
    "round": ((-1, UINT32, 1.5), "round is {}, but should be an integer in [0, 2^32)"),
}
BASE_KEYS = {SGD: ("lr", "momentum", "dampening", "weight_decay"), Adam: ("lr", "betas", "eps", "weight_decay"),
             AdamW: ("lr", "betas", "eps", "weight_decay")}  # fmt: skip
METHOD_KEYS = {"RWP": ("sigma", "eta", "beta", "seed", "stream", "round"), "m-RWP": ("sigma", "lam"), "SAM": ("rho",),
               "ASAM": ("rho", "eta"), "rolling": ("sigma", "eta", "beta", "seed", "round")}  # fmt: skip
METHODS = {"none": None, "RWP": RWP(eta=1.0), "m-RWP": RWP(lam=0.5, eta=1.0), "SAM": SAM(), "ASAM": ASAM(),
           "rolling": RWP(eta=1.0, rolling=True)}  # fmt: skip


def message(key, value):
    return RANGES[key][1].format(value[0] if key == "betas" else value)


VALUES = [(key, value) for key, (values, _) in RANGES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), VALUES, ids=str)
def test_constructor_and_group_values(key, value):
    """Refused as an argument of the optimizer or of the method, and as a group's own value."""
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    rules = [rule for rule, keys in BASE_KEYS.items() if key in keys]
    for rule in rules:
        with refused(ValueError, message(key, value), params):
            rule(params, **{key: value})
        with refused(ValueError, message(key, value), params):
            rule([{"params": params[:1]}, {"params": params[1:], key: value}])
    for name in [name for name, keys in METHOD_KEYS.items() if key in keys]:
        method = METHODS[name]
        with refused(ValueError, message(key, value), params):
            SGD([{"params": params[:1]}, {"params": params[1:], key: value}], perturb=method)
        if key != "round":
            start = f"{type(method).__name__}: {key} is {value}, but should be a"
            with pytest.raises(ValueError, match=re.escape(start)):
                type(method)(**{key: value})


MIDWAY = [
    (rule, name, key) for rule, keys in BASE_KEYS.items() for name in METHODS for key in keys if rule is not AdamW
]
MIDWAY += [(SGD, name, key) for name, keys in METHOD_KEYS.items() for key in keys]


@pytest.mark.parametrize(("rule", "name", "key"), MIDWAY, ids=lambda v: getattr(v, "__name__", v))
def test_values_changed_in_training(rule, name, key, backend):
    """Refused by the first call that uses it, before any bucket was served; put right, training goes on."""
    for value in RANGES[key][0]:
        if key in ("beta", "momentum") and value == INF:
            continue
        params, opt = make(METHODS[name], rule, backend=backend)
        used_by_perturb = key in ("sigma", "rho", "seed", "stream", "round") or (key, name) == ("eta", "ASAM")
        early = (used_by_perturb and not opt.rolling) or (key == "eta" and name in ("RWP", "m-RWP"))
        cycle(opt, perturb=not early)
        # One key for all groups; of the others, the last group's value, so that the first bucket could be served.
        changed = opt.param_groups[0 if key in ("seed", "stream", "round") else 1 :]
        good = changed[0][key]
        for group in changed:
            group[key] = value
        with refused(ValueError, message(key, value), params, opt):
            opt.perturb() if early else opt.step()
        for group in changed:
            group[key] = good
        if early:
            opt.perturb()
            fill(params)
        opt.step()


@pytest.mark.parametrize(("name", "value"), [("m-RWP", None), ("RWP", 0.5), ("rolling", 0.5)])
def test_lam_may_not_mix_none_and_a_number(name, value, backend):
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    text = f"a group has lam={value!r} and the method lam={METHODS[name].lam!r}; lam may not mix None and a number"
    with refused(ValueError, text, params):
        SGD([{"params": params[:1]}, {"params": params[1:], "lam": value}], perturb=METHODS[name])
    params, opt = make(METHODS[name], backend=backend)
    cycle(opt)
    opt.param_groups[1]["lam"] = value
    with refused(ValueError, "lam may not mix None and a number", params, opt):
        opt.step()


@pytest.mark.parametrize("key", ["seed", "stream"])
def test_a_groups_own_noise_key_is_used_or_refused(key):
    """One optimizer draws with one key: another one in a group must not be ignored in silence."""

    def noise(**own):
        p = Parameter(torch.ones(3, 4))
        opt = SGD([{"params": [Parameter(torch.ones(2))]}, {"params": [p], **own}], perturb=RWP(sigma=0.1))
        opt.perturb()
        return p.detach() - 1

    try:
        other = noise(**{key: 5})
    except ValueError as error:
        assert key in str(error)
    else:
        assert not torch.equal(other, noise())


# --- what an optimizer can be made of -----------------------------------------------------------


DTYPES = "but should have one of: float32, float16, bfloat16; convert it with .to(dtype)"
ONLY32 = "but should have one of: float32; convert it with .to(dtype)"


def tensor_cases():
    shared = "params[1] shares memory with params[0]; pass every tensor once, without overlap"
    return {
        "sparse": (TypeError, "is sparse_coo, but should be strided; call .to_dense()", [torch.eye(3).to_sparse()]),
        "complex": (TypeError, f"has dtype torch.complex64, {DTYPES}", [torch.ones(2, dtype=torch.complex64)]),
        "float64": (TypeError, f"has dtype torch.float64, {DTYPES}", [torch.ones(2, dtype=torch.float64)]),
        "gaps": (ValueError, "has gaps or overlaps in memory (strides (2,)); call .contiguous()", [DATA[::2]]),
        "expanded": (ValueError, "(strides (0, 1)); call .contiguous()", [torch.ones(1, 3).expand(4, 3)]),
        "views": (ValueError, shared, [DATA[:6], DATA[4:]]),
        "inside": (ValueError, shared, [DATA, DATA[3:5]]),
        "same data": (ValueError, shared, [DATA, DATA.view(4, 6)]),
    }


TRANSPOSED = "params[0] has strides (1, 4), so dim 0 is not outermost in memory and its filters are not contiguous"


@pytest.mark.parametrize("case", tensor_cases())
@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "Wrap"])
def test_parameters(case, wrapped):
    error, text, tensors = tensor_cases()[case]
    params = [Parameter(t, requires_grad=True) for t in tensors]
    with pytest.raises(error, match=re.escape(text)):
        Wrap(torch.optim.SGD(params), RWP()) if wrapped else SGD(params, perturb=RWP())
    opt = SGD([Parameter(torch.ones(2))])
    text = text.replace("params[1]", "params[2]").replace("params[0]", "params[1]")
    with pytest.raises(error, match=re.escape(text)):
        opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1
    assert torch.equal(DATA, torch.arange(24.0))


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_duplicates_and_transposed():
    p = Parameter(torch.ones(3, 4))
    for make_it in (lambda: SGD([p, p]), lambda: Wrap(torch.optim.SGD([p, p]))):
        with refused(ValueError, "params[1] shares memory with params[0]; pass every tensor once", [p]):
            make_it()
    q = Parameter(torch.randn(3, 4).t())
    for method in (RWP(), SAM(), ASAM()):
        with refused(ValueError, f"SGD: {TRANSPOSED}; call .contiguous()", [q]):
            SGD([q], perturb=method)
        with refused(ValueError, f"Wrap: {TRANSPOSED}; call .contiguous()", [q]):
            Wrap(torch.optim.SGD([q]), method)


ZERO = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})
CALLS = [
    ("Wrap: ZeroRedundancyOptimizer steps a shard of the parameters; use FSDP2 or a plain optimizer",
     TypeError, lambda p: Wrap(ZERO([p]))),
    ("Wrap: base_optimizer is <class 'torch.optim.sgd.SGD'>, but should be a torch.optim.Optimizer instance",
     TypeError, lambda p: Wrap(torch.optim.SGD)),
    ("Wrap: base_optimizer is flatkern's already; pass perturb= to it instead", TypeError, lambda p: Wrap(SGD([p]))),
    ("SGD: perturb is <class 'flatkern.methods.rwp.RWP'>, but should be flatkern.RWP(), SAM(), ASAM(), GSAM(), "
     "FriendlySAM(), LookSAM() or MomentumSAM(), or None",
     TypeError, lambda p: SGD([p], perturb=RWP)),
    ("SGD: enhance is 1, but should be flatkern.IRE(kappa=...), or None",
     TypeError, lambda p: SGD([p], enhance=1)),
    ("Wrap: enhance is 1, but should be flatkern.IRE(kappa=...), or None",
     TypeError, lambda p: Wrap(torch.optim.SGD([p]), enhance=1)),
    ("Adam: amsgrad is True, but no kernel keeps the maximum of the second moments; pass amsgrad=False",
     ValueError, lambda p: Adam([p], amsgrad=True)),
    ("SGD: differentiable is True, but the kernels write in place and have no backward; pass differentiable=False",
     ValueError, lambda p: SGD([p], differentiable=True)),
    ("AdamW: capturable is True, but CUDA graphs need the triton", ValueError, lambda p: AdamW([p], capturable=True)),
    ("Adam: amsgrad is True, but no kernel keeps", ValueError, lambda p: Adam([{"params": [p], "amsgrad": True}])),
    ("SGD: differentiable is True, but the kernels",
     ValueError, lambda p: SGD([{"params": [p], "differentiable": True}])),
    ("Adam: a group has capturable=True", ValueError, lambda p: Adam([{"params": [p], "capturable": True}])),
    ("RWP: rolling=True excludes lam: a rolling step has one gradient; pass lam=None",
     ValueError, lambda p: RWP(rolling=True, lam=0.5)),
    ('RWP: rolling=True excludes mix="ranks", whose steps begin with perturb(); use one of them',
     ValueError, lambda p: RWP(rolling=True, mix="ranks")),
    ("RWP: mix is 'both', but should be \"gradients\", \"losses\" or \"ranks\"",
     ValueError, lambda p: RWP(lam=0.5, mix="both")),
    ('RWP: mix="losses" mixes two losses; give lam, the weight of the perturbed one',
     ValueError, lambda p: RWP(mix="losses")),
    ("SGD: max_grad_norm is 0, but should be a number > 0, or None", ValueError, lambda p: SGD([p], max_grad_norm=0)),
    ("SGD: max_grad_norm is -1.0, but should be a number > 0", ValueError, lambda p: SGD([p], max_grad_norm=-1.0)),
    ("SGD: max_grad_norm is nan, but should be a number > 0", ValueError, lambda p: SGD([p], max_grad_norm=NAN)),
    ("SGD: max_grad_norm is '1', but should be a number > 0, or None",
     ValueError, lambda p: SGD([p], max_grad_norm="1")),
    ("SGD: max_grad_norm is True, but should be a number", ValueError, lambda p: SGD([p], max_grad_norm=True)),
    ("lr is None, but should be a number", TypeError, lambda p: SGD([p], lr=None)),
    ("momentum is '0.9', but should be a number", TypeError, lambda p: SGD([p], momentum="0.9")),
    ("sigma is None, but should be a number",
     TypeError, lambda p: SGD([{"params": [p], "sigma": None}], perturb=RWP())),
    ("betas is 0.9, but should be a pair of numbers in [0, 1)", ValueError, lambda p: Adam([p], betas=0.9)),
    ("betas is (0.9,), but should be a pair of numbers in [0, 1)", ValueError, lambda p: AdamW([p], betas=(0.9,))),
    ("perturb_: params is a tensor, but should be a list of tensors; pass [params]",
     TypeError, lambda p: flatkern.perturb_(p, 0.1, seed=0, round=0)),
    ("filter_norms: params is a tensor, but should be a list", TypeError, lambda p: flatkern.filter_norms(p)),
    ("restore_: backups is a tensor, but should be a list", TypeError, lambda p: flatkern.restore_([p], p)),
    ("no backend for cpu: cuda runs on cuda only; use backend=None or 'eager' on this device",
     RuntimeError, lambda p: SGD([p], backend="cuda")),
    ("backend is 'gpu', but should be one of eager, cpp, triton, cuda, or None for the best one",
     ValueError, lambda p: SGD([p], backend="gpu")),
    ("step: closure is 3, but should be a callable or a list of them", TypeError, lambda p: SGD([p]).step(3)),
    ("step: closure is [], but should be a callable or a list of them", TypeError, lambda p: SGD([p]).step([])),
    ("3], but should be a callable or a list of them", TypeError, lambda p: SGD([p]).step([len, 3])),
    ("step: 2 closures, but ", ValueError, lambda p: SGD([p]).step([len, len])),
    ("perturb: this optimizer has no perturbation; pass perturb=flatkern.RWP(), SAM(), ...",
     RuntimeError, lambda p: SGD([p]).perturb()),
    ("follow: only a rolling optimizer can follow a model; pass perturb=flatkern.RWP(rolling=True)",
     RuntimeError, lambda p: SGD([p], perturb=RWP()).follow(torch.nn.Linear(1, 1))),
    ("perturb: the optimizer is rolling and perturbs in step(); use train(), eval() or follow(model)",
     RuntimeError, lambda p: SGD([p], perturb=RWP(rolling=True)).perturb()),
]  # fmt: skip


def begins(row):
    return row[0][:45]


@pytest.mark.parametrize("row", CALLS, ids=begins)
def test_constructors_and_calls(row):
    text, error, call = row
    p = Parameter(torch.randn(3, 2))
    p.grad = torch.randn(3, 2)
    with refused(error, text, [p]):
        call(p)


def test_amsgrad_from_elsewhere():
    """A torch checkpoint that used it, or a group changed in training: refused, not ignored."""
    params = [Parameter(torch.randn(3, 2))]
    fill(params)
    base = torch.optim.Adam(params, amsgrad=True)
    base.step()
    text = "Adam: amsgrad is True, but no kernel keeps the maximum of the second moments; pass amsgrad=False"
    loaded, changed = Adam(params), Adam(params)
    with refused(ValueError, text, params, loaded):
        loaded.load_state_dict(base.state_dict())
    assert not loaded.param_groups[0]["amsgrad"]
    changed.param_groups[0]["amsgrad"] = True
    with refused(ValueError, text, params, changed):
        changed.step()


# --- gradients, and the functions ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "m-RWP", "SAM", "rolling", "Wrap", "clip"])
def test_sparse_gradients(name, backend):
    """Whichever call meets them first refuses; afterwards a dense gradient is all it takes."""
    params = [Parameter(torch.randn(3, 2)), Parameter(torch.randn(4, 5))]
    own = {"backend": backend, "perturb": METHODS.get(name), "max_grad_norm": 1.0 if name == "clip" else None}
    opt = Wrap(torch.optim.SGD(params), SAM(), backend=backend) if name == "Wrap" else SGD(params, momentum=0.9, **own)
    opt.train()
    fill(params)
    first = opt.perturb if isinstance(opt.method, SAM) else opt.step
    if name == "m-RWP":
        opt.perturb()
        fill(params)
    params[1].grad = torch.eye(4, 5).to_sparse()
    with refused(TypeError, "grads[1] is sparse_coo, but should be strided; call .to_dense()", params, opt):
        first()
    params[1].grad = params[1].grad.to_dense()
    first()


NOISE = {"seed": 0, "round": 0}


def noisy(params, sigma=0.1, **own):
    return lambda backend: flatkern.perturb_(params, sigma, **(NOISE | own), backend=backend)


def back(params, backups):
    return lambda backend: flatkern.restore_(params, backups, backend=backend)


def norms(params):
    return lambda backend: flatkern.filter_norms(params)


SHARED = "params[1] shares memory with params[0]; pass every tensor once, without overlap"
META, LOSSY = X.to("meta"), (TypeError, ValueError)
FUNCTIONS = [
    ("perturb_: sigma is nan, but should be a finite number", ValueError, noisy([X], NAN)),
    ("perturb_: sigma is -inf, but should be a finite number", ValueError, noisy([X], -INF)),
    ("perturb_: seed is -1, but should be an integer in [0, 2^32)", ValueError, noisy([X], seed=-1)),
    ("perturb_: round is 4294967296, but should be an integer in [0, 2^32)", ValueError, noisy([X], round=UINT32)),
    ("perturb_: stream is 0.5, but should be an integer in [0, 2^32)", ValueError, noisy([X], stream=0.5)),
    ("perturb_: params[1] is int, but should be a tensor", TypeError, noisy([X, 3])),
    (f"perturb_: params[1] has dtype torch.int32, {DTYPES}", TypeError, noisy([X, X.int()])),
    (f"perturb_: {SHARED}", ValueError, noisy([X, X])),
    (f"perturb_: {SHARED}", ValueError, noisy([X[:2], X[1:]])),
    ("perturb_: params[0] has gaps or overlaps in memory (strides (4, 2)); call .contiguous()",
     ValueError, noisy([X[:, ::2]])),
    ("perturb_: params[0] has strides (1, 3), so dim 0 is not outermost in memory and its filters are not contiguous; "
     "call .contiguous()", ValueError, noisy([X.view(4, 3).t()])),
    ("perturb_: backups has 0 entries, but params has 1", ValueError, noisy([X], backups=[])),
    ("backups[0] has shape (4, 3), but params[0] has (3, 4)", ValueError, noisy([X], backups=[torch.ones(4, 3)])),
    ("backups[0] has strides (1, 3), but params[0] has (4, 1); copy it into the other's memory format",
     ValueError, noisy([X], backups=[torch.ones(4, 3).t()])),
    (f"backups[0] has dtype torch.float64, {DTYPES}", TypeError, noisy([X], backups=[X.double()])),
    ("backups[0] has dtype torch.float16", LOSSY, noisy([X], backups=[X.half()])),  # could not restore every bit
    ("backups[0] is on meta, but params[0] is on cpu; move one of them", ValueError, noisy([X], backups=[META])),
    ("backups[0] shares memory with params[0]", ValueError, noisy([X], backups=[X])),
    ("norms[0] has 4 elements, but params[0] needs 3", ValueError, noisy([X], norms=[torch.ones(4)])),
    (f"norms[0] has dtype torch.float64, {ONLY32}", TypeError, noisy([X], norms=[torch.ones(3).double()])),
    ("norms[0] is on meta, but params[0] is on cpu; move one of them", ValueError, noisy([X], norms=[META[0, :3]])),
    ("restore_: backups has 0 entries, but params has 1", ValueError, back([X], [])),
    ("restore_: backups[0] has shape (12,), but params[0] has (3, 4)", ValueError, back([X], [torch.ones(12)])),
    ("restore_: backups[0] has dtype torch.float16", LOSSY, back([X], [X.half()])),
    ("restore_: backups[0] is on meta, but params[0] is on cpu; move one of them", ValueError, back([X], [META])),
    (f"restore_: {SHARED}", ValueError, back([X, X], [X + 1, X + 2])),
    (f"filter_norms: params[0] has dtype torch.int32, {DTYPES}", TypeError, norms([X.int()])),
    ("filter_norms: params[0] is int, but should be a tensor", TypeError, norms([3])),
    ("backend is 'gpu', but should be one of eager, cpp, triton, cuda, or None for the best one",
     ValueError, lambda backend: flatkern.restore_([X], [X + 1], backend="gpu")),
]  # fmt: skip


@pytest.mark.parametrize("row", FUNCTIONS, ids=begins)
def test_functions(row, backend):
    text, error, call = row
    with refused(error, text, [X]):
        call(backend)


UPDATE = {"lr": [0.1], "momentum": [0.0], "dampening": [0.0], "weight_decay": [0.0], "nesterov": [False],
          "grad_weight": [1.0], "clean_weight": [0.0], "kappa": [0.0], "beta": [0.0], "sigma": [0.0], "eta": [0.0],
          "index": [0], "offset": [0]}  # fmt: skip
TENSORS = ("params", "momentum_buffers", "backups", "masters", "history", "grads", "clean_grads", "masks", "lrs",
           "sigmas", "noise", "component", "grad_scale", "clip", "found_inf")  # fmt: skip
DRAWS = torch.zeros(3, dtype=torch.int64)
OPERATION = [  # arguments of sgd_update_, and what every backend says about them
    ("grads[0] is on meta, but params[0] is on cpu; move one of them", ValueError, {"grads": [META]}),
    ("grads[0] has shape (4, 3), but params[0] has (3, 4)", ValueError, {"grads": [torch.ones(4, 3)]}),
    ("grads has 0 entries, but params has 1", ValueError, {"grads": []}),
    (f"grads[0] has dtype torch.float64, {DTYPES}", TypeError, {"grads": [X.double()]}),
    ("grads[0] is sparse_coo, but should be strided; call .to_dense()", TypeError, {"grads": [X.to_sparse()]}),
    ("grads[0] is NoneType, but should be a tensor", TypeError, {"grads": [None]}),
    ("grads is None, but should be Tensor[]", TypeError, {"grads": None}),
    ("momentum_buffers[0] has shape (12,), but params[0] has (3, 4)",
     ValueError, {"momentum_buffers": [torch.ones(12)]}),
    (f"masters[0] has dtype torch.float16, {ONLY32}", TypeError, {"masters": [X.half()]}),
    ("history[0] has 4 elements, but params[0] needs 3", ValueError, {"history": [torch.ones(4)]}),
    ("masks[0] has dtype torch.float32, but should have one of: uint8", TypeError, {"masks": [torch.ones(3, 1)]}),
    ("masks[0] has shape (3, 4), but params[0] needs a contiguous (3, 1)",
     ValueError, {"masks": [torch.ones(3, 4, dtype=torch.uint8)]}),
    ("lr has 2 entries, but params has 1", ValueError, {"lr": [0.1, 0.2]}),
    ("lr[0] is nan, but should be finite", ValueError, {"lr": [NAN]}),
    ("grad_scale is float64 (), but should be a 0-dim float32 tensor", TypeError, {"grad_scale": X.double()[0, 0]}),
    ("grad_scale is float32 (1,), but should be a 0-dim float32 tensor", TypeError, {"grad_scale": torch.ones(1)}),
    ("lrs is float32 (1,), but should be float64 (1,), one for each of params", TypeError, {"lrs": torch.ones(1)}),
    ("lrs is list, but should be float64 (1,), one for each of params", TypeError, {"lrs": [0.1]}),
    ("sigmas is float64 (2,), but should be float64 (1,), one", TypeError, {"sigmas": torch.ones(2).double()}),
    ("sigmas is float64 (), but should be float64 (1,), one", TypeError, {"sigmas": torch.ones(()).double()}),
    ("lrs is on meta, but params[0] is on cpu; move one of them", ValueError, {"lrs": META[0].double()[:1]}),
    ("noise is float32 (3,), but should be int64 (3,): seed, stream, round", TypeError, {"noise": torch.zeros(3)}),
    ("seed is -1, but should be an integer in [0, 2^32)", ValueError, {"noise": DRAWS - 1}),
    ("index[0] is ", ValueError, {"noise": DRAWS, "index": [-1]}),
    ("offset[0] is ", ValueError, {"noise": DRAWS, "offset": [-1]}),
]  # fmt: skip


@pytest.mark.parametrize("row", OPERATION, ids=begins)
def test_operation(row, backend):
    """The checks in front of an operation are the same whatever runs behind them."""
    text, error, own = row
    values = {"params": [X], "grads": [X + 1]} | own
    op = dispatch.resolve("sgd_update_", "cpu", backend)
    with refused(error, f"sgd_update_: {text}", [X]):
        op(*(values.get(name) for name in TENSORS), **(UPDATE | {k: v for k, v in own.items() if k in UPDATE}))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_is_not_live_is_refused(name):
    """By the constructor or by the first call, naming the backend and the reason, and nothing has changed."""
    report = flatkern.backends()[name]
    if report["live"]:
        pytest.skip(f"{name} is live here")
    with refused(RuntimeError, f"perturb_gaussian_: no backend for cpu: {name} ", [X]):
        flatkern.perturb_([X], 0.1, **NOISE, backend=name)
    p = Parameter(torch.randn(3, 4))
    with refused(RuntimeError, f"no backend for cpu: {name} ", [p]):
        SGD([p], perturb=RWP(), backend=name).perturb()
    p.grad = torch.randn(3, 4)
    with refused(RuntimeError, f"no backend for cpu: {name} ", [p]):
        AdamW([p], backend=name).step()


def test_an_unknown_environment_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FLATKERN_BACKEND", "gpu")
    text = "FLATKERN_BACKEND is 'gpu', but should be one of eager, cpp, triton, cuda, or None for the best one"
    with refused(ValueError, text, [X]):
        SGD([Parameter(X)])
    with refused(ValueError, text, [X]):
        flatkern.perturb_([X], 0.1, **NOISE)
