"""Hugging Face's Trainer: what is refused or warned of, what is logged, and which lines a user writes."""

import importlib
import sys
import warnings

import pytest
import torch
from accelerate import Accelerator, DistributedType
from common import TWO_PASS, assert_other_tensors, assert_same_tensors, weights
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers_common import (
    ROWS,
    Sentences,
    Texts,
    arguments,
    make_bert,
    make_gpt,
    make_optimizer,
    make_trainer,
    train,
)

import flatkern
from flatkern.integrations.transformers import FlatkernCallback, FlatkernTrainer

TEXTS = Texts(4 * ROWS)


def plain_trainer(opt, model, folder, **more):
    args = arguments(folder, **more.pop("args", {}))
    return Trainer(
        model=model, args=args, train_dataset=TEXTS, optimizers=(opt, None), callbacks=[FlatkernCallback(**more)]
    )


# --- the lines that a user writes -----------------------------------------------------------------


def test_rolling_RWP_in_one_line(tmp_path):
    """The Trainer makes the optimizer itself, with its weight decay by names; only these two arguments are new."""
    rwp = flatkern.RWP(sigma=0.05, rolling=True)
    own = {
        "optimizer_cls_and_kwargs": (flatkern.AdamW, {"lr": 0.02, "perturb": rwp}),
        "callbacks": [FlatkernCallback()],
    }
    trainer = Trainer(make_gpt(), arguments(tmp_path, weight_decay=0.1), train_dataset=TEXTS, **own)
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert opt.cycle.weights.ever_perturbed and not opt.is_perturbed
    plain = Trainer(make_gpt(), arguments(tmp_path, weight_decay=0.1, learning_rate=0.02), train_dataset=TEXTS)
    plain.train()
    assert_other_tensors(weights(trainer.model), weights(plain.model))


@pytest.mark.parametrize("method", ["SAM", "m-RWP"])
def test_other_Trainers_are_combined_by_inheritance(method, tmp_path):
    class Both(FlatkernTrainer, Seq2SeqTrainer):
        pass

    args = arguments(tmp_path, Seq2SeqTrainingArguments, gradient_accumulation_steps=2)
    trained = [weights(train(method, make_gpt(), args, TEXTS, kind=kind).model) for kind in (FlatkernTrainer, Both)]
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_values_follow_schedules(method, tmp_path):
    key, seen = "sigma" if method == "rolling RWP" else "rho", []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0][key])

    callbacks = [FlatkernCallback(**{key: lambda step: 0.01 * (step + 1)}), Look()]
    train(method, make_gpt(), arguments(tmp_path, max_steps=4), TEXTS, callbacks=callbacks)
    assert seen == [0.01 * k for k in (1, 2, 3, 4)]


# --- IRE ------------------------------------------------------------------------------------------


def test_IRE_draws_labels_for_what_is_in_the_loss(tmp_path):
    """Of a classifier all rows; of a language model positions that predict a token which is not ignored."""
    trainer = FlatkernTrainer(make_bert(), arguments(tmp_path))
    rows = torch.randn(4, 3)
    assert torch.equal(trainer.logits_for_mask({"logits": rows}, {"labels": torch.tensor([0, 2, 1, 1])}), rows)
    assert trainer.logits_for_mask({"logits": rows}, {}) is rows

    trainer = FlatkernTrainer(make_gpt(), arguments(tmp_path))
    logits = torch.randn(1, 4, 5)
    chosen = trainer.logits_for_mask({"logits": logits}, {"labels": torch.tensor([[1, -100, 3, -100]])})
    assert torch.equal(chosen, logits[0, 1:2])  # the second position predicts the third token


