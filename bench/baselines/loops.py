"""What a user would write instead of flatkern, in three degrees of care, around a fused torch optimizer.

    papers     the loops of the released research code, pass for pass: temporaries, repeated norms,
               flattened gradients, restoring by subtraction or by re-pointing `p.data`
    loop       a careful loop over tensors: clones, broadcast filter norms, addcmul, exact restore
    foreach    the fastest that eager PyTorch offers: `torch._foreach` ops, every buffer kept

All of them take flatkern's three calls, so that one driver times everybody; compiled.py has a fourth.
`bench/tests/test_baselines.py` checks them against flatkern: a wrong baseline may be a fast one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..methods import LR, MOMENTUM, WEIGHT_DECAY, Method


def torch_optimizer(params: list[Tensor], base: str, **implementation: bool) -> torch.optim.Optimizer:
    """The plain base optimizer; `implementation` is fused=True or foreach=True."""
    if base == "sgd":
        return torch.optim.SGD(params, LR[base], MOMENTUM, weight_decay=WEIGHT_DECAY[base], **implementation)
    return torch.optim.AdamW(params, LR[base], weight_decay=WEIGHT_DECAY[base], **implementation)


class FusedAndCopy:
    """float32 masters as torch's users have them: the fused optimizer on `params`, then one copy of them into the
    half-precision weights of the network. Its gradients come in float32; who converts them is not asked.
    """

    def __init__(self, params: list[Tensor], base: str) -> None:
        self.base = torch_optimizer(params, base, fused=True)
        self.params = [p.detach() for p in params]
        self.weights = [p.to(torch.bfloat16) for p in self.params]

    def step(self) -> None:
        self.base.step()
        torch._foreach_copy_(self.weights, self.params)


def per_filter(t: Tensor, like: Tensor) -> Tensor:
    """One value per filter, shaped to broadcast against `like`; rank <= 1 passes through."""
    return t.view(-1, *[1] * (like.dim() - 1)) if like.dim() >= 2 else t


def filter_norm(t: Tensor) -> Tensor:
    """L2 norm of every dim-0 slice; tensors of rank <= 1 have one."""
    return vector_norm(t.flatten(1), dim=1) if t.dim() >= 2 else vector_norm(t)


class Baseline:
    """The order of events, shared by all; what subclasses write is the arithmetic between them."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        self.params, self.method = params, method
        self.base = torch_optimizer(params, base, fused=True)
        self.clean_grads: list[Tensor] | Tensor | None = None
        self.aside: list[Tensor | None] = [None] * len(params)
        self.rounds = 0
        self.moved = False
        if method.rolling:
            self.perturb()

    @torch.no_grad()
    def perturb(self) -> None:
        if self.method.mixes:
            self.keep_clean_gradients()
        if self.method.rho:
            self.climb()
        else:
            self.add_noise()
        for p, grad in zip(self.params, self.aside, strict=True):
            p.grad = grad
        self.moved = True

    @torch.no_grad()
    def restore(self) -> None:
        self.put_back()
        self.aside = [p.grad for p in self.params]
        self.rounds += 1

    @torch.no_grad()
    def step(self) -> None:
        if self.moved:
            self.put_back()
        if self.method.history:
            self.remember()
        if self.method.mixes:
            self.mix()
        self.moved = False
        if self.rounds:
            torch._foreach_div_([p.grad for p in self.params], self.rounds + 1)
            self.aside, self.rounds = [None] * len(self.params), 0
        self.base.step()
        if self.method.rolling:
            self.perturb()

    @torch.no_grad()
    def eval(self) -> None:
        """Rolling: clean weights, until the next step."""
        self.put_back()
        self.moved = False


