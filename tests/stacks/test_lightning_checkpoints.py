"""Checkpoints of Lightning's Trainer: clean weights whenever they are made, and trainings that go on from them."""

import copy

import pytest
import torch
from common import (
    METHODS,
    assert_same_state,
    assert_same_tensors,
    clean_weights,
    make_batches,
    make_model,
    weights,
)
from lightning.pytorch import Callback
from lightning_common import (
    AUTOMATIC,
    EXPLICIT,
    ROLLING,
    Automatic,
    Manual,
    TwoBatches,
    by_hand,
    every_step,
    fit,
    make_trainer,
    network,
    windows_of,
)

automatic = pytest.mark.parametrize("method", AUTOMATIC)


@automatic
def test_checkpoints_hold_clean_weights(method, tmp_path):
    module, windows = Automatic(method), windows_of(3)
    fit(module, [b for (b,) in windows], [every_step(tmp_path)], enable_checkpointing=True)
    model, _, seen = by_hand(method, windows)
    assert_same_tensors(weights(module.net), weights(model))
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_same_tensors(network(saved), seen[step])
    assert_same_state(saved["optimizer_states"][0], module.opt.state_dict())


@automatic
def test_resume_is_bit_identical(method, tmp_path):
    """From the middle of an epoch and from its end, in a new module with other weights."""
    # Lightning begins a resumed epoch with its first batch, unless the loader has a state: here all are the same.
    for step, batches in ((3, 4 * make_batches(1)), (4, make_batches(4))):
        folder = tmp_path / str(step)
        straight, module = Automatic(method), Automatic(method)
        fit(straight, batches, [every_step(folder)], epochs=2, enable_checkpointing=True)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1)
        fit(module, batches, epochs=2, ckpt_path=folder / f"step={step}.ckpt")
        assert module.global_step == 8
        assert_same_tensors(weights(module.net), weights(straight.net))
        assert_same_state(module.opt.state_dict(), straight.opt.state_dict())


class Resumable(list):
    """A loader that has a state: how many batches of its epoch it has given."""

    given = 0

    def __iter__(self):
        while self.given < len(self):
            self.given += 1
            yield self[self.given - 1]
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


@pytest.mark.parametrize("method", [*ROLLING, "SAM"])
def test_resume_goes_on_after_the_last_batch(method, tmp_path):
    straight, module, batches = Automatic(method), Automatic(method), make_batches(4)
    trainer = make_trainer(straight, [every_step(tmp_path)], enable_checkpointing=True)
    trainer.fit(straight, Resumable(batches))
    make_trainer(module).fit(module, Resumable(batches), ckpt_path=tmp_path / "step=2.ckpt")
    assert module.global_step == 4
    assert_same_tensors(weights(module.net), weights(straight.net))
    assert_same_state(module.opt.state_dict(), straight.opt.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical_by_manual_optimization(method, tmp_path):
    windows = windows_of(2, size=2)
    straight, module = Manual(method), Manual(method)
    fit(straight, windows, [every_step(tmp_path)], epochs=2, enable_checkpointing=True)
    fit(module, windows, epochs=2, ckpt_path=tmp_path / "step=2.ckpt")
    assert_same_tensors(weights(module.net), weights(straight.net))
    assert_same_state(module.opt.state_dict(), straight.opt.state_dict())


class AfterBatches(Callback):
    def __init__(self, call):
        self.call = call

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.call(trainer, batch_idx)


def twice(windows):
    """Each batch for both passes."""
    return [batch for (batch,) in windows for _ in range(2)]


@pytest.mark.parametrize("method", [*EXPLICIT, "mSAM"])
def test_weights_saved_between_two_passes_are_clean(method, tmp_path):
    """And a checkpoint of the whole training raises there; neither changes the trajectory."""
    own = {"k": 1} if method == "LookSAM" else {}  # two passes in every step

    def save(trainer, batch_idx):
        trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt", weights_only=True)
        if batch_idx % 2 == 0:
            with pytest.raises(RuntimeError, match="the weights are perturbed"):
                trainer.save_checkpoint(tmp_path / "whole.ckpt")

    module, windows = TwoBatches(method, own=own), windows_of(2)
    fit(module, twice(windows), [AfterBatches(save)])
    _, _, seen = by_hand(method, windows, own=own)
    for batch_idx, step in ((0, 0), (1, 1), (2, 1), (3, 2)):
        assert_same_tensors(network(torch.load(tmp_path / f"{batch_idx}.ckpt", weights_only=True)), seen[step])
    assert_same_tensors(weights(module.net), seen[-1])


def test_what_of_a_model_is_saved_between_two_passes():
    """Parts are clean too, tied weights stay tied, and what holds nothing of the optimizer's is left alone."""

    def save(trainer, batch_idx):
        if batch_idx % 2 == 0:
            seen.append(clean_weights(module.net, module.opt)["0.weight"])
            part, whole = module.net[0].state_dict(prefix="a."), module.state_dict()
            assert torch.equal(part["a.weight"], seen[-1])
            assert torch.equal(whole["net.0.weight"], seen[-1])
            assert whole["net.0.weight"].data_ptr() == whole["first.weight"].data_ptr()
            assert module.state_dict(keep_vars=True)["net.0.weight"] is module.net[0].weight
            assert not torch.equal(module.net[0].weight, seen[-1])
            version = module.net[0].weight._version
            module.frozen.state_dict()
            copied = copy.deepcopy(module.net)  # which the optimizer does not know
            assert torch.equal(copied.state_dict()["0.weight"], module.net[0].weight)
            assert module.net[0].weight._version == version

    module, windows, seen = TwoBatches("SAM"), windows_of(2), []
    module.first, module.frozen = module.net[0], make_model().requires_grad_(False)
    fit(module, twice(windows), [AfterBatches(save)])
    assert len(seen) == 2
    assert_same_tensors(weights(module.net), by_hand("SAM", windows)[2][-1])
    assert not module._state_dict_pre_hooks
    assert not module.net[0]._state_dict_hooks


def test_a_state_dict_that_fails_between_two_passes():
    """The next batch goes on at perturbed weights, and a later state_dict() is as ever."""

    class Fails(TwoBatches):
        failing = False

        def get_extra_state(self):
            if self.failing:
                raise OSError
            return 0

        def set_extra_state(self, state):
            pass

    def save(trainer, batch_idx):
        module.failing = batch_idx % 2 == 0
        if module.failing:
            with pytest.raises(OSError):
                module.state_dict()
        else:
            assert module.state_dict()["net.0.weight"].data_ptr() == module.net[0].weight.data_ptr()

    module, windows = Fails("SAM"), windows_of(2)
    fit(module, twice(windows), [AfterBatches(save)])
    assert_same_tensors(weights(module.net), by_hand("SAM", windows)[2][-1])
