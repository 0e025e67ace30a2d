"""Whether the machine was quiet: copies are raced in every race, and their code is always the same."""

from __future__ import annotations

from ..models import MODELS

NOISY = 0.1  # half of the interquartile range of a copy's rounds, of its median: beyond it times do not repeat


def spreads(results: dict) -> dict[str, float]:
    """Of each race how far its copies were spread; copies that fit into a cache say nothing about memory."""
    rows = [b for b in results["benchmarks"] if "copy_spread" in b["extra_info"]]
    return {b["group"]: b["extra_info"]["copy_spread"] for b in rows if not MODELS[b["params"]["model"]].small}


def remarks(results: dict) -> list[str]:
    """A sentence where some races were disturbed."""
    found = spreads(results)
    noisy = {group: spread for group, spread in found.items() if spread > NOISY}
    if not noisy:
        return []
    worst = max(noisy, key=noisy.__getitem__)
    return [
        f"this machine was not quiet: copies spread by more than {100 * NOISY:.0f} % in {len(noisy)} of {len(found)} "
        f"races, most in {worst!r} ({100 * noisy[worst]:.0f} %); ratios of one race still compare, as its candidates "
        "took turns, times of different races do not"
    ]
