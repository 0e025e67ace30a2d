"""Hugging Face's Trainer: evaluations, checkpoints and resuming, of one-pass and of two-pass methods."""

import warnings

import pytest
import torch
from common import METHODS, TWO_PASS, assert_same_state, assert_same_tensors, weights
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers_common import (
    ROWS,
    Texts,
    arguments,
    best_of_three,
    kind_of,
    make_gpt,
    make_optimizer,
    make_trainer,
    train,
    train_by_hand,
    windows_of,
)

from flatkern.integrations.transformers import FlatkernCallback, FlatkernTrainer
from flatkern.schedules import cosine_increase

TEXTS = Texts(6 * ROWS)


def weights_by_hand(method, steps):
    """The clean weights after each step."""
    model = make_gpt()
    return train_by_hand(method, model, make_optimizer(method, model), windows_of(TEXTS, 2, steps))


@pytest.mark.parametrize("method", METHODS)
def test_lr_zero_returns_the_weights(method, tmp_path):
    model = make_gpt()
    start = weights(model)
    trainer = train(method, model, arguments(tmp_path, gradient_accumulation_steps=2), TEXTS, lr=0.0, **kind_of(method))
    assert trainer.flat.method is None or trainer.flat.cycle.weights.ever_perturbed
    assert_same_tensors(weights(model), start)


class EvaluationsAtCleanWeights(TrainerCallback):
    """Notes the weights that an evaluation and a checkpoint see, without a forward or a state_dict of its own."""

    def __init__(self):
        self.seen = []

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.seen.append((state.global_step, weights(model)))


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_checkpoints_hold_clean_weights(method, tmp_path):
    """And neither changes what is trained. The first and the third checkpoint have no evaluation before them."""
    look = EvaluationsAtCleanWeights()
    more = kind_of(method)
    callbacks = [*more.pop("callbacks", []), look]
    args = arguments(
        tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=1, logging_strategy="steps", logging_steps=1, max_grad_norm=0.0,
        max_steps=4,
    )  # fmt: skip
    model = make_gpt()
    trainer = train(method, model, args, TEXTS, callbacks=callbacks, eval_dataset=TEXTS, **more)
    by_hand = weights_by_hand(method, 4)
    assert_same_tensors(weights(model), by_hand[-1])
    assert [step for step, _ in look.seen] == [2, 2, 2, 4, 4, 4]  # three batches each
    for step, seen in look.seen:
        assert_same_tensors(seen, by_hand[step - 1])
    for step, expected in enumerate(by_hand, 1):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert_same_tensors(saved, {name: expected[name] for name in saved})
    plain = Trainer(model, arguments(tmp_path / "plain"), eval_dataset=TEXTS)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_saves_inside_of_a_step_see_clean_weights(method, tmp_path):
    """By a callback between micro-batches, and the step goes on as if nothing had been."""

    seen, trained = [], []

    class Inside(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.evaluate()
            trainer.save_model(tmp_path / "inside")
            seen.append(load_file(tmp_path / "inside" / "model.safetensors"))

        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    for inside in ([], [Inside()]):
        model, more = make_gpt(dropout=0.0), kind_of(method)  # an evaluation draws a random number
        callbacks = [*more.pop("callbacks", []), *inside]
        args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=1)
        trainer = make_trainer(method, model, args, TEXTS, callbacks=callbacks, eval_dataset=Texts(ROWS), **more)
        trainer.train()
        trained.append(weights(model))
    assert_same_tensors(*trained)
    assert len(seen) == 3 * 2
    start = weights(make_gpt())
    for tensors in seen:
        assert_same_tensors(tensors, {name: start[name] for name in tensors})


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(method, tmp_path):
    """From a checkpoint inside an epoch, with dropout, a learning rate and a value of the method that change."""
    key = {"IRE": "kappa"}.get(method, "sigma" if "RWP" in method else "rho")

    def trainer(folder):
        more = kind_of(method)
        more["callbacks"] = [FlatkernCallback(**{key: cosine_increase(0.05, 4, 4)})]
        args = arguments(
            folder, max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2,
            lr_scheduler_type="linear",
        )  # fmt: skip
        return make_trainer(method, make_gpt(), args, TEXTS, **more)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert whole.flat.param_groups[0][key] == pytest.approx(cosine_increase(0.05, 4, 4)(3), rel=0)
    assert_same_tensors(weights(resumed.model), weights(whole.model))
    assert_same_state(resumed.flat.state_dict(), whole.flat.state_dict())