def test_IRE_takes_another_loss_once_in_an_interval(tmp_path):
    """And the Trainer's own one everywhere else, also where a derived class has its own."""
    kinds = []

    class Own(FlatkernTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            kinds.append("loss")
            return super().compute_loss(model, inputs, *args, **kwargs)

        def logits_for_mask(self, outputs, inputs):
            kinds.append("mask")
            return super().logits_for_mask(outputs, inputs)

    train("IRE", make_bert(), arguments(tmp_path, gradient_accumulation_steps=2), Sentences(16), kind=Own)
    assert kinds == ["mask", "loss", "loss", "loss", "loss", "mask", "loss", "loss"]


class Headed(torch.nn.Module):
    """Its forward takes no labels."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 3)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids).mean(dim=1))}


@pytest.mark.parametrize("method", ["IRE"])
def test_inputs_that_only_compute_loss_takes_are_no_inputs_of_the_mask(method, tmp_path):
    class Own(FlatkernTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs.pop("labels")
            return torch.nn.functional.cross_entropy(model(**inputs)["logits"], labels)

    torch.manual_seed(0)
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = train(method, Headed(), args, Sentences(3 * ROWS), kind=Own)
    assert trainer.state.global_step == 3 and trainer.flat.mask.exists and not trainer.flat.mask_due


def test_IRE_refuses_what_has_no_classes(tmp_path):
    trainer = FlatkernTrainer(make_bert(), arguments(tmp_path))
    with pytest.raises(ValueError, match=r"shape \(4, 1\), but should be .*override FlatkernTrainer.logits_for_mask"):
        trainer.logits_for_mask({"logits": torch.randn(4, 1)}, {})
    with pytest.raises(TypeError, match=r"the model returns tuple without; override FlatkernTrainer.logits_for_mask"):
        trainer.logits_for_mask((torch.randn(4, 3),), {})


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["of the arguments", "of the optimizer"])
@pytest.mark.parametrize("method", ["m-RWP", "SAM", "rolling RWP"])
def test_the_logged_norm_is_that_of_the_final_gradient(method, limit, tmp_path):
    own, given = (None, 1.0) if limit == "of the arguments" else (1.0, 0.0)
    args = arguments(
        tmp_path, gradient_accumulation_steps=2, logging_strategy="steps", logging_steps=1, max_grad_norm=given
    )
    trainer = train(method, make_gpt(), args, TEXTS, limit=own)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 3 and logged[-1] == trainer.flat.grad_norm.item()
    assert args.max_grad_norm == given and trainer.flat.max_grad_norm == own  # as before


@pytest.mark.parametrize("method", ["m-RWP", "SAM", "GSAM"])
def test_without_a_limit_the_norm_of_half_a_gradient_is_not_logged(method, tmp_path):
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1, max_grad_norm=0.0)
    history = train(method, make_gpt(), args, TEXTS).state.log_history
    assert [entry["grad_norm"] > 0 for entry in history if "grad_norm" in entry] == [True] * 3 * (method == "SAM")


@pytest.mark.parametrize("method", ["m-RWP", "SAM"])
def test_the_arguments_stay_as_they_were_given(method, tmp_path):
    """For callbacks, in checkpoints, and for others who clip by the Trainer's accelerator."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(args.max_grad_norm)
            other = torch.nn.Parameter(torch.zeros(1))
            other.grad = torch.full((1,), 8.0)
            trainer.accelerator.clip_grad_norm_([other], 2.0)
            seen.append(round(other.grad.item(), 4))

    args = arguments(tmp_path, max_grad_norm=0.5, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = make_trainer(method, make_gpt(), args, TEXTS, callbacks=[Look()])
    trainer.train()
    assert seen == [0.5, 2.0]
    assert torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False).max_grad_norm == 0.5


def test_two_different_limits_are_refused(tmp_path):
    trainer = make_trainer("SAM", make_gpt(), arguments(tmp_path), TEXTS, limit=0.5)
    with pytest.raises(ValueError, match=r"args.max_grad_norm is 1.0 and the optimizer's max_grad_norm is 0.5"):
        trainer.train()
    assert_same_tensors(weights(trainer.model), weights(make_gpt()))
    limited = train("SAM", make_gpt(), arguments(tmp_path, max_grad_norm=0.0), TEXTS, limit=0.5)
    assert limited.flat.max_grad_norm == 0.5 and limited.flat.grad_norm > 0.5


def test_clipping_twice_is_warned_of(tmp_path):
    model = make_gpt()
    trainer = plain_trainer(make_optimizer("rolling RWP", model, max_grad_norm=0.5), model, tmp_path)
    with pytest.warns(UserWarning, match=r"clipped twice.*args.max_grad_norm=1.0.*max_grad_norm=0.5; set args.max_gra"):
        trainer.train()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["RWP", "Momentum-SAM", "IRE", *TWO_PASS])
def test_a_plain_Trainer_refuses_what_needs_more_than_step(method, tmp_path):
    model = make_gpt()
    trainer = plain_trainer(make_optimizer(method, model), model, tmp_path)
    with pytest.raises(RuntimeError, match=r"needs more than the optimizer.step\(\).*FlatkernTrainer") as refusal:
        trainer.train()
    assert ("rolling=True" in str(refusal.value)) is (method in ("RWP", "m-RWP", "m-ARWP", "Momentum-SAM"))
    assert_same_tensors(weights(model), weights(make_gpt()))


@pytest.mark.parametrize("method", ["SAM"])
def test_a_plain_Trainer_refuses_it_with_a_callback_of_a_FlatkernTrainer_too(method, tmp_path):
    callback = FlatkernCallback()
    train(method, make_gpt(), arguments(tmp_path, max_steps=1), TEXTS, callbacks=[callback])
    again = make_trainer(method, make_gpt(), arguments(tmp_path), TEXTS, kind=Trainer, callbacks=[callback])
    with pytest.raises(RuntimeError, match=r"SAM needs more than the optimizer.step\(\)"):
        again.train()


