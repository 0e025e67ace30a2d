"""Optimizers of other libraries inside of Wrap: schedule-free, bitsandbytes' and torchao's 8-bit AdamW."""

import pytest
import torch
from common import (
    CLASSES,
    FEATURES,
    METHODS,
    assert_other_tensors,
    assert_same_tensors,
    clean_weights,
    loss_of,
    make_batches,
    mask_loss,
    weights,
)
from torch import nn

import flatkern

bases = {}


def base(name, module):
    """A factory of an optimizer; where its library is missing its tests say so."""

    def decorated(make):
        def made(params, **values):
            return make(pytest.importorskip(module), params, **values)

        bases[name] = made
        return made

    return decorated


@base("schedule-free", "schedulefree")
def schedule_free(library, params, lr=0.05):
    return library.AdamWScheduleFree(params, lr=lr, warmup_steps=2)


@base("bitsandbytes", "bitsandbytes")
def bitsandbytes(library, params, lr=0.05):
    return library.optim.AdamW8bit(params, lr=lr)  # 8 bits from 4096 elements on


@base("torchao", "torchao.optim")
def torchao(library, params, lr=0.05):
    return library.AdamW8bit(params, lr=lr)


every_base = pytest.mark.parametrize("base", bases)
METHODS_HERE = ["RWP", "rolling RWP", "m-RWP", "SAM", "IRE"]
every_method = pytest.mark.parametrize("method", METHODS_HERE)


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step; the compiler would take longer than all tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_model():
    """One matrix is large enough for 8-bit state."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, CLASSES))


def make(method, model, base, **values):
    return flatkern.Wrap(bases[base](model.parameters(), **values), **METHODS[method].make())


def train(method, model, opt, batches, start=0):
    """What a user of Wrap writes; schedule-free optimizers are switched by opt.train() and opt.eval()."""
    opt.train()
    for index, batch in enumerate(batches, start):
        if opt.enhancement is not None and opt.mask_due:
            mask_loss(model, batch, index).backward()
            opt.update_mask()
        if METHODS[method].loop == "noisy":
            opt.perturb()
        loss_of(model, batch).backward()
        if METHODS[method].loop in ("mixed", "ascent"):
            opt.perturb()
            loss_of(model, batch).backward()
        opt.step()
        opt.zero_grad()


def train_by_hand(method, model, base, batches):
    """The same with the bare optimizer: its gradients come from a second one, which never steps."""
    inner = bases[base](model.parameters())
    if hasattr(inner, "train"):
        inner.train()
    own = METHODS[method].make(rolling=False) if method == "rolling RWP" else METHODS[method].make()
    points = flatkern.SGD(model.parameters(), lr=0.0, **own)
    params = list(model.parameters())
    for batch in batches:
        loss_of(model, batch).backward()
        if METHODS[method].loop in ("noisy", "plain"):
            points.zero_grad()
        points.perturb()
        loss_of(model, batch).backward()
        noisy = [p.grad.clone() for p in params]
        points.restore()
        points.release()
        for p, g in zip(params, noisy, strict=True):
            p.grad = g
        inner.step()
        for p in params:
            p.grad = None
    return inner


@every_base
@pytest.mark.parametrize("method", ["RWP", "rolling RWP", "SAM"])
def test_equals_a_loop_by_hand(method, base):
    model, other = make_model(), make_model()
    opt = make(method, model, base)
    train(method, model, opt, make_batches(4))
    inner = train_by_hand(method, other, base, make_batches(4))
    opt.eval()
    if hasattr(inner, "eval"):
        inner.eval()
    assert_same_tensors(weights(model), weights(other))
    assert_other_tensors(weights(model), weights(make_model()))


@every_base
@every_method
def test_no_perturbation_leaves_the_optimizer_as_it_is(method, base):
    """sigma, rho, kappa of 0, all the weight on m-RWP's second pass: the bare optimizer's trajectory, bit for bit."""
    model, other = make_model(), make_model()
    neutral = {"SAM": {"rho": 0.0}, "m-RWP": {"sigma": 0.0, "lam": 1.0}}.get(method, {"sigma": 0.0})
    own = METHODS[method].make(**neutral) if method != "IRE" else {"enhance": flatkern.IRE(kappa=0.0, interval=2)}
    opt = flatkern.Wrap(bases[base](model.parameters()), **own)
    train(method, model, opt, make_batches(3))
    opt.eval()
    inner = bases[base](other.parameters())
    if hasattr(inner, "train"):
        inner.train()
    for batch in make_batches(3):
        loss_of(other, batch).backward()
        inner.step()
        inner.zero_grad()
    if hasattr(inner, "eval"):
        inner.eval()
    assert_same_tensors(weights(model), weights(other))


@every_base
@every_method
def test_resume_is_bit_identical(method, base, tmp_path):
    batches = make_batches(4)
    whole = make_model()
    opt = make(method, whole, base)
    train(method, whole, opt, batches)

    first = make_model()
    first_opt = make(method, first, base)
    train(method, first, first_opt, batches[:2])
    first_opt.eval()
    torch.save({"model": first.state_dict(), "opt": first_opt.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    second = make_model()
    second.load_state_dict(saved["model"])
    second_opt = make(method, second, base)
    if hasattr(second_opt.base, "eval"):
        second_opt.eval()
    second_opt.load_state_dict(saved["opt"])
    train(method, second, second_opt, batches[2:], start=2)
    reference = whole
    if base == "schedule-free":  # saving needs its eval mode, and switching there and back rounds
        reference = make_model()
        opt = make(method, reference, base)
        train(method, reference, opt, batches[:2])
        opt.eval()
        train(method, reference, opt, batches[2:], start=2)
    for each in (opt, second_opt):
        each.eval()
    assert_same_tensors(weights(second), weights(reference))


@pytest.mark.parametrize("base", ["bitsandbytes", "torchao"])
@every_method
def test_lr_zero_returns_the_weights(method, base):
    model = make_model()
    opt = make(method, model, base, lr=0.0)
    train(method, model, opt, make_batches(2))
    opt.eval()
    assert_same_tensors(weights(model), weights(make_model()))


@every_method
def test_schedule_free_averages_are_read_in_eval_mode(method):
    """opt.eval() is clean weights and schedule-free's average; opt.train() goes back."""
    pytest.importorskip("schedulefree")
    model = make_model()
    opt = make(method, model, "schedule-free")
    train(method, model, opt, make_batches(3))
    training = clean_weights(model, opt)
    opt.eval()
    assert not opt.base.param_groups[0]["train_mode"]
    assert_other_tensors(weights(model), training)
    opt.train()
    back = clean_weights(model, opt)
    for name, w in training.items():
        torch.testing.assert_close(back[name], w, rtol=1e-5, atol=1e-6)  # schedule-free's own way there and back


@pytest.mark.parametrize("base", ["bitsandbytes", "torchao"])
def test_eight_bits_of_state_are_kept(base):
    """Large matrices really have 8-bit state, so that the tests above are about it."""
    model = make_model()
    opt = make("SAM", model, base)
    train("SAM", model, opt, make_batches(1))
    state = opt.state[model[2].weight]
    small = [v for v in state.values() if isinstance(v, torch.Tensor)]
    assert any(v.dtype == torch.uint8 or hasattr(v, "codes") for v in small), {k: type(v) for k, v in state.items()}