@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_the_best_model_is_loaded_at_the_end(method, tmp_path):
    """On clean weights, and the noise does not come back over them."""
    args, metrics = best_of_three(tmp_path)
    trainer = make_trainer(
        method, make_gpt(), args, TEXTS, eval_dataset=TEXTS, compute_metrics=metrics,
        **kind_of(method),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trained = weights(trainer.model)
    assert_same_tensors({name: trained[name] for name in saved}, saved)
    trainer.model.train()
    trainer.model(**{key: torch.stack([TEXTS[0][key]]) for key in TEXTS[0]})
    assert_same_tensors(weights(trainer.model), trained)


@pytest.mark.parametrize("method", ["rolling RWP", *TWO_PASS])
def test_a_training_that_fails_leaves_clean_weights(method, tmp_path):
    """In the second pass of the second step, where there is one; the optimizer trains again afterwards."""
    passes = iter([False] * (6 if METHODS[method].loop == "ascent" else 3) + [True])

    class Failing(FlatkernTrainer if method in TWO_PASS else Trainer):
        def compute_loss(self, *args, **kwargs):
            if next(passes, False):
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0)
    trainer = make_trainer(method, make_gpt(), args, TEXTS, **{**kind_of(method), "kind": Failing})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if method == "rolling RWP":  # a plain Trainer tells no callback: followed, so that what is saved is clean
        saved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        assert_same_tensors({name: saved[name] for name in weights(trainer.model)}, weights_by_hand(method, 1)[0])
        trainer.flat.eval()
    assert_same_tensors(weights(trainer.model), weights_by_hand(method, 1)[0])
    trainer.train()
    assert trainer.state.global_step == 3 and not trainer.flat.is_perturbed


@pytest.mark.parametrize("method", ["SAM", "rolling RWP"])
def test_a_FlatkernTrainer_that_fails_leaves_clean_weights_by_itself(method, tmp_path):
    class Failing(FlatkernTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.flat.is_perturbed:
                raise RuntimeError("out of memory")
            return super().compute_loss(*args, **kwargs)

    model = make_gpt()
    trainer = make_trainer(method, model, arguments(tmp_path), TEXTS, kind=Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_same_tensors(weights(model), weights(make_gpt()))
    assert not trainer.flat.is_perturbed and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", TWO_PASS)
def test_a_training_that_fails_between_micro_batches_leaves_no_step_behind(method, tmp_path):
    class Fail(TrainerCallback):
        substeps = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1
            if self.substeps == 2:
                raise KeyboardInterrupt

    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer = make_trainer(method, make_gpt(), args, TEXTS, callbacks=[Fail()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_tensors(weights(trainer.model), weights(make_gpt()))
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.flat.state_dict()  # would be refused with a step pending


@pytest.mark.parametrize("method", TWO_PASS)
def test_auto_find_batch_size_goes_on_from_clean_weights(method, tmp_path):
    """Memory runs out in a second pass, and the Trainer begins again with smaller batches, inside of train()."""

    class Small(FlatkernTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > ROWS // 2 and self.flat.is_perturbed:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trained = []
    for own in ({"auto_find_batch_size": True}, {"per_device_train_batch_size": ROWS // 2}):
        args = arguments(tmp_path, gradient_accumulation_steps=2, **own)
        trainer = make_trainer(method, make_gpt(), args, TEXTS, kind=Small)
        if "sigma" in trainer.flat.param_groups[0] and len(trained):
            trainer.flat.param_groups[0]["round"] = 2  # two were drawn for batches of 4 and of 3 rows
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FlatkernTrainer")
            trainer.train()
        trained.append(weights(trainer.model))
    assert_same_tensors(*trained)


def test_the_model_is_not_followed_any_more_after_a_training(tmp_path):
    trainer = train("rolling RWP", make_gpt(), arguments(tmp_path), TEXTS, **kind_of("rolling RWP"))
    after = weights(trainer.model)
    trainer.model.train()
    trainer.model(**{key: torch.stack([TEXTS[0][key]]) for key in TEXTS[0]})
    assert_same_tensors(weights(trainer.model), after)
    trainer.train()
    assert not trainer.flat.cycle.followers.models
