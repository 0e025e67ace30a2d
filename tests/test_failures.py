"""Whatever fails, the weights end clean inside step(closure) and `with perturbed()`; between explicit calls the next
one names the way back.
"""

import copy
import pickle

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import METHODS, Network, Training, backends, batch, noise, train, trained
from steps import begins_clean

import flatkern
from flatkern import dispatch

MASTERS = {"dtype": torch.bfloat16, "master_weights": True}
OPTIONS = [{}, MASTERS, {"base": "Wrap"}]
ERRORS = [ZeroDivisionError, KeyboardInterrupt]
KINDS = ("RWP", "ARWP", "m-RWP", "SAM", "ASAM")
options = pytest.mark.parametrize(
    ("backend", "options"),
    backends([(o,) for o in OPTIONS], lambda options: not options),
    indirect=["backend"],
    ids=str,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")


class Failing(torch.autograd.Function):
    """Its backward raises, halfway through the network's."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def climb(run, index=0):
    """What comes before perturb() in a step."""
    if begins_clean(run.opt):
        run.backward(index)


def failing_backward(run, error=ZeroDivisionError):
    """A backward that has added to some gradients when it fails."""
    x = torch.tanh(torch.nn.functional.linear(batch(1)[0].to(run.net.gate.dtype), run.net.hidden, run.net.bias))
    (torch.nn.functional.linear(Failing.apply(x, error("in backward")), run.net.head) * run.net.gate).sum().backward()


def assert_clean_and_usable(run, name, weights, state, untroubled):
    """Clean, nothing pending, and the next steps are those of a run that never failed."""
    assert not run.opt.is_perturbed
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    run.opt.state_dict()
    run.opt.zero_grad()
    for r in (run, untroubled):
        for group in r.opt.param_groups:
            if "round" in group:
                group["round"] = 9
        train(r, METHODS[name].user, 2, start=3)
    assert_same(run.weights(), untroubled.weights())


def two_trained(name, backend, **options):
    """A run and one that never fails; the weights and the state of both."""
    runs = [trained(name, backend, steps=2, **options) for _ in range(2)]
    return *runs, runs[0].weights(), runs[0].state()


# --- with perturbed() -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
@options
@pytest.mark.parametrize("name", KINDS)
def test_block_raises(name, options, error, backend):
    """Before, between and after backward passes; this round's gradients are dropped."""
    for body in ("raise", "backward raise", "failing"):
        run, untroubled, weights, state = two_trained(name, backend, **options)
        climb(run)
        with pytest.raises(error), run.opt.perturbed():
            assert not same(run.weights(), weights)
            if body == "failing":
                failing_backward(run, error)
            if body.startswith("backward"):
                run.backward(1)
            raise error
        assert all(p.grad is None for p in run.net.parameters())
        assert_clean_and_usable(run, name, weights, state, untroubled)


@pytest.mark.parametrize("name", ["RWP rounds", "ARWP rounds", "mSAM"])
def test_block_raises_in_a_later_round(name, backend):
    """Only this round is dropped: without a gradient of it, the rounds before still make the step."""
    kind = {"RWP rounds": "RWP", "ARWP rounds": "ARWP", "mSAM": "SAM"}[name]
    run, untroubled, weights, _ = two_trained(kind, backend)
    for r in (run, untroubled):
        climb(r)
        r.opt.perturb()
        r.backward(0)
        r.opt.restore()
    climb(run)
    with pytest.raises(ZeroDivisionError), run.opt.perturbed():
        raise ZeroDivisionError
    assert_same(run.weights(), weights)
    for r in (run, untroubled):
        r.opt.step()
    assert_same(run.weights(), untroubled.weights())
    assert not same(run.weights(), weights)


@pytest.mark.parametrize("name", KINDS)
def test_block_is_left_in_every_way(name, backend):
    """Return, break, a step inside, a restore inside, an exception after the step."""
    for way in ("return", "break", "step", "restore", "step raise"):
        run, untroubled, weights, _ = two_trained(name, backend)

        def body(run=run, way=way):
            for _ in (0, 1):
                climb(run)
                with run.opt.perturbed():
                    assert run.opt.is_perturbed
                    run.backward(1)
                    if way.startswith("step"):
                        run.opt.step()
                    if way == "step raise":
                        raise ZeroDivisionError
                    if way == "restore":
                        run.opt.restore()
                    if way == "return":
                        return
                    break

        if way == "step raise":
            with pytest.raises(ZeroDivisionError):
                body()
        else:
            body()
        assert not run.opt.is_perturbed
        if not way.startswith("step"):
            assert_same(run.weights(), weights)
            run.opt.step()
        climb(untroubled)
        untroubled.opt.perturb()
        untroubled.backward(1)
        untroubled.opt.step()
        assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("name", KINDS)
def test_refused_on_entry(name, backend):
    """A block that cannot be entered is not left either: what was on stays on."""
    run, *_ = two_trained(name, backend)
    climb(run)
    run.opt.perturb()
    now = run.weights()
    with pytest.raises(RuntimeError, match="already perturbed"), run.opt.perturbed():
        pytest.fail("the body ran")
    assert run.opt.is_perturbed
    assert_same(run.weights(), now)


# --- step(closure) ----------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("name", [*KINDS, "mSAM"])
def test_backward_fails_in_a_closure(name, options, backend):
    """In each of the passes."""
    for failing in range({"RWP": 1, "ARWP": 1, "mSAM": 4}.get(name, 2)):
        run, untroubled, weights, state = two_trained(name, backend, **options)
        calls = []

        def closure(run=run, calls=calls, failing=failing):
            run.opt.zero_grad()
            calls.append(1)
            return failing_backward(run) if len(calls) == failing + 1 else run.backward(1)

        with pytest.raises(ZeroDivisionError, match="in backward"):
            run.opt.step([closure] * 2 if name in ("mSAM", "m-RWP") else closure)
        assert len(calls) == failing + 1
        assert_clean_and_usable(run, name, weights, state, untroubled)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@options
@pytest.mark.parametrize("name", ["SAM", "ASAM", "mSAM"])
def test_climb_is_not_finite(name, value, options, backend):
    """The step is skipped: weights and state are those before."""
    run, _, weights, state = two_trained(name, backend, **options)

    def closure():
        run.opt.zero_grad()
        return run.backward(1, weight=value)

    run.opt.step([closure] * (2 if name == "mSAM" else 1))
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    assert not run.opt.is_perturbed
    run.opt.zero_grad()
    train(run, METHODS[name].user, 1, start=3)
    assert all(w.isfinite().all() for w in run.weights())
    assert not same(run.weights(), weights)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@options
@pytest.mark.parametrize("name", KINDS)
def test_perturbed_gradient_is_not_finite(name, value, options, backend):
    """restore() is exact whatever the gradients are, and release() forgets them."""
    run, _, weights, state = two_trained(name, backend, **options)
    climb(run)
    with run.opt.perturbed():
        run.backward(1, weight=value)
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    run.opt.release()
    run.opt.zero_grad()
    train(run, METHODS[name].user, 1, start=3)
    assert all(w.isfinite().all() for w in run.weights())


# --- ops that fail ----------------------------------------------------------------------------------


class Mixed(Training):
    """bfloat16 and float32 parameters with masters: two buckets, the first with masters, the second with copies."""

    def __init__(self, perturb, backend):
        super().__init__(None)
        net = Network()
        net.hidden.data = net.hidden.data.bfloat16()
        net.forward = lambda index: (net.hidden.float().square().mean() + net.head.square().mean()) * (index + 1)
        self.net = net
        self.opt = flatkern.SGD([net.hidden, net.head], lr=0.1, momentum=0.9, weight_decay=0.1, perturb=perturb,
                                backend=backend, master_weights=True)  # fmt: skip
        self.start = self.weights()


@pytest.fixture
def failing(monkeypatch):
    """failing(op, k): the k-th call of an op raises, before it has written anything."""
    load = dispatch.load
    due = {}

    def counting(op, backend):
        function = load(op, backend)

        def run(*args, **kwargs):
            if op.name in due:
                due[op.name] -= 1
                if due[op.name] < 0:
                    del due[op.name]
                    raise MemoryError(op.name)
            function(*args, **kwargs)

        return run

    dispatch.resolve.cache_clear()
    monkeypatch.setattr(dispatch, "load", counting)
    yield due.__setitem__
    monkeypatch.undo()
    dispatch.resolve.cache_clear()


@pytest.mark.parametrize("bucket", [0, 1])
@pytest.mark.parametrize("how", ["perturb", "perturbed", "closure"])
@pytest.mark.parametrize("name", KINDS)
def test_perturbing_fails(name, how, bucket, failing, backend):
    """At the first or the second bucket: what was written is undone, and the same call works afterwards."""
    run, untroubled = (Mixed(METHODS[name].make(), backend) for _ in range(2))
    for r in (run, untroubled):
        train(r, METHODS[name].user, 1)
    weights, state = run.weights(), run.state()
    if how != "closure":
        climb(run)
        climb(untroubled)
    failing("perturb_ascent_" if name.endswith("SAM") else "perturb_gaussian_", bucket)
    with pytest.raises(MemoryError):
        if how == "perturbed":
            with run.opt.perturbed():
                pytest.fail("the body ran")
        run.opt.perturb() if how == "perturb" else run.opt.step(run.closure(0))
    assert not run.opt.is_perturbed
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    assert run.opt.param_groups[0].get("round") == untroubled.opt.param_groups[0].get("round")
    for r in (run, untroubled):
        if how == "closure":
            r.opt.zero_grad()
            climb(r)
        r.opt.perturb()
        r.backward(1)
        r.opt.step()
    assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("bucket", [0, 1])
@pytest.mark.parametrize("how", ["perturbed", "closure"])
@pytest.mark.parametrize("name", KINDS)
def test_updating_fails(name, how, bucket, failing, backend):
    """In step(): no parameter is left perturbed, whether its bucket had its update or not."""
    run = Mixed(METHODS[name].make(), backend)
    run.opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(run, METHODS[name].user, 1)
    climb(run) if how == "perturbed" else None
    failing("sgd_update_", bucket)
    with pytest.raises(MemoryError):
        if how == "closure":
            run.opt.step(run.closure(0))
        with run.opt.perturbed():
            run.backward(0)
            run.opt.step()
    assert not run.opt.is_perturbed
    assert_same(run.weights(), run.start)
    run.opt.state_dict()


@pytest.mark.parametrize("bucket", [0, 1])
def test_updating_fails_in_rolling_mode(bucket, failing, backend):
    """eval() still gives clean weights back."""
    run = Mixed(noise(sigma=0.1, rolling=True), backend)
    run.opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(run, METHODS["rolling"].user, 2)
    assert run.opt.is_perturbed
    run.backward(0)
    failing("sgd_update_", bucket)
    with pytest.raises(MemoryError):
        run.opt.step()
    run.opt.eval()
    assert_same(run.weights(), run.start)


@pytest.mark.parametrize("bucket", [0, 1])
def test_restoring_fails(bucket, failing, backend):
    """restore() can be called again."""
    run = Mixed(noise(sigma=0.1), backend)
    run.opt.perturb()
    failing("restore_", bucket)
    with pytest.raises(MemoryError):
        run.opt.restore()
    with pytest.raises(RuntimeError, match=r"restore\(\)"):
        run.opt.state_dict()
    run.opt.restore()
    assert_same(run.weights(), run.start)
    run.opt.state_dict()


# --- between explicit calls -------------------------------------------------------------------------


@options
@pytest.mark.parametrize("name", KINDS)
def test_loop_that_was_interrupted(name, options, backend):
    """After perturb() and an exception in the user's loop every next call names restore(), until it is called."""
    run, untroubled, weights, state = two_trained(name, backend, **options)
    climb(run)
    run.opt.perturb()
    with pytest.raises(ZeroDivisionError):
        failing_backward(run)
    for call in (run.opt.perturb, run.opt.state_dict, lambda: pickle.dumps(run.opt), lambda: copy.deepcopy(run.opt),
                 lambda: run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
                 lambda: flatkern.SGD(run.net.parameters())):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            call()
    run.opt.restore()
    assert_same(run.weights(), weights)
    with pytest.raises(RuntimeError, match=r"release\(\)"):
        run.opt.state_dict()
    run.opt.release()
    assert_clean_and_usable(run, name, weights, state, untroubled)


@options
@pytest.mark.parametrize("name", [*KINDS, "rolling"])
def test_loading_ends_the_perturbation(name, options, backend):
    """What others wrote since stays, the rest is restored; pending rounds are forgotten."""
    run, *_ = two_trained(name, backend, **options)
    run.opt.eval()
    saved, weights = copy.deepcopy(run.opt.state_dict()), run.weights()
    if name == "rolling":
        run.opt.train()
    else:
        climb(run)
        run.opt.perturb()
        run.backward(1)
    with torch.no_grad():
        run.net.head.fill_(0.5)
    run.opt.load_state_dict(saved)
    assert not run.opt.is_perturbed
    head = [name for name, _ in run.net.named_parameters()].index("head")
    now = run.weights()
    assert (now.pop(head) == 0.5).all()
    weights.pop(head)
    assert_same(now, weights)
    run.opt.state_dict()
    run.opt.zero_grad()
    run.opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(run, METHODS[name].user, 2)
    run.opt.eval()
    assert (run.net.head == 0.5).all()  # with masters too: neither the old one nor the perturbed one