@pytest.mark.parametrize("method", ["rolling RWP"])
def test_a_forgotten_callback_is_warned_of(method, tmp_path):
    """The Trainer calls train() of the optimizer before every forward, and saves without eval()."""
    trainer = make_trainer(method, make_gpt(), arguments(tmp_path, max_steps=10), TEXTS, kind=Trainer)
    with pytest.warns(UserWarning, match=r"nothing follows a model, and train\(\) was called .*FlatkernCallback\(\)"):
        trainer.train()


@pytest.mark.parametrize("kind", [Trainer, FlatkernTrainer])
def test_refuses_an_optimizer_of_others(kind, tmp_path):
    trainer = kind(make_gpt(), arguments(tmp_path), train_dataset=TEXTS, callbacks=[FlatkernCallback()])
    with pytest.raises(TypeError, match=r"optimizer is AdamW, but should be one of flatkern's; pass Trainer\(...,"):
        trainer.train()


@pytest.mark.parametrize("method", ["m-RWP", "m-ARWP", "mSAM"])
def test_refuses_rounds_that_are_averaged(method, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = make_trainer(method, make_gpt(), args, TEXTS, own={"rounds": "mean"})
    with pytest.raises(ValueError, match=r'rounds="mean", but .* divides .*pass perturb=.*rounds="sum"'):
        trainer.train()


@pytest.mark.parametrize("method", ["SAM"])
def test_without_accumulation_averaged_rounds_are_the_same(method, tmp_path):
    trained = [
        weights(train(method, make_gpt(), arguments(tmp_path), TEXTS, own={"rounds": rounds}).model)
        for rounds in ("mean", "sum")
    ]
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", ["m-RWP"])
def test_refuses_another_mix(method, tmp_path):
    own = {"mix": "losses", "rounds": "mean"}
    trainer = make_trainer(method, make_gpt(), arguments(tmp_path), TEXTS, own=own)
    with pytest.raises(ValueError, match=r'mix="losses".*pass mix="gradients", rounds="sum"'):
        trainer.train()


@pytest.mark.parametrize("method", ["SAM", "m-RWP", "IRE", "rolling RWP"])
def test_refuses_sharding_that_hides_the_gradients_of_a_pass(method, tmp_path, monkeypatch):
    trainer = make_trainer(method, make_gpt(), arguments(tmp_path), TEXTS)
    batch = {key: torch.stack([TEXTS[k][key] for k in range(2)]) for key in TEXTS[0]}
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    if method == "rolling RWP":
        trainer.current_gradient_accumulation_steps = 1  # which a Trainer sets before the first step
        trainer.training_step(trainer.model, batch)
    else:
        with pytest.raises(RuntimeError, match=r"distributed by FSDP.*use DDP, or flatkern.RWP\(rolling=True\) or Mom"):
            trainer.training_step(trainer.model, batch)
        assert all(p.grad is None for p in trainer.model.parameters())


def test_refuses_schedules_that_nothing_reads(tmp_path):
    with pytest.raises(TypeError, match=r"sigma is 0.1, but should be a function of the step number"):
        FlatkernCallback(sigma=0.1)
    model = make_gpt()
    trainer = plain_trainer(make_optimizer("rolling RWP", model), model, tmp_path, rho=lambda step: 0.1)
    with pytest.raises(ValueError, match=r"no 'rho'"):
        trainer.train()


@pytest.mark.parametrize("method", ["SAM", "m-RWP", "RWP"])
def test_a_step_that_nobody_finished_is_dropped_with_a_warning(method, tmp_path):
    """A callback stops the epoch inside of a step."""

    class Stop(TrainerCallback):
        stops = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.stops += 1
            control.should_epoch_stop = self.stops == 1

    two_epochs = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    with pytest.warns(UserWarning, match=r"not followed by optimizer.step\(\).*gradients are dropped"):
        stopped = train(method, make_gpt(), two_epochs, TEXTS, callbacks=[Stop()])
    assert stopped.state.global_step == 2  # those of the second epoch
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole = train(method, make_gpt(), arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2), TEXTS)
    if method == "SAM":  # draws no noise, so that nothing at all is left of it
        assert_same_tensors(weights(stopped.model), weights(whole.model))


def test_without_the_library_an_import_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flatkern.integrations.transformers")
    with pytest.raises(ImportError, match=r"^flatkern.integrations.transformers: .*'flatkern\[transformers\]'"):
        importlib.import_module("flatkern.integrations.transformers")
