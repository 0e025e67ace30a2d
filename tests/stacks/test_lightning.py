"""Lightning's Trainer with every method: equal to a loop by hand, bit for bit, by automatic and manual optimization."""

import copy

import pytest
import torch
from common import (
    METHODS,
    SIMILAR,
    TWO_PASS,
    assert_other_tensors,
    assert_same_tensors,
    clean_weights,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    mask_loss,
    passes_of,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning_common import (
    AUTOMATIC,
    EXPLICIT,
    ROLLING,
    Automatic,
    Manual,
    TwoBatches,
    by_hand,
    fit,
    loader,
    make_trainer,
    network,
    state_of,
    windows_of,
)

import flatkern
from flatkern.integrations.lightning import FlatkernCallback

automatic = pytest.mark.parametrize("method", AUTOMATIC)


# --- the same trajectory --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*AUTOMATIC, *SIMILAR])
def test_automatic_optimization_equals_a_loop_by_hand(method):
    module, windows = Automatic(method), windows_of(4)
    fit(module, [batch for (batch,) in windows])
    model, opt, seen = by_hand(method, windows)
    assert_same_tensors(weights(module.net), weights(model))
    assert_same_tensors(state_of(module.opt), state_of(opt))
    assert_other_tensors(weights(model), seen[0])
    assert_same_tensors(module.ended_at, weights(model))  # in the module's own on_train_end()
    assert len(module.trained_at) == sum(passes_of(method, step) for step in range(4))


@pytest.mark.parametrize("method", METHODS)
def test_manual_optimization_equals_a_loop_by_hand(method):
    """Two micro-batches a step, in one training_step; the calls go through Lightning's proxy of the optimizer."""
    module, windows = Manual(method), windows_of(3, size=2)
    fit(module, windows)
    model, _, seen = by_hand(method, windows)
    assert_same_tensors(weights(module.net), weights(model))
    assert_other_tensors(weights(model), seen[0])


@automatic
def test_lr_zero_returns_the_weights(method):
    module = Automatic(method, lr=0.0)
    before = weights(module.net)
    fit(module, make_batches(3), validate=make_batches(1), val_check_interval=2)
    assert_same_tensors(weights(module.net), before)
    if method != "IRE":
        assert_other_tensors(module.trained_at[-1], before)


@pytest.mark.parametrize("method", METHODS)
def test_lr_zero_returns_the_weights_by_manual_optimization(method):
    module = Manual(method, lr=0.0)
    before = weights(module.net)
    fit(module, windows_of(3, size=2), validate=make_batches(1), val_check_interval=2)
    assert_same_tensors(weights(module.net), before)


def test_m_rwp_may_take_two_batches():
    """`is_perturbed` tells training_step which pass it serves, so that each takes half of the rows, as in the paper."""

    class Halves(Automatic):
        def training_step(self, batch, batch_idx):
            noisy = self.optimizers().is_perturbed
            return loss_of(self, tuple(t[2:] if noisy else t[:2] for t in batch))

    module, batches = Halves("m-RWP"), make_batches(3)
    fit(module, batches)
    halves = [[(x[:2], y[:2]), (x[2:], y[2:])] for x, y in batches]
    assert_same_tensors(weights(module.net), weights(by_hand("m-RWP", halves)[0]))


@automatic
def test_a_skipped_batch_changes_nothing(method):
    """training_step may return None, and Lightning then runs no backward."""

    class Skips(Automatic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module, windows = Skips(method), windows_of(3)
    fit(module, [batch for (batch,) in windows])
    states = [weights(module.net), clean_weights(module.net, module.opt)]
    assert_same_tensors(*states)
    if METHODS[method].loop == "ascent":  # the others have drawn the noise of a round
        model = by_hand(method, [windows[0], windows[2]])[0]
        assert_same_tensors(states[0], weights(model))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", ["IRE"])
def test_a_training_step_may_update_the_mask(method, micro_batches):
    """Without `mask_loss`, on one process; Lightning zeroes the gradients of the last step only afterwards."""

    class Updates(Automatic):
        takes_masks = False

        def training_step(self, batch, batch_idx):
            if self.opt.mask_due:
                self.opt.zero_grad()
                mask_loss(self, batch, self.global_step).backward()
                self.opt.update_mask()
            return super().training_step(batch, batch_idx)

    module, windows = Updates(method), windows_of(3, micro_batches)
    fit(module, [b for window in windows for b in window], accumulate_grad_batches=micro_batches)
    assert_same_tensors(weights(module.net), by_hand(method, windows)[2][-1])


@pytest.mark.parametrize("method", ["SAM", "RWP", "rolling RWP"])
def test_a_perturbation_and_a_mask_equal_a_loop_by_hand(method):
    """The mask is taken at clean weights, whatever is on."""
    more = {"enhance": flatkern.IRE(kappa=1.0, interval=2)}
    module, batches = Automatic(method, **more), make_batches(4)
    fit(module, batches)
    model = make_model()
    opt = make_optimizer(method, model, **more)
    opt.train()
    for k, batch in enumerate(batches):
        opt.zero_grad()
        if opt.mask_due:
            with opt.clean():
                mask_loss(model, batch, k).backward()
                opt.update_mask()
        if METHODS[method].loop == "ascent":
            loss_of(model, batch).backward()
        if not opt.rolling:
            opt.perturb()
        loss_of(model, batch).backward()
        opt.step()
    opt.eval()
    assert_same_tensors(weights(module.net), weights(model))


HOOKS = "on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step".split()


@automatic
def test_hooks_around_a_pass_run_once_a_pass(method):
    calls = dict.fromkeys([*HOOKS, "on_train_batch_start", "on_train_batch_end"], 0)

    def counter(name):
        def count(self, *args):
            calls[name] += 1

        return count

    counting = type("Counts", (Callback,), {name: counter(name) for name in calls})
    fit(Automatic(method), make_batches(3), [counting()])
    passes = sum(passes_of(method, step) for step in range(3))
    masks = 2 if method == "IRE" else 0  # every other step of three
    backward = {"on_before_backward": masks, "on_after_backward": masks}
    assert calls == {name: (passes if name in HOOKS else 3) + backward.get(name, 0) for name in calls}


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ROLLING, "IRE"])
def test_accumulated_micro_batches_equal_a_loop_by_hand(method):
    """With validations between two micro-batches, too, which do not change the trajectory."""
    windows = windows_of(3, size=2)
    flat = [batch for window in windows for batch in window]
    model, opt, _ = by_hand(method, windows)
    for validation in ({}, {"validate": make_batches(1), "val_check_interval": 3}):
        module = Automatic(method)
        fit(module, flat, accumulate_grad_batches=2, **validation)
        assert_same_tensors(weights(module.net), weights(model))
        assert_same_tensors(state_of(module.opt), state_of(opt))
        assert module.global_step == 3


