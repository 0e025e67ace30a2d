"""Stage cuda: the CUDA kernels beside Triton's and torch's fused optimizers, where they are live."""

from __future__ import annotations

import flatkern

from . import racing, wanted
from .goals import CUDA
from .stage import DRY, emit, say
from .stages import most_seconds


def main(arguments: list[str]) -> int:
    state = flatkern.backends()["cuda"]
    if state["live"]:
        return racing.run(wanted.cuda(), usual=most_seconds()["cuda"], most=2.0)
    emit("miss", model="all", method="all", base="all", candidate=CUDA, reason=state["reason"][:300])
    say(f"skipped: {' '.join(state['reason'].split())[:300]}")
    return 0 if DRY or "is not installed" in state["reason"] else 1
