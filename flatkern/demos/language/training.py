"""A small Llama on bytes, and its training: the model, the text, the loop. What is shown is in command.py."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flatkern

BYTES = 256
WARMUP = 0.1  # of the steps; IRE begins after it
VALIDATION = 0.1  # of the text
BETAS, WEIGHT_DECAY, CLIP, LAST_LR = (0.9, 0.95), 0.1, 1.0, 1 / 20  # the authors' recipe


@dataclass(frozen=True)
class Shape:
    """A Llama: RMSNorm, rotary positions, SwiGLU, no biases."""

    width: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 64

    @property
    def hidden(self) -> int:
        return 64 * math.ceil(self.width * 8 / 3 / 64)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before_attention, self.before_mlp = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, dim=-1)
        result: Tensor = x + self.down(nn.functional.silu(gate) * up)
        return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Llama(nn.Module):
    """Bytes to logits, (batch, length) to (batch, length, 256)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        result: Tensor = self.head(self.norm(x))
        return result


def read_text(limit: int) -> tuple[Tensor, Tensor]:
    """The sources of this Python's standard library as bytes, (training, validation); whole files on either side.

    Every tenth file is for validation. Bytes are used as they are, so no tokenizer is needed.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py")
    )
    files = [f for f in files if f.parent.name not in ("site-packages", "test", "idlelib")]
    size = 0
    for k, file in enumerate(files):
        text = file.read_bytes()
        parts[k % round(1 / VALIDATION) == 0].append(text)
        size += len(text)
        if size > limit:
            break
    training, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in parts)
    return training, validation


def batch_of(text: Tensor, shape: Shape, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - shape.context - 1, (size, 1), generator=generator)
    windows = text[starts + torch.arange(shape.context + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    x, y = (t.to(device) for t in batch)
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, shape: Shape, size: int, device: torch.device) -> float:
    """Mean over 16 fixed batches, in nats per byte."""
    generator = torch.Generator().manual_seed(1)
    losses = [loss_of(model, batch_of(text, shape, size, generator), device) for _ in range(16)]
    return float(torch.stack(losses).mean())


def seconds(device: torch.device) -> float:
    """The time, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make(
    kappa: float | None,
    shape: Shape,
    lr: float,
    sharp_fraction: float,
    seed: int,
    device: torch.device,
    backend: str | None,
) -> tuple[Llama, flatkern.AdamW]:
    """The model of a seed, and its optimizer."""
    torch.manual_seed(seed)
    model = Llama(shape).to(device)
    enhance = None if kappa is None else flatkern.IRE(kappa, sharp_fraction=sharp_fraction)
    opt = flatkern.AdamW(
        model.parameters(), lr, BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, enhance=enhance, backend=backend
    )
    return model, opt


def train(
    kappa: float | None,
    text: tuple[Tensor, Tensor],
    shape: Shape,
    *,
    steps: int,
    batch: int,
    lr: float,
    sharp_fraction: float,
    seed: int,
    device: torch.device,
    backend: str | None,
    points: int = 20,
    tick: Callable[[float], None] = lambda loss: None,
) -> dict[str, Any]:
    """One run; AdamW where `kappa` is None, else AdamW-IRE from the end of the warm-up on.

    Runs of a seed share initial weights and batches. IRE's mask takes batches of its own, every ten steps.

    Returns:
        The curve (step, training loss, validation loss), and the seconds of optimizer, mask updates and everything.
    """
    model, opt = make(kappa, shape, lr, sharp_fraction, seed, device, backend)
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1_000_000)
    curve, spent = list[dict[str, float]](), {"optimizer": 0.0, "masks": 0.0}
    total, recent = seconds(device), 0.0
    for step in range(steps):
        start = seconds(device)
        if step >= WARMUP * steps and opt.mask_due:
            x, _ = batch_of(text[0], shape, batch, other)
            flatkern.sampled_label_loss(model(x.to(device))).backward()
            opt.update_mask()
            spent["masks"] += seconds(device) - start
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        loss = loss_of(model, batch_of(text[0], shape, batch, generator), device)
        loss.backward()
        start = seconds(device)
        opt.step()
        spent["optimizer"] += seconds(device) - start
        opt.zero_grad()
        recent = float(loss.detach()) if not step else 0.95 * recent + 0.05 * float(loss.detach())
        tick(recent)
        if (step + 1) % max(1, steps // points) == 0 or step + 1 == steps:
            held_out = validation_loss(model, text[1], shape, batch, device)
            curve.append({"step": step + 1, "training": recent, "validation": held_out})
    return {"curve": curve, "seconds": {**spent, "total": seconds(device) - total}}
