"""A small network, its data, and every method with the training pattern of its user, which `steps.py` has.

flatkern appears through its public names only.
"""

from collections import namedtuple
from functools import cache, partial

import torch
from compare import copies, same
from conftest import BACKENDS
from steps import (
    Scaled,
    clean_first,
    climbing,
    climbing_shards,
    climbing_when_due,
    noisy,
    noisy_block,
    noisy_first,
    noisy_rounds,
    one_closure,
    plain,
    two_closures,
    weighted_clean_first,
    weighted_noisy_first,
)
from torch import nn
from torch.nn import functional

import flatkern

SEED, STREAM = 7, 3


@cache
def batch(index):
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(4, 4, generator=generator), torch.randn(4, 3, generator=generator)


class Network(nn.Module):
    """linear, tanh, linear, times a 0-D gate: as quick as may be. `forward(i)` is the loss on batch i.

    `frozen` does not require a gradient and stands first, so that a noise index which skips it is caught; `sometimes`
    is used on batches with i % 3 == 0 only, `unused` never. With `explicit_zeros` both have a gradient of zeros there.
    """

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.frozen = nn.Parameter(torch.randn(5, generator=generator), requires_grad=False)
        self.hidden = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(5, generator=generator))
        self.unused = nn.Parameter(torch.randn(2, 3, generator=generator))
        self.sometimes = nn.Parameter(torch.randn(3, generator=generator))
        self.head = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.to(dtype)
        self.explicit_zeros = False

    def forward(self, index):
        x, target = (t.to(self.gate.dtype) for t in batch(index))
        x = torch.tanh(functional.linear(x, self.hidden, self.bias)) * self.frozen
        x = functional.linear(x, self.head, self.sometimes if index % 3 == 0 else None)
        loss = (self.gate * x - target).float().square().mean()
        if self.explicit_zeros:
            loss = loss + 0.0 * (self.unused.float().sum() + self.sometimes.float().sum())
        return loss


def make_optimizer(base, params, lr=0.05, weight_decay=0.01, **own):
    if base == "Wrap":
        return flatkern.Wrap(torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay), **own)
    momentum = {"momentum": 0.9} if base == "SGD" else {}
    return getattr(flatkern, base)(params, lr=lr, weight_decay=weight_decay, **momentum, **own)


class Training(Scaled):
    """A network, its optimizer, perhaps a GradScaler: what a pattern acts on."""

    def __init__(self, perturb=None, base="SGD", dtype=torch.float32, scaler=None, **own):
        self.net = Network(dtype)
        self.opt = make_optimizer(base, self.net.parameters(), perturb=perturb, **own)
        self.scaler = scaler
        self.start = self.weights()
        self.saw_other_weights = False  # has a forward met weights that are not the initial ones?
        self.overflow = set()  # of the numbers of backward passes whose gradients are not finite
        self.passes = 0

    def loss(self, index):
        self.saw_other_weights |= not same(self.weights(), self.start)
        return self.net(index)

    def backward(self, index, weight=1.0):
        """Forward and backward; adds to `.grad`. Returns the loss."""
        loss = self.loss(index)
        scale = self.scaler.scale(torch.tensor(1.0)) if self.scaler is not None else 1.0
        bad = float("inf") if self.passes in self.overflow else 1.0
        self.passes += 1
        (loss * weight * scale * bad).backward()
        return loss.detach()

    def closure(self, index):
        def call():
            self.opt.zero_grad()
            return self.backward(index)

        return call

    def weights(self):
        return copies(self.net.parameters())

    def clean_weights(self):
        with self.opt.clean():
            return self.weights()

    def state(self):
        """Every tensor of the optimizer's state, by parameter and key."""
        params = list(self.net.parameters())
        found = {(k, key): value for k, p in enumerate(params) for key, value in self.opt.state.get(p, {}).items()}
        return {key: value.clone() for key, value in found.items() if isinstance(value, torch.Tensor)}


# `closure` is the same step in torch's closure convention, where the method has one. `base` is what a neutral
# perturbation leaves: one gradient of batch t, or the mean of those of 2t and 2t + 1.
Method = namedtuple("Method", "make user closure base", defaults=(None, None))

