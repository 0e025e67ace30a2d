"""Memory formats: what is walked together with a parameter follows it when the model changes its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables import same_layout


def like(t: Tensor, p: Tensor) -> Tensor:
    """`t` in the memory format of `p`: itself, or a copy."""
    if same_layout(t, p) or t.shape != p.shape:
        return t
    return torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)
