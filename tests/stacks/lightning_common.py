"""LightningModules around the tiny model, by automatic and by manual optimization, and a Trainer that is quiet."""

import warnings

import torch
from common import (
    METHODS,
    clean_weights,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    mask_loss,
    step_by_hand,
    weights,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from flatkern.integrations.lightning import FlatkernCallback

# Several rounds a step need several batches in one training_step, which is manual optimization.
AUTOMATIC = [name for name in METHODS if name != "mSAM"]
ROLLING = ["rolling RWP", "rolling Momentum-SAM"]
EXPLICIT = [name for name in AUTOMATIC if name not in (*ROLLING, "IRE")]


class Automatic(LightningModule):
    """What a user writes: nothing of flatkern's but the optimizer.

    Arguments:
        method: a name of METHODS.
        values: of `make_optimizer`.
    """

    takes_masks = True  # by the callback

    def __init__(self, method, batch_norm=False, **values):
        super().__init__()
        self.net = make_model(batch_norm=batch_norm)
        self.method, self.values = method, values
        self.trained_at = []  # weights that training_step met
        self.evaluated_at = []  # weights that validation, test and prediction met

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.trained_at.append(weights(self.net))
        return loss_of(self, batch)

    def validation_step(self, batch, batch_idx):
        self.evaluated_at.append(weights(self.net))

    test_step = validation_step

    def on_train_end(self):
        self.ended_at = weights(self.net)

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)
        return self(batch[0])

    def configure_optimizers(self):
        self.opt = make_optimizer(self.method, self, **self.values)
        return self.opt


class Manual(Automatic):
    """The same by manual optimization: a batch is a window of micro-batches, and the loop is the user's."""

    takes_masks = False

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.automatic_optimization = False

    def training_step(self, window, batch_idx):
        self.trained_at.append(weights(self.net))
        step_by_hand(self.method, self, self.optimizers(), window, self.global_step)


class TwoBatches(Automatic):
    """Manual optimization with one pass a batch: the weights stay perturbed from one batch to the next."""

    takes_masks = False

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt, first = self.optimizers(), batch_idx % 2 == 0
        if first:
            opt.zero_grad()
        if not first or METHODS[self.method].loop != "noisy":
            self.manual_backward(loss_of(self, batch))
        if first:
            opt.perturb()
        else:
            opt.step()


# Lightning's, on trainings as tiny as these, and on what is done here on purpose.
REMARKS = (
    "The '(train|val)_dataloader' does not have many workers",
    "You defined a `validation_step` but have no",
    "`training_step` returned `None`",
    "Be aware that when using `ckpt_path`, callbacks used to create",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "Using ModelCheckpoint with manual optimization",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_trainer(module, callbacks=(), epochs=1, **options):
    """With flatkern's callback last, where a user may put it."""
    ours = FlatkernCallback(mask_loss=seeded_mask_loss(module) if module.takes_masks else None)
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **QUIET, **options}
    return Trainer(max_epochs=epochs, callbacks=[*callbacks, ours], **options)


def seeded_mask_loss(module):
    """IRE's loss, with the labels that the loop by hand draws."""
    return lambda model, batch: mask_loss(model, batch, module.global_step)


def loader(batches):
    """The batches as they are, in their order."""
    return DataLoader(batches, batch_size=None)


def fit(module, batches, callbacks=(), epochs=1, ckpt_path=None, validate=None, **options):
    """Train on `batches`; returns the Trainer.

    Arguments:
        validate: batches of a validation.
    """
    trainer = make_trainer(module, callbacks, epochs, **options)
    with warnings.catch_warnings():
        for text in REMARKS:
            warnings.filterwarnings("ignore", text)
        trainer.fit(module, loader(batches), None if validate is None else loader(validate), ckpt_path=ckpt_path)
    return trainer


# --- checkpoints -----------------------------------------------------------------------------------


def every_step(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options)


def network(checkpoint):
    return {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}


# --- the same by hand ------------------------------------------------------------------------------


def by_hand(method, windows, start=0, batch_norm=False, **values):
    """The model and the optimizer after a loop by hand, and the clean weights before and after every step."""
    model = make_model(batch_norm=batch_norm)
    opt = make_optimizer(method, model, **values)
    seen = [weights(model)]
    if opt.rolling:
        opt.train()
    for k, window in enumerate(windows):
        step_by_hand(method, model, opt, window, start + k)
        seen.append(clean_weights(model, opt))
    opt.zero_grad()
    opt.eval()
    return model, opt, seen


def state_of(opt):
    """Every tensor of the optimizer's state, and the noise's round, by position: the modules' names differ."""
    saved = opt.state_dict()
    found = {f"{k} {key}": value for k, entry in saved["state"].items() for key, value in entry.items()}
    return found | {"round": torch.tensor(saved["param_groups"][0].get("round", 0))}


def windows_of(count, size=1):
    batches = make_batches(count * size)
    return [batches[k * size : (k + 1) * size] for k in range(count)]