noise = partial(flatkern.RWP, seed=SEED, stream=STREAM)
METHODS = {
    "RWP": Method(partial(noise, sigma=0.1), noisy, one_closure, "one"),
    "RWP block": Method(partial(noise, sigma=0.1), noisy_block, one_closure, "one"),
    "RWP rounds": Method(partial(noise, sigma=0.1), noisy_rounds, None, "mean"),
    "ARWP": Method(partial(noise, sigma=0.1, eta=2.0, beta=0.9), noisy, one_closure, "one"),
    "ARWP rounds": Method(partial(noise, sigma=0.1, eta=2.0, beta=0.9), noisy_rounds, None, "mean"),
    "m-RWP": Method(partial(noise, sigma=0.1, lam=0.3), clean_first, two_closures),
    "m-RWP noisy first": Method(partial(noise, sigma=0.1, lam=0.3), noisy_first, two_closures),
    "m-RWP losses": Method(partial(noise, sigma=0.1, lam=0.3, mix="losses"), weighted_clean_first),
    "m-RWP losses noisy first": Method(partial(noise, sigma=0.1, lam=0.3, mix="losses"), weighted_noisy_first),
    "m-ARWP": Method(partial(noise, sigma=0.1, lam=0.3, eta=2.0, beta=0.9), clean_first, two_closures),
    "m-ARWP losses": Method(partial(noise, sigma=0.1, lam=0.3, eta=2.0, mix="losses"), weighted_noisy_first),
    "rolling": Method(partial(noise, sigma=0.1, rolling=True), plain, one_closure, "one"),
    "rolling ARWP": Method(partial(noise, sigma=0.1, eta=2.0, beta=0.9, rolling=True), plain, one_closure, "one"),
    "SAM": Method(partial(flatkern.SAM, rho=0.3), climbing, one_closure, "one"),
    "ASAM": Method(partial(flatkern.ASAM, rho=0.6), climbing, one_closure, "one"),
    "ASAM all": Method(partial(flatkern.ASAM, rho=0.6, eta=0.0, all_tensors=True), climbing, one_closure, "one"),
    "mSAM": Method(partial(flatkern.SAM, rho=0.3), climbing_shards, two_closures, "mean"),
    "mixed SAM": Method(partial(flatkern.SAM, rho=0.3, lam=0.4), climbing, one_closure),
    "SAM at intervals": Method(partial(flatkern.SAM, rho=0.3, interval=2), climbing_when_due, one_closure, "one"),
    "GSAM": Method(partial(flatkern.GSAM, rho=0.3), climbing, one_closure, "one"),
    "GSAM rounds": Method(partial(flatkern.GSAM, rho=0.3), climbing_shards, two_closures),
    "FriendlySAM": Method(partial(flatkern.FriendlySAM, rho=0.3), climbing, one_closure, "one"),
    "LookSAM": Method(partial(flatkern.LookSAM, rho=0.3, k=2), climbing_when_due, one_closure, "one"),
    "MomentumSAM": Method(partial(flatkern.MomentumSAM, rho=0.3), noisy, one_closure, "one"),
    "rolling MomentumSAM": Method(partial(flatkern.MomentumSAM, rho=0.3, rolling=True), plain, one_closure, "one"),
    "rolling absolute": Method(partial(noise, sigma=0.1, scale="absolute", rolling=True), plain, one_closure, "one"),
}
BASES = ("SGD", "Adam", "AdamW", "Wrap")


def backends(rows, in_eager):
    """Rows for every backend, as (backend, *row); eager noise is slow, so there only those that `in_eager` accepts."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [(backend, *row) for row in rows for backend in BACKENDS if backend != "eager" or in_eager(*row)]


def train(run, user, steps=3, start=0):
    for t in range(start, start + steps):
        user(run, t)
        run.opt.zero_grad()


def trained(method, backend, user="SAM", steps=4, zeros=False, **own):
    """A `Training` after some steps.

    Arguments:
        method: a name of METHODS; or a method, which trains as the user of the one named `user` does.
        zeros: gradients that are missing are zeros.
        own: more of `Training`, and of its optimizer.
    """
    make, user = (METHODS[method].make, method) if isinstance(method, str) else (lambda: method, user)
    run = Training(make(), backend=backend, **own)
    run.net.explicit_zeros = zeros
    train(run, METHODS[user].user, steps)
    return run
