"""Who takes part, and a step of each as its user writes it: passes, the optimizer's calls, zero_grad().

The cycles are those of methods.py. Where these races preset a gradient, a step here computes it: "clean" and "noisy"
stand for a forward and a backward.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

import flatkern

from ..baselines.libraries import is_installed, libraries_of
from ..candidates import FLOOR, build, untouched_optimizer
from ..methods import METHODS, Method
from ..timing.harness import Clock
from .networks import Batch, Network

OURS = "flatkern "  # and the backend
LIBRARY = "pytorch_optimizer"  # heavyball's SAM takes closures, and computes something else
PASSES = "forward", "backward"


class Who(NamedTuple):
    """A method, and who computes it: "torch fused", "flatkern cpp", "loop", "foreach", "pytorch_optimizer"."""

    method: str
    label: str

    @property
    def key(self) -> str:
        return f"{self.method} by {self.label}"


def candidates(network: Network, backend: str = "cpp") -> list[Who]:
    """What a user may choose between, the plain fused optimizer first."""
    ours = OURS + backend
    found = [Who("plain", FLOOR), Who("plain", ours), Who("rolling", ours)]
    for method in ("m-rwp", "sam"):
        library = [LIBRARY] * (LIBRARY in libraries_of(method, network.base) and is_installed(LIBRARY))
        found += [Who(method, label) for label in (ours, "loop", "foreach", *library)]
    return [*found, Who("ire", ours)] if network.title == "GPT" else found


class Training:
    """A network with an optimizer of its own, which takes part in a race by being called."""

    def __init__(self, network: Network, who: Who) -> None:
        self.method = METHODS[who.method]
        self.model, self.batches = network.build(), network.batches()
        self.params = list(self.model.parameters())
        self.optimizer = self.build(who, network.base)
        # Loops and libraries' classes wrap an optimizer; not all of them have its zero_grad().
        self.zero_grad = getattr(self.optimizer, "zero_grad", self.model.zero_grad)
        self.losses: list[float] = []  # of every pass
        self.count = 0

    def build(self, who: Who, base: str):
        if not who.label.startswith(OURS):
            return build(who.label, self.params, who.method, self.method, base)
        optimizer = untouched_optimizer(self.params, self.method, base, backend=who.label.removeprefix(OURS))
        if self.method.rolling:
            optimizer.follow(self.model)
        return optimizer

    def __call__(self, count: int) -> dict[str, int]:
        return self.step(Clock())

    def step(self, clock: Clock) -> dict[str, int]:
        """One step: nanoseconds by call. What comes once in several steps comes in each, and counts with its share."""
        passes, moved = 0, False
        for kind, call, share in self.method.cycle:
            if kind != "none":
                again = moved and passes > 0  # at perturbed weights, after a pass at clean ones
                self.take_pass(self.batch(again), clock, share, again)
                passes += 1
            clock.time(call, getattr(self.optimizer, call), share)
            moved = call == "perturb"
        clock.time("zero_grad", self.zero_grad)
        self.count += 1
        return clock.read()

    def batch(self, again: bool) -> Batch:
        """m-RWP has another batch for its second pass, SAM the same."""
        return self.batches[(self.count + (again and self.method.sigma > 0)) % len(self.batches)]

    def take_pass(self, batch: Batch, clock: Clock, share: float, again: bool) -> None:
        inputs, targets = batch
        loss = torch.empty(())

        def forward() -> None:
            nonlocal loss
            loss = cross_entropy(self.model(inputs), targets)

        with flatkern.frozen_running_stats(self.model) if again else nullcontext():
            clock.time("forward", forward, share)
            clock.time("backward", lambda: loss.backward(), share)
        self.losses.append(loss.item())


def passes_of(method: Method) -> float:
    """Forwards and backwards in a step; rare ones with their share."""
    return sum(turn.share for turn in method.cycle if turn.gradient != "none")
