"""How a tensor is read as a table of filters: shapes and memory order, nothing about any backend.

A filter is a dim-0 slice; tensors of rank <= 1 are one filter. Inside a filter, elements are counted
in memory order, so a channels_last weight is walked as it is stored.
"""

from __future__ import annotations

import math

from torch import Tensor


def filters(t: Tensor) -> int:
    """Number of filters: dim 0, or 1 for tensors of rank <= 1."""
    return t.shape[0] if t.dim() >= 2 else 1


def columns(t: Tensor) -> int:
    """Elements in one filter (0 when the tensor is empty)."""
    return t.numel() // max(filters(t), 1)


def history_length(t: Tensor) -> int:
    """Length of ARWP's history: one float per filter, per element for tensors of rank <= 1."""
    return filters(t) if t.dim() >= 2 else t.numel()


def mask_shape(t: Tensor) -> tuple[int, ...]:
    """Shape of a tensor's uint8 mask: a bit per element, eight columns of a filter to a byte; for tensors of rank <= 1
    a byte per element. Both are cut by rows where the tensor is."""
    return (t.shape[0], -(-math.prod(t.shape[1:]) // 8)) if t.dim() >= 2 else (t.numel(),)


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one gapless, non-overlapping block of memory in some order."""
    if t.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_outer_filters(t: Tensor) -> bool:
    """True if dim 0 is outermost in memory, so that every filter is one contiguous stretch."""
    return t.dim() < 2 or t.shape[0] == 1 or t.numel() == 0 or t.stride(0) == columns(t)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if equal indices of `a` and `b` lie at equal places in memory order."""
    if a.shape != b.shape:
        return False
    strides = a.stride(), b.stride()  # as a rule equal, which is soon told
    return (
        strides[0] == strides[1]
        or a.numel() == 0
        or all(n == 1 or i == j for n, i, j in zip(a.shape, *strides, strict=True))
    )


def rows(t: Tensor) -> Tensor:
    """`t` as (filters, columns) in memory order, sharing its memory."""
    return t.as_strided((filters(t), columns(t)), (columns(t), 1))
