"""An optimizer of the same kind in training, on small tensors of the CPU: what it launches is recorded.

Only here is known which calls a training makes. The optimizer itself is read, and nothing else is done with it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import dtensor
from .dispatch import RECORDED, compiled_module
from .jobs import Job, Shard, recording
from .optim import amp
from .optim.base import FlatOptimizer
from .optim.momentum_sam import MOMENTA
from .optim.names import names_of

# State that is made anew in the form that it always has; all other state has the dtype that a checkpoint gave it.
OF_ONE_FORM = ("step", "history", "mask")


def record(opt: FlatOptimizer, scaled: bool, rounds: int, device: torch.device | None = None) -> list[Job]:
    """The distinct jobs of an optimizer's parameters on a device, or of all of them."""
    stand_ins = StandIns(device)
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shadow = stand_ins.optimizer(opt)
        with recording(opt.capturable, stand_ins.shards) as jobs:
            try:
                Rehearsal(shadow, stand_ins, scaled, rounds).run()
            finally:
                shadow.cycle.weights.left()  # when it is collected, nobody restores its weights
    return list({job.key: job for job in jobs}.values())


class Nothing:
    """The base of a Wrap, whose steps launch nothing of ours, and keep the momentum that a method may follow."""

    def __init__(self, groups: list[dict[str, Any]], state: Any) -> None:
        self.param_groups = groups
        self.state: Any = defaultdict(dict)
        self._momenta = {p: {k: v for k, v in of_p.items() if k in MOMENTA} for p, of_p in state.items()}

    def step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
            self.state[p].update(self._momenta.get(p) or {MOMENTA[0]: torch.zeros_like(p, requires_grad=False)})


def is_aligned(t: Tensor) -> bool:
    """What a kernel that moves 16 bytes at a time may rely on."""
    return dtensor.local(t).data_ptr() % 16 == 0


def zeros(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    if aligned:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    room = torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype, device="cpu")
    return room[1:].view(shape)


class StandIns:
    """Small tensors that are compiled for as an optimizer's tensors are, one for all that are alike in a group."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.shape_of = compiled_module("triton").plan.smallest_alike
        self.shards: dict[int, Shard] = {}
        self.gradients: dict[Tensor, bool] = {}  # of those that get one: whether it is aligned
        self._numbers: dict[int, Tensor] = {}

    def optimizer(self, opt: FlatOptimizer) -> FlatOptimizer:
        """As unpickling would make it, except that it has no hooks, and that it is of none but our classes."""
        kept = opt.raw_state()
        state: Any = defaultdict(dict)
        groups = [self._group(group, opt.state, state) for group in opt.param_groups]
        fixed = {**kept["flatkern"], "backend": RECORDED}
        if "base" in fixed:
            fixed["base"], state = Nothing(groups, state), defaultdict(dict)
        kind = next(c for c in type(opt).__mro__ if c.__module__.split(".")[0] == __name__.split(".")[0])
        shadow: FlatOptimizer = object.__new__(kind)
        shadow.__setstate__(
            {"defaults": self._value(kept["defaults"]), "param_groups": groups, "state": state, "flatkern": fixed}
        )
        return shadow

    def _group(self, group: dict[str, Any], real: Any, state: Any) -> dict[str, Any]:
        found: dict[Any, Tensor] = {}
        names = names_of(group)
        for p, name in zip(group["params"], names, strict=True):
            if self.device is None or dtensor.local(p).device == self.device:
                self._add(p, "weight" in name, real.get(p, {}), found, state)
        # What a rolling draw was made with is drawn anew.
        anew = ("params", "param_names", "drawn", "perturb_drawn")
        rest = {k: self._value(v) for k, v in group.items() if k not in anew}
        if any(names):
            rest["param_names"] = ["weight" if is_weight else "other" for _, is_weight in found]
        return {"params": list(found.values()), **rest}

    def _add(self, p: Tensor, is_weight: bool, state_of_p: Any, found: dict[Any, Tensor], state: Any) -> None:
        part, ranks = dtensor.local(p), dtensor.ranks_of(p)
        shape = self.shape_of(part)
        # Vectors may be cut inside of an eight.
        shard = Shard(ranks, dtensor.first_row(p) % 8 if ranks and p.dim() < 2 else 0)
        beside = [
            (name, value.dtype, is_aligned(value))
            for name, value in state_of_p.items()
            if isinstance(value, Tensor) and name not in OF_ONE_FORM and dtensor.local(value).shape == part.shape
        ]
        gets_aligned = p.grad is None or is_aligned(p.grad)
        alike = (shape, part.dtype, is_aligned(p), p.requires_grad, gets_aligned, shard, *beside), is_weight
        if alike in found:
            return
        q = found[alike] = torch.nn.Parameter(zeros(shape, part.dtype, is_aligned(p)), p.requires_grad)
        state.update({q: {name: zeros(shape, dtype, aligned) for name, dtype, aligned in beside}} if beside else {})
        self.shards[id(q)] = shard
        if p.requires_grad:
            self.gradients[q] = gets_aligned

    def _value(self, value: Any) -> Any:
        """A value of a group; tensors are numbers there, and the same for all groups that share one."""
        if isinstance(value, Tensor):
            if id(value) not in self._numbers:
                self._numbers[id(value)] = value.detach().to("cpu", copy=True)
            return self._numbers[id(value)]
        if isinstance(value, dict):
            return {k: self._value(v) for k, v in value.items()}
        return type(value)(map(self._value, value)) if type(value) in (tuple, list) else value


class Scaler(torch.amp.GradScaler):
    """A scaler that finds all gradients finite, whatever their dtype."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.scale(torch.zeros((), device="cpu"))

    def unscale_(self, optimizer: Any) -> None:
        found = {torch.device("cpu"): torch.zeros((), device="cpu")}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found


