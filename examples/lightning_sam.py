# python examples/lightning_sam.py [--method SAM|rolling|plain]
"""A LightningModule trained by SAM, or by rolling RWP, or by plain SGD, on scikit-learn's handwritten digits.

What differs from any other LightningModule is marked by (1) and (2); `training_step` does not change.
"""

import argparse
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import flatkern
from flatkern.integrations.lightning import FlatkernCallback

METHODS = {"SAM": flatkern.SAM(rho=0.05), "rolling": flatkern.RWP(sigma=0.01, rolling=True), "plain": None}


class Digits(LightningModule):
    def __init__(self, method):
        super().__init__()
        self.method = method
        features = nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.net = nn.Sequential(*features, nn.Flatten(), nn.Linear(16 * 16, 10))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("loss", cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self):
        found = self.trainer.callback_metrics
        print(f"epoch {self.current_epoch}: loss {found['loss']:.3f}, accuracy {found['accuracy']:.1%}", flush=True)

    def configure_optimizers(self):
        return flatkern.SGD(self.parameters(), lr=0.05, momentum=0.9, perturb=METHODS[self.method])  # (1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="SAM")
    method = parser.parse_args().method
    warnings.filterwarnings("ignore", "The '(train|val)_dataloader' does not have many workers")
    seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images[:, None] / 8 - 1).float(), torch.tensor(digits.target).long())
    train, test = random_split(data, [1200, 597])
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(max_epochs=5, devices=1, num_sanity_val_steps=0, callbacks=[FlatkernCallback()], **quiet)  # (2)
    trainer.fit(Digits(method), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 597))
    print(f"{method}: test accuracy {trainer.callback_metrics['accuracy']:.1%}, at clean weights")


if __name__ == "__main__":
    main()
