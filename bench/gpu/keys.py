"""Stage keys: the races that the goals are about, beside torch's fused optimizers."""

from __future__ import annotations

from . import racing, wanted


def main(arguments: list[str]) -> int:
    return racing.run(wanted.keys(), usual=80.0, most=2.0)
