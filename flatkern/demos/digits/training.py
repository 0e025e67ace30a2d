"""What the demo trains: the digits, a small network, and one training step of every method as a user writes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatkern

from .methods import METHODS, Hyper

SETTINGS = {"clean": 0.0, "noisy": 0.4}  # share of training labels replaced by another class
TEST, TRAIN = 897, 600  # of 1797 images; the 300 that remain are the validation set of the search
BATCH, MOMENTUM, SHARDS = 50, 0.9, 4  # mSAM: 4 shards of 12 or 13 images
PROBE_SIGMA, PROBE_DRAWS = 0.02, 10  # noise of the sharpness measure


@dataclass(frozen=True)
class Data:
    """Images (n, 1, 8, 8) in [-1, 1] and labels."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(seed: int, noise: float) -> Data:
    """One test set for all seeds; the seed draws training and validation images, and which labels are wrong."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    rest, test = train_test_split(range(len(labels)), test_size=TEST, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, train_size=TRAIN, random_state=seed, stratify=labels[rest])
    given = labels[train]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(TRAIN, generator=generator)[: round(noise * TRAIN)]
    given[wrong] = (given[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return Data((images[train], given), (images[validation], labels[validation]), (images[test], labels[test]))


def make_network(seed: int) -> nn.Module:
    """Three convolutions and a linear layer.

    GroupNorm keeps no running statistics, so that a perturbed pass and mSAM's smaller batches differ from a plain pass
    in nothing but the method. With BatchNorm the perturbed passes belong into `flatkern.frozen_running_stats(model)`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for channels, filters, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [
                nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False),
                nn.GroupNorm(4, filters),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 10))


PERIOD = (
    10  # steps in which a method does all that it does: IRE has a mask in every tenth, LookSAM an ascent in every fifth
)


def usual(times: list[float]) -> float:
    """Mean over a period of the medians of steps at the same place in it: what comes in some steps only counts, too."""
    return mean(median(times[k::PERIOD]) for k in range(min(PERIOD, len(times))))


class Stopwatch:
    """Time of each step, and of the optimizer's calls in it, in milliseconds."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def step(self, function: Callable[[], Any]) -> None:
        self.optimizer.append(0.0)
        start = time.perf_counter()
        function()
        self.steps.append(1e3 * (time.perf_counter() - start))

    def __call__(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self.optimizer[-1] += 1e3 * (time.perf_counter() - start)


def train_step(
    name: str,
    opt: flatkern.SGD,
    backward: Callable[..., None],
    batch: Tensor,
    other: Tensor,
    timed: Callable[[Callable[[], Any]], None],
    schedule: Callable[[], None],
) -> None:
    """One optimizer step; `backward` takes the indices of a batch, `other` is m-RWP's second one."""
    opt.zero_grad()
    if opt.mask_due:
        backward(batch, sampled=True)
        timed(opt.update_mask)
    match name:
        case "SGD" | "SGD, 2x steps" | "RWP rolling" | "Momentum-SAM" | "IRE":
            backward(batch)
        case "RWP" | "ARWP":
            timed(opt.perturb)
            backward(batch)
        case "m-RWP" | "m-ARWP":
            backward(batch)
            timed(opt.perturb)
            backward(other)
        case "SAM" | "ASAM" | "mixed SAM" | "GSAM" | "Friendly-SAM" | "LookSAM" | "SAM-IRE":
            backward(batch)
            if opt.perturb_due:  # always, but of LookSAM
                timed(opt.perturb)
                backward(batch)
        case "mSAM":
            for shard in batch.chunk(SHARDS):
                timed(opt.restore)  # the first one finds clean weights and does nothing
                backward(shard)
                timed(opt.perturb)
                backward(shard)
    schedule()  # of sigma; before the step, because a rolling step draws the noise of the next pass
    timed(opt.step)


def batches(seed: int, steps: int) -> Tensor:
    """Indices (steps, BATCH): one shuffle of the training set after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH / TRAIN)
    return torch.cat([torch.randperm(TRAIN, generator=generator) for _ in range(epochs)]).view(-1, BATCH)[:steps]


def make_optimizer(name: str, model: nn.Module, hyper: Hyper, seed: int, backend: str | None) -> flatkern.SGD:
    opt = flatkern.SGD(
        model.named_parameters(),  # ASAM asks for the names
        lr=hyper["lr"],
        momentum=MOMENTUM,
        weight_decay=hyper["weight_decay"],
        perturb=METHODS[name].perturb(hyper, seed),
        enhance=METHODS[name].enhance(hyper),
        backend=backend,
    )
    if opt.rolling:
        opt.follow(model)
    return opt


def schedule_of_sigma(name: str, opt: flatkern.SGD, hyper: Hyper, steps: int) -> Callable[[], None]:
    """The papers' schedule of the one-gradient methods: sigma grows elevenfold, up to the tuned value."""
    if name not in ("RWP", "RWP rolling", "ARWP"):
        return lambda: None
    growth = flatkern.schedules.cosine_increase(hyper["sigma"] / 11, 10, steps)
    return flatkern.schedules.PerturbationScheduler(opt, "sigma", growth).step


