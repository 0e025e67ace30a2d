"""flatkern in Hugging Face Accelerate, in one process: `passes`, checkpoints, a GradScaler, what is refused."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate_common import Training, fresh_accelerate  # noqa: F401  a fixture
from common import (
    EVERY,
    METHODS,
    TWO_PASS,
    assert_other_tensors,
    assert_same_state,
    assert_same_tensors,
    clean_weights,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    step_by_hand,
    train_by_hand,
    weights,
)
from safetensors.torch import load_file

import flatkern
from flatkern.integrations.accelerate import passes

every_method = pytest.mark.parametrize("method", METHODS)


def by_hand(training, batches=8, **more):
    """The weights and the optimizer of the same training without Accelerate."""
    model = make_model()
    rounds = getattr(training.opt.method, "rounds", None)
    own = {} if rounds is None else {"rounds": rounds}
    opt = make_optimizer(training.method, model, own=own, **more)
    losses = train_by_hand(training.method, model, opt, training.windows(batches))
    return model, opt, losses


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", EVERY)
def test_a_step_equals_a_loop_by_hand(method, count, base):
    """SGD sees the scale of a gradient, AdamW has more state."""
    training = Training(method, count, batches=6 if count == 3 else 8, opt={"base": base})
    losses = training.run()
    model, opt, expected = by_hand(training, len(losses), base=base)
    training.opt.eval()
    assert_same_tensors(weights(training.plain), weights(model))
    assert_same_state(training.opt.state_dict(), opt.state_dict())
    assert_other_tensors(weights(model), weights(make_model()))
    if count == 1 or method not in ("m-RWP", "m-ARWP"):
        means = torch.stack(losses).view(-1, count).mean(dim=1)
        torch.testing.assert_close(means, expected, rtol=1e-6, atol=0)  # a mean of up to three float32 numbers


@pytest.mark.parametrize("method", TWO_PASS)
def test_summed_rounds_of_a_single_micro_batch_equal_a_loop_by_hand(method):
    """m-RWP has two passes in it, so that its losses are halved."""
    training = Training(method, own={"rounds": "sum"}, opt={"base": "SGD"})
    training.run()
    model = by_hand(training, base="SGD")[0]
    assert_same_tensors(weights(training.plain), weights(model))


@pytest.mark.parametrize("method", ["m-RWP", "m-ARWP"])
def test_the_noisy_pass_may_have_a_batch_of_its_own(method):
    training = Training(method, own={})
    batches = make_batches(4)
    for clean, noisy in zip(batches[0::2], batches[1::2], strict=True):
        training.step(lambda b=clean: loss_of(training.model, b), noisy=lambda b=noisy: loss_of(training.model, b))
    model = make_model()
    opt = make_optimizer(method, model)
    for clean, noisy in zip(batches[0::2], batches[1::2], strict=True):
        step_by_hand(method, model, opt, [clean, noisy], clean=1)
    assert_same_tensors(weights(training.plain), weights(model))


@pytest.mark.parametrize("method", ["SAM", "m-RWP"])
def test_a_window_that_ends_with_the_data_steps_too(method):
    """4 + 2 micro-batches. Accelerate divides by 4 in both windows, so that the second step is half as long."""
    training = Training(method, 4, batches=6, opt={"base": "SGD", "momentum": 0.0, "lr": 0.5})
    training.run()
    model = make_model()
    opt = make_optimizer(method, model, base="SGD", momentum=0.0, lr=0.5, own={"rounds": "sum"})
    batches = make_batches(6)
    step_by_hand(method, model, opt, batches[:4])
    opt.param_groups[0]["lr"] = 0.25
    step_by_hand(method, model, opt, batches[4:])
    assert_same_tensors(weights(training.plain), weights(model))


@every_method
def test_lr_zero_returns_the_weights(method):
    training = Training(method, 2, opt={"lr": 0.0})
    training.run()
    training.opt.eval()
    assert_same_tensors(weights(training.plain), weights(make_model()))


@every_method
def test_resume_is_bit_identical(method, tmp_path):
    """save_state() between two steps; rolling noise is on there."""
    whole = Training(method, 2)
    whole.run()

    first = Training(method, 2)
    first.run(stop=4)
    first.accelerator.save_state(tmp_path)
    second = Training(method, 2, opt={"lr": 3.0})
    second.accelerator.load_state(tmp_path)
    second.index = first.index
    second.run(start=4)

    for training in (first, second, whole):
        training.opt.eval()
    assert_same_tensors(weights(second.plain), weights(whole.plain))
    assert_same_state(second.opt.state_dict(), whole.opt.state_dict())


@every_method
def test_checkpoints_hold_clean_weights(method, tmp_path):
    training = Training(method, 2)
    training.run(stop=4)
    clean = clean_weights(training.plain, training.opt)
    if training.opt.rolling:
        assert training.opt.is_perturbed
        assert_other_tensors(weights(training.plain), clean)
    training.accelerator.save_state(tmp_path / "state")
    training.accelerator.save_model(training.model, tmp_path / "model")
    assert_same_tensors(load_file(tmp_path / "state" / "model.safetensors"), clean)
    assert_same_tensors(load_file(tmp_path / "model" / "model.safetensors"), clean)


@every_method
def test_saving_does_not_change_the_training(method, tmp_path):
    saved = Training(method, 2)
    saved.run(stop=4)
    saved.accelerator.save_state(tmp_path)
    saved.run(start=4)
    plain = Training(method, 2)
    plain.run()
    for training in (saved, plain):
        training.opt.eval()
    assert_same_tensors(weights(saved.plain), weights(plain.plain))


@every_method
def test_prepare_changes_nothing(method):
    """It loads the optimizer's own state_dict into it, and moves tensors between devices."""
    model = make_model()
    opt = make_optimizer(method, model)
    train_by_hand(method, model, opt, [[batch] for batch in make_batches(3)])
    before, state = weights(model), opt.state_dict()
    Accelerator(cpu=True).prepare(model, opt)
    assert_same_tensors(weights(model), before)
    assert_same_state(opt.state_dict(), state)


