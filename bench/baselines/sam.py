"""SAM's kin as users write it, in the same three degrees of care as loops.py; tests/test_baselines.py checks them too.

`papers` are loops over tensors with the temporaries and repeated norms of the released code; GSAM's and LookSAM's
inner products and norms are over all parameters, as flatkern's, where some code takes them per tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..methods import Method
from .loops import STYLES, Baseline, Foreach, Loop, Papers

EPS = 1e-12


def norm_of(tensors: list[Tensor]) -> Tensor:
    return vector_norm(torch.stack([vector_norm(t) for t in tensors]))


def product_of(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]).sum()


class PapersClean(Papers):
    """Both gradients, each cloned."""

    def keep_clean_gradients(self) -> None:
        self.clean_grads = [p.grad.clone() for p in self.params]


class PapersMixed(PapersClean):
    def mix(self) -> None:
        for p, clean in zip(self.params, self.clean_grads, strict=True):
            p.grad = (1 - self.method.lam) * clean + self.method.lam * p.grad


class PapersGSAM(PapersClean):
    def mix(self) -> None:
        pairs = list(zip(self.params, self.clean_grads, strict=True))
        inner = sum(torch.sum(clean * p.grad) for p, clean in pairs)
        new_norm = torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params]).norm(p=2)
        old_norm = torch.stack([(1.0 * clean).norm(p=2) for clean in self.clean_grads]).norm(p=2)
        cosine = inner / (new_norm * old_norm + EPS)
        for p, clean in pairs:
            vertical = clean - cosine * old_norm * p.grad / (new_norm + EPS)
            p.grad.add_(vertical, alpha=-self.method.alpha)


class LoopGSAM(Loop):
    """g - alpha (a - c g) as (1 + alpha c) g - alpha a, in place."""

    def mix(self) -> None:
        grads = [p.grad for p in self.params]
        norm_a, norm_g = norm_of(self.clean_grads), norm_of(grads)
        share = product_of(self.clean_grads, grads) / (norm_g * norm_a + EPS) * norm_a / (norm_g + EPS)
        for g, clean in zip(grads, self.clean_grads, strict=True):
            g.mul_(1 + self.method.alpha * share).add_(clean, alpha=-self.method.alpha)


class ForeachGSAM(Foreach):
    """The climb has measured one of the norms."""

    def mix(self) -> None:
        grads = [p.grad for p in self.params]
        norm_g = vector_norm(torch.stack(torch._foreach_norm(grads)))
        share = product_of(self.clean_grads, grads) / (norm_g * self.norm + EPS) * self.norm / (norm_g + EPS)
        torch._foreach_mul_(grads, 1 + self.method.alpha * share)
        torch._foreach_add_(grads, self.clean_grads, alpha=-self.method.alpha)


class PapersFriendly(Papers):
    means: list[Tensor] | None = None

    def climb(self) -> None:
        if self.means is None:
            self.means = [p.grad.clone() for p in self.params]
        else:
            for k, p in enumerate(self.params):
                grad = p.grad.clone()
                p.grad -= self.means[k] * 1.0
                self.means[k] = self.means[k] * self.method.decay + grad * (1 - self.method.decay)
        super().climb()


class LoopFriendly(Loop):
    means: list[Tensor] | None = None

    def climb(self) -> None:
        if self.means is None:
            self.means = [p.grad.clone() for p in self.params]
        else:
            self.leave_means_out()
        super().climb()

    def leave_means_out(self) -> None:
        """d = a - m in place of the gradient; then m + (1 - decay) d is the new mean."""
        for p, mean in zip(self.params, self.means, strict=True):
            mean.add_(p.grad.sub_(mean), alpha=1 - self.method.decay)


class ForeachFriendly(LoopFriendly, Foreach):
    def leave_means_out(self) -> None:
        grads = [p.grad for p in self.params]
        torch._foreach_sub_(grads, self.means)
        torch._foreach_add_(self.means, grads, alpha=1 - self.method.decay)


class PapersLook(PapersClean):
    def mix(self) -> None:
        if self.moved:
            self.keep()
            return
        norm = torch.stack([p.grad.norm(p=2) for p in self.params]).norm(p=2)
        kept = torch.stack([v.norm(p=2) for v in self.kept]).norm(p=2)
        for p, v in zip(self.params, self.kept, strict=True):
            p.grad.add_(norm / (kept + 1e-8) * v, alpha=self.method.alpha)

    def keep(self) -> None:
        pairs = list(zip(self.params, self.clean_grads, strict=True))
        norm = torch.stack([clean.norm(p=2) for clean in self.clean_grads]).norm(p=2)
        perturbed = torch.stack([p.grad.norm(p=2) for p in self.params]).norm(p=2)
        cosine = sum(torch.sum((clean / norm) * (p.grad / perturbed)) for p, clean in pairs)
        self.kept = [p.grad - perturbed * cosine * (clean / norm) for p, clean in pairs]


class LoopLook(Loop):
    """The length of what is kept is measured once."""

    def mix(self) -> None:
        grads = [p.grad for p in self.params]
        if self.moved:
            share = product_of(self.clean_grads, grads) / norm_of(self.clean_grads) ** 2
            self.kept = [torch.addcmul(g, a, -share) for g, a in zip(grads, self.clean_grads, strict=True)]
            self.kept_norm = norm_of(self.kept)
            return
        scale = self.method.alpha * norm_of(grads) / self.kept_norm
        for g, v in zip(grads, self.kept, strict=True):
            g.addcmul_(v, scale)


class ForeachLook(Foreach):
    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        self.kept = [torch.empty_like(p) for p in params]
        super().__init__(params, method, base)

    def mix(self) -> None:
        grads = [p.grad for p in self.params]
        if self.moved:
            share = product_of(self.clean_grads, grads) / self.norm**2
            torch._foreach_copy_(self.kept, grads)
            self.add(self.kept, self.clean_grads, -share)
            self.kept_norm = vector_norm(torch.stack(torch._foreach_norm(self.kept)))
            return
        norm = vector_norm(torch.stack(torch._foreach_norm(grads)))
        self.add(grads, self.kept, self.method.alpha * norm / self.kept_norm)

    def add(self, to: list[Tensor], tensors: list[Tensor], scale: Tensor) -> None:
        """As the climb: a host scalar saves a pass on the CPU, and on a GPU the host does not wait."""
        if self.on_cpu:
            torch._foreach_add_(to, tensors, alpha=scale.item())
        else:
            torch._foreach_add_(to, torch._foreach_mul(tensors, scale))


class AlongMomentum(Baseline):
    def momenta(self) -> list[Tensor]:
        """The base's; empty before its first step, so that nothing moves."""
        states = [self.base.state.get(p, {}) for p in self.params]
        return [state[key] for state in states for key in ("momentum_buffer", "exp_avg") if key in state]


