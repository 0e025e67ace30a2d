"""The perturbation as functions, without an optimizer: evolution strategies, MeZO, sharpness probes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .checks import check_outer_filters, check_parameters, check_storage
from .dispatch import call
from .tables import filters
from .values import check_uint32


def _run(op: str, device: torch.device, backend: str | None, *args: Any, **kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        from . import traced

        traced.run(op, device.type, backend, *args, **kwargs)
    else:
        call(op, device.type, backend, *args, **kwargs)


def _list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: {name} is a tensor, but should be a list of tensors; pass [{name}]")
    return list(tensors)


def _by_device(params: list[Tensor]) -> dict[torch.device, list[int]]:
    result: dict[torch.device, list[int]] = {}
    for k, p in enumerate(params):
        result.setdefault(p.device, []).append(k)
    return result


def _some(values: list[Any] | None, which: list[int]) -> list[Any] | None:
    return None if values is None else [values[k] for k in which]


def _check_backups(op: str, params: list[Tensor], backups: list[Tensor]) -> None:
    """A backup must hold every bit of its tensor, and must not be the tensor."""
    for k, (p, saved) in enumerate(zip(params, backups, strict=True)):
        check_storage(f"{op}: backups[{k}]", saved)
        if saved.dtype not in (p.dtype, torch.float32):
            raise TypeError(
                f"{op}: backups[{k}] has dtype {saved.dtype}, but params[{k}] has {p.dtype}; it would lose bits"
            )
        if saved.device == p.device and p.numel() and saved.data_ptr() == p.data_ptr():
            raise ValueError(f"{op}: backups[{k}] shares memory with params[{k}]; pass another tensor")


def filter_norms(params: Iterable[Tensor]) -> list[Tensor]:
    """L2 norm of every filter of every tensor.

        norms[k][f] = || params[k][f] ||_2

    A filter is a dim-0 slice; tensors of rank <= 1 are one filter. Any device and backend; summed in
    float32, in a fixed order.

    Arguments:
        params: tensors, float32, float16 or bfloat16, dim 0 outermost in memory.

    Returns:
        One float32 tensor of shape (filters,) per parameter, on its device.

    Raises:
        TypeError, ValueError: a dtype or layout that no kernel can walk.
    """
    params = _list("filter_norms", "params", params)
    if not torch.compiler.is_compiling():
        check_parameters("filter_norms", params)
        check_outer_filters("filter_norms", "params", params)
    params = [p.detach() for p in params]
    norms = [torch.empty(filters(p), dtype=torch.float32, device=p.device) for p in params]
    for device, which in _by_device(params).items():
        _run("filter_norms_", device, None, _some(norms, which), _some(params, which))
    return norms


@torch.no_grad()
def perturb_(
    params: Iterable[Tensor],
    sigma: float,
    *,
    seed: int,
    round: int,
    stream: int = 0,
    norms: list[Tensor] | None = None,
    backups: list[Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """Add filter-wise Gaussian noise to tensors, in place.

        p <- p + s z,    s = sigma ||p_f||_2,    z ~ N(0, 1) keyed by (seed, stream, round, position in
                                                 the list, row, column)

    The same key draws the same noise on every backend, bit for bit, so `perturb_(params, -2 * sigma,
    ...)` reaches the mirrored point up to rounding; exact restoration needs `backups`.

    Arguments:
        params: tensors, float32, float16 or bfloat16, dim 0 outermost in memory.
        sigma: relative standard deviation; any finite number, negative ones mirror the noise.
        seed, stream, round: integers in [0, 2^32).
        norms: `filter_norms(params)`; computed from the present values where absent. Give them when
            the tensors are perturbed already.
        backups: tensors like `params`, written with their values before the perturbation.
        backend: "eager", "cpp", "triton" or "cuda", used or refused; None takes the best one.

    Raises:
        ValueError, TypeError: sigma not finite, a key out of range, lists of different length, shape,
            device or layout; nothing has been written then.
        RuntimeError: a named backend that is not live.

    Source: Li et al. 2024 (arXiv:2404.00357), eq. 5.
    """
    params = _list("perturb_", "params", params)
    if not torch.compiler.is_compiling():
        if not math.isfinite(sigma):
            raise ValueError(f"perturb_: sigma is {sigma!r}, but should be a finite number")
        seed, round, stream = (
            check_uint32("perturb_", name, value)
            for name, value in (("seed", seed), ("round", round), ("stream", stream))
        )
        check_parameters("perturb_", params)
        check_outer_filters("perturb_", "params", params)
        for name, values in (("norms", norms), ("backups", backups)):
            if values is not None and len(values) != len(params):
                raise ValueError(f"perturb_: {name} has {len(values)} entries, but params has {len(params)}")
        if backups is not None:
            _check_backups("perturb_", params, backups)
    noise = torch.tensor([seed, stream, round], dtype=torch.int64, device="cpu")  # whatever torch's default is
    for device, which in _by_device(params).items():
        n = len(which)
        _run(
            "perturb_gaussian_", device, backend,
            _some(params, which), _some(backups, which), None, _some(norms, which), None, None, noise,
            sigma=[float(sigma)] * n, eta=[0.0] * n, index=which, offset=[0] * n,
        )  # fmt: skip


@torch.no_grad()
def restore_(params: Iterable[Tensor], backups: Iterable[Tensor], *, backend: str | None = None) -> None:
    """Put saved values back, exactly.

        p <- backup

    Arguments:
        params, backups: tensors of equal shapes and layouts; a float32 backup of a half-precision
            tensor rounds on store.
        backend: as `perturb_`.

    Raises:
        ValueError, TypeError: lists of different length, shape, device or layout; nothing has been
            written then.
    """
    params, backups = _list("restore_", "params", params), _list("restore_", "backups", backups)
    if not torch.compiler.is_compiling():
        if len(params) != len(backups):
            raise ValueError(f"restore_: backups has {len(backups)} entries, but params has {len(params)}")
        check_parameters("restore_", params)
        _check_backups("restore_", params, backups)
    for device, which in _by_device(params).items():
        _run("restore_", device, backend, _some(params, which), _some(backups, which))
