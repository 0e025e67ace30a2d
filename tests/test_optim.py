"""flatkern's SGD, Adam and AdamW against torch's: its own test inputs, groups, schedulers, hooks, checkpoints."""

import builtins
import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import flatkern

RULES = ("SGD", "Adam", "AdamW")
METHODS = {
    "RWP": flatkern.RWP(sigma=0.0),
    "ARWP": flatkern.RWP(sigma=0.0, eta=1.0),
    "SAM": flatkern.SAM(rho=0.0),
    "ASAM": flatkern.ASAM(rho=0.0),
}
STEPS = 6
EPS = 2.0**-24  # half an ulp of 1 in float32

# What torch takes and flatkern refuses, with the reason that the refusal must give.
REFUSED = {"amsgrad": "no kernel keeps the maximum", "capturable": "CUDA graphs need", "differentiable": "no backward"}
# What torch refuses because its foreach path cannot do it; flatkern ignores foreach, so there is nothing to refuse.
FOREACH_ONLY = ("lr as Tensor doesn't work with foreach", r"betas\[0\] as a Tensor is not supported")

# torch's lists of test inputs pull in its whole test suite, which changes global flags; so they come from a process of
# their own. expecttest is a requirement of that suite, not of these lists.
COLLECT = """
import sys, types, unittest
if "expecttest" not in sys.modules:
    try:
        import expecttest
    except ImportError:
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal import common_optimizers as source
cases = {}
for rule in ("SGD", "Adam", "AdamW"):
    inputs = getattr(source, f"optim_inputs_func_{rule.lower()}")("cpu", torch.float32)
    errors = getattr(source, f"optim_error_inputs_func_{rule.lower()}")("cpu", torch.float32)
    cases[rule] = (
        [(i.desc, i.params, i.kwargs) for i in inputs],
        [(e.optimizer_error_input.desc, e.optimizer_error_input.params, e.optimizer_error_input.kwargs,
          e.error_type.__name__, e.error_regex) for e in errors],
    )
torch.save(cases, sys.argv[1])
"""


@pytest.fixture(scope="module")
def torch_cases(tmp_path_factory):
    """{rule: (inputs, error inputs)} of torch's own optimizer tests."""
    path = tmp_path_factory.mktemp("torch") / "cases.pt"
    subprocess.run([sys.executable, "-c", COLLECT, str(path)], check=True, capture_output=True, timeout=120)
    return torch.load(path, weights_only=False)


def parameters(shapes=((3, 5), (4, 2, 3, 3), (7,), ()), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(params, step):
    """The same for every optimizer, so that rounding is all that can differ."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def train(opt, params, steps=STEPS, start=0):
    for step in range(start, start + steps):
        gradients(params, step)
        opt.step()


def assert_close(ours, theirs, lr=1e-3, steps=STEPS):
    """Within rounding: the store of w rounds once in each, and the update, whose terms are O(1), a few dozen times.

    lr bounds the update's size: gradients are below 5, a momentum of 0.9 sums up to 10 of them.
    """
    for a, b in zip(ours, theirs, strict=True):
        bound = steps * EPS * (2 * b.abs() + 2 * 64 * lr)
        assert ((a - b).abs() <= bound).all(), (a - b).abs().max()


@pytest.mark.covering(1)
@pytest.mark.parametrize("rule", RULES)
def test_torch_inputs(rule, torch_cases, backend):
    """Every configuration that torch tests: the same trajectory within rounding, or a refusal with its reason."""
    inputs, _ = torch_cases[rule]
    compared = []
    for desc, _, kwargs in inputs:
        refused = [key for key in REFUSED if kwargs.get(key)]
        if refused:
            with pytest.raises(ValueError, match=REFUSED[refused[0]]):
                getattr(flatkern, rule)(parameters(), **kwargs, backend=backend)
            continue
        ours, theirs = parameters(), parameters()
        train(getattr(flatkern, rule)(ours, **kwargs, backend=backend), ours)
        train(getattr(torch.optim, rule)(theirs, **kwargs), theirs)
        assert_close(ours, theirs, lr=float(kwargs.get("lr", 1e-3)))
        compared.append(desc)
    assert len(compared) >= len(inputs) - 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_torch_error_inputs(rule, torch_cases):
    """Torch's error type and regular expression. Duplicates are an error here, where torch only warns."""
    _, errors = torch_cases[rule]
    assert len(errors) >= 7
    for desc, params, kwargs, kind, regex in errors:
        if desc.startswith(FOREACH_ONLY):
            continue
        params = parameters() if params is None else params
        error = ValueError if kind == "UserWarning" else getattr(builtins, kind)
        match = "shares memory with params" if kind == "UserWarning" else regex
        with pytest.raises(error, match=match):
            getattr(flatkern, rule)(params, **kwargs)


@pytest.mark.parametrize("rule", RULES)
def test_signature(rule):
    """Torch's arguments, in torch's order, with torch's defaults; then ours, keyword-only."""
    ours = inspect.signature(getattr(flatkern, rule)).parameters.values()
    theirs = inspect.signature(getattr(torch.optim, rule)).parameters
    positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(p.name, p.default) for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    shared = {p.name: p.default for p in ours if p.name in theirs and p.kind is p.KEYWORD_ONLY}
    assert shared == {p.name: p.default for p in theirs.values() if p.kind is p.KEYWORD_ONLY}
    added = {p.name: (p.kind, p.default) for p in ours if p.name not in theirs}
    capturable = {} if "capturable" in theirs else {"capturable": False}
    ours_only = {"perturb": None, "enhance": None, "backend": None, "master_weights": False, "max_grad_norm": None}
    assert added == {name: (inspect.Parameter.KEYWORD_ONLY, value) for name, value in (ours_only | capturable).items()}


@pytest.mark.parametrize("make", [flatkern.SGD, flatkern.AdamW, lambda p: flatkern.Wrap(torch.optim.SGD(p))])
def test_trainers_recognise_it(make):
    """A torch.optim.Optimizer whose step takes `closure`, by position or by that name, and None."""
    opt = make(parameters())
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt._step_supports_amp_scaling
    assert opt.step() is None
    assert opt.step(None) is None
    assert opt.step(closure=None) is None
    assert opt.step(closure=lambda: 3.5) == 3.5
    assert opt.step(lambda: 3.5) == 3.5


def use(opt, params, step):
    """One step of the optimizer's method where every pass finds the same gradients."""
    gradients(params, step)
    if opt.method is not None and not opt.rolling:
        if isinstance(opt.method, flatkern.RWP):
            opt.zero_grad()
        opt.perturb()
        gradients(params, step)
    opt.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*METHODS, "rolling"])
