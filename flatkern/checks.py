"""Argument checks and their messages, in front of every backend: `op: which argument is what; what to do`.

Checks read, never write, so a refused call has changed nothing. Compiled backends do the same checks
in one fast pass of their own and come here for the message.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dtensor, tables
from .ops import Op
from .values import check_uint32

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32_LISTS = {"norms", "masters", "history", "steps"}
MAGNITUDE_DIGITS = (11, 10, 10)  # bits of each step of a radix selection
# One number a parameter, per filter or for all of it, instead of one per element.
LENGTHS = {"norms": tables.filters, "history": tables.history_length, "steps": lambda t: 1}
# What a call keeps there would be lost, once it writes the parameters.
KEPT = {"backups", "masters", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "new_means", "outs"}
WALKS_FILTERS = {"fill_normal_", "filter_norms_", "perturb_gaussian_", "pack_mask_", "amplify_"}
BACKENDS = ("eager", "cpp", "triton", "cuda")
UINT32 = 2**32


class LayoutError(ValueError):
    """Two tensors that should be walked together have different strides."""


def check(op: Op, values: dict[str, Any]) -> None:
    """Check the arguments of one call of `op`; raises ValueError, TypeError or LayoutError."""
    reference_name = "params" if values.get("params") is not None else "grads"
    if op.name == "fill_normal_":
        reference_name = "outs"
    reference = values[reference_name]
    for argument in op.arguments:
        name, value = argument.name, values[argument.name]
        if value is None:
            if not argument.type.endswith("?"):
                raise TypeError(f"{op.name}: {name} is None, but should be {argument.type}")
        elif argument.type.startswith("Tensor[]"):
            _check_list(op, name, value, reference_name, reference)
        elif argument.type.endswith("[]"):
            if len(value) != len(reference):
                raise ValueError(
                    f"{op.name}: {name} has {len(value)} entries, but {reference_name} has {len(reference)}"
                )
            _check_scalars(op, name, value)
        elif name == "noise":
            check_noise(op.name, value)
        elif name in ("lrs", "sigmas"):
            _check_numbers(op, name, value, reference_name, reference)
        elif name == "prefix":
            if value.dtype != torch.int64 or value.dim() != 1 or value.numel() >= len(MAGNITUDE_DIGITS):
                raise TypeError(f"{op.name}: prefix is {_kind(value)}, but should be int64 with fewer than 3 digits")
        elif name == "counts":
            size = 2 ** MAGNITUDE_DIGITS[values["prefix"].numel() % len(MAGNITUDE_DIGITS)] + 2
            if value.dtype != torch.int64 or value.shape != (size,) or not value.is_contiguous():
                raise TypeError(f"{op.name}: counts is {_kind(value)}, but should be int64 ({size},), contiguous")
        elif name == "component":
            if value.dtype != torch.float32 or value.shape != (2,) or not value.is_contiguous():
                raise TypeError(f"{op.name}: component is {_kind(value)}, but should be float32 (2,), contiguous")
            _check_beside(op, name, value, reference_name, reference)
        elif name == "products":
            if value.dtype != torch.float64 or value.shape != (3,) or not value.is_contiguous():
                raise TypeError(f"{op.name}: products is {_kind(value)}, but should be float64 (3,), contiguous")
        elif value.dtype != torch.float32 or value.dim() != 0:
            raise TypeError(f"{op.name}: {name} is {_kind(value)}, but should be a 0-dim float32 tensor")
    if op.name == "ascent_norm_" and values["params"] is None and any(eta >= 0 for eta in values["eta"]):
        raise ValueError("ascent_norm_: params is None, but an eta is >= 0, and T_w = |w| + eta needs the weights")
    if values.get("component") is not None and values["clean_grads"] is None:
        raise ValueError(f"{op.name}: component is given, but clean_grads is None, and it is a component of them")
    if op.name == "perturb_ascent_" and values["new_means"] is not None and values["means"] is None:
        raise ValueError("perturb_ascent_: new_means is given, but means is None, and they are made of those")
    walks_filters = any(values.get(name) is not None for name in ("noise", "history", "masks"))
    if op.name in WALKS_FILTERS or walks_filters:
        check_outer_filters(op.name, reference_name, reference)


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def _check_list(op: Op, name: str, tensors: Sequence[Tensor], reference_name: str, reference: Sequence[Tensor]) -> None:
    if len(tensors) != len(reference):
        raise ValueError(f"{op.name}: {name} has {len(tensors)} entries, but {reference_name} has {len(reference)}")
    for k, (t, like) in enumerate(zip(tensors, reference, strict=True)):
        where = f"{op.name}: {name}[{k}]"
        dtypes = (torch.float32,) if name in FLOAT32_LISTS else (torch.uint8,) if name == "masks" else STORAGE_DTYPES
        check_storage(where, t, dtypes)
        if t.device != like.device and name != "steps":
            raise ValueError(
                f"{where} is on {t.device}, but {reference_name}[{k}] is on {like.device}; move one of them"
            )
        if name in LENGTHS:
            if t.numel() != LENGTHS[name](like):
                raise ValueError(
                    f"{where} has {t.numel()} elements, but {reference_name}[{k}] needs {LENGTHS[name](like)}"
                )
        elif name == "masks":
            if t.shape != tables.mask_shape(like) or not t.is_contiguous():
                raise ValueError(
                    f"{where} has shape {tuple(t.shape)}, but {reference_name}[{k}] needs a contiguous "
                    f"{tables.mask_shape(like)}"
                )
        elif t.shape != like.shape:
            raise ValueError(f"{where} has shape {tuple(t.shape)}, but {reference_name}[{k}] has {tuple(like.shape)}")
        elif not tables.same_layout(t, like):
            raise LayoutError(
                f"{where} has strides {t.stride()}, but {reference_name}[{k}] has {like.stride()}; "
                "copy it into the other's memory format"
            )
        if name in KEPT and name != reference_name and _overlap(_span(t), _span(like)):
            raise ValueError(f"{where} shares memory with {reference_name}[{k}]; pass another tensor")


def check_storage(where: str, t: Tensor, dtypes: Iterable[torch.dtype] = STORAGE_DTYPES) -> None:
    """Refuse what no kernel can walk: not a tensor, sparse, complex, integer, float64, or with gaps."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{where} is {type(t).__name__}, but should be a tensor")
    if dtensor.is_sharded(t):
        raise TypeError(f"{where} is a DTensor; pass what is on this rank, its .to_local()")
    if t.layout != torch.strided:
        raise TypeError(f"{where} is {str(t.layout).removeprefix('torch.')}, but should be strided; call .to_dense()")
    if t.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where} has dtype {t.dtype}, but should have one of: {allowed}; convert it with .to(dtype)")
    if not tables.is_dense(t):
        raise LayoutError(f"{where} has gaps or overlaps in memory (strides {t.stride()}); call .contiguous()")