class Rehearsal:
    """The calls of a training."""

    def __init__(self, opt: FlatOptimizer, stand_ins: StandIns, scaled: bool, rounds: int) -> None:
        self.opt, self.gradients, self.scaled, self.rounds = opt, stand_ins.gradients, scaled, rounds
        self.scaler = Scaler() if scaled else None

    def run(self) -> None:
        opt = self.opt
        if not self.gradients:
            return
        if opt.enhancement is None:
            self.train()
            return
        if opt.own_groups[0]["mask_age"] is None:
            self.train()  # the first mask may come late
        if any(group["enhance"] and any(p in self.gradients for p in group["params"]) for group in opt.own_groups):
            opt.eval()
            self.backward()
            opt.update_mask()
            self.train()

    def train(self) -> None:
        """Every way to a step."""
        # A user may have the scaler unscale the gradients before the step, to look at them.
        for unscaled in (False, True) if self.scaled else (False,):
            if self.opt.setup.method is None:
                self.backward()
                self.step(unscaled)
            elif self.opt.rolling:
                self.roll(unscaled)
            else:
                # The second time there is a momentum, which a method may follow.
                for clean_first, restored in self.orders() * (1 + self.opt.perturbation.starts_perturbed):
                    self.cycle(unscaled, clean_first, restored)
                self.between(unscaled)

    def between(self, unscaled: bool) -> None:
        """A step between ascents."""
        groups = self.opt.own_groups
        if self.opt.perturbation.has_interval and groups[0]["perturb_interval"] > 1:
            for group in groups:
                group["perturb_count"] = 1
            self.backward()
            self.step(unscaled)

    def orders(self) -> list[tuple[bool, bool]]:
        """Whether the clean pass of two comes first, and whether restore() precedes the step."""
        perturbation = self.opt.perturbation
        if not perturbation.has_clean_pass:
            found = [(False, False), (False, True)]
        elif not perturbation.mixes and any(map(perturbation.keeps_history, self.opt.own_groups)):
            return [(False, True)]
        else:
            found = [(True, False), (True, True), (False, True)]
        # A scaler has to see gradients in `.grad`, where the last pass must have left them.
        return [order for order in found if not self.scaled or order != (found[0][0], True)]

    def cycle(self, unscaled: bool, clean_first: bool, restored: bool) -> None:
        opt, perturbation = self.opt, self.opt.perturbation
        two = perturbation.has_clean_pass
        one_round = two and (not perturbation.mixes or (self.scaled and not clean_first))
        opt.zero_grad()
        for group in opt.own_groups if perturbation.has_interval else ():
            group["perturb_count"] = 0
        for left in reversed(range(1 if one_round else self.rounds)):
            if perturbation.ascends or clean_first:
                self.backward()
                clean_first = False
            opt.perturb(self.scaler)
            self.backward()
            with opt.clean():
                pass
            if left or restored:
                opt.restore()
        if two and restored and not opt.cycle.gradients.clean:
            self.backward()
        self.step(unscaled)

    def roll(self, unscaled: bool) -> None:
        """A step from clean weights, as the first one may be, one from perturbed ones, and an evaluation."""
        opt = self.opt
        opt.eval()
        for _ in range(2):
            self.backward()
            self.step(unscaled)
            opt.train()
        with opt.clean():
            pass
        opt.eval()

    def backward(self) -> None:
        for p, aligned in self.gradients.items():
            if p.grad is None:
                p.grad = zeros(tuple(p.shape), p.dtype, aligned)
            else:
                p.grad.zero_()
            self.opt.perturbation.saw_gradient(p)

    def step(self, unscaled: bool) -> None:
        """As GradScaler does it; torch's hooks of steps are not for this one."""
        if self.scaled:
            self.opt.grad_scale = None if unscaled else torch.ones((), device="cpu")  # type: ignore[attr-defined]
            self.opt.found_inf = torch.zeros((), device="cpu")  # type: ignore[attr-defined]
        self.opt.step_without_closure()
        amp.forget(self.opt)
        self.opt.zero_grad()
