"""Norms in eager PyTorch: of filters, of the ascent gradient, of the final gradient.

Squares of filters are float32 products, those of gradients float64, since large gradients have squares beyond float32.
Sums are taken in float64 and the root is rounded to float32 once, so that this file is the value the others are
measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables import rows
from .arithmetic import mixed


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


def ascent_norm_(norm, params, grads, *, eta) -> None:
    """The norm that scales SAM's climb, over all tensors at once.

        norm <- || T_w g ||_2,    T_w = |w| + eta, or 1 where eta < 0

    `params` are the clean weights (masters where there are some); absent when every eta < 0. Finite unless a gradient,
    T_w g or the norm itself is beyond float32.

    Foret et al. 2021, eq. 2; adaptive form: Kwon et al. 2021, eq. 4.
    """
    scaled = [
        (params[k].float().abs() + e) * g.float() if e >= 0 else g.float()
        for k, (g, e) in enumerate(zip(grads, eta, strict=True))
    ]
    norm.copy_(total_norm(scaled, norm.device))


def gradient_norm_(norm, grads, clean_grads, grad_scale, *, grad_weight, clean_weight) -> None:
    """The norm of the final gradient, as the update forms it before clipping.

    norm <- || grad_weight grad_scale g + clean_weight g_clean ||_2

    Finite unless a gradient or the norm itself is beyond float32.
    """
    finals = [
        mixed(g, clean_grads[k] if clean_grads else None, grad_scale, grad_weight[k], clean_weight[k], None)
        for k, g in enumerate(grads)
    ]
    norm.copy_(total_norm(finals, norm.device))
