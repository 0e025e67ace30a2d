"""Where errors and warnings that need more than a sentence point to: headings of the documentation, a closed list."""

from __future__ import annotations

from pathlib import Path

ROOT = "docs"  # of the checkout; a hosted address would stand here
ANCHORS = {
    "cycle": ("phases", "gradients", "writes", "following", "checkpoints"),
    "ranks": ("ddp", "fsdp2", "mix-ranks", "refused"),
    "gpu": ("backends", "graphs", "install"),
    "methods": ("sam-and-asam", "ire"),
    "numerics": ("half-precision", "noise"),
    "stacks": ("table",),
}


def page(name: str, anchor: str) -> str:
    """`see docs/cycle.md#writes`, to stand at the end of a message."""
    if anchor not in ANCHORS.get(name, ()):
        raise KeyError(f"pages: {name}#{anchor} is not in the list of anchors")
    return f"see {ROOT}/{name}.md#{anchor}"


def where() -> str:
    """Where a reader finds the pages."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "docs" / "methods.md").exists():
        return f"README.md and docs/ in {checkout}"
    return "README.md and docs/ of flatkern's sources"