def check_gradient(where: str, grad: Tensor, param: Tensor) -> None:
    """Refuse a gradient that cannot be walked together with its parameter, but for its memory format."""
    check_storage(where, grad)
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"{where} has shape {tuple(grad.shape)} on {grad.device}, but its parameter {tuple(param.shape)} on "
            f"{param.device}; call zero_grad() and take another backward"
        )


def check_outer_filters(op: str, name: str, tensors: Sequence[Tensor], *, only_trained: bool = False) -> None:
    """Refuse tensors whose filters are not contiguous stretches of memory; `only_trained` as in `check_parameters`."""
    for k, t in enumerate(tensors):
        if (t.requires_grad or not only_trained) and not tables.has_outer_filters(t):
            raise ValueError(
                f"{op}: {name}[{k}] has strides {t.stride()}, so dim 0 is not outermost in memory "
                "and its filters are not contiguous; call .contiguous()"
            )


def check_noise(where: str, noise: Tensor) -> None:
    """`noise` is int64 (3,), each of seed, stream, round in [0, 2^32). Beyond the CPU the words are not looked at:
    the host would have to wait."""
    if noise.dtype != torch.int64 or noise.shape != (3,):
        raise TypeError(f"{where}: noise is {_kind(noise)}, but should be int64 (3,): seed, stream, round")
    words = noise.tolist() if noise.is_cpu else []
    for name, value in zip(("seed", "stream", "round"), words, strict=False):
        check_uint32(where, name, value)


