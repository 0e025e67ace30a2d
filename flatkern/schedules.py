"""Schedules of the perturbation's strength, for `group["sigma"]` or `group["rho"]`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from .optim.groups import Group, own_key
from .values import check_value, is_number


def cosine_increase(start: float, increase: float, total_steps: int) -> Callable[[int], float]:
    """The papers' cosine increase of sigma.

        sigma(t) = start (1 + increase (1 - cos(pi t / T)) / 2),    sigma(0) = start, sigma(T) = start (1 + increase)

    Arguments:
        start: value at t = 0, >= 0.
        increase: relative growth until T, >= -1; the released recipe has start 0.001, increase 10.
        total_steps: T > 0, in optimizer steps. Later t stay at the final value.

    Returns:
        A function of the step number t.

    Raises:
        ValueError: a value out of range.

    Source: Li et al. 2024 (arXiv:2404.00357); Bisla et al. 2022 (LPF-SGD).
    """
    numbers = all(map(is_number, (start, increase, total_steps)))
    if not (numbers and 0 <= start < math.inf and -1 <= increase < math.inf and 0 < total_steps < math.inf):
        raise ValueError(
            f"cosine_increase: start {start!r}, increase {increase!r}, total_steps {total_steps!r}, "
            "but should be start >= 0, increase >= -1, total_steps > 0"
        )

    def value(t: int) -> float:
        progress = min(max(t / total_steps, 0.0), 1.0)
        return start * (1.0 + increase * (1.0 - math.cos(math.pi * progress)) / 2.0)

    return value


class FollowLr:
    """A value that goes with the learning rate of a group; see `follow_lr`."""

    def __init__(self, low: float, high: float, lr_min: float, lr_max: float | None) -> None:
        self.low, self.high, self.lr_min, self.lr_max = low, high, lr_min, lr_max
        self.largest: list[float] = []  # learning rate so far of each group, in the order in which they were met
        self._met: list[Any] = []  # the first parameter of each

    def value(self, group: Group) -> float:
        """The value at the present learning rate of `group`."""
        lr = float(group["lr"])
        lr_max = self._largest(group, lr) if self.lr_max is None else self.lr_max
        if lr_max == self.lr_min:
            return self.high
        share = (lr - self.lr_min) / (lr_max - self.lr_min)
        return self.low + (self.high - self.low) * min(max(share, 0.0), 1.0)

    def _largest(self, group: Group, lr: float) -> float:
        # Optimizers of torch's have other groups after load_state_dict(), and the same parameters.
        first = next(iter(group.get("params", ())), group)
        k = next((k for k, known in enumerate(self._met) if known is first), len(self._met))
        self._met += [first] if k == len(self._met) else []
        self.largest += [self.lr_min] * (k + 1 - len(self.largest))
        self.largest[k] = max(self.largest[k], lr)
        return self.largest[k]

    def state_dict(self) -> dict[str, Any]:
        return {"largest": list(self.largest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.largest = list(state["largest"])


def follow_lr(low: float, high: float, lr_min: float = 0.0, lr_max: float | None = None) -> FollowLr:
    """Tie rho or sigma to the learning rate of its group, as GSAM's authors do with rho.

        value = low + (high - low) (lr - lr_min) / (lr_max - lr_min)

        rhos = PerturbationScheduler(opt, "rho", follow_lr(0.02, 0.05))
        ...; opt.step(); lrs.step(); rhos.step()

    Arguments:
        low, high: the values at lr_min and at lr_max, >= 0. Learning rates beyond those have these values.
        lr_min: >= 0.
        lr_max: >= lr_min; None: the largest learning rate of the group so far, kept in the scheduler's state, so that
            the value is `high` while the learning rate warms up: give lr_max then. Where it is lr_min, the value is
            `high`.

    Raises:
        ValueError: a value out of range.

    Source: Zhuang et al. 2022 (GSAM, arXiv:2203.08065), section 4.
    """
    numbers = [low, high, lr_min] + ([] if lr_max is None else [lr_max])
    if not all(is_number(v) and 0 <= v < math.inf for v in numbers) or (lr_max is not None and lr_max < lr_min):
        raise ValueError(
            f"follow_lr: low {low!r}, high {high!r}, lr_min {lr_min!r}, lr_max {lr_max!r}, but should be numbers >= 0 "
            "with lr_max >= lr_min, or lr_max=None"
        )
    return FollowLr(float(low), float(high), float(lr_min), None if lr_max is None else float(lr_max))


class PerturbationScheduler(LRScheduler):
    """Sets a group key such as "sigma" or "rho" from a function of the step number; in place where it is a tensor.

        scheduler = PerturbationScheduler(opt, "sigma", cosine_increase(0.001, 10, total_steps))
        ...; opt.step(); scheduler.step()

    A torch.optim.lr_scheduler.LRScheduler, for code that takes no other, such as `SequentialLR`, `ChainedScheduler`,
    Lightning and Hugging Face's Trainer; but it changes no lr and leaves `initial_lr` to those that do.

    The constructor sets the value of step 0, every `step()` the next one, and the optimizer uses it from its next call
    that perturbs. A rolling one draws the noise of the next forward in `opt.step()`: with `scheduler.step()` after
    `opt.step()`, as usual, the first draw with a new value is that of the following `opt.step()`; with
    `scheduler.step()` before `opt.step()` it is this one's.

    Arguments:
        optimizer: one of flatkern's.
        key: the group key to set in every group; for `Wrap` our value of that name, also where its key is
            `perturb_<name>`.
        schedule: step number -> value; or `follow_lr(...)`, whose `value(group)` is asked instead: let the scheduler
            of the learning rate step first.
        last_epoch: the step number before the one to start from.

    State: the step number, and the largest learning rates of `follow_lr`; the schedule is the code's.

    Raises:
        ValueError: a group has no such key; a value out of range for a tensor, which nobody checks later. Numbers are
            checked by the next call of the optimizer.
        TypeError: `optimizer` is no torch.optim.Optimizer.
    """

    def __init__(
        self, optimizer: Optimizer, key: str, schedule: Callable[[int], float] | FollowLr, last_epoch: int = -1
    ) -> None:
        # LRScheduler's own constructor would fix `initial_lr`, and count the optimizer's steps to warn of the order.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"PerturbationScheduler: optimizer is {type(optimizer).__name__}, but should be a torch.optim.Optimizer"
            )
        for k, group in enumerate(optimizer.param_groups):
            if own_key(group, key) not in group:
                raise ValueError(
                    f"PerturbationScheduler: group {k} has no {key!r}; the optimizer's method does not use it"
                )
        self._optimizer, self.key, self.schedule = optimizer, key, schedule
        self._initial_lrs: list[tuple[Group, Any]] = []
        self.last_epoch = last_epoch
        self._initial_step()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        if caller is not None and caller.f_code is SequentialLR.__init__.__code__:
            self._keep_lrs(**{key: caller.f_locals[key] for key in ("optimizer", "schedulers", "milestones")})
        return self._optimizer

    @optimizer.setter
    def optimizer(self, value: Optimizer) -> None:
        self._optimizer = value

    def _keep_lrs(self, optimizer: Any, schedulers: Any, milestones: Any) -> None:
        """SequentialLR sets every lr back to `initial_lr`. Where all its schedulers are ours, no lr is theirs to set:
        the present lr is the initial one until the first of them has begun.
        """
        ours = all(isinstance(s, PerturbationScheduler) and s._optimizer is optimizer for s in schedulers)
        if not ours or self is not schedulers[-1] or self._initial_lrs or len(milestones) != len(schedulers) - 1:
            return
        kept = [(group, group.get("initial_lr")) for group in optimizer.param_groups if "lr" in group]
        for group, _ in kept:
            group["initial_lr"] = group["lr"]
        for scheduler in schedulers:
            scheduler._initial_lrs = kept

    def _initial_step(self) -> None:
        for group, initial_lr in self._initial_lrs:
            group.pop("initial_lr", None)
            if initial_lr is not None:
                group["initial_lr"] = initial_lr
        self._initial_lrs.clear()
        self._step_count = 0
        self.step()

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step, or go to step `epoch`."""
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        """What torch's schedulers call each other by."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._set()

    def _set(self) -> None:
        schedule = self.schedule
        at_step = None if isinstance(schedule, FollowLr) else schedule(self.last_epoch)
        for group in self._optimizer.param_groups:
            key = own_key(group, self.key)
            value = schedule.value(group) if isinstance(schedule, FollowLr) else at_step
            if isinstance(group[key], torch.Tensor):
                check_value(key, value, "PerturbationScheduler")
                group[key].fill_(value)  # in place, where a captured graph reads it
            else:
                group[key] = value

    def get_last_lr(self) -> list[Any]:
        """The learning rates of the groups, which others set; copies where they are tensors."""
        lrs = [group["lr"] for group in self._optimizer.param_groups]
        return [lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        state = {"last_epoch": self.last_epoch, "_step_count": self._step_count}
        return {**state, **self.schedule.state_dict()} if isinstance(self.schedule, FollowLr) else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the saved step; {"last_step": n} of version 0.1 does, too."""
        self.last_epoch = state["last_step"] if "last_step" in state else state["last_epoch"]
        self._step_count = state.get("_step_count", self.last_epoch + 1)
        if isinstance(self.schedule, FollowLr) and "largest" in state:
            self.schedule.load_state_dict(state)
        if self.last_epoch >= 0:  # in a SequentialLR one whose turn has not come is at -1
            self._set()
