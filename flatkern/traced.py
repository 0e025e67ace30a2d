"""What torch.compile sees of the functions; imported while it traces, because importing Dynamo takes a second."""

from __future__ import annotations

from typing import Any

import torch

from .checks import check_backend
from .dispatch import call, resolve, served_by
from .library import DISPATCH_KEYS, backend_of


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_registered(op: str, device_type: str, backend: str | None) -> bool:
    """True if a registered op serves the call; refuses as everywhere. torch.compile asks once, while it traces."""
    backend = check_backend(backend)
    resolve(op, device_type, backend)
    served = served_by(op, device_type, backend)[0]
    return served != "eager" and device_type in DISPATCH_KEYS and backend_of(op, device_type) == served


# Inductor takes minutes for the integers of eager's noise.
call_untraced = torch.compiler.disable(call, reason="flatkern's eager backend is not traced")


def run(op: str, device_type: str, backend: str | None, *args: Any, **kwargs: Any) -> None:
    """One op; the registered one, which stays a single node of the graph, unless eager serves the call."""
    if is_registered(op, device_type, backend):
        getattr(torch.ops.flatkern, op)(*args, **kwargs)
    else:
        call_untraced(op, device_type, backend, *args, **kwargs)