def _check_scalars(op: Op, name: str, values: Sequence[float]) -> None:
    for k, value in enumerate(values):
        # A counter word holds the parameter index, and one the eighth part of a column.
        if (name == "index" and not 0 <= value < UINT32) or (name == "offset" and not 0 <= value < 8 * UINT32):
            raise ValueError(f"{op.name}: {name}[{k}] is {value}, but should be >= 0 and in range of the counter")
        if not math.isfinite(value):
            raise ValueError(f"{op.name}: {name}[{k}] is {value}, but should be finite")


def _check_numbers(op: Op, name: str, t: Tensor, reference_name: str, reference: Sequence[Tensor]) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.float64 or t.shape != (len(reference),):
        kind = _kind(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(
            f"{op.name}: {name} is {kind}, but should be float64 ({len(reference)},), one for each of {reference_name}"
        )
    _check_beside(op, name, t, reference_name, reference)


def _check_beside(op: Op, name: str, t: Tensor, reference_name: str, reference: Sequence[Tensor]) -> None:
    if reference and t.device != reference[0].device:
        raise ValueError(
            f"{op.name}: {name} is on {t.device}, but {reference_name}[0] is on {reference[0].device}; move one of them"
        )


def check_parameters(where: str, params: Sequence[Tensor], *, only_trained: bool = False) -> None:
    """Refuse parameters that no kernel can walk, or that share memory: they would be perturbed twice.

    With `only_trained`, those that do not require grad may be of any kind, as in torch: 4-bit models have frozen
    integers. They may share no memory either.
    """
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    first: dict[int, int] = {}
    for k, p in enumerate(params):
        if not only_trained or p.requires_grad:
            check_storage(f"{where}: params[{k}]", p)
        if first.setdefault(id(p), k) != k:
            raise _share_memory(where, first[id(p)], k)
        span = _span(p)
        if span is not None:
            spans.setdefault(p.device, []).append((*span, k))
    for on_device in spans.values():
        on_device.sort()
        for (_, end, k), (start, _, other) in itertools.pairwise(on_device):
            if start < end:
                raise _share_memory(where, *sorted((k, other)))


def _share_memory(where: str, first: int, second: int) -> ValueError:
    return ValueError(
        f"{where}: params[{second}] shares memory with params[{first}]; pass every tensor once, without overlap"
    )


def _span(t: Tensor) -> tuple[int, int] | None:
    """The addresses that `t` lies between; None for what has no memory of its own: meta, fake, sparse or empty."""
    plain = type(t) in dtensor.PLAIN
    if t.layout != torch.strided or (not plain and t.untyped_storage().device.type == "meta"):
        return None  # fake tensors say that they are on a device; their storage is on meta
    elements = t.numel()
    start = t.data_ptr() if elements else 0  # 0 on meta, and for a wrapper around other tensors
    if not start or t.is_nested:
        return None
    if not t.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + elements * t.element_size()


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]


def check_backend(backend: str | None) -> str | None:
    """The backend to use, None for the best one; FLATKERN_BACKEND sets the default."""
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("FLATKERN_BACKEND") or None, "FLATKERN_BACKEND"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"{source} is {backend!r}, but should be one of {', '.join(BACKENDS)}, or None for the best one"
        )
    return backend