@pytest.mark.parametrize("method", EXPLICIT)
def test_refuses_accumulation_of_micro_batches_that_cannot_be_replayed(method):
    module = Automatic(method)
    before = weights(module.net)
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2.*manual optimization.*rolling=True"):
        fit(module, make_batches(4), accumulate_grad_batches=2)
    assert_same_tensors(weights(module.net), before)
    assert not module.trained_at


def test_refuses_accumulation_that_begins_during_training():
    module = Automatic("SAM")
    schedule = GradientAccumulationScheduler({1: 2})
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=2"):
        fit(module, make_batches(2), [schedule], epochs=2)
    assert module.global_step == 2
    assert_same_tensors(weights(module.net), clean_weights(module.net, module.opt))


# --- evaluation -----------------------------------------------------------------------------------


@automatic
def test_evaluations_see_clean_weights(method):
    """The sanity check, validations between steps, test and prediction; and none of them changes the trajectory."""
    module, windows = Automatic(method), windows_of(4)
    trainer = fit(
        module, [b for (b,) in windows], validate=make_batches(1), val_check_interval=1, num_sanity_val_steps=1
    )
    seen = by_hand(method, windows)[2]
    assert len(module.evaluated_at) == len(seen) == 5
    for found, expected in zip(module.evaluated_at, seen, strict=True):
        assert_same_tensors(found, expected)
    for evaluate in (trainer.test, trainer.validate, trainer.predict):
        module.evaluated_at.clear()
        evaluate(module, loader(make_batches(1)))
        assert_same_tensors(module.evaluated_at[0], seen[-1])


def test_a_training_batch_sees_the_noise_of_its_round():
    """The weights at which rolling batches train are those of the loop by hand, and not clean ones."""
    module, windows = Automatic("rolling RWP"), windows_of(3)
    fit(module, [b for (b,) in windows], validate=make_batches(1), val_check_interval=2)
    model = make_model()
    opt = make_optimizer("rolling RWP", model)
    opt.train()
    for (batch,), found in zip(windows, module.trained_at, strict=True):
        assert_same_tensors(found, weights(model))
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()


