"""What the tests of Hugging Face's Trainer share: tiny models and data, trainings, and the same loops by hand."""

import contextlib
import gc

import pytest
import torch
from common import EVERY, USED_FURTHER, loop_of, summed, weights
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import flatkern
from flatkern.integrations.transformers import FlatkernCallback, FlatkernTrainer

VOCABULARY, TOKENS, ROWS = 13, 6, 4

# Every train() of a Trainer collects garbage, which takes ten times as long as training these models where all that
# has been imported is walked.
gc.freeze()


class Texts(Dataset):
    """Random tokens; the labels of some positions are ignored, as of padding."""

    def __init__(self, count, seed=3, ignored=True):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (count, TOKENS), generator=generator)
        self.labels = self.ids.clone()
        if ignored:
            self.labels[torch.rand(count, TOKENS, generator=generator) < 0.2] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        return {"input_ids": self.ids[k], "labels": self.labels[k]}


class Sentences(Dataset):
    """Random tokens and a class for each row."""

    def __init__(self, count, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (count, TOKENS), generator=generator)
        self.labels = torch.randint(3, (count,), generator=generator)

    __len__, __getitem__ = Texts.__len__, Texts.__getitem__


def make_gpt(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=TOKENS, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def arguments(folder, kind=TrainingArguments, **more):
    """Three steps in the order of the data, on the CPU; nothing is logged, shown, or saved."""
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": ROWS, "max_steps": 3, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "seed": 11,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", 
    }  # fmt: skip
    return kind(**{**values, **more})


def best_of_three(folder):
    """Arguments of a training whose second checkpoint is the best, and its Trainer's metrics."""
    steps = iter((2, 1, 3))
    args = arguments(
        folder, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=False,
    )  # fmt: skip
    return args, lambda _: {"step": next(steps)}


def make_optimizer(method, model, lr=0.02, own=None, **more):
    """AdamW with a method of EVERY whose rounds are summed, as the Trainer's losses need it."""
    rounds = {} if EVERY[method].loop == "plain" else summed(method)
    keywords = EVERY[method].make(**{**rounds, **(own or {})})
    params = [p for p in model.parameters() if p.requires_grad]
    return flatkern.AdamW(params, lr=lr, **{**keywords, **more})


class SeedSteps(TrainerCallback):
    """Dropout and sampled labels of a step depend on its number alone, and a loop by hand can draw the same."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(1000 + state.global_step)


def kind_of(method):
    """A plain Trainer with the callback where that is enough."""
    if method.startswith("rolling"):
        return {"kind": Trainer, "callbacks": [FlatkernCallback()]}
    return {"kind": FlatkernTrainer}


def with_accumulation(all_of):
    """Methods and accumulations: 1, 2 and 3 for `all_of`, 2 for the others."""
    pairs = [(method, n) for method in EVERY for n in ((1, 2, 3) if method in all_of else (2,))]
    return pytest.mark.parametrize("method, accumulation", pairs)


def make_trainer(
    method, model, args, data, kind=FlatkernTrainer, callbacks=(), own=None, lr=0.02, limit=None, opt=None, **more
):
    """A Trainer; its optimizer itself is `trainer.flat`."""
    opt = opt or make_optimizer(method, model, lr, own, max_grad_norm=limit)
    trainer = kind(
        model=model, args=args, train_dataset=data, optimizers=(opt, None), callbacks=[SeedSteps(), *callbacks], **more
    )
    trainer.flat = opt
    return trainer


def train(*args, **more):
    """Train; returns the Trainer."""
    trainer = make_trainer(*args, **more)
    trainer.train()
    return trainer


def batches_of(data, rows=ROWS):
    """The data in their order; the last batch may be shorter."""
    rows_of = [range(k, min(k + rows, len(data))) for k in range(0, len(data), rows)]
    return [{key: torch.stack([data[k][key] for k in at]) for key in data[0]} for at in rows_of]


def windows_of(data, accumulation, steps, rows=ROWS):
    """The micro-batches of each step, epoch after epoch; the last step of an epoch may have fewer."""
    batches = batches_of(data, rows)
    epoch = [batches[k : k + accumulation] for k in range(0, len(batches), accumulation)]
    return [epoch[k % len(epoch)] for k in range(steps)]


def halves_of(batch):
    """A single row cannot be halved, and comes twice."""
    first = (len(batch["input_ids"]) + 1) // 2
    if len(batch["input_ids"]) == 1:
        return [batch, batch]
    return [{key: v[:first] for key, v in batch.items()}, {key: v[first:] for key, v in batch.items()}]


def backward(model, batch, items, averaged):
    """The Trainer's loss of a micro-batch: a sum over its tokens, divided by those of all micro-batches of the step, of
    all ranks, times the number of ranks, because DDP takes their mean.

    Arguments:
        averaged: over the ranks, now; otherwise by a later backward.
    """
    is_ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    with model.no_sync() if is_ddp and not averaged else contextlib.nullcontext():
        loss = model(**batch, num_items_in_batch=items).loss
        (loss * (torch.distributed.get_world_size() if is_ddp else 1)).backward()


def step_by_hand(method, model, opt, window):
    """One step of a causal language model, by flatkern's public calls alone, on losses as the Trainer divides them."""
    opt.zero_grad()
    if opt.enhancement is not None and opt.mask_due:
        # Labels are drawn for the positions that are in the loss, each of which predicts the next token.
        with opt.clean():
            logits = model(**window[0]).logits[:, :-1][window[0]["labels"][:, 1:] != -100]
            flatkern.sampled_label_loss(logits).backward()
            opt.update_mask()
    loop, n = loop_of(method, opt), len(window)
    items = [sum((batch["labels"] != -100).sum() for batch in window)] * n
    if loop == "mixed" and n == 1:
        window = halves_of(*window)
        items = [2 * (batch["labels"] != -100).sum() for batch in window]  # half of each half's mean
        n = 2
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        for count in {id(count): count for count in items}.values():
            torch.distributed.all_reduce(count)
    clean = (n + 1) // 2
    if loop == "noisy":
        opt.perturb()
    for k, batch in enumerate(window):
        if loop == "mixed" and k == clean:
            opt.perturb()
        last = k == n - 1 or (loop == "mixed" and k == clean - 1)
        backward(model, batch, items[k], averaged=method in USED_FURTHER if loop == "ascent" else last)
        if loop == "ascent":
            opt.perturb()
            backward(model, batch, items[k], averaged=last)
            if not last:
                opt.restore()
    opt.step()


def train_by_hand(method, model, opt, windows):
    """Train; ends with clean weights. Returns the clean weights after each step."""
    if method == "ASAM":
        opt.name_parameters(model)
    after = []
    model.train()
    if opt.rolling:
        opt.train()
    for k, window in enumerate(windows):
        torch.manual_seed(1000 + k)
        step_by_hand(method, model, opt, window)
        with opt.clean():
            after.append(weights(model))
    opt.eval()
    return after
