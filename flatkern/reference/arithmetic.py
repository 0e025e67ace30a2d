"""Scalars and roots with the rounding every backend agrees on, and the mixing of gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def float32(x: float, like: Tensor) -> Tensor:
    """A host scalar as every backend sees it: rounded to float32 once."""
    return torch.tensor(x, dtype=torch.float32, device=like.device)


def numbers(given: Tensor | None, host: list[float]) -> list[float]:
    """One float64 per tensor: from the device where they are `given` there, else the host's."""
    return host if given is None else given.tolist()


def root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root."""
    return x.double().sqrt().float()


def mixed(
    g: Tensor, clean: Tensor | None, component: Tensor | None, grad_scale: Tensor | None,
    weight: float, clean_weight: float, clip: Tensor | None,
) -> Tensor:  # fmt: skip
    """g <- clip (weight grad_scale g + clean_weight (q g_clean - r grad_scale g)); float32.

    (q, r) = `component`. The weights of both gradients are formed first: weight - clean_weight r, and clean_weight q.
    """
    factor, of_clean = float32(weight, g), float32(clean_weight, g)
    if component is not None:
        factor, of_clean = factor - of_clean * component[1], of_clean * component[0]
    if grad_scale is not None:
        factor = factor * grad_scale
    result = factor * g.float()
    if clean is not None:
        result = result + of_clean * clean.float()
    return result if clip is None else result * clip
