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
    halves_of,
    make_gpt,
    make_optimizer,
    train,
    train_by_hand,
    windows_of,
    with_accumulation,
)

import flatkern
from flatkern.integrations.transformers import FlatkernTrainer, halves

STEPS, LIMIT = 4, 0.25
# Five micro-batches, the last of three rows: accumulation 2 and 3 leave a short last step in an epoch.
TEXTS = Texts(5 * ROWS - 1)


@with_accumulation(all_of=["SAM", "m-RWP", "IRE", "LookSAM", "Momentum-SAM"])
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


def mean_loss(model, batch):
    """What an override of compute_loss usually has: a mean over the batch's own tokens."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


class Mean:
    """Of a model that takes `num_items_in_batch`, so that the Trainer believes that the loss is divided by it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return mean_loss(model, inputs)


class TakesTheMean(Mean, FlatkernTrainer):
    pass


class PlainMean(Mean, Trainer):
    pass


HALVES = {
    "a model that takes no num_items_in_batch": (WithBatchNorm, FlatkernTrainer, lambda model, b: model(**b)["loss"]),
    "a compute_loss of one's own": (make_gpt, TakesTheMean, mean_loss),
}


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("method", ["m-RWP"])
def test_halves_of_a_batch_whose_loss_is_a_mean(method, kind, tmp_path):
    """(1 - lam) of the first half's mean gradient, lam of the second's."""
    make_model, trainer_kind, loss_of = HALVES[kind]
    data = Sentences(3 * ROWS) if make_model is WithBatchNorm else Texts(3 * ROWS)
    torch.manual_seed(0)
    model, by_hand = make_model(), make_model()
    by_hand.load_state_dict(model.state_dict())
    train(method, model, arguments(tmp_path, max_grad_norm=0.0), data, kind=trainer_kind)
    opt = make_optimizer(method, by_hand)
    for k, batch in enumerate(batches_of(data)):
        torch.manual_seed(1000 + k)
        opt.zero_grad()
        clean, noisy = halves_of(batch)
        (loss_of(by_hand, clean) / 2).backward()
        opt.perturb()
        with flatkern.frozen_running_stats(by_hand):
            (loss_of(by_hand, noisy) / 2).backward()
        opt.step()
    assert_same_tensors(weights(model), weights(by_hand))


@pytest.mark.parametrize("kinds", [(FlatkernTrainer, Trainer), (TakesTheMean, PlainMean)])
@pytest.mark.parametrize("method", ["m-RWP"])
def test_the_logged_loss_of_two_halves_is_that_of_the_batch(method, kinds, tmp_path):
    """At lr = 0 and sigma = 0, without dropout, it is a plain Trainer's, but for the order in which rows are summed."""
    logged = []
    for kind in kinds:
        model = make_gpt(dropout=0.0)
        args = arguments(tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1)
        opt = make_optimizer(method, model, lr=0.0, own={"sigma": 0.0})
        if kind is kinds[1]:
            opt = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = train(method, model, args, Texts(ROWS - 1, ignored=False), kind=kind, opt=opt)
        logged += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(logged[1], rel=1e-5), logged[1]]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["m-RWP"])
def test_a_single_row_at_an_epochs_end_is_taken_in_both_passes(method, accumulation, tmp_path):
    data = Texts(2 * ROWS + 1, ignored=False)
    model, by_hand = make_gpt(), make_gpt()
    args = arguments(tmp_path, max_steps=STEPS, gradient_accumulation_steps=accumulation, max_grad_norm=0.0)
    train(method, model, args, data)
    train_by_hand(method, by_hand, make_optimizer(method, by_hand), windows_of(data, accumulation, STEPS))
    assert_same_tensors(weights(model), weights(by_hand))


@pytest.mark.parametrize("method", ["m-RWP"])
def test_a_half_whose_labels_are_all_ignored_has_a_loss_of_zero(method, tmp_path):
    """Not of 0 / 0; the other half has its own."""
    data = Texts(ROWS)
    data.labels[: ROWS // 2] = -100
    model, start = make_gpt(), weights(make_gpt())
    args = arguments(tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False)
    trainer = train(method, model, args, data)
    assert 0 < trainer.state.log_history[0]["loss"] < float("inf")
    assert all(w.isfinite().all() for w in weights(model).values())
    assert_other_tensors(weights(model), start)


def test_what_cannot_be_halved_is_taken_twice():
    """Tensors of other lengths, and tensors inside of something, whose rows nobody knows."""
    rows, others = torch.ones(4, 6), torch.ones(3, 6)
    for batch in ({"input_ids": rows[:1]}, {"input_ids": rows, "positions": others}, {"a": rows, "b": {"c": rows}}):
        first, second, counts = halves(batch)
        assert first is batch and second is batch and counts == (1, 1)
    names = ["a", "b", "c"]
    first, second, counts = halves({"input_ids": rows[:3], "scale": torch.ones(1), "names": names, "flag": True})
    assert counts == (2, 1) and first["names"] == ["a", "b"] and second["names"] == ["c"]
    assert len(first["input_ids"]) == 2 and len(second["scale"]) == 1 and second["flag"] is True
