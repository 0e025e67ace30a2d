"""The fourth baseline, off by default: the whole of step() in one function under torch.compile.

Restoring, mixing and the base rule are compiled together, which is what fuses them; the perturbation
stays as in `foreach`, because torch.compile's normals are several times slower than torch's own on
the CPU. Compiling takes about a minute for a hundred tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .baselines import Foreach
from .methods import LR, MOMENTUM, WEIGHT_DECAY, Method


def gradient(k: int, grads: list[Tensor], clean: list[Tensor] | None, lam: float | None, rounds: int) -> Tensor:
    if clean is not None:
        return lam * grads[k] + (1 - lam) * clean[k]
    return grads[k] / rounds if rounds > 1 else grads[k]


def sgd(params, backups, grads, clean, velocities, *, lam, rounds):
    for k, p in enumerate(params):
        w = backups[k]
        v = MOMENTUM * velocities[k] + gradient(k, grads, clean, lam, rounds) + WEIGHT_DECAY["sgd"] * w
        velocities[k].copy_(v)
        p.copy_(w - LR["sgd"] * v)


def adamw(params, backups, grads, clean, means, squares, step, *, lam, rounds):
    step += 1
    rate, root = LR["adamw"] / (1 - 0.9**step), (1 - 0.999**step).sqrt()
    for k, p in enumerate(params):
        g = gradient(k, grads, clean, lam, rounds)
        m = 0.9 * means[k] + 0.1 * g
        v = 0.999 * squares[k] + 0.001 * g * g
        means[k].copy_(m)
        squares[k].copy_(v)
        w = backups[k] * (1 - LR["adamw"] * WEIGHT_DECAY["adamw"])
        p.copy_(w - rate * m / (v.sqrt() / root + 1e-8))


class Compiled(Foreach):
    """`foreach`, with step() compiled; state starts at zero, which is torch's first step too."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        moments = 1 if base == "sgd" else 2
        self.state: list = [[torch.zeros_like(p) for p in params] for _ in range(moments)]
        if base == "adamw":
            self.state.append(torch.zeros(()))
        self.update = torch.compile({"sgd": sgd, "adamw": adamw}[base], dynamic=False)
        super().__init__(params, method, base)

    @torch.no_grad()
    def step(self) -> None:
        if self.method.history:
            self.remember()
        grads = [p.grad for p in self.params]
        clean = self.clean_grads
        self.update(self.params, self.backups, grads, clean, *self.state, lam=self.method.lam, rounds=self.rounds + 1)
        self.aside, self.rounds = [None] * len(self.params), 0
        if self.method.rolling:
            self.perturb()
