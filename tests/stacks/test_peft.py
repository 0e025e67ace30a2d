"""flatkern on LoRA's adapters, in Hugging Face's Trainer: what is perturbed, saved, merged, and left alone."""

import pytest
import torch
from common import assert_other_tensors, assert_same_tensors, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers_common import (
    ROWS,
    Texts,
    arguments,
    best_of_three,
    make_gpt,
    make_optimizer,
    make_trainer,
    train_by_hand,
    windows_of,
)

from flatkern.integrations.transformers import FlatkernCallback, FlatkernTrainer

TEXTS = Texts(4 * ROWS)
BATCH = {key: torch.stack([TEXTS[k][key] for k in range(2)]) for key in TEXTS[0]}


def make_lora():
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(make_gpt(dropout=0.0), config)


def train(method, folder, callbacks=(), **more):
    rolling = method == "rolling RWP"
    callbacks = [*callbacks, *([FlatkernCallback()] if rolling else [])]
    args = arguments(folder, **{"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, **more})
    trainer = make_trainer(
        method, make_lora(), args, TEXTS, kind=Trainer if rolling else FlatkernTrainer, callbacks=callbacks, lr=0.1
    )
    trainer.train()
    return trainer


def adapters(model):
    return {name: w for name, w in weights(model).items() if "lora_" in name}


class WhatMoves(TrainerCallback):
    """Notes which weights a step's last backward has seen perturbed."""

    def __init__(self):
        self.moved = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        seen = weights(model)
        with optimizer.optimizer.clean():
            clean = weights(model)
        self.moved.append({name for name in seen if not torch.equal(seen[name], clean[name])})


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-RWP"])
def test_only_adapters_move_and_a_training_equals_a_loop_by_hand(method, tmp_path):
    moves = WhatMoves()
    trainer = train(method, tmp_path, [moves])
    model, start = trainer.model, make_lora()
    # The second factor begins at zero, and noise in proportion to its norm does too.
    assert set().union(*moves.moved) == set(adapters(model))
    assert_other_tensors(adapters(model), adapters(start))
    base, base_before = ({n: w for n, w in weights(m).items() if "lora_" not in n} for m in (model, start))
    assert_same_tensors(base, base_before)
    by_hand = make_lora()
    train_by_hand(method, by_hand, make_optimizer(method, by_hand, lr=0.1), windows_of(TEXTS, 2, 4))
    assert_same_tensors(weights(model), weights(by_hand))


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-RWP"])
def test_merging_takes_clean_weights(method, tmp_path):
    """After a training; and inside of one within `with opt.clean():`, since peft reads the weights themselves."""

    class Merge(TrainerCallback):
        merged = None

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 4:
                with optimizer.optimizer.clean():
                    model.merge_adapter()
                    self.merged = weights(model)
                    model.unmerge_adapter()

    merge = Merge()
    trainer = train(method, tmp_path, [merge])
    clean = make_lora()
    clean.load_state_dict(trainer.model.state_dict())
    clean.merge_adapter()
    # What merging and unmerging leaves of the base is peft's rounding: the last step's merge comes first.
    name = "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"
    expected = make_lora()
    expected.load_state_dict(
        {**expected.state_dict(), **{n: w for n, w in trainer.model.state_dict().items() if "lora_" in n}}
    )
    expected.merge_adapter()
    assert torch.equal(merge.merged[name], weights(expected)[name])
    assert not torch.equal(merge.merged[name], weights(make_lora())[name])
    merged = trainer.model.merge_and_unload()
    assert torch.equal(weights(merged)["transformer.h.0.attn.c_attn.weight"], weights(clean)[name])


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-RWP"])
def test_adapters_are_saved_clean_and_resumed_bit_for_bit(method, tmp_path):
    """save_pretrained() inside of a training, the Trainer's checkpoints, and a training that goes on from one."""

    class Save(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.save_pretrained(tmp_path / "own")

    whole = train(method, tmp_path / "whole", [Save()], save_strategy="steps", save_steps=1)
    two_steps = train(method, tmp_path / "two", max_steps=2)
    saved = PeftModel.from_pretrained(make_gpt(dropout=0.0), tmp_path / "whole" / "checkpoint-2")
    assert_same_tensors(adapters(saved), adapters(two_steps.model))
    own = PeftModel.from_pretrained(make_gpt(dropout=0.0), tmp_path / "own")
    assert_same_tensors(adapters(own), adapters(two_steps.model))

    rolling = method == "rolling RWP"
    args = arguments(tmp_path / "on", max_steps=4, gradient_accumulation_steps=2, max_grad_norm=0.0)
    resumed = make_trainer(
        method, make_lora(), args, TEXTS, kind=Trainer if rolling else FlatkernTrainer,
        callbacks=[FlatkernCallback()], lr=0.1,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_tensors(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_the_best_adapter_is_loaded_at_the_end(method, tmp_path):
    rolling = method == "rolling RWP"
    args, metrics = best_of_three(tmp_path)
    trainer = make_trainer(
        method, make_lora(), args, TEXTS, kind=Trainer if rolling else FlatkernTrainer,
        callbacks=[FlatkernCallback()], eval_dataset=TEXTS, compute_metrics=metrics, lr=0.1,
    )  # fmt: skip
    trainer.train()
    saved = PeftModel.from_pretrained(make_gpt(dropout=0.0), tmp_path / "checkpoint-2")
    assert_same_tensors(adapters(trainer.model), adapters(saved))
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**BATCH).logits, saved.eval()(**BATCH).logits)
