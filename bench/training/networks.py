"""Four small networks and their data, built from seeds: plain torch, plain steps of 20 to 100 ms on two cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

CLASSES, PIXELS = 10, 32
VOCABULARY, CONTEXT = 8192, 128
BATCHES = 4

Batch = tuple[Tensor, Tensor]  # inputs and targets


def mlp() -> nn.Module:
    widths = [1024] * 5
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a convolution where the shape changes (He et al. 2016)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), second, nn.BatchNorm2d(out))
        changes = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if (into, stride) == (out, 1) else changes

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def conv() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    into = 32
    for out, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
        layers.append(Residual(into, out, stride))
        into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, CLASSES))


class Block(nn.Module):
    """A transformer's, with normalization in front."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.before_mlp(x))))


class Vit(nn.Module):
    """Images (batch, 3, 32, 32) to logits, by patches of 8 x 8."""

    def __init__(self, width: int = 256, blocks: int = 6, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((PIXELS // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class Gpt(nn.Module):
    """Tokens (batch, length) to logits (batch x length, vocabulary); the output head is the embedding, as in GPT-2."""

    def __init__(self, width: int = 384, blocks: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, 6, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def vectors(count: int, generator: torch.Generator) -> Batch:
    return torch.randn(count, 1024, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def images(count: int, generator: torch.Generator) -> Batch:
    pixels = torch.randn(count, 3, PIXELS, PIXELS, generator=generator)
    return pixels, torch.randint(CLASSES, (count,), generator=generator)


def text(count: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].flatten()


@dataclass(frozen=True)
class Network:
    """A named network with its usual optimizer; its loss is cross entropy, and `numel` counts its weights."""

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Batch]
    batch: int  # vectors, images or texts
    base: str
    numel: int

    def build(self, seed: int = 0) -> nn.Module:
        """The network, in train mode; torch's generator goes on as if it had drawn nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().train()

    def batches(self, seed: int = 1) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [self.data(self.batch, generator) for _ in range(BATCHES)]


NETWORKS = {
    "mlp": Network("MLP", mlp, vectors, 128, "sgd", 4_208_650),
    "conv": Network("ResNet", conv, images, 32, "sgd", 1_228_970),
    "vit": Network("ViT", Vit, images, 8, "adamw", 4_795_146),
    "gpt": Network("GPT", Gpt, text, 1, "adamw", 10_293_504),
}
