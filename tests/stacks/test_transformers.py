"""flatkern inside Hugging Face's Trainer: FlatkernCallback and FlatkernTrainer equal a loop written by hand, bit for bit."""

import pytest
import torch
from common import METHODS, assert_other_tensors, assert_same_tensors, weights
from transformers import Trainer
from transformers_common import arguments, make_gpt, make_optimizer, texts, train, train_by_hand, windows_of  # noqa: F401

from flatkern.integrations.transformers import FlatkernCallback

STEPS, LIMIT = 4, 0.25


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_equals_a_loop_by_hand(method, accumulation, texts, tmp_path):  # noqa: F811
    """With clipping, of the final gradient, and with steps of fewer micro-batches at the end of an epoch."""
    model, start = make_gpt(), weights(make_gpt())
    args = arguments(tmp_path, max_steps=STEPS, gradient_accumulation_steps=accumulation, max_grad_norm=LIMIT)
    trainer = train(method, model, args, texts)
    assert trainer.state.global_step == STEPS and args.max_grad_norm == LIMIT

    by_hand = make_gpt()
    opt = make_optimizer(method, by_hand, max_grad_norm=LIMIT)
    train_by_hand(method, by_hand, opt, windows_of(texts, accumulation, STEPS))
    assert_other_tensors(weights(model), start)
    assert_same_tensors(weights(model), weights(by_hand))
    assert opt.grad_norm > LIMIT  # so that the limit mattered
