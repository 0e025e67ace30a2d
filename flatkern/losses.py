"""sampled_label_loss: the loss whose gradient estimates the diagonal of the Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_label_loss(logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Mean cross-entropy with labels that are drawn from the model's own prediction.

        y ~ Categorical(softmax(logits)),    loss = mean over all rows of -log softmax(logits)_y

    The squared gradient, times the number of rows, is the Gauss-Newton-Bartlett estimate; `IRE` needs its order only.

    Arguments:
        logits: floating point, shape (..., classes).
        generator: of the labels; torch's default one where absent.

    Returns:
        The loss; 0-dim float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: logits that are not floating point, or have no classes.

    Source: Liu et al. 2024 (Sophia, arXiv:2305.14342), algorithm 2; Wang et al. 2024 (IRE, arXiv:2405.20763).
    """
    if not logits.is_floating_point():
        raise TypeError(f"sampled_label_loss: logits has dtype {logits.dtype}, but should be floating point")
    if logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(f"sampled_label_loss: logits has shape {tuple(logits.shape)}, but should be (..., classes)")
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    labels = torch.multinomial(rows.detach().softmax(dim=-1), 1, generator=generator).squeeze(-1)
    return torch.nn.functional.cross_entropy(rows, labels)
