"""Perturbing and restoring weights in eager PyTorch: Gaussian (RWP, ARWP), ascent (SAM, ASAM)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables import rows
from .arithmetic import float32, numbers, root
from .noise import normals_like
from .norm import direction, row_norms


def noise_scale(norms: Tensor, sigma: float, history: Tensor | None, eta: float) -> Tensor:
    """Standard deviation of the noise: sigma * norm / sqrt(1 + eta F); float32."""
    s = float32(sigma, norms) * norms
    return s if history is None else s / root(1 + float32(eta, norms) * history)


def perturbation(w: Tensor, norms: Tensor, history: Tensor | None, sigma, eta, noise, index, offset) -> Tensor:
    """e = s z for a weight tensor, as (filters, columns); float32."""
    if history is not None:
        # One float per filter scales its row; tensors of rank <= 1 keep one float per element.
        history = history[:, None] if w.dim() >= 2 else history[None, :]
    return noise_scale(norms[:, None], sigma, history, eta) * normals_like(w, noise, index, offset)


def perturb_gaussian_(params, backups, masters, norms, history, sigmas, noise, *, sigma, eta, index, offset) -> None:
    """Add filter-wise Gaussian noise to the weights and remember the way back.

        backup <- p
        p      <- w + s z,    s = sigma * ||w_f|| / sqrt(1 + eta F_f),    z ~ N(0, 1)

    w is the master where there is one, else p. `norms` absent: computed here, from w. `history` (F)
    absent: factor 1. Arithmetic is float32 and rounds once, on store; e = s z is rounded before it
    is added.

    RWP: Li et al. 2022 and 2024, eq. 5. ARWP: Li et al. 2024, eq. 14, with the released code's
    power -1/2 and per-filter sum.
    """
    sigma = numbers(sigmas, sigma)
    for k, param in enumerate(params):
        w = masters[k] if masters else param
        norm = norms[k] if norms else row_norms(rows(w))
        past = history[k] if history else None
        e = perturbation(w, norm, past, sigma[k], eta[k], noise, index[k], offset[k])
        if backups:
            backups[k].copy_(param)
        rows(param).copy_(rows(w).float() + e)


def ascent(p: Tensor, d: Tensor, scale: Tensor, eta: float) -> Tensor:
    t = (p.abs() + eta) ** 2 if eta >= 0 else 1.0
    return torch.where(scale == 0, p, p + scale * t * d)


def perturb_ascent_(
    params, backups, new_means, masters, grads, means, norm, *, rho, eta, sigma, momentum
) -> None:  # fmt: skip
    """Climb to the SAM ascent point and remember the way back.

        backup   <- p
        p        <- w + scale * t * d,    scale = rho / (norm + 1e-12),    t = (|w| + eta)^2, or 1 where eta < 0
        d        =  g - sigma m, or g without means
        new_mean <- momentum m + (1 - momentum) g

    `norm` is ascent_norm_'s 0-dim result, so the host never waits for it; where it is not finite the climb is zero, and
    a new mean is the old one. w is the master where there is one, else p. A negative rho descends (maximize).

    Foret et al. 2021, eq. 2; adaptive form: Kwon et al. 2021, eq. 6; with means: Li et al. 2024 (Friendly-SAM), eqs. 9
    and 10, where the mean is used before it is renewed.
    """
    for k, param in enumerate(params):
        w, g = (masters[k] if masters else param).float(), grads[k].float()
        scale = torch.where(norm.isfinite(), float32(rho[k], norm) / (norm + 1e-12), 0.0)
        if backups:
            backups[k].copy_(param)
        param.copy_(ascent(w, direction(g, means[k] if means else None, sigma[k]), scale, eta[k]))
        if new_means:
            m = means[k].float()
            new = float32(momentum[k], g) * m + float32(1 - momentum[k], g) * g
            new_means[k].copy_(torch.where(norm.isfinite(), new, m))


def restore_(params, backups) -> None:
    """Put the clean weights back, exactly.

        p <- backup

    A float32 master is a backup too: it rounds to the parameter's dtype on store.
    """
    for param, backup in zip(params, backups, strict=True):
        param.copy_(backup)