def test_neutral(rule, name, backend):
    """No noise, no climb: bit-identical to the plain base optimizer of the same backend."""
    method = METHODS.get(name) or flatkern.RWP(sigma=0.0, rolling=True)
    options = {"weight_decay": 0.1, "lr": 0.05} | ({"momentum": 0.9} if rule == "SGD" else {})
    plain, ours = parameters(), parameters()
    train(getattr(flatkern, rule)(plain, **options, backend=backend), plain)
    opt = getattr(flatkern, rule)(ours, **options, backend=backend, perturb=method)
    for step in range(STEPS):
        use(opt, ours, step)
    opt.eval()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", [*METHODS, "rolling", "plain"])
def test_neutral_wrap(name, backend):
    """Around torch's own optimizer: bit-identical to it."""
    method = None if name == "plain" else METHODS.get(name) or flatkern.RWP(sigma=0.0, rolling=True)
    plain, ours = parameters(), parameters()
    train(torch.optim.RMSprop(plain, momentum=0.9), plain)
    opt = flatkern.Wrap(torch.optim.RMSprop(ours, momentum=0.9), perturb=method, backend=backend)
    for step in range(STEPS):
        use(opt, ours, step)
    opt.eval()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_mixed_gradient_without_noise(rule, backend):
    """m-RWP at sigma = 0 is the base rule on lam g + (1 - lam) g_clean."""
    lam, plain, ours = 0.25, parameters(), parameters()
    base = getattr(torch.optim, rule)(plain, lr=0.01)
    opt = getattr(flatkern, rule)(ours, lr=0.01, perturb=flatkern.RWP(sigma=0.0, lam=lam), backend=backend)
    for step in range(STEPS):
        gradients(ours, step)
        opt.perturb()
        gradients(ours, 50 + step)
        opt.step()
        gradients(plain, step)
        clean = [p.grad for p in plain]
        gradients(plain, 50 + step)
        for p, g in zip(plain, clean, strict=True):
            p.grad = lam * p.grad + (1 - lam) * g
        base.step()
    assert_close(ours, plain, lr=0.01)


def test_tensor_lr_changes_in_place(backend):
    for rule in RULES:
        ours, theirs = parameters(), parameters()
        rates = torch.tensor(0.1), torch.tensor(0.1)
        pair = (
            (getattr(flatkern, rule)(ours, lr=rates[0], backend=backend), ours),
            (getattr(torch.optim, rule)(theirs, lr=rates[1]), theirs),
        )
        for opt, params in pair:
            train(opt, params, 2)
            opt.param_groups[0]["lr"].fill_(0.01)
            train(opt, params, 2, start=2)
        assert isinstance(pair[0][0].param_groups[0]["lr"], torch.Tensor)
        assert_close(ours, theirs, lr=0.1)


