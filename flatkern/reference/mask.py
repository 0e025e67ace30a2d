"""IRE's mask in eager PyTorch: which gradients are small, and the longer steps where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import MAGNITUDE_DIGITS as DIGITS
from ..tables import columns, mask_shape, rows
from .arithmetic import float32

INFINITY_BITS = 0x7F800000


def magnitude_bits(g: Tensor) -> Tensor:
    """The bit pattern of |g| in float32 as an integer, which has the order of |g|; NaN is above all."""
    return g.float().abs().contiguous().view(torch.int32)


def count_magnitudes_(counts, grads, prefix) -> None:
    """One step of a radix selection: a histogram of the next digit of |g|.

        counts[d]  <- number of elements whose bits of |g| begin with the digits `prefix`, and go on with d
        counts[-2] <- number of elements whose bits begin with less than `prefix`
        counts[-1] <- number of elements that are not finite

    The 31 bits are read as digits of 11, 10 and 10. `prefix` is int64 with the digits known so far, none at first;
    `counts` is int64 with an entry per value of the next digit, and two more. Counts are exact, so the selection is,
    and the last two tell whether a guessed prefix was right.
    """
    level = prefix.numel()
    shift = sum(DIGITS[level + 1 :])
    counts.zero_()
    for g in grads:
        bits = magnitude_bits(g).flatten().long()
        higher = bits >> (shift + DIGITS[level])
        wanted = torch.zeros((), dtype=torch.int64, device=bits.device)
        for digit, width in zip(prefix, DIGITS, strict=False):
            wanted = (wanted << width) | digit
        digits = (bits >> shift) & (2 ** DIGITS[level] - 1)
        counts[:-2] += torch.bincount(digits[higher == wanted], minlength=counts.numel() - 2)
        counts[-2] += (higher < wanted).sum()
        counts[-1] += (bits >= INFINITY_BITS).sum()


def pack_mask_(masks, grads, threshold) -> None:
    """The mask of the small gradients, a bit per element.

        n_i <- [ |g_i| <= threshold ]

    Column 8c + j of a filter is bit j of byte c, columns in memory order; tensors of rank <= 1 have a byte per
    element. Bits beyond the last column are zero.

    Wang et al. 2024 (IRE), algorithm 1.
    """
    for mask, g in zip(masks, grads, strict=True):
        small = rows(g).float().abs() <= threshold
        if g.dim() < 2:
            mask.copy_(small.flatten())
            continue
        padded = torch.nn.functional.pad(small, (0, -small.shape[1] % 8)).view(*mask_shape(g), 8)
        mask.copy_((padded.to(torch.int32) << torch.arange(8, device=g.device)).sum(dim=-1))


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as booleans of the shape and memory order of `like`."""
    result = torch.empty_like(like, dtype=torch.bool)
    if like.dim() < 2:
        return result.copy_(mask.view(like.shape) != 0)
    bits = (mask.unsqueeze(-1).to(torch.int32) >> torch.arange(8, device=mask.device)) & 1
    rows(result).copy_(bits.flatten(1)[:, : columns(like)] != 0)
    return result


def amplified(w: Tensor, previous: Tensor, mask: Tensor, kappa: float) -> Tensor:
    """w + kappa n (w - w_old); float32, and exactly w where n is 0."""
    return torch.where(unpacked(mask, previous), w + float32(kappa, w) * (w - previous), w)


def amplify_(params, previous, masks, *, kappa) -> None:
    """Lengthen the step that led from `previous` to `params`, where the mask is set.

        w <- w + kappa n (w - w_old)

    Wang et al. 2024 (IRE), algorithm 1; the whole displacement, momentum and weight decay included.
    """
    for k, p in enumerate(params):
        p.copy_(amplified(p.float(), previous[k].float(), masks[k], kappa[k]))
