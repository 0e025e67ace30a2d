"""Hooks on parameters, which outlive the optimizer that has put them there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class WeakHook:
    """Calls a method of what it holds weakly; a copy of it, or what was pickled, calls nothing."""

    def __init__(self, method: Callable[[Tensor], None]) -> None:
        self._method: Callable[[], Callable[[Tensor], None] | None] = weakref.WeakMethod(method)

    def __call__(self, p: Tensor) -> None:
        method = self._method()
        if method is not None:
            method(p)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._method = lambda: None


def remove_all(handles: dict[Tensor, Any]) -> None:
    """Remove the hooks of these parameters."""
    for handle in handles.values():
        handle.remove()
    handles.clear()
