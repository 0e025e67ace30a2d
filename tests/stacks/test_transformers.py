"""Trainings by Hugging Face's Trainer equal a loop written by hand, bit for bit."""

import pytest
import torch
from common import assert_other_tensors, assert_same_tensors, weights
from torch.utils.data import Subset
from transformers import Trainer
from transformers_common import (
    ROWS,
    VOCABULARY,
    Sentences,
    Texts,
    arguments,
    batches_of,
    make_gpt,
    make_optimizer,
    train,
    train_by_hand,
    windows_of,
    with_accumulation,
)

import flatkern

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


class WithBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(VOCABULARY, 8), torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embed(input_ids).mean(dim=1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", ["SAM", "m-RWP", "IRE"])
def test_running_statistics_are_those_of_clean_passes(method, tmp_path):
    """A plain training at lr = 0 sees the same clean micro-batches: for m-RWP every other one."""
    data = Sentences(6 * ROWS)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model, plain = WithBatchNorm(), WithBatchNorm()
    plain.load_state_dict(model.state_dict())
    train(method, model, args, data, lr=0.0)
    if method == "m-RWP":
        data, args = Subset(data, [k for k in range(len(data)) if k // ROWS % 2 == 0]), arguments(tmp_path)
    opt = torch.optim.SGD(plain.parameters(), lr=0.0)
    Trainer(plain, args, train_dataset=data, optimizers=(opt, None)).train()
    assert_same_tensors(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert model.norm.num_batches_tracked == (3 if method == "m-RWP" else 6)


@pytest.mark.parametrize("method", ["IRE"])
def test_the_mask_of_a_rolling_optimizer_is_taken_at_clean_weights(method, tmp_path):
    trained = []
    for by_hand in (False, True):
        model = make_gpt()
        opt = make_optimizer(method, model, perturb=flatkern.RWP(sigma=0.05, rolling=True))
        if by_hand:
            train_by_hand(method, model, opt, windows_of(TEXTS, 1, STEPS))
        else:
            train(method, model, arguments(tmp_path, max_steps=STEPS, max_grad_norm=0.0), TEXTS, opt=opt)
        trained.append(weights(model))
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", ["m-RWP"])
def test_halves_of_a_batch_whose_loss_is_a_mean(method, tmp_path):
    """A model that takes no `num_items_in_batch`: (1 - lam) of the first half's mean gradient, lam of the second's."""
    data, args = Sentences(3 * ROWS), arguments(tmp_path, max_grad_norm=0.0)
    torch.manual_seed(0)
    model, by_hand = WithBatchNorm(), WithBatchNorm()
    by_hand.load_state_dict(model.state_dict())
    train(method, model, args, data)
    opt = make_optimizer(method, by_hand)
    for batch in batches_of(data):
        opt.zero_grad()
        clean, noisy = ({key: v[at] for key, v in batch.items()} for at in (slice(2), slice(2, None)))
        (by_hand(**clean)["loss"] / 2).backward()
        opt.perturb()
        with flatkern.frozen_running_stats(by_hand):
            (by_hand(**noisy)["loss"] / 2).backward()
        opt.step()
    assert_same_tensors(weights(model), weights(by_hand))