def test_names_and_unknown_group_keys():
    """Named parameters keep their names; keys that nobody knows stay in their group."""
    params = parameters()
    named = [(f"layer{k}.weight", p) for k, p in enumerate(params)]
    groups = [{"params": named[:2], "lr": 0.5, "param_group": 7}, {"params": named[2:], "tag": "x"}]
    opt = flatkern.SGD(groups, lr=0.1, perturb=flatkern.RWP())
    assert [g["param_names"] for g in opt.param_groups] == [["layer0.weight", "layer1.weight"],
                                                            ["layer2.weight", "layer3.weight"]]  # fmt: skip
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.1]
    saved = opt.state_dict()["param_groups"]
    assert saved[0]["param_group"] == 7
    assert saved[1]["tag"] == "x"
    assert saved[1]["param_names"] == ["layer2.weight", "layer3.weight"]


def test_group_overrides(backend):
    for rule in RULES:
        ours, theirs = parameters(), parameters()
        own = {"lr": 0.2, "weight_decay": 0.3}
        own |= {"momentum": 0.5, "nesterov": True} if rule == "SGD" else {"betas": (0.5, 0.6), "eps": 1e-3}
        for library, params, extra in ((flatkern, ours, {"backend": backend}), (torch.optim, theirs, {})):
            opt = getattr(library, rule)([{"params": params[:2], **own}, {"params": params[2:]}], lr=0.01, **extra)
            train(opt, params, 3)
            opt.param_groups[1]["lr"] = 0.3
            train(opt, params, 3, start=3)
        assert_close(ours, theirs, lr=0.3)


@pytest.mark.parametrize("rule", RULES)
def test_schedulers(rule, backend):
    """StepLR, then OneCycleLR, which cycles momentum or beta1 too; the same steps as torch's."""
    for schedule in (
        lambda opt: StepLR(opt, step_size=2, gamma=0.5),
        lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=STEPS + 1),
    ):
        options = {"momentum": 0.9} if rule == "SGD" else {}
        ours, theirs = parameters(), parameters()
        seen = []
        for library, params, extra in ((flatkern, ours, {"backend": backend}), (torch.optim, theirs, {})):
            opt = getattr(library, rule)(params, lr=0.1, **options, **extra)
            scheduler = schedule(opt)
            values = []
            for step in range(STEPS):
                train(opt, params, 1, start=step)
                scheduler.step()
                values.append([opt.param_groups[0].get(key) for key in ("lr", "momentum", "betas")])
            seen.append(values)
        assert seen[0] == seen[1]
        assert_close(ours, theirs, lr=0.1)


def test_scheduler_of_sigma_and_rho_takes_effect(backend):
    """Method values are read from the groups at every call."""
    for method, key, value in ((flatkern.RWP(sigma=0.1), "sigma", 0.0), (flatkern.SAM(rho=0.1), "rho", 0.0)):
        (p,) = params = parameters([(4, 3)])
        opt = flatkern.SGD(params, lr=0.0, perturb=method, backend=backend)
        for on in (True, False, True):
            opt.param_groups[0][key] = 0.1 if on else value
            before = p.detach().clone()
            if key == "rho":
                gradients(params, 0)
            opt.perturb()
            assert torch.equal(p, before) is not on
            opt.restore()
            assert torch.equal(p, before)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("rule", RULES)
def test_foreach_and_fused_are_ignored(rule, flag, backend):
    results = []
    for value in (None, True, False):
        params = parameters()
        train(getattr(flatkern, rule)(params, **{flag: value}, backend=backend), params)
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def counted(register):
    """Register a hook that records what it is called on; the list, and the handle."""
    calls = []
    return calls, register(lambda opt, args, kwargs: calls.append(type(opt).__name__))


