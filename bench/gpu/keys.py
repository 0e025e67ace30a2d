"""Stage keys: the races that the goals are about: Triton's kernels, the CUDA kernels, torch's fused optimizers."""

from __future__ import annotations

from . import beside, racing, wanted
from .stages import most_seconds


def main(arguments: list[str]) -> int:
    return racing.run(wanted.keys(), usual=most_seconds()["keys"], most=2.0, sentence=beside.sentence)
