"""python examples/accelerate_methods.py          or: accelerate launch examples/accelerate_methods.py

RWP, m-RWP, SAM and IRE in a Hugging Face Accelerate script with gradient accumulation. What differs from an ordinary
script is marked by (1) to (3). The data are scikit-learn's handwritten digits, a fifth of the training labels random.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import flatkern
from flatkern.integrations.accelerate import passes  # (1)

METHODS = {
    "AdamW": {},
    "rolling RWP": {"perturb": flatkern.RWP(sigma=0.02, rolling=True)},
    "m-RWP": {"perturb": flatkern.RWP(sigma=0.02, lam=0.5, rounds="sum")},
    "SAM": {"perturb": flatkern.SAM(rho=0.1, rounds="sum")},
    "IRE": {"enhance": flatkern.IRE(kappa=1.0)},
}


def load_data():
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:797], order[797:]
    wrong = torch.randint(0, 10, (200,), generator=torch.Generator().manual_seed(1))
    labels = labels.clone()
    labels[train[:200]] = wrong
    return TensorDataset(images[train], labels[train]), (images[test], labels[test])


def train(name, data, test, epochs=10):
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = flatkern.AdamW(model.parameters(), lr=3e-3, **METHODS[name])
    model, opt, loader = accelerator.prepare(model, opt, DataLoader(data, batch_size=25, shuffle=True))
    step = passes(accelerator, opt, model)  # (2)
    if step.optimizer.rolling:
        step.optimizer.follow(model)
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                mask = (lambda x=x: flatkern.sampled_label_loss(model(x))) if name == "IRE" else None
                loss = step(lambda x=x, y=y: cross_entropy(model(x), y), mask=mask)  # (3) backward, step, zero_grad
    model.eval()
    images, labels = (t.to(accelerator.device) for t in test)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    accelerator.print(f"{name:<12} last loss {loss.item():.3f}   test accuracy {100 * right:.1f} %")


if __name__ == "__main__":
    training_data, test_data = load_data()
    for method in METHODS:
        train(method, training_data, test_data)