WAYS = {"plain": lambda opt: opt.step(), "closure": lambda opt: opt.step(lambda: None)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [None, flatkern.RWP(), flatkern.RWP(rolling=True)], ids=["none", "RWP", "rolling"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "Wrap"])
def test_step_hooks_fire_once(way, method, wrapped):
    params = parameters([(3,)])
    base = torch.optim.SGD(params, lr=0.1)
    opt = flatkern.Wrap(base, perturb=method) if wrapped else flatkern.SGD(params, lr=0.1, perturb=method)
    gradients(params, 0)
    before, after = counted(opt.register_step_pre_hook)[0], counted(opt.register_step_post_hook)[0]
    WAYS[way](opt)
    assert (len(before), len(after)) == (1, 1)


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "Wrap"])
def test_global_step_hooks_fire_once(wrapped):
    """Profilers and torchtitan register them; one step is one call. Wrap and its base are two optimizers to torch, and
    the base's own step is called, so that whoever has patched or hooked it is served: the global hooks see both."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params = parameters([(3,)])
    base = torch.optim.SGD(params, lr=0.1)
    opt = flatkern.Wrap(base) if wrapped else flatkern.SGD(params, lr=0.1)
    own = counted(base.register_step_post_hook)[0]
    gradients(params, 0)
    before, handle = counted(register_optimizer_step_pre_hook)
    after, other = counted(register_optimizer_step_post_hook)
    try:
        opt.step()
    finally:
        handle.remove()
        other.remove()
    assert own == (["SGD"] if wrapped else [])
    assert (len(before), len(after)) == ((2, 2) if wrapped else (1, 1))


def test_zero_grad():
    params = parameters()
    opt = flatkern.SGD(params)
    gradients(params, 0)
    kept = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    opt.zero_grad()
    assert all(p.grad is None for p in params)


def test_zeroed_gradients_are_not_fresh():
    """After zero_grad(set_to_none=False) SAM has nothing to climb along, and RWP nothing to lose."""
    params = parameters()
    sam = flatkern.SGD(params, perturb=flatkern.SAM())
    gradients(params, 0)
    sam.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"there is no new one in \.grad"):
        sam.perturb()
    rwp = flatkern.SGD(params, perturb=flatkern.RWP())
    gradients(params, 0)
    rwp.zero_grad(set_to_none=False)
    rwp.perturb()
    rwp.restore()


def test_dampening_starts_after_the_first_step(backend):
    """Torch's v <- d on the first step of each parameter, also of one that comes late."""
    ours, theirs = parameters(), parameters()
    for opt, params in (
        (flatkern.SGD(ours, lr=0.1, momentum=0.9, dampening=0.7, backend=backend), ours),
        (torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.7), theirs),
    ):
        for step in range(4):
            gradients(params, step)
            if step < 2:
                params[1].grad = None
            opt.step()
    assert_close(ours, theirs, lr=0.1)


# --- checkpoints ---------------------------------------------------------------------------------

OPTIONS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.95)},
}


@pytest.mark.parametrize("step_type", [None, int, float])
@pytest.mark.parametrize("rule", OPTIONS)
def test_torch_checkpoint_loads_and_continues(rule, step_type, backend):
    """Within rounding of torch continuing itself; so does torch from a checkpoint of ours. `step` may be a number."""
    theirs, ours, back = parameters(), parameters(seed=9), parameters(seed=8)
    base = getattr(torch.optim, rule)(theirs, **OPTIONS[rule])
    train(base, theirs, 4)
    saved = copy.deepcopy(base.state_dict())
    for state in saved["state"].values():
        if step_type and "step" in state:
            state["step"] = step_type(state["step"])
    opt = getattr(flatkern, rule)(ours, lr=7.0, backend=backend)
    opt.load_state_dict(saved)
    copy_weights(ours, theirs)
    train(base, theirs, 4, start=4)
    train(opt, ours, 4, start=4)
    assert_close(ours, theirs, lr=0.05)

    again = getattr(torch.optim, rule)(back, lr=7.0)
    again.load_state_dict(opt.state_dict())
    copy_weights(back, ours)
    train(again, back, 4, start=8)
    train(base, theirs, 4, start=8)
    assert_close(back, theirs, lr=0.05, steps=8)


def copy_weights(params, source):
    with torch.no_grad():
        for p, q in zip(params, source, strict=True):
            p.copy_(q)


@pytest.mark.parametrize("base", ["AdamW", "RMSprop", "Adagrad"])
def test_wrap_leaves_the_base_to_make_its_state(base):
    """Many bases initialise only where a parameter's state is empty; ARWP's history comes after theirs."""
    params = parameters()
    opt = flatkern.Wrap(getattr(torch.optim, base)(params), flatkern.RWP(eta=1.0))
    # Adagrad's is made in its constructor.
    expected = {*opt.base.state[params[0]], "history"} if base == "Adagrad" else set()
    opt.perturb()
    opt.restore()
    assert all(set(opt.state.get(p, {})) == expected for p in params)
    for step in range(2):
        opt.perturb()
        gradients(params, step)
        opt.step()
        opt.zero_grad()
    assert all(opt.base.state[p]["history"].any() and "step" in opt.base.state[p] for p in params)