class Papers(Baseline):
    """The released loops of RWP, m-RWP, m-ARWP and ARWP, the usual SAM, and the authors' ASAM."""

    history: list[Tensor] | None = None

    def add_noise(self) -> None:
        if self.method.history and self.method.lam is None:
            self.old = [p.clone() for p in self.params]
        self.noise = []
        for i, p in enumerate(self.params):
            if self.method.absolute:
                e = torch.normal(0.0, self.method.sigma, p.shape, device=p.device)
            elif p.dim() >= 2:
                flat = p.view(p.shape[0], -1)
                norms = flat.norm(dim=1, keepdim=True).repeat(1, flat.shape[1]).view(p.shape)
                e = torch.normal(0.0, self.method.sigma * norms)
            else:
                e = torch.empty_like(p).normal_(0.0, self.method.sigma * (p.norm().item() + 1e-16))
            if self.history:
                e.div_(torch.sqrt(1 + self.method.history * self.filter_history(i, p)))
            self.noise.append(e)
            p.add_(e)

    def filter_history(self, i: int, p: Tensor) -> Tensor:
        if p.dim() < 2:
            return self.history[i]
        flat = self.history[i].view(p.shape[0], -1)
        return flat.sum(dim=1, keepdim=True).repeat(1, flat.shape[1]).view(p.shape)

    def climb(self) -> None:
        if self.method.floor is not None:
            return self.adaptive_climb()
        norm = torch.norm(torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params]), p=2)
        scale = self.method.rho / (norm + 1e-12)
        self.old = []
        for p in self.params:
            self.old.append(p.clone())
            p.add_(1.0 * p.grad * scale)

    def adaptive_climb(self) -> None:
        operators, norms = [], []
        for p in self.params:
            t = p.clone()
            if p.dim() >= 2:
                t.abs_().add_(self.method.floor)
                p.grad.mul_(t)
            operators.append(t)
            norms.append(p.grad.norm(p=2))
        scale = self.method.rho / (torch.norm(torch.stack(norms), p=2) + 1e-16)
        self.noise = []
        for p, t in zip(self.params, operators, strict=True):
            if p.dim() >= 2:
                p.grad.mul_(t)
            t.copy_(p.grad).mul_(scale)
            p.add_(t)
            self.noise.append(t)

    def put_back(self) -> None:
        if (self.method.rho and self.method.floor is None) or (self.method.history and self.method.lam is None):
            for p, old in zip(self.params, self.old, strict=True):
                p.data = old
        else:
            for p, e in zip(self.params, self.noise, strict=True):
                p.sub_(e)

    def keep_clean_gradients(self) -> None:
        self.clean_grads = torch.cat([p.grad.reshape(-1) for p in self.params])

    def mix(self) -> None:
        noisy = torch.cat([p.grad.reshape(-1) for p in self.params])
        mixture = self.method.lam * noisy + (1 - self.method.lam) * self.clean_grads
        start = 0
        for p in self.params:
            p.grad = mixture[start : start + p.numel()].view(p.shape).clone()
            start += p.numel()

    def remember(self) -> None:
        # The history has the shape of the weights, although only its sum over filters is ever used.
        if self.history is None:
            self.history = [p.grad.clone() ** 2 for p in self.params]
            return
        for i, p in enumerate(self.params):
            self.history[i] = self.method.beta * self.history[i] + p.grad.clone() ** 2


class Loop(Baseline):
    """A careful loop: no host waits, no needless pass, one float of history per filter."""

    history: list[Tensor] | None = None

    def add_noise(self) -> None:
        self.backups = []
        for i, p in enumerate(self.params):
            self.backups.append(p.clone())
            if self.method.absolute:
                p.add_(torch.randn_like(p), alpha=self.method.sigma)
                continue
            scale = self.method.sigma * filter_norm(p)
            if self.history:
                scale = scale / (1 + self.method.history * self.history[i]).sqrt()
            p.addcmul_(torch.randn_like(p), per_filter(scale, p))

    def climb(self) -> None:
        floor = self.method.floor
        slopes, weights = [p.grad for p in self.params], [None] * len(self.params)
        if floor is not None:
            weights = [p.abs().add_(floor) if p.dim() >= 2 else None for p in self.params]
            slopes = [g if t is None else t * g for g, t in zip(slopes, weights, strict=True)]
        scale = self.method.rho / (vector_norm(torch.stack([vector_norm(s) for s in slopes])) + 1e-12)
        self.backups = []
        for p, s, t in zip(self.params, slopes, weights, strict=True):
            self.backups.append(p.clone())
            p.addcmul_(s if t is None else t.mul_(s), scale)

    def put_back(self) -> None:
        for p, backup in zip(self.params, self.backups, strict=True):
            p.copy_(backup)

    def keep_clean_gradients(self) -> None:
        self.clean_grads = [p.grad for p in self.params]

    def mix(self) -> None:
        for p, clean in zip(self.params, self.clean_grads, strict=True):
            p.grad.mul_(self.method.lam).add_(clean, alpha=1 - self.method.lam)

    def remember(self) -> None:
        new = [filter_norm(p.grad) ** 2 if p.dim() >= 2 else p.grad**2 for p in self.params]
        if self.history is None:
            self.history = new
            return
        for past, square in zip(self.history, new, strict=True):
            past.mul_(self.method.beta).add_(square)