def test_validation_inside_of_a_cycle_of_several_batches():
    """Manual optimization: m-RWP's clean pass on one batch, its noisy pass on the next, a validation between them."""

    module, windows = TwoBatches("m-RWP"), windows_of(2, size=2)
    flat = [batch for window in windows for batch in window]
    fit(module, flat, validate=make_batches(1), val_check_interval=1, num_sanity_val_steps=0)
    _, _, seen = by_hand("m-RWP", windows)
    assert_same_tensors(weights(module.net), seen[-1])
    for found, expected in zip(module.evaluated_at, [seen[0], seen[1], seen[1], seen[2]], strict=True):
        assert_same_tensors(found, expected)


# --- the end --------------------------------------------------------------------------------------


class Stops(Exception):
    pass


@pytest.mark.parametrize("passes", [0, 1])
@automatic
def test_an_exception_leaves_clean_weights(method, passes, tmp_path):
    """In a first or in a second pass; and a checkpoint made of it is clean, and goes on."""

    class Fails(Automatic):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 2 and self.failing <= len(self.trained_at):
                raise Stops
            return loss

    module, windows = Fails(method), windows_of(4)
    module.failing = 2 * (2 if method in TWO_PASS else 1) + (2 if passes and method in TWO_PASS else 1)
    with pytest.raises(Stops):
        fit(module, [b for (b,) in windows], [OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    seen = by_hand(method, windows[:2])[2]
    assert_same_tensors(weights(module.net), seen[2])
    assert not module.opt.is_perturbed
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert_same_tensors(network(saved), seen[2])
    module(windows[0][0][0])  # no hook of ours is left in the model
    assert_same_tensors(weights(module.net), seen[2])


def test_an_exception_inside_of_a_manual_cycle_leaves_clean_weights(tmp_path):
    class Fails(Automatic):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            self.manual_backward(loss_of(self, batch))
            opt.perturb()
            self.manual_backward(loss_of(self, batch))
            raise KeyboardInterrupt

    module = Fails("SAM")
    module.automatic_optimization = False
    before = weights(module.net)
    with pytest.raises(SystemExit):  # Lightning's answer
        fit(module, make_batches(1), [OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    assert_same_tensors(weights(module.net), before)
    assert_same_tensors(network(torch.load(tmp_path / "on_exception.ckpt", weights_only=True)), before)


def test_one_callback_serves_several_trainings():
    """Another module, another optimizer: nothing of the first training is left."""
    ours = FlatkernCallback()
    for method in ("rolling RWP", "SAM", "rolling RWP"):
        module, windows = Automatic(method), windows_of(3)
        trainer = make_trainer(module)
        trainer.callbacks = [ours]
        trainer.fit(module, loader([b for (b,) in windows]))
        assert_same_tensors(weights(module.net), by_hand(method, windows)[2][-1])
    assert not ours.optimizers
    after = copy.deepcopy(module)
    module.train()(windows[0][0][0])
    assert_same_tensors(weights(module.net), weights(after.net))


@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_a_search_for_the_learning_rate_changes_nothing(method, tmp_path):
    """Lightning's Tuner trains without callbacks, and goes back to a checkpoint of its own."""

    class Tuned(Automatic):
        lr = 0.05

    module = Tuned(method)
    before = weights(module.net)
    trainer = make_trainer(module, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, loader(make_batches(9)), num_training=5, update_attr=False)
    assert_same_tensors(weights(module.net), before)


@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_a_compiled_module_equals_a_loop_by_hand(method):
    module, windows = Automatic(method), windows_of(3)
    trainer = make_trainer(module)
    trainer.fit(torch.compile(module, backend="eager"), loader([b for (b,) in windows]), loader(make_batches(1)))
    seen = by_hand(method, windows)[2]
    assert_same_tensors(weights(module.net), seen[-1])
    assert_same_tensors(module.evaluated_at[-1], seen[-1])


def test_a_rolling_optimizer_without_the_callback_warns():
    """What the callback is for: without it the noise stays on, or never comes."""
    module = Automatic("rolling RWP")
    trainer = make_trainer(module)
    trainer.callbacks = []
    with pytest.warns(UserWarning, match="rolling optimizer"):
        trainer.fit(module, loader(make_batches(12)))
