"""The operations as torch.library ops, so that torch.compile can trace them.

Only compiled backends are registered: eager PyTorch as a default kernel would answer in silence for
a missing one, and needs no registration to be traced.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from .dispatch import compiled_name, resolve
from .ops import OPS, Op

# Device type: torch's dispatch key, the backend that serves it.
DISPATCH_KEYS = {"cpu": ("CPU", "cpp"), "cuda": ("CUDA", "triton")}


def _fake(*args: Any, **kwargs: Any) -> None:
    """Every op only mutates, so there is nothing to allocate and nothing to return."""


def _late(op: Op, device_type: str, backend: str) -> Any:
    """Resolve on the first call, so that importing this module loads no backend."""

    def run(*args: Any, **kwargs: Any) -> None:
        # The dispatcher hands keyword-only arguments over by name, the others by position.
        resolve(op.name, device_type, backend)(*args, **kwargs)

    return run


@functools.cache
def register() -> torch.library.Library:
    """Define every op and give it the compiled kernels that are installed. Idempotent."""
    library = torch.library.Library("flatkern", "DEF")
    for op in OPS.values():
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"flatkern::{op.name}", _fake, lib=library)
        for device_type, (key, backend) in DISPATCH_KEYS.items():
            if backend in op.backends.split() and importlib.util.find_spec(compiled_name(backend)):
                library.impl(op.name, _late(op, device_type, backend), key)
    return library
