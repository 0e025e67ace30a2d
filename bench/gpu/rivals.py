"""Stage rivals: what users write instead, in all degrees of care, and what a call costs that has nothing to do."""

from __future__ import annotations

from . import racing, wanted
from .stages import most_seconds


def main(arguments: list[str]) -> int:
    return racing.run(wanted.rivals(), usual=most_seconds()["rivals"], most=0.4)