def make_backward(model: nn.Module, part: tuple[Tensor, Tensor], seed: int) -> Callable[..., None]:
    """A backward pass of a batch; `sampled`: of a loss with labels that the model draws."""
    images, labels = part
    drawn = torch.Generator().manual_seed(seed)

    def backward(batch: Tensor, sampled: bool = False) -> None:
        logits = model(images[batch])
        loss = flatkern.sampled_label_loss(logits, generator=drawn) if sampled else cross_entropy(logits, labels[batch])
        loss.backward()

    return backward


@dataclass(frozen=True)
class Fitted:
    """A trained model, in evaluation mode and with clean weights, and what was measured meanwhile."""

    model: nn.Module
    opt: flatkern.SGD
    watch: Stopwatch
    curve: list[dict[str, Any]]


def fit(
    name: str,
    data: Data,
    seed: int,
    epochs: int,
    hyper: Hyper,
    backend: str | None = None,
    evaluate_on: str = "test",
    points: int = 5,
    tick: Callable[[], None] = lambda: None,
) -> Fitted:
    """Every method sees the same start and batches, and all but one the same number of steps.

    Arguments:
        hyper: lr, weight_decay, and the method's strength under its own name.
        points: how often the accuracy is taken for the curves.
        tick: called after every epoch.
    """
    model = make_network(seed)
    opt = make_optimizer(name, model, hyper, seed, backend)
    steps = METHODS[name].length * epochs * (TRAIN // BATCH)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    schedule = schedule_of_sigma(name, opt, hyper, steps)
    backward = make_backward(model, data.train, seed)
    watch, curve = Stopwatch(), []
    order = zip(batches(2 * seed, steps), batches(2 * seed + 1, steps), strict=True)
    for k, (batch, other) in enumerate(order, start=1):
        model.train()
        watch.step(lambda: train_step(name, opt, backward, batch, other, watch, schedule))  # noqa: B023
        rates.step()
        if k * points // steps > (k - 1) * points // steps:
            accuracy, loss = evaluate(model, getattr(data, evaluate_on))
            curve.append({"step": k, "accuracy": accuracy, "loss": loss})
        if k % (TRAIN // BATCH) == 0:
            tick()
    opt.eval()
    model.eval()
    return Fitted(model, opt, watch, curve)


def train(
    name: str, data: Data, seed: int, epochs: int, hyper: Hyper, backend: str | None = None, *args: Any, **others: Any
) -> dict[str, Any]:
    """One run: `fit`, which takes the same arguments, and what is shown of it."""
    fitted = fit(name, data, seed, epochs, hyper, backend, *args, **others)
    model, watch, curve = fitted.model, fitted.watch, fitted.curve
    return {
        "method": name,
        "seed": seed,
        "accuracy": curve[-1]["accuracy"],
        "curve": curve,
        "train_loss": evaluate(model, data.train)[1],
        "loss_increase": loss_increase(model, data.train, seed, backend),
        "step_ms": usual(watch.steps),
        "optimizer_ms": usual(watch.optimizer),
        "cost": cost(name, fitted.opt),
    }


@torch.no_grad()
def evaluate(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy in percent and loss."""
    model.eval()
    logits = model(part[0])
    correct = int((logits.argmax(1) == part[1]).sum())
    return 100 * correct / len(part[1]), cross_entropy(logits, part[1]).item()


def loss_increase(model: nn.Module, part: tuple[Tensor, Tensor], seed: int, backend: str | None) -> float:
    """Mean of L(w + e) - L(w) over draws of filter-wise noise; `part` is the training set with its given labels."""
    params = list(model.parameters())
    saved = [p.detach().clone() for p in params]
    start, total = evaluate(model, part)[1], 0.0
    for draw in range(PROBE_DRAWS):
        flatkern.perturb_(params, PROBE_SIGMA, seed=seed, stream=1, round=draw, backend=backend)
        total += evaluate(model, part)[1] - start
        flatkern.restore_(params, saved, backend=backend)
    return total / PROBE_DRAWS


def cost(name: str, opt: flatkern.SGD) -> dict[str, float]:
    """`flatkern.cost`, with mSAM's further rounds, in passes over memory: times that 4 bytes per weight move."""
    counted = flatkern.cost(opt)
    passes = counted.bytes_moved / (4 * counted.parameters)
    if name == "mSAM":
        # A further round reads the gradient twice and the weights, writes and restores them: 6 passes.
        passes += 6 * (SHARDS - 1)
    base = counted.base_bytes / (4 * counted.parameters)
    return {"parameters": counted.parameters, "passes": passes, "multiple_of_sgd": passes / base}
