"""The fourth baseline, off by default on the CPU: the whole of step() in one function under torch.compile.

Restoring, mixing and the base rule are compiled together, which is what fuses them. On the CPU the
perturbation stays as in `foreach`, because torch.compile's normals are several times slower there than
torch's own; on a GPU it is compiled too, and step() is written in `_foreach` ops, which torch.compile
turns into few kernels for many tensors. Compiling takes about a minute for a hundred tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import LR, MOMENTUM, WEIGHT_DECAY, Method
from .loops import Foreach, filter_norm, per_filter


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


def gradients(grads: list[Tensor], clean: list[Tensor] | None, lam: float | None, rounds: int) -> list[Tensor]:
    if clean is not None:
        return torch._foreach_lerp(grads, clean, 1 - lam)
    return torch._foreach_div(grads, rounds) if rounds > 1 else grads


def sgd_lists(params, backups, grads, clean, velocities, *, lam, rounds):
    torch._foreach_mul_(velocities, MOMENTUM)
    decayed = torch._foreach_add(gradients(grads, clean, lam, rounds), backups, alpha=WEIGHT_DECAY["sgd"])
    torch._foreach_add_(velocities, decayed)
    torch._foreach_copy_(params, torch._foreach_add(backups, velocities, alpha=-LR["sgd"]))


def adamw_lists(params, backups, grads, clean, means, squares, step, *, lam, rounds):
    step += 1
    rate, root = LR["adamw"] / (1 - 0.9**step), (1 - 0.999**step).sqrt()
    g = gradients(grads, clean, lam, rounds)
    torch._foreach_lerp_(means, g, 0.1)
    torch._foreach_mul_(squares, 0.999)
    torch._foreach_addcmul_(squares, g, g, 0.001)
    below = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(squares), [root] * len(params)), 1e-8)
    change = torch._foreach_mul(torch._foreach_div(means, below), [rate] * len(params))
    kept = torch._foreach_mul(backups, 1 - LR["adamw"] * WEIGHT_DECAY["adamw"])
    torch._foreach_copy_(params, torch._foreach_sub(kept, change))


def scatter(params, backups, *, sigma):
    torch._foreach_copy_(backups, params)
    for p in params:
        p.addcmul_(torch.randn_like(p), per_filter(sigma * filter_norm(p), p))


class Compiled(Foreach):
    """`foreach`, with step() compiled; state starts at zero, which is torch's first step too.

    `lists` is the form for GPUs, and the default there.
    """

    def __init__(self, params: list[Tensor], method: Method, base: str, lists: bool | None = None) -> None:
        moments = 1 if base == "sgd" else 2
        self.lists = params[0].is_cuda if lists is None else lists
        self.state: list = [[torch.zeros_like(p) for p in params] for _ in range(moments)]
        if base == "adamw":
            self.state.append(params[0].new_zeros((), dtype=torch.float32))
        rules = {"sgd": sgd_lists, "adamw": adamw_lists} if self.lists else {"sgd": sgd, "adamw": adamw}
        self.update = torch.compile(rules[base], dynamic=False)
        self.scatter = torch.compile(scatter, dynamic=False)
        super().__init__(params, method, base)

    def add_noise(self) -> None:
        if not self.lists or self.method.history:
            return super().add_noise()
        self.noise = self.noises = None  # the normals live in registers
        self.scatter(self.params, self.backups, sigma=self.method.sigma)

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