def scaler(scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


@pytest.mark.parametrize("count", [1, 2])
@every_method
def test_a_grad_scaler_changes_nothing(method, count):
    """A scale of a power of two, and no overflow: every bit is that of the training without it."""
    plain = Training(method, count)
    plain.run()
    scaled = Training(method, count, scaler=scaler())
    scaled.run()
    for training in (plain, scaled):
        training.opt.eval()
    assert scaled.prepared.scaler is scaled.accelerator.scaler
    assert_same_tensors(weights(scaled.plain), weights(plain.plain))


@pytest.mark.parametrize("method, bad", [*((m, 1) for m in METHODS), *((m, 2) for m in TWO_PASS)])
def test_an_overflow_skips_the_step_and_lowers_the_scale(method, bad):
    """In the first or in the second pass of a step."""
    training = Training(method, scaler=scaler())
    training.run(stop=2)
    before = clean_weights(training.plain, training.opt)
    calls = 0

    def overflowing(model, batch):
        nonlocal calls
        calls += 1
        return loss_of(model, batch) * (float("inf") if calls == bad else 1.0)

    training.run(start=2, stop=3, loss_of=overflowing)
    assert_same_tensors(clean_weights(training.plain, training.opt), before)
    assert training.accelerator.scaler.get_scale() == 2.0**9
    assert int(training.opt.skipped_steps) == 1
    assert training.prepared.step_was_skipped is False  # Accelerate sees that step() was called
    training.run(start=3)
    assert training.accelerator.scaler.get_scale() == 2.0**9
    after = clean_weights(training.plain, training.opt)
    assert_other_tensors(after, before)
    assert all(torch.isfinite(w).all() for w in after.values())


@every_method
def test_a_closure_that_raises_leaves_clean_weights(method):
    """In the last pass of a window, which is dropped."""
    training = Training(method, 2)
    calls, most = 0, 4 if METHODS[method].loop == "ascent" else 2

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls == most:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    with pytest.raises(KeyboardInterrupt):
        training.run(stop=2, loss_of=failing)
    assert calls == most
    assert not training.opt.is_perturbed
    assert_same_tensors(weights(training.plain), weights(make_model()))
    assert all(p.grad is None for p in training.plain.parameters())
    if "RWP" not in method:  # with RWP a round of noise is used up
        training.accelerator.step, training.index = 0, 0
        training.run()
        training.opt.eval()
        model = by_hand(training)[0]
        assert_same_tensors(weights(training.plain), weights(model))


@pytest.mark.parametrize("method", TWO_PASS)
def test_batch_norm_sees_clean_weights_alone(method):
    training = Training(method, 2, batch_norm=True)
    training.run(stop=4)
    clean = 4 if METHODS[method].loop == "ascent" else 2
    assert training.plain[1].num_batches_tracked == clean


@every_method
def test_a_scheduler_takes_every_step(method):
    training = Training(method, 2)
    schedule = torch.optim.lr_scheduler.LinearLR(training.opt, 1.0, 0.1, total_iters=4)
    schedule = training.accelerator.prepare(schedule)
    for x, y in training.loader:
        with training.accelerator.accumulate(training.model):
            training.micro_batch(x, y)
            schedule.step()
    assert training.opt.param_groups[0]["lr"] == pytest.approx(0.005)
    assert training.prepared.step_was_skipped is False


@pytest.mark.parametrize("method", ["rolling RWP", "rolling Momentum-SAM"])
def test_an_ordinary_loop_needs_one_line(method):
    """opt.follow(model): the loop itself knows nothing of flatkern."""
    ours = Training(method, 2)
    for x, y in ours.loader:
        with ours.accelerator.accumulate(ours.model):
            ours.accelerator.backward(loss_of(ours.model, (x, y)))
            ours.prepared.step()
            ours.prepared.zero_grad()
    stepped = Training(method, 2)
    stepped.run()
    for training in (ours, stepped):
        training.opt.eval()
    assert_same_tensors(weights(ours.plain), weights(stepped.plain))


# --- refused --------------------------------------------------------------------------------------


def test_refuses_an_optimizer_that_is_not_prepared():
    model = make_model()
    with pytest.raises(ValueError, match=r"opt was not prepared; call model, opt = accelerator\.prepare"):
        passes(Accelerator(cpu=True), make_optimizer("SAM", model))


def test_refuses_an_optimizer_of_another_kind():
    accelerator = Accelerator(cpu=True)
    opt = accelerator.prepare(torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="opt is SGD, but should be an optimizer of flatkern's"):
        passes(accelerator, opt)
    with pytest.raises(TypeError, match=r"accelerator is NoneType, but should be an accelerate\.Accelerator"):
        passes(None, opt)


@pytest.mark.parametrize("method", TWO_PASS)
def test_refuses_accumulation_without_summed_rounds(method):
    with pytest.raises(ValueError, match=r'gradient_accumulation_steps is 2.*pass A?\w+\(\.\.\., rounds="sum"\)'):
        Training(method, 2, own={})


def test_refuses_losses_that_the_loop_weighs():
    with pytest.raises(ValueError, match='mix="losses" leaves the weighting of losses to the loop'):
        Training("m-RWP", own={"mix": "losses"})


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_refuses_stacks_that_flatten_parameters(kind, monkeypatch):
    training = Training("SAM")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(NotImplementedError, match=r"use DDP, or FSDP2"):
        passes(training.accelerator, training.opt)


def refused(training, error, match, *args, **keywords):
    """`step` is refused, and nothing has changed."""
    before = weights(training.plain)
    with pytest.raises(error, match=match):
        training.step(*args, **keywords)
    assert_same_tensors(weights(training.plain), before)
    assert not training.opt.is_perturbed


def test_refuses_arguments_that_the_method_does_not_take():
    batch = make_batches(1)[0]
    training = Training("SAM")

    def closure():
        return loss_of(training.model, batch)

    refused(training, TypeError, "noisy is given, but only m-RWP", closure, noisy=closure)
    refused(training, TypeError, "mask is given, but the optimizer has no enhance", closure, mask=closure)
    refused(training, TypeError, "closure is Tensor, but should be a function", torch.ones(()))
    refused(training, TypeError, "closure has returned NoneType", lambda: closure().backward())
    refused(training, ValueError, "a loss without a graph", lambda: closure().detach())
    training = Training("m-RWP", 2)
    training.accelerator.gradient_state._set_sync_gradients(False)
    refused(training, ValueError, "noisy is given, but with gradient accumulation", closure, noisy=closure)


def test_refuses_to_step_where_a_mask_is_due_and_missing():
    batch = make_batches(1)[0]
    training = Training("IRE")
    refused(training, TypeError, "mask is missing, and IRE's is due", lambda: loss_of(training.model, batch))


def test_says_how_accelerate_is_installed(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "flatkern.integrations.accelerate")
    with pytest.raises(ImportError, match=r"pip install 'flatkern\[accelerate\]'"):
        importlib.import_module("flatkern.integrations.accelerate")
    assert flatkern.__version__
