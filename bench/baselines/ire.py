"""IRE as users write it, in the same three degrees of care as loops.py; tests/test_baselines.py checks them too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..methods import Method
from .loops import torch_optimizer


class AuthorsIRE:
    """The released code (its newer class): everything concatenated, one kthvalue, four passes after the base step."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        self.params, self.method = params, method
        self.base = torch_optimizer(params, base, fused=True)
        self.masks: list[Tensor] = []

    @torch.no_grad()
    def update_mask(self) -> None:
        threshold = self.threshold()
        self.masks = [(p.grad.abs() <= threshold).to(p.dtype) for p in self.params]
        for p in self.params:
            p.grad = None

    def threshold(self) -> Tensor:
        flat = torch.cat([p.grad.abs().view(-1) for p in self.params])
        return flat.kthvalue(int(len(flat) * (1 - self.method.sharp_fraction))).values

    @torch.no_grad()
    def step(self) -> None:
        last = [p.clone() for p in self.params]
        self.base.step()
        for p, old, mask in zip(self.params, last, self.masks, strict=True):
            p.add_((p - old) * mask * self.method.kappa)


class LoopIRE(AuthorsIRE):
    """A careful loop: the displacement in place of the copy, one multiply-add."""

    @torch.no_grad()
    def step(self) -> None:
        last = [p.clone() for p in self.params]
        self.base.step()
        for p, old, mask in zip(self.params, last, self.masks, strict=True):
            p.addcmul_(torch.sub(p, old, out=old), mask, value=self.method.kappa)


class ForeachIRE(AuthorsIRE):
    """Multi-tensor ops, and no buffer allocated twice."""

    def __init__(self, params: list[Tensor], method: Method, base: str) -> None:
        super().__init__(params, method, base)
        self.on_cpu = params[0].device.type == "cpu"
        self.last = [torch.empty_like(p) for p in params]
        self.flat = params[0].new_empty(sum(p.numel() for p in params))

    def threshold(self) -> Tensor:
        torch.cat([p.grad.view(-1) for p in self.params], out=self.flat)
        k = int(len(self.flat) * (1 - self.method.sharp_fraction))
        if self.on_cpu:
            return self.flat.abs_().kthvalue(k).values
        # On a GPU torch's kthvalue gives a whole row to one block, whereas its sort uses all of them.
        return self.flat.abs_().sort().values[k - 1]

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.last, self.params)
        self.base.step()
        # last <- old - new, so that two passes remain.
        torch._foreach_sub_(self.last, self.params)
        torch._foreach_addcmul_(self.params, self.last, self.masks, -self.method.kappa)


IRE_STYLES: dict[str, Callable[[list[Tensor], Method, str], AuthorsIRE]] = {
    "papers": AuthorsIRE,
    "loop": LoopIRE,
    "foreach": ForeachIRE,
}