class PapersMomentum(AlongMomentum, Papers):
    """The released code keeps no copy: what was subtracted is added again."""

    scale = 0.0

    def climb(self) -> None:
        if momenta := self.momenta():
            norm = torch.norm(torch.stack([v.norm(p=2) for v in momenta]), p=2)
            self.scale = self.method.rho / (norm.item() + EPS)
            for p, v in zip(self.params, momenta, strict=True):
                p.sub_(v, alpha=self.scale)

    def put_back(self) -> None:
        for p, v in zip(self.params, self.momenta() or self.params, strict=True):
            p.add_(v, alpha=self.scale)


class LoopMomentum(AlongMomentum, Loop):
    def climb(self) -> None:
        self.backups = [p.clone() for p in self.params]
        if momenta := self.momenta():
            scale = -self.method.rho / (norm_of(momenta) + EPS)
            for p, v in zip(self.params, momenta, strict=True):
                p.addcmul_(v, scale)


class ForeachMomentum(AlongMomentum, Foreach):
    def climb(self) -> None:
        torch._foreach_copy_(self.backups, self.params)
        if momenta := self.momenta():
            scale = -self.method.rho / (vector_norm(torch.stack(torch._foreach_norm(momenta))) + EPS)
            if self.on_cpu:
                torch._foreach_add_(self.params, momenta, alpha=scale.item())
            else:
                torch._foreach_add_(self.params, torch._foreach_mul(momenta, scale))


Styles = dict[str, Callable[[list[Tensor], Method, str], Baseline]]
RULES: dict[str, Styles] = {
    "": STYLES,
    "gsam": {"papers": PapersGSAM, "loop": LoopGSAM, "foreach": ForeachGSAM},
    "friendly": {"papers": PapersFriendly, "loop": LoopFriendly, "foreach": ForeachFriendly},
    "looksam": {"papers": PapersLook, "loop": LoopLook, "foreach": ForeachLook},
    "momentum": {"papers": PapersMomentum, "loop": LoopMomentum, "foreach": ForeachMomentum},
}
MIXED: Styles = {**STYLES, "papers": PapersMixed}
