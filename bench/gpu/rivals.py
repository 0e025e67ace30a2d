"""Stage rivals: what users write instead, in all degrees of care, and what a call costs that has nothing to do."""

from __future__ import annotations

from . import racing, wanted


def main(arguments: list[str]) -> int:
    return racing.run(wanted.rivals(), usual=60.0, most=0.4)
