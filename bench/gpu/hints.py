"""Stage hints: the CUDA kernels with their cache hints and without, in turns; do the hints pay?

Those without are a second library (FK_NO_HINTS in csrc/cuda/device.cuh), loaded beside the first one.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flatkern import cuda, dispatch

from . import beside, compiled, racing, wanted
from .goals import CUDA, NO_HINTS
from .racing import Racer
from .stage import DRY, WITH_CUDA, emit, say
from .stages import most_seconds

OTHER = "flatkern_no_hints._CUDA"  # the module without hints, of which Python wants the last part of the name


class Switched(Racer):
    """Each candidate steps with its own library."""

    def prepare(self, race, entry, weights, gradients):
        library = OTHER if entry.label == NO_HINTS else dispatch.MODULES["cuda"]
        with using(library):
            candidate, held = super().prepare(race, replace(entry, label=CUDA), weights, gradients)

        def turn(count: int) -> dict[str, int]:
            with using(library):
                return candidate(count)

        return turn, held


@contextmanager
def using(library: str) -> Iterator[None]:
    """Inside, "cuda" is this module."""
    usual = dispatch.MODULES["cuda"]
    dispatch.MODULES["cuda"] = library
    dispatch.resolve.cache_clear()
    try:
        yield
    finally:
        dispatch.MODULES["cuda"] = usual
        dispatch.resolve.cache_clear()


def load(path: Path) -> None:
    """Load the library without hints, from where `import` does not look. In a dry run: once more the emulated one."""
    if not DRY:
        loader = importlib.machinery.ExtensionFileLoader(OTHER, str(path))
        spec = importlib.util.spec_from_file_location(OTHER, path, loader=loader)
        assert spec is not None, "a loader was given"
        sys.modules[OTHER] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[OTHER])
    cuda.load(OTHER)


def main(arguments: list[str]) -> int:
    reason = absent()
    if reason:
        emit("miss", model="all", method="all", base="all", candidate=NO_HINTS, reason=reason)
        say(f"skipped: {reason}")
        return 0 if DRY or not WITH_CUDA else 1
    return racing.run(wanted.hints(), usual=most_seconds()["hints"], most=2.0, racer=Switched, sentence=beside.policy)


def absent() -> str:
    """Why nothing can be raced; empty if it can."""
    state = dispatch.backends()["cuda"]
    if not state["live"]:
        return " ".join(state["reason"].split())[:300]
    path = compiled.no_hints()
    if path is None and not DRY:
        return "the library without hints was not built; stage warm says why"
    try:
        load(path or Path())
    except ImportError as error:
        return " ".join(f"the library without hints cannot be loaded: {error}".split())[:300]
    return ""
