"""Trainers that stand between the user and the optimizer: a proxy with another `__dict__`, a wrapper that delegates,
distributed checkpoints in one process. They are imitated here, so that nothing has to be installed.
"""

import copy

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import METHODS, Training, backends, noise, train
from steps import plain
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.lr_scheduler import StepLR

NAMES = ("RWP", "RWP block", "RWP rounds", "ARWP", "m-RWP", "m-RWP noisy first", "m-ARWP losses", "rolling",
         "rolling ARWP", "SAM", "ASAM", "mSAM")  # fmt: skip
BASES = ("SGD", "AdamW", "Wrap")
names_and_bases = pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends([(name, base) for name in NAMES for base in BASES], lambda name, base: base == "SGD"),
    indirect=["backend"],
)


class ProxyBase:
    """As Lightning's: a subclass of the optimizer's class, whose instances have a copy of its `__dict__`; methods run
    with the proxy as `self`, but step() on the optimizer."""

    def __init__(self, opt):
        self.__dict__ = {k: v for k, v in opt.__dict__.items() if k not in ("step",)}
        self.__class__ = type("Proxy" + type(opt).__name__, (ProxyBase, type(opt)), {})
        self._optimizer = opt

    def step(self, closure=None, **kwargs):
        return self._optimizer.step(closure, **kwargs) if closure is not None else self._optimizer.step()


def run_by_proxy(name, backend, base="SGD", **options):
    run = Training(METHODS[name].make(), base, backend=backend, **options)
    real = run.opt
    StepLR(real, 100)  # schedulers patch the instance's step
    run.opt = ProxyBase(real)
    return run, real


@names_and_bases
def test_proxy_leaves_every_weight_at_lr_zero(name, base, backend):
    """Explicit calls and closures; a second copy of the state would restore other weights."""
    for user in filter(None, (METHODS[name].user, METHODS[name].closure)):
        run, real = run_by_proxy(name, backend, base, lr=0.0, weight_decay=0.0)
        train(run, user)
        run.opt.eval()
        assert run.saw_other_weights
        assert_same(run.weights(), run.start)
        assert not real.is_perturbed


@names_and_bases
def test_proxy_is_the_optimizer(name, base, backend):
    """The same trajectory, state and round, whoever is asked, and whoever makes each call."""
    run, real = run_by_proxy(name, backend, base)
    direct = Training(METHODS[name].make(), base, backend=backend)
    train(run, METHODS[name].user, 2)
    proxy, run.opt = run.opt, real
    train(run, METHODS[name].user, 1, start=2)
    run.opt = proxy
    train(run, METHODS[name].user, 1, start=3)
    train(direct, METHODS[name].user, 4)
    for opt in (real, proxy):
        assert opt.is_perturbed is direct.opt.is_perturbed
        assert opt.param_groups[0].get("round") == direct.opt.param_groups[0].get("round")
    proxy.eval()
    direct.opt.eval()
    assert not real.is_perturbed
    assert_same(run.weights(), direct.weights())
    for opt in (real, proxy):
        run.opt = opt
        assert_same_state(run.state(), direct.state())
    saved, expected = proxy.state_dict(), direct.opt.state_dict()
    assert saved["state"].keys() == expected["state"].keys()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["RWP", "ARWP", "SAM", "rolling"])
def test_proxy_loads(name, base, backend):
    """A checkpoint loaded through either is seen by both."""
    source = Training(METHODS[name].make(), base, backend=backend)
    train(source, METHODS[name].user, 2)
    source.opt.eval()
    saved = copy.deepcopy(source.opt.state_dict())
    train(source, METHODS[name].user, 2, start=2)
    source.opt.eval()
    for through_proxy in (False, True):
        run, real = run_by_proxy(name, backend, base)
        train(run, METHODS[name].user, 2)
        run.opt.eval()
        (run.opt if through_proxy else real).load_state_dict(copy.deepcopy(saved))
        train(run, METHODS[name].user, 2, start=2)
        run.opt.eval()
        assert_same(run.weights(), source.weights())


def test_refusals_by_proxy(backend):
    run, real = run_by_proxy("RWP", backend)
    run.opt.perturb()
    for opt in (run.opt, real):
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            opt.state_dict()
        with pytest.raises(RuntimeError, match="already perturbed"):
            opt.perturb()
    with run.opt.clean():
        assert not real.is_perturbed
        assert_same(run.weights(), run.start)
    real.restore()
    assert not run.opt.is_perturbed
    with run.opt.perturbed():
        assert real.is_perturbed
    assert_same(run.weights(), run.start)


def test_proxy_that_goes_away(backend):
    """Its end is not the optimizer's: a perturbation stays on, and a model that it made follow is still followed."""
    run, real = run_by_proxy("RWP", backend)
    run.opt.perturb()
    noisy = run.weights()
    run.opt = real
    assert_same(run.weights(), noisy)
    real.restore()
    assert_same(run.weights(), run.start)
    run, real = run_by_proxy("rolling", backend)
    run.opt.follow(run.net)
    run.opt = real
    run.loss(0)
    assert real.is_perturbed


