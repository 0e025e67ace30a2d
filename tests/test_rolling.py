"""Rolling mode: one pass a step, nothing but step() to call; train() and eval() switch the noise, and change nothing.

A step of it is a step of explicit RWP on the same noise, except that the first is the plain base step.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import METHODS, SEED, STREAM, Training, backends, noise, train
from steps import plain

import flatkern

ROLLING = ("rolling", "rolling ARWP")
EXPLICIT = {"rolling": "RWP", "rolling ARWP": "ARWP"}
PRECISIONS = {
    "fp32": {},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 masters": {"dtype": torch.bfloat16, "master_weights": True},
    "Wrap": {"base": "Wrap"},
    "Adam": {"base": "Adam"},
    "AdamW masters": {"base": "AdamW", "dtype": torch.float16, "master_weights": True},
}
precisions = pytest.mark.parametrize(
    ("backend", "precision"), backends(PRECISIONS, lambda p: p in ("fp32", "bf16 masters")), indirect=["backend"]
)
names = pytest.mark.parametrize("name", ROLLING)


def rolling(name, backend, steps=0, **options):
    run = Training(METHODS[name].make(), backend=backend, **options)
    train(run, plain, steps)
    return run


def round_of(run):
    return run.opt.param_groups[0]["round"]


@precisions
@names
def test_equals_explicit(name, precision, backend):
    """The first step starts in eval mode, so it is the base step; from there the gradient is taken at the noise of
    round 0, 1, 2, ...; weights, momentum and history are those of explicit RWP, bit for bit."""
    options = PRECISIONS[precision]
    run, explicit = (
        rolling(name, backend, **options),
        Training(METHODS[EXPLICIT[name]].make(), backend=backend, **options),
    )
    assert not run.opt.is_perturbed
    for t in range(5):
        (plain if t == 0 else METHODS["RWP"].user)(explicit, t)
        plain(run, t)
        for r in (run, explicit):
            r.opt.zero_grad()
        assert run.opt.is_perturbed
        assert not same(run.weights(), explicit.weights())
        assert_same(run.clean_weights(), explicit.weights())
        assert round_of(run) == round_of(explicit) == t
    run.opt.eval()
    explicit_state = {key: value for key, value in explicit.state().items() if key in run.state()}
    assert_same_state(run.state(), explicit_state)


@precisions
@names
def test_train_and_eval_are_idempotent(name, precision, backend):
    """The noise of the current round, again and again; neither advances it."""
    options = PRECISIONS[precision]
    run = rolling(name, backend, steps=2, **options)
    noisy, clean, state, round = run.weights(), run.clean_weights(), run.state(), round_of(run)
    for call, weights in (("train", noisy), ("eval", clean), ("eval", clean), ("train", noisy), ("train", noisy)):
        getattr(run.opt, call)()
        assert_same(run.weights(), weights)
        assert run.opt.is_perturbed is (call == "train")
        assert round_of(run) == round
    run.opt.train(False)
    assert_same(run.weights(), clean)
    assert_same_state(run.state(), state)


def evaluate(run):
    run.opt.eval()
    run.loss(20)
    run.opt.train()


def save(run):
    run.opt.eval()
    torch.save([run.net.state_dict(), run.opt.state_dict()], io.BytesIO())
    pickle.dumps(run.opt)
    copy.deepcopy(run.opt)
    run.opt.train()


def peek(run):
    with run.opt.clean():
        run.loss(20)


@pytest.mark.parametrize("between", [evaluate, save, peek])
@precisions
@names
def test_looking_changes_nothing(name, precision, between, backend):
    """Evaluating or saving between steps, and between backward and step(), leaves the trajectory as it is."""
    options = PRECISIONS[precision]
    run, watched = rolling(name, backend, **options), rolling(name, backend, **options)
    train(run, plain, 4)
    for t in range(4):
        if t:
            between(watched)
        watched.backward(t)
        if t:
            between(watched)
        watched.step()
        watched.opt.zero_grad()
    assert_same(run.weights(), watched.weights())
    for r in (run, watched):
        r.opt.eval()
    assert_same(run.weights(), watched.weights())
    assert_same_state(run.state(), watched.state())


@pytest.mark.parametrize("key", ["sigma", "eta", "perturb"])
def test_looking_under_a_schedule_changes_nothing(key, backend):
    """Values that change after step(): the noise of the round is the one that step() drew, also after an evaluation."""
    watched, run = (rolling("rolling ARWP", backend) for _ in range(2))
    for t, value in enumerate([0.2, 0.3, 0.4] if key != "perturb" else [True, False, True]):
        for r in (run, watched):
            plain(r, t)
            r.opt.zero_grad()
            r.opt.param_groups[0][key] = value
        evaluate(watched)
        assert_same(run.weights(), watched.weights())


@names
def test_step_in_eval_mode(name, backend):
    """The base step, then train mode: no history, no new round."""
    run, base = rolling(name, backend, steps=2), Training(None, backend=backend)
    run.opt.eval()
    round = round_of(run)
    with torch.no_grad():
        for p, q in zip(base.net.parameters(), run.net.parameters(), strict=True):
            p.copy_(q)
    for (k, key), value in run.state().items():
        if key == "momentum_buffer":
            base.opt.state[list(base.net.parameters())[k]][key] = value
    before = {key: value for key, value in run.state().items() if "momentum" not in key[1]}
    for r in (run, base):
        plain(r, 2)
    assert run.opt.is_perturbed
    assert_same(run.clean_weights(), base.weights())
    assert round_of(run) == round
    assert_same_state({key: run.state()[key] for key in before}, before)


@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "Wrap"])
@names
def test_initial_step_of_distributed_checkpointing(name, base, backend):
    """lr 0 and gradients of zero on a fresh optimizer: state, and nothing else; then training as ever."""
    run, other = rolling(name, backend, base=base), rolling(name, backend, base=base)
    for p in run.net.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    run.opt.param_groups[0]["lr"] = 0.0
    run.opt.step(closure=None)
    run.opt.param_groups[0]["lr"] = 0.05
    run.opt.zero_grad()
    assert_same(run.weights(), run.start)
    assert not run.opt.is_perturbed
    assert round_of(run) == 0
    assert {k for k, _ in run.state()} == set(range(1, 7))
    run.opt.state_dict()
    run.opt.load_state_dict(other.opt.state_dict())
    for r in (run, other):
        train(r, plain)
        r.opt.eval()
    assert_same(run.weights(), other.weights())


def test_refused(backend):
    """Each names what to call instead, and changes nothing."""
    run = rolling("rolling", backend, steps=2)
    noisy, round = run.weights(), round_of(run)
    for call in (run.opt.state_dict, partial(pickle.dumps, run.opt), partial(copy.deepcopy, run.opt), run.opt.release,
                 lambda: run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"eval\(\)"):
            call()
    for mode in ("train", "eval"):
        getattr(run.opt, mode)()
        weights = run.weights()
        for call in (run.opt.perturb, run.opt.restore, lambda: run.opt.perturbed().__enter__()):
            with pytest.raises(RuntimeError, match=r"train\(\)|eval\(\)|follow"):
                call()
            assert_same(run.weights(), weights)
    run.opt.train()
    assert_same(run.weights(), noisy)
    assert round_of(run) == round
    assert len(run.opt.param_groups) == 1
    with pytest.raises(ValueError, match=r"rolling.*lam"):
        flatkern.RWP(rolling=True, lam=0.5)
    for other in ("RWP", "SAM"):
        with pytest.raises(RuntimeError, match="rolling"):
            Training(METHODS[other].make()).opt.follow(run.net)


def test_train_and_eval_of_others(backend):
    """Without rolling train() does nothing and eval() is restore(), so trainers may call both."""
    for name in ("RWP", "SAM"):
        run = Training(METHODS[name].make(), backend=backend)
        run.opt.train()
        assert_same(run.weights(), run.start)
        if name == "SAM":
            run.backward(0)
        run.opt.perturb()
        noisy = run.weights()
        run.opt.train()
        assert_same(run.weights(), noisy)
        run.opt.eval()
        assert_same(run.weights(), run.start)


@names
def test_noise_of_parameters_without_gradient(name, backend):
    """`unused` has a gradient in no step, `sometimes` in some: both have the noise of every round, frozen ones none."""
    run = rolling(name, backend)
    for t in range(4):
        plain(run, t)
        expected = run.clean_weights()
        flatkern.perturb_(expected, 0.1, seed=SEED, stream=STREAM, round=t, backend=backend)
        now = dict(run.net.named_parameters())
        assert_same([now["frozen"]], run.start[:1])
        index = list(now).index("unused")
        assert_same([now["unused"]], [expected[index]])
        assert_same([run.clean_weights()[index]], [run.start[index]])
        if name == "rolling":
            assert_same(run.weights()[1:], expected[1:])
        run.opt.zero_grad()


def test_groups_change_during_training(backend):
    """sigma and perturb=False, from one step to the next."""
    run = Training(None)
    params = list(run.net.parameters())
    run.opt = flatkern.SGD([{"params": params[:3]}, {"params": params[3:], "perturb": False}], lr=0.05,
                           perturb=noise(sigma=0.1, rolling=True), backend=backend)  # fmt: skip
    for t, (sigma, on) in enumerate([(0.1, False), (0.2, False), (0.0, True), (0.3, False), (0.3, True)]):
        run.opt.param_groups[0]["sigma"] = sigma
        run.opt.param_groups[1]["perturb"] = on
        plain(run, t)
        clean = run.clean_weights()
        expected = [c.clone() for c in clean]
        flatkern.perturb_(expected, sigma, seed=SEED, stream=STREAM, round=t, backend=backend)
        assert_same(run.weights()[1:3], expected[1:3])
        assert same(run.weights()[3:], clean[3:]) is not on
        run.opt.zero_grad()


# --- follow(model) ----------------------------------------------------------------------------------


@precisions
@names
def test_follow(name, precision, backend):
    """Noise in training forwards, clean weights in eval forwards and in state_dict(); the trajectory is the same."""
    options = PRECISIONS[precision]
    run, other = rolling(name, backend, **options), rolling(name, backend, **options)
    handle = run.opt.follow(run.net)
    other.opt.train()  # a followed model is noisy in the first step too
    train(other, plain, 4)
    saved = []
    for t in range(4):
        run.net.train()
        plain(run, t)
        run.opt.zero_grad()
        run.net.eval()
        saved.append(run.loss(20))
        assert not run.opt.is_perturbed
        clean = run.weights()
        run.net.train()
        run.loss(20)
        assert run.opt.is_perturbed
        assert not same(run.weights(), clean)
        assert_same(run.net.state_dict().values(), clean)
        run.opt.state_dict()
    assert not run.opt.is_perturbed
    other.opt.eval()
    assert_same(run.weights(), other.weights())
    assert saved[-1] == other.net(20)
    handle.remove()
    run.net.train()
    run.loss(20)
    assert not run.opt.is_perturbed


def test_follow_a_submodule_in_checkpoints(backend):
    """state_dict() of a model that contains the followed one is clean too."""
    run = rolling("rolling", backend, steps=1)
    outer = torch.nn.ModuleDict({"inner": run.net})
    run.opt.follow(run.net)
    run.loss(20)
    noisy, clean = run.weights(), run.clean_weights()
    assert_same(outer.state_dict().values(), clean)
    run.loss(20)
    assert_same(run.weights(), noisy)


def test_followed_model_is_copied_and_pickled(backend):
    """A copy is clean and followed by nobody: its forwards leave its weights, and those of the model, alone."""
    run = rolling("rolling", backend, steps=1)
    run.opt.follow(run.net)
    run.loss(20)
    noisy, clean = run.weights(), run.clean_weights()
    copies = [copy.deepcopy(run.net), pickle.loads(pickle.dumps(run.net))]
    assert not run.opt.is_perturbed
    run.loss(20)
    for net in copies:
        assert_same(net.parameters(), clean)
        for training in (True, False):
            net.train(training)(20)
            assert_same(net.parameters(), clean)
        net.state_dict()
    assert run.opt.is_perturbed
    assert_same(run.weights(), noisy)


def test_followed_model_gets_another_optimizer(backend):
    """The model's hooks do not keep the old optimizer alive, and then do nothing."""
    run = rolling("rolling", backend, steps=1)
    run.opt.follow(run.net)
    run.loss(20)
    clean = run.clean_weights()
    run.opt.eval()
    run.opt = flatkern.AdamW(run.net.parameters(), lr=1e-3, perturb=noise(sigma=0.1, rolling=True), backend=backend)
    run.loss(20)
    assert_same(run.weights(), clean)
    run.opt.follow(run.net)
    run.loss(20)
    assert run.opt.is_perturbed
    run.net.eval()
    run.loss(20)
    assert_same(run.weights(), clean)
