"""python examples/timm_rwp.py

Rolling RWP in timm's training loop: an optimizer from timm's registry, NativeScaler, an average of the weights and
CheckpointSaver. What differs from timm's train.py is marked by (1) to (3). The images are scikit-learn's handwritten
digits.
"""

import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.nn.functional import cross_entropy, interpolate

from flatkern.integrations.timm import register  # (1)


def load_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = interpolate(images, size=32)[order], torch.tensor(digits.target)[order]
    return images[:640], labels[:640], images[640:960], labels[640:960]


@torch.no_grad()
def accuracy(model, images, labels):
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(epochs=5, batch_size=32):
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_data()
    register()  # (2) names for --opt: rwpadamw, rwpsgd, samsgd, ...
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    opt = create_optimizer_v2(model, "rwpadamw", lr=3e-3, weight_decay=0.05, sigma=0.01)
    opt.follow(model)  # (3) noise in training forwards, clean weights elsewhere
    scaler, ema = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.9)
    scheduler = CosineLRScheduler(opt, t_initial=epochs, lr_min=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(model, opt, model_ema=ema, amp_scaler=scaler, checkpoint_dir=folder)
        for epoch in range(epochs):
            model.train()
            for rows in torch.randperm(len(images)).split(batch_size):
                loss = cross_entropy(model(images[rows]), labels[rows])
                scaler(loss, opt)
                opt.zero_grad()
                ema.update(model)
            scheduler.step(epoch + 1)
            right, averaged = (accuracy(m, test_images, test_labels) for m in (model, ema.module))
            best, _ = saver.save_checkpoint(epoch, metric=averaged)
            print(f"epoch {epoch + 1}   loss {loss.item():.3f}   accuracy {right:.1f} %, averaged {averaged:.1f} %")
    print(f"best accuracy of averaged weights: {best:.1f} %")


if __name__ == "__main__":
    main()
