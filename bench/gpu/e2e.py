"""Stage e2e: what rolling RWP costs a training step of a small GPT, by Triton's kernels and by the CUDA kernels, beside
torch's fused AdamW, and that twice.

Every optimizer trains a model of its own. They take turns in bursts of steps, and a ratio is to the burst of the plain
optimizer in the same round.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flatkern
from bench.gpu.goals import ROLLING, ROLLING_CUDA
from bench.gpu.stage import DRY, WITH_CUDA, emit, left, say
from bench.timing.harness import balanced_orders
from bench.timing.stats import quartiles

DEVICE = torch.device("cpu" if DRY else "cuda")
USUAL = 35.0  # seconds of the stage, of which imports and first steps take the most
SECONDS, RESERVE = 12.0, 3.0  # of bursts, at most; at the end of the stage
LEAST, MOST = (2, 2) if DRY else (12, 60)  # rounds, if there is time
STEPS = 1 if DRY else 5  # in a burst
FIRST_STEPS = 1 if DRY else 5
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Shape(NamedTuple):
    """GPT-2 small's, with a smaller vocabulary: the optimizer walks 91 million parameters."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 256
    vocabulary: int = 8192
    batch: int = 16


SHAPE = Shape(1, 16, 2, 8, 32, 2) if DRY else Shape()


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Tokens (batch, length) to the loss of the next ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.tie()
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)

    def tie(self) -> Gpt:
        """The output head is the embedding, as in GPT-2."""
        self.head.weight = self.tokens.weight
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens[:, :-1]
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def batches(shape: Shape, count: int = 8) -> list[Tensor]:
    """Tokens of which each decides the next one, so that a loss can fall soon."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(shape.vocabulary, (count, shape.batch, 1), generator=generator)
    tokens = [first]
    for _ in range(shape.context):
        tokens.append((5 * tokens[-1] + 3) % shape.vocabulary)
    return list(torch.cat(tokens, dim=-1).to(DEVICE))


class Training:
    """One optimizer with its model."""

    def __init__(self, model: nn.Module, data: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.data, self.optimizer = model.train(), data, optimizer
        self.losses: list[Tensor] = []  # on the device, read at the end

    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = self.data[len(self.losses) % len(self.data)]
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = self.model(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.detach())

    def burst(self) -> tuple[float, float]:
        """Microseconds of a step, and those until the host had started it."""
        if DRY:
            began = perf_counter()
            self.steps(STEPS)
            took = 1e6 * (perf_counter() - began) / STEPS
            return took, took
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = perf_counter()
        start.record()
        self.steps(STEPS)
        end.record()
        started = 1e6 * (perf_counter() - began) / STEPS
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / STEPS, started

    def fell(self) -> tuple[float, float]:
        """The first loss, and the mean of the last ones; an error if that is no training."""
        losses = torch.stack(self.losses).float().tolist()
        last = statistics.mean(losses[-len(self.data) :])
        if not all(map(math.isfinite, losses)):
            at = next(k for k, loss in enumerate(losses) if not math.isfinite(loss))
            raise ArithmeticError(f"the loss of step {at + 1} is {losses[at]}")
        if not DRY and not last < losses[0]:
            raise ArithmeticError(f"the loss did not fall: {losses[0]:.3f} at first, {last:.3f} at last")
        return losses[0], last


def rolling(model: nn.Module, backend: str | None = "triton") -> torch.optim.Optimizer:
    method = flatkern.RWP(sigma=0.01, rolling=True)
    optimizer = flatkern.AdamW(model.parameters(), perturb=method, backend=backend, **OPTIONS)
    optimizer.follow(model)
    return optimizer


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)


def ours(model: nn.Module, backend: str | None = "triton") -> torch.optim.Optimizer:
    return flatkern.AdamW(model.parameters(), backend=backend, **OPTIONS)


PLAIN, AGAIN, OURS, OURS_CUDA = "plain", "plain again", "plain, ours", "plain, ours, cuda"
WHO: dict[str, Callable[..., torch.optim.Optimizer]] = {
    PLAIN: plain,
    AGAIN: plain,
    ROLLING: rolling,
    OURS: ours,
    ROLLING_CUDA: functools.partial(rolling, backend="cuda"),
    OURS_CUDA: functools.partial(ours, backend="cuda"),
}


def optimizers() -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """How to make those whose Triton kernels have to be compiled, on parameters that nobody has touched."""

    def untouched(who: str) -> torch.optim.Optimizer:
        with torch.device("meta"):
            model = Gpt(SHAPE)
        return WHO[who](model.to_empty(device="cpu").tie(), backend=None)

    return {who: functools.partial(untouched, who) for who in (ROLLING, OURS)}


def main(arguments: list[str]) -> int:
    torch.manual_seed(0)
    with DEVICE:  # 91 million normals, which take the host seconds
        model = Gpt(SHAPE)
    data = batches(SHAPE)
    parameters = sum(p.numel() for p in model.parameters())
    trainings, wrong = {}, []
    state = flatkern.backends()["cuda"]
    absent = "" if state["live"] else f"WITHOUT CUDA kernels ({' '.join(state['reason'].split())[:200]})"
    for who, make in WHO.items():
        if absent and who in (ROLLING_CUDA, OURS_CUDA):
            continue
        own = copy.deepcopy(model)
        try:
            trainings[who] = Training(own, data, make(own))
            trainings[who].steps(FIRST_STEPS)
            synchronize()
        except Exception as error:
            trainings.pop(who, None)
            wrong.append(f"{who}: {type(error).__name__}: {error}")
            say(wrong[-1])
            if who == PLAIN:
                raise
    say(f"{parameters / 1e6:.1f} million parameters; {', '.join(trainings)}")
    times, hosts = take_turns(trainings)
    found = compared(times)
    for who, training in trainings.items():
        try:
            first, last = training.fell()
        except ArithmeticError as error:
            first = last = None
            wrong.append(f"{who}: {error}")
        host_us = round(statistics.median(hosts[who]), 1)
        emit("e2e", who=who, **found[who], host_us=host_us, parameters=parameters, first_loss=first, last_loss=last)
    host_ms = statistics.median(hosts[PLAIN]) / 1e3
    say("; ".join(filter(None, [f"{sentence(found)}, the host's part is {host_ms:.2f} ms", absent, *wrong])))
    return 1 if wrong or (absent and WITH_CUDA) else 0


def take_turns(trainings: dict[str, Training]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Microseconds of a step by round, in an order in which everybody follows everybody else equally often."""
    times: dict[str, list[float]] = {who: [] for who in trainings}
    hosts: dict[str, list[float]] = {who: [] for who in trainings}
    labels, orders = list(trainings), balanced_orders(len(trainings))
    began = perf_counter()
    for turn in range(MOST):
        # Whole designs only, so that nobody is more often behind a certain other one; unless the stage is about to end.
        if turn >= LEAST and turn % len(orders) == 0 and perf_counter() - began > SECONDS:
            break
        if turn >= min(2, LEAST) and left(USUAL) < RESERVE:
            break
        for position in orders[turn % len(orders)]:
            took, started = trainings[labels[position]].burst()
            times[labels[position]].append(took)
            hosts[labels[position]].append(started)
    return times, hosts


def compared(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median microseconds of a step; median and quartiles of what a burst took in plain ones of its round."""
    found = {}
    for who, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times[PLAIN], strict=True))
        q1, q3 = quartiles(ratios)
        found[who] = {
            "step_us": round(statistics.median(own), 1),
            "ratio": round(statistics.median(ratios), 5),
            "q1": round(q1, 5),
            "q3": round(q3, 5),
            "turns": len(own),
        }
    return found


def sentence(found: dict[str, dict[str, Any]]) -> str:
    def text(who: str) -> str:
        f = found[who]
        return f"{who} / plain = {f['ratio']:.3f} (quartiles {f['q1']:.3f} to {f['q3']:.3f})"

    others = [text(who) for who in (ROLLING, ROLLING_CUDA, AGAIN, OURS, OURS_CUDA) if who in found]
    return f"{', '.join(others)}; a plain step takes {found[PLAIN]['step_us'] / 1e3:.2f} ms"


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()
