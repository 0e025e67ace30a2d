"""Trainings by Hugging Face's Trainer equal a loop written by hand, bit for bit."""

from common import assert_other_tensors, assert_same_tensors, weights
from transformers_common import (
    ROWS,
    Texts,
    arguments,
    make_gpt,
    make_optimizer,
    train,
    train_by_hand,
    windows_of,
    with_accumulation,
)

STEPS, LIMIT = 4, 0.25
# Five micro-batches, the last of three rows: accumulation 2 and 3 leave a short last step in an epoch.
TEXTS = Texts(5 * ROWS - 1)


@with_accumulation(all_of=["SAM", "m-RWP", "IRE"])
def test_a_training_equals_a_loop_by_hand(method, accumulation, tmp_path):
    """With dropout, with clipping, of the final gradient, and with steps of fewer micro-batches at an epoch's end."""
    model, start = make_gpt(), weights(make_gpt())
    args = arguments(tmp_path, max_steps=STEPS, gradient_accumulation_steps=accumulation, max_grad_norm=LIMIT)
    trainer = train(method, model, args, TEXTS)
    assert trainer.state.global_step == STEPS and args.max_grad_norm == LIMIT

    by_hand = make_gpt()
    opt = make_optimizer(method, by_hand, max_grad_norm=LIMIT)
    train_by_hand(method, by_hand, opt, windows_of(TEXTS, accumulation, STEPS))
    assert_other_tensors(weights(model), start)
    assert_same_tensors(weights(model), weights(by_hand))
    assert opt.grad_norm > LIMIT