# --- a wrapper that delegates -----------------------------------------------------------------------


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As Accelerate's: state and groups are the optimizer's, whose own state_dict it loads at once; step() goes through
    the scaler, which calls a patched step, to see whether it was skipped."""

    def __init__(self, optimizer, scaler=None):
        self.optimizer, self.scaler, self.called, self.skipped = optimizer, scaler, False, False
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        if scaler is not None:
            original = optimizer.step

            def patched(*args, **kwargs):
                self.called = True
                return original(*args, **kwargs)

            self.patched, self.original = patched, original

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def defaults(self):
        return self.optimizer.defaults

    def add_param_group(self, param_group):
        self.optimizer.add_param_group(param_group)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none=None):
        self.optimizer.zero_grad() if set_to_none is None else self.optimizer.zero_grad(set_to_none=set_to_none)

    def train(self):
        self.optimizer.train()

    def eval(self):
        self.optimizer.eval()

    def step(self, closure=None):
        if self.scaler is None:
            return self.optimizer.step(closure)
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.skipped, self.called = not self.called, False
        self.optimizer.step = self.original
        return None


class Accelerated(Training):
    """Method calls go to the wrapped optimizer, all else to the wrapper, as in a script that uses Accelerate."""

    def step(self):
        self.wrapper.step()

    def prepare(self):
        self.wrapper = AcceleratedOptimizer(self.opt, self.scaler)
        return self


@pytest.mark.parametrize("scaled", [False, True])
@names_and_bases
def test_accelerated(name, base, scaled, backend):
    """Round trip in prepare, steps through the wrapper, with a scheduler on it, and a checkpoint on the way."""
    # A scaler looks at `.grad` before step(), so its last round must not end in restore(), as the block's does.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled and name != "RWP block" else None
    run = Accelerated(METHODS[name].make(), base, backend=backend, scaler=scaler).prepare()
    other = Training(METHODS[name].make(), base, backend=backend)
    scheduler = StepLR(run.wrapper, 100)
    for t in range(4):
        METHODS[name].user(run, t)
        run.wrapper.zero_grad()
        scheduler.step()
        if t == 1:
            run.wrapper.eval()
            run.wrapper.load_state_dict(copy.deepcopy(run.wrapper.state_dict()))
            run.wrapper.train()
    train(other, METHODS[name].user, 4)
    for opt in (run.wrapper, other.opt):
        opt.eval()
    assert_same(run.weights(), other.weights())
    assert_same_state(run.state(), other.state())


def test_accelerated_closure_with_a_scaler(backend):
    """Accelerate hands the closure on beside the scaler, by position: refused before it is called."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = Accelerated(noise(), backend=backend, scaler=scaler).prepare()
    run.scaler.scale(run.loss(0)).backward()
    with pytest.raises(RuntimeError, match="scaler"):
        run.wrapper.step(run.closure(0))
    assert run.passes == 0


# --- distributed checkpoints ------------------------------------------------------------------------

FLAT = (False, True)


def saved_by_dcp(run, flat):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    return copy.deepcopy(dcp.get_optimizer_state_dict(run.net, run.opt, options=options)), options


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends(
        [(name, base) for name in (None, "RWP", "ARWP", "rolling", "rolling ARWP", "SAM") for base in BASES],
        lambda name, base: base == "SGD",
    ),
    indirect=["backend"],
)
def test_distributed_checkpoint(name, base, flat, backend):
    """Saved, loaded into a fresh optimizer, continued: as if nothing had been."""

    def make():
        run = Training(METHODS[name].make() if name else None, base, backend=backend)
        run.net.explicit_zeros = True  # torch wants state for every parameter that requires a gradient
        return run

    user = METHODS[name].user if name else plain
    run = make()
    train(run, user, 3)
    run.opt.eval()
    saved, options = saved_by_dcp(run, flat)
    weights = run.weights()

    fresh = make()
    with torch.no_grad():
        for p, w in zip(fresh.net.parameters(), weights, strict=True):
            p.copy_(w)
    dcp.set_optimizer_state_dict(fresh.net, fresh.opt, saved, options=options)
    assert_same(fresh.weights(), weights)
    assert_same_state({k: v for k, v in fresh.state().items() if k in run.state()}, run.state())
    assert fresh.opt.param_groups[0].get("round") == run.opt.param_groups[0].get("round")
    for r in (run, fresh):
        r.opt.train()
        train(r, user, 2, start=3)
        r.opt.eval()
    assert_same(fresh.weights(), run.weights())


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["RWP", "rolling ARWP"])
def test_distributed_checkpoint_of_a_fresh_optimizer(name, base, flat, backend):
    """The step that initialises the state leaves weights and round alone, and no noise on; every training goes on."""
    run = Training(METHODS[name].make(), base, backend=backend)
    saved, _ = saved_by_dcp(run, flat)
    assert any("momentum_buffer" in key or "exp_avg" in key for key in (saved if flat else str(saved).split("'")))
    assert_same(run.weights(), run.start)
    assert not run.opt.is_perturbed
    assert run.opt.param_groups[0]["round"] == 0
    assert run.opt.param_groups[0]["lr"] == 0.05
    train(run, METHODS[name].user)
    run.opt.eval()
    assert not same(run.weights(), run.start)


def test_distributed_checkpoint_of_perturbed_weights(backend):
    """Refused as state_dict() is, by name of the way out."""
    for method, remedy in ((noise(), r"restore\(\)"), (noise(rolling=True), r"eval\(\)")):
        run = Training(method, backend=backend)
        train(run, plain if method.rolling else METHODS["RWP"].user, 1)
        run.opt.train() if method.rolling else run.opt.perturb()
        with pytest.raises(RuntimeError, match=remedy):
            dcp.get_optimizer_state_dict(run.net, run.opt)
        run.opt.eval()
        dcp.get_optimizer_state_dict(run.net, run.opt)
