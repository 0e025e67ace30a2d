"""The operations as torch.library ops, so that torch.compile can trace them.

Only compiled backends are registered: eager PyTorch as a default kernel would answer in silence for
a missing one, and needs no registration to be traced.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .dispatch import compiled_backends, is_installed, refuse, resolve
from .ops import OPS, Op

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # torch's, of device types


def _fake(*args: Any, **kwargs: Any) -> None:
    """Every op only mutates, so there is nothing to allocate and nothing to return."""


@functools.cache
def backend_of(op: str, device_type: str) -> str:
    """The backend behind a registered op: the first that serves it; the first of all, which says why, if none does."""
    candidates = compiled_backends(op, device_type)
    return next((name for name in candidates if refuse(op, name, device_type) is None), candidates[0])


def _late(op: Op, device_type: str) -> Any:
    """Resolve on the first call, so that importing this module loads no backend."""

    def run(*args: Any, **kwargs: Any) -> None:
        # The dispatcher hands keyword-only arguments over by name, the others by position.
        resolve(op.name, device_type, backend_of(op.name, device_type))(*args, **kwargs)

    return run


@functools.cache
def register() -> torch.library.Library:
    """Define every op and give it the compiled kernels that are installed. Idempotent."""
    library = torch.library.Library("flatkern", "DEF")
    for op in OPS.values():
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"flatkern::{op.name}", _fake, lib=library)
        for device_type, key in DISPATCH_KEYS.items():
            if any(map(is_installed, compiled_backends(op.name, device_type))):
                library.impl(op.name, _late(op, device_type), key)
    return library
