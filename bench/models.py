"""Parameter shapes of well-known networks, from their architecture rules; no forward passes, no other packages.

Only shapes live here: an optimizer sees a list of tensors, and its speed depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1000 classes (He et al. 2016): 3, 4, 6, 3 bottlenecks of 1x1, 3x3, 1x1 convolutions."""

    def conv_norm(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv_norm(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv_norm(width, channels, 1) + conv_norm(width, width, 3) + conv_norm(4 * width, width, 1)
            if block == 0:
                shapes += conv_norm(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def vit_b16() -> list[Shape]:
    """ViT-B/16 for 224 x 224 pixels and 1000 classes (Dosovitskiy et al. 2021), fused query-key-value weights."""
    d, tokens = 768, 14 * 14 + 1
    norm = [(d,), (d,)]
    block = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, tokens, d), (d, 3, 16, 16), (d,), *(12 * block), *norm, (1000, d), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 small (Radford et al. 2019), output head tied to the embedding, weights stored (in, out)."""
    d = 768
    norm = [(d,), (d,)]
    block = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * block), *norm]


def llama_1b() -> list[Shape]:
    """TinyLlama 1.1B (Zhang et al. 2024, arXiv:2401.02385): 22 blocks, 4 key-value heads for 32, untied head."""
    d, kv, hidden = 2048, 4 * 64, 5632
    attention = [(d, d), (kv, d), (kv, d), (d, d)]
    block = [*attention, (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(32000, d), *(22 * block), (d,), (32000, d)]


def many_small() -> list[Shape]:
    """A thousand tensors of a hundred elements: what is left is the cost of the list."""
    return 1000 * [(10, 10)]


def tiny_160() -> list[Shape]:
    """As many tensors as ResNet-50 has, of ten elements each: what is left is the cost of the call."""
    return 160 * [(10,)]


@dataclass(frozen=True)
class Model:
    """A named list of shapes, with the counts that everybody quotes for it."""

    title: str
    rule: Callable[[], list[Shape]]
    tensors: int
    numel: int
    small: bool = False  # calls cost more than memory traffic, and all of it fits into a cache

    def shapes(self) -> list[Shape]:
        """The shapes in the order of `model.parameters()`; a wrong count is an error, not a result."""
        shapes = self.rule()
        counts = len(shapes), sum(map(prod, shapes))
        if counts != (self.tensors, self.numel):
            raise ValueError(f"{self.title}: (tensors, parameters) is {counts}, should be {self.tensors, self.numel}")
        return shapes


MODELS = {
    "resnet50": Model("ResNet-50", resnet50, 161, 25_557_032),
    "vit_b16": Model("ViT-B/16", vit_b16, 152, 86_567_656),
    "gpt2": Model("GPT-2 124M", gpt2, 148, 124_439_808),
    "llama_1b": Model("Llama 1.1B", llama_1b, 201, 1_100_048_384),
    "many_small": Model("1000 tensors of 100", many_small, 1000, 100_000, small=True),
    "tiny_160": Model("160 tensors of 10", tiny_160, 160, 1_600, small=True),
}
