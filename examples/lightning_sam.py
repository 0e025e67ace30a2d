# python examples/lightning_sam.py [--method SAM|rolling|plain]
"""A LightningModule trained by SAM, or by rolling RWP, or by plain SGD.

What differs from any other LightningModule is marked by (1) and (2); `training_step` does not change. The data are
scikit-learn's handwritten digits where it is installed, else labels of a random network.
"""

import argparse
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import flatkern
from flatkern.integrations.lightning import FlatkernCallback

METHODS = {"SAM": flatkern.SAM(rho=0.05), "rolling": flatkern.RWP(sigma=0.01, rolling=True), "plain": None}


def load_data():
    """Images (n, 1, 8, 8) and labels."""
    try:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return TensorDataset(torch.tensor(digits.images[:, None] / 8 - 1).float(), torch.tensor(digits.target).long())
    except ImportError:
        images = torch.randn(1797, 1, 8, 8)
        return TensorDataset(images, (images.flatten(1) @ torch.randn(64, 10)).argmax(1))


class Digits(LightningModule):
    def __init__(self, method):
        super().__init__()
        self.method = method
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, 10),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("loss", cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self):
        found = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        print(f"epoch {self.current_epoch}: loss {found['loss']:.3f}, accuracy {found['accuracy']:.1%}", flush=True)

    def configure_optimizers(self):
        return flatkern.SGD(self.parameters(), lr=0.05, momentum=0.9, perturb=METHODS[self.method])  # (1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="SAM")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The '(train|val)_dataloader' does not have many workers")
    seed_everything(0, verbose=False)
    train, test = random_split(load_data(), [1200, 597])
    trainer = Trainer(
        accelerator="auto", devices=1, max_epochs=args.epochs, callbacks=[FlatkernCallback()],  # (2)
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Digits(args.method), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 597))
    print(f"{args.method}: test accuracy {trainer.callback_metrics['accuracy']:.1%}, at clean weights")


if __name__ == "__main__":
    main()