class Foreach(Loop):
    """Multi-tensor ops where there are any, `out=` elsewhere, and no buffer allocated twice."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        self.on_cpu = params[0].device.type == "cpu"
        self.backups = [torch.empty_like(p) for p in params]
        self.weights = [torch.empty_like(p) for p in params] if method.floor is not None else []
        self.slopes = [torch.empty_like(p) for p in params] if method.floor is not None else []
        if method.sigma:
            # One long fill: a fill per tensor costs as much again on small ones.
            self.noise = params[0].new_empty(sum(p.numel() for p in params))
            pieces = self.noise.split([p.numel() for p in params])
            self.noises = [z.view(p.shape) for z, p in zip(pieces, params, strict=True)]
        super().__init__(params, method, base)

    def add_noise(self) -> None:
        torch._foreach_copy_(self.backups, self.params)
        if self.method.absolute:
            self.noise.normal_(0.0, self.method.sigma)
            torch._foreach_add_(self.params, self.noises)
            return
        scales = [filter_norm(p) for p in self.params]
        torch._foreach_mul_(scales, self.method.sigma)
        if self.history:
            factors = torch._foreach_mul(self.history, self.method.history)
            torch._foreach_add_(factors, 1)
            torch._foreach_sqrt_(factors)
            scales = torch._foreach_div(scales, factors)
        self.noise.normal_()
        scales = [per_filter(s, p) for s, p in zip(scales, self.params, strict=True)]
        torch._foreach_addcmul_(self.params, self.noises, scales)

    def climb(self) -> None:
        grads = [p.grad for p in self.params]
        slopes, directions = grads, grads
        if self.method.floor is not None:
            slopes, directions = list(grads), list(grads)
            for i, p in enumerate(self.params):
                if p.dim() >= 2:
                    torch.abs(p, out=self.weights[i]).add_(self.method.floor)
                    slopes[i] = torch.mul(grads[i], self.weights[i], out=self.slopes[i])
                    directions[i] = self.weights[i].mul_(slopes[i])
        self.norm = vector_norm(torch.stack(torch._foreach_norm(slopes)))
        scale = self.method.rho / (self.norm + 1e-12)
        torch._foreach_copy_(self.backups, self.params)
        if self.on_cpu:
            # Here reading the norm back costs nothing, and a host scalar saves a pass.
            torch._foreach_add_(self.params, directions, alpha=scale.item())
        else:
            # The host does not wait; gradients that have served may be overwritten by the pass.
            if self.method.mixes:
                directions = torch._foreach_mul(directions, scale)
            else:
                torch._foreach_mul_(directions, scale)
            torch._foreach_add_(self.params, directions)

    def put_back(self) -> None:
        torch._foreach_copy_(self.params, self.backups)

    def mix(self) -> None:
        torch._foreach_lerp_([p.grad for p in self.params], self.clean_grads, 1 - self.method.lam)

    def remember(self) -> None:
        new = [filter_norm(p.grad) if p.dim() >= 2 else p.grad.clone() for p in self.params]
        torch._foreach_mul_(new, new)
        if self.history is None:
            self.history = new
            return
        torch._foreach_mul_(self.history, self.method.beta)
        torch._foreach_add_(self.history, new)


STYLES: dict[str, Callable[[list[Tensor], Method, str], Baseline]] = {
    "papers": Papers,
    "loop": Loop,
    "foreach": Foreach,
}
