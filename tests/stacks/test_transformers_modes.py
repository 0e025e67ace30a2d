"""Hugging Face's Trainer under DDP and under torch.compile."""

import os

import pytest
import torch
import torch.distributed as dist
from common import TWO_PASS, assert_same_tensors, weights
from torch.nn.parallel import DistributedDataParallel
from transformers_common import (
    ROWS,
    Texts,
    arguments,
    batches_of,
    kind_of,
    make_gpt,
    make_optimizer,
    make_trainer,
    train,
    train_by_hand,
    with_accumulation,
)

from flatkern.integrations.transformers import FlatkernTrainer

STEPS = 3


def as_torchrun_sets_it():
    """The process group is there already."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))


def train_on_two_ranks(method, accumulation, folder):
    """By the Trainer, and by hand, on this rank's batches; returns the weights of both."""
    rank, world = dist.get_rank(), dist.get_world_size()
    as_torchrun_sets_it()
    texts = Texts(STEPS * accumulation * ROWS * world)
    args = arguments(folder, max_steps=STEPS, gradient_accumulation_steps=accumulation, max_grad_norm=0.25)
    trainer = train(method, make_gpt(), args, texts, **kind_of(method))
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)

    by_hand = DistributedDataParallel(make_gpt())
    opt = make_optimizer(method, by_hand, max_grad_norm=None if method.startswith("rolling") else 0.25)
    own = batches_of(texts)[rank::world]
    windows = [own[k : k + accumulation] for k in range(0, len(own), accumulation)]
    if method.startswith("rolling"):
        opt.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.25) and None)
    train_by_hand(method, by_hand, opt, windows)
    return weights(trainer.model), weights(by_hand.module)


@with_accumulation(all_of=["m-RWP"])
def test_two_ranks_equal_a_loop_by_hand_and_one_another(method, accumulation, two, tmp_path):
    (first, by_hand), (second, _) = two.call(train_on_two_ranks, method, accumulation, tmp_path)
    assert_same_tensors(first, second)
    assert_same_tensors(first, by_hand)


class OverflowsOnOneRank(FlatkernTrainer):
    """In the first pass of the second step."""

    passes = 0

    def compute_loss(self, *args, **kwargs):
        self.passes += 1
        overflows = self.passes == 3 and dist.get_rank() == 1
        return super().compute_loss(*args, **kwargs) * (float("inf") if overflows else 1.0)


def overflow_on_one_rank(method, folder):
    as_torchrun_sets_it()
    args = arguments(folder, max_steps=STEPS)
    trainer = make_trainer(method, make_gpt(), args, Texts(STEPS * ROWS * 2), kind=OverflowsOnOneRank)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.train()
    return weights(trainer.model), int(trainer.flat.skipped_steps), trainer.accelerator.scaler.get_scale()


@pytest.mark.parametrize("method", ["SAM", "GSAM"])
def test_two_ranks_skip_an_overflow_together(method, two, tmp_path):
    """SAM's ranks ascend along gradients of their own."""
    (first, *seen), (second, *others) = two.call(overflow_on_one_rank, method, tmp_path)
    assert seen == others == [1, 2.0**3]
    assert_same_tensors(first, second)


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-RWP"])
def test_a_compiled_training_is_the_same(method, tmp_path):
    """torch_compile=True: nothing of the optimizer is traced, and the compiled model sees the perturbed weights."""
    texts, trained = Texts(4 * ROWS), []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = arguments(tmp_path, gradient_accumulation_steps=2, **compiled)
        trainer = train(method, make_gpt(dropout=0.0), args, texts, **kind_of(method))
        assert hasattr(trainer.model_wrapped, "_orig_mod") is bool(compiled)
        trained.append(weights(trainer.model))
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", ["rolling RWP", *TWO_PASS, "IRE"])
def test_a_gradient_scaler_changes_nothing(method, tmp_path):
    """As under fp16, which needs a GPU. The scale is a power of two, so that no bit of a gradient depends on it."""
    texts, trained = Texts(4 * ROWS), []
    for scaled in (False, True):
        # A plain Trainer clips scaled gradients here, because only fp16 tells Accelerate to unscale.
        limit = 0.0 if method == "rolling RWP" else 0.25
        args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=limit)
        trainer = make_trainer(method, make_gpt(), args, texts, **kind_of(method))
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        trainer.train()
        assert (trainer.optimizer.scaler is not None) is scaled and trainer.flat.skipped_steps == 0
        trained.append(weights(trainer.model))
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-RWP"])
def test_gradient_checkpointing_changes_nothing(method, tmp_path):
    """Reentrant: one of its backwards is several for autograd, so that m-RWP's passes cannot be counted."""
    texts, trained = Texts(4 * ROWS), []
    for own in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        model = make_gpt()
        args = arguments(tmp_path, gradient_accumulation_steps=2, **own)
        train(method, model, args, texts, **kind_of(method))
        assert model.is_gradient_checkpointing is bool(own)
        trained.append(weights(model))
    assert_same_tensors(*trained)
