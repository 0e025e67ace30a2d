"""Norms in eager PyTorch: of filters, of the ascent gradient, of the final gradient.

Squares of filters are float32 products, those of gradients float64, since large gradients have squares beyond float32.
Sums are taken in float64 and the root is rounded to float32 once, so that this file is the value the others are
measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables import rows
from .arithmetic import float32, mixed


def row_norms(t: Tensor) -> Tensor:
    """L2 norm of each row of a (rows, columns) tensor; float32 (rows,)."""
    return t.float().square().double().sum(dim=1).sqrt().float()


def total_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """L2 norm over all elements of all tensors; 0-dim float32."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        total += t.double().square().sum()
    return total.sqrt().float()


def filter_norms_(norms, params) -> None:
    """The L2 norm of every filter.

        norms[k][f] <- || params[k][f] ||_2

    Written to float32 (filters,). No 1/sqrt(n) and no floor: a zero filter has norm zero.

    Bisla et al. 2022 (LPF-SGD), filter-wise scale; Li et al. 2024 (m-RWP), section 3.
    """
    for norm, param in zip(norms, params, strict=True):
        norm.copy_(row_norms(rows(param)))


def direction(g: Tensor, mean: Tensor | None, sigma: float) -> Tensor:
    """What an ascent goes along: g, or Friendly-SAM's g - sigma m; float32."""
    return g.float() if mean is None else g.float() - float32(sigma, g) * mean.float()


def ascent_norm_(norm, params, grads, means, *, eta, sigma) -> None:
    """The norm that scales SAM's climb, over all tensors at once.

        norm <- || T_w d ||_2,    d = g - sigma m, or g without means,    T_w = |w| + eta, or 1 where eta < 0

    `params` are the clean weights (masters where there are some); absent when every eta < 0. Finite unless a gradient,
    T_w d or the norm itself is beyond float32.

    Foret et al. 2021, eq. 2; adaptive form: Kwon et al. 2021, eq. 4; with means: Li et al. 2024 (Friendly-SAM), eq. 10.
    """
    scaled = []
    for k, g in enumerate(grads):
        d = direction(g, means[k] if means else None, sigma[k])
        scaled.append((params[k].float().abs() + float32(eta[k], d)) * d if eta[k] >= 0 else d)
    norm.copy_(total_norm(scaled, norm.device))


def gradient_norm_(norm, grads, clean_grads, component, grad_scale, *, grad_weight, clean_weight) -> None:
    """The norm of the final gradient, as the update forms it before clipping.

        norm <- || grad_weight grad_scale g + clean_weight (q g_clean - r grad_scale g) ||_2,    (q, r) = component

    Finite unless a gradient or the norm itself is beyond float32.
    """
    finals = [
        mixed(g, clean_grads[k] if clean_grads else None, component, grad_scale, grad_weight[k], clean_weight[k], None)
        for k, g in enumerate(grads)
    ]
    norm.copy_(total_norm(finals, norm.device))


def gradient_products_(products, grads, clean_grads) -> None:
    """The inner products of two gradients, over all tensors at once.

        products <- <g_clean, g_clean>, <g_clean, g>, <g, g>

    In float64 throughout: what is left of one gradient beside its projection on the other is told from them down to a
    millionth of its norm.

    GSAM: Zhuang et al. 2022 (arXiv:2203.08065), eq. 8. LookSAM: Liu et al. 2022 (arXiv:2203.02714), eq. 6.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=products.device)
    for g, a in zip((g.double() for g in grads), (a.double() for a in clean_grads), strict=True):
        totals += torch.stack([(a * a).sum(), (a * g).sum(), (g * g).sum()])
    products.copy_(totals)
