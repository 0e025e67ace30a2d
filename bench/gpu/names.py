"""What a GPU is called in the names of result files."""

from __future__ import annotations

import re

# Makers, memory and sockets: what tells no two chips apart whose results lie in different folders.
NOISE = re.compile(r"nvidia|geforce|tesla|\b\d+\s?gb\b|\bhbm\d*e?\b|\bsxm\d*\b|\bpcie\b|\bnvl\b")


def slug(name: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100, NVIDIA GeForce RTX 4090 -> rtx-4090."""
    return re.sub(r"[^a-z0-9]+", "-", NOISE.sub(" ", name.lower().replace("-", " "))).strip("-") or "gpu"
