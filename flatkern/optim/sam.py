"""SAM, ASAM and mSAM: up along the gradient at the clean weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtensor
from ..methods import GSAM, SAM, FriendlySAM, LookSAM
from ..values import check_flag, check_positive, check_uint32
from .amp import Amp, check_can_unscale, record
from .buckets import Bucket, Call, CleanStore, Partition, global_norm
from .cycle import Cycle
from .errors import refuse_scaled_ascent, warn_rounded_away, warn_unnamed
from .gradients import gradients_of, mean_is_over_ranks
from .groups import Group, common_value
from .names import names_of
from .perturbation import NoPerturbation
from .traffic import Sizes, Traffic, ascend

Numbers = dict[str, list[Any]]
Tensors = list[Tensor] | None
ASCENT = {
    # Ascent of the objective that is minimised: with maximize=True that is descent.
    "rho": lambda group: -float(group["rho"]) if group.get("maximize") else float(group["rho"]),
    "eta": lambda group: float(group["eta"]),
    "adaptive": lambda group: group["adaptive"],
    "names": lambda group: group.get("param_names"),
}


class AscentPerturbation(NoPerturbation):
    """SAM: up along the gradient, by rho in the norm over all perturbed parameters. Several rounds make mSAM.

    ASAM scales the ascent by T_w = |w| + eta. Where, `adaptive` tells in each group: True, False, or None, its authors'
    rule by names. With an interval only every k-th step is one; those between are the base's.
    """

    pattern = "loss.backward(); opt.perturb(); loss on the same batch .backward(); opt.step()"
    closures = "twice each"
    moves = True
    ascends = True
    ops: tuple[str, ...] = ("ascent_norm_", "perturb_ascent_")
    refuses_perturb = ""
    accumulates = False
    launches = 3
    mixes_by_lam = False

    def __init__(self, method: SAM | GSAM | FriendlySAM | LookSAM) -> None:
        self.name = type(method).__name__
        self.sums = method.rounds == "sum"
        self.has_interval = "perturb_interval" in method.defaults
        self.has_lam = "lam" in method.defaults

    # --- which steps -----------------------------------------------------------------------------

    def check_common(self, groups: list[Group], optimizer: str) -> None:
        if self.has_interval and groups:
            common_value(groups, "perturb_interval", optimizer, "one ascent")

    def is_due(self, groups: list[Group]) -> bool:
        if not self.has_interval or not groups:
            return True
        interval = groups[0]["perturb_interval"]
        if type(interval) is not int or interval < 1:
            interval = check_positive("perturb_due", "perturb_interval", interval)
        if any([group["perturb_interval"] != interval for group in groups]):
            self.check_common(groups, "perturb_due")
        return bool(groups[0]["perturb_count"] % interval == 0)

    def closures_of(self, groups: list[Group]) -> str:
        return self.closures if self.is_due(groups) else "once each"

    # --- groups ----------------------------------------------------------------------------------

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        if self.has_interval:
            interval = check_positive(optimizer, "perturb_interval", group["perturb_interval"])
            check_uint32(optimizer, "perturb_count", group["perturb_count"])
            if capturable and interval > 1:
                raise ValueError(
                    f"{optimizer}: perturb_interval is {interval} with capturable=True, but a CUDA graph repeats one "
                    "step, with an ascent or without; use interval 1, or capturable=False"
                )
        if self.has_lam and (group["lam"] is None) is self.mixes_by_lam:
            raise ValueError(
                f"{optimizer}: a group has lam={group['lam']!r}, but {self.name} was made "
                f"{'with' if self.mixes_by_lam else 'without'} a number for it; lam may not mix None and a number"
            )
        if group["adaptive"] is None:
            return
        try:
            check_flag(optimizer, "adaptive", group["adaptive"])
        except TypeError as error:
            raise TypeError(f"{error}, or None for ASAM's rule by names") from None

    def is_described_by(self, saved: Group, group: Group) -> bool:
        # Before groups told which method they are of, ASAM's had eta and SAM's had not.
        before = "ASAM" if "eta" in saved else "SAM"
        same_lam = (saved.get("lam") is None) == (group.get("lam") is None)
        return "rho" in saved and saved.get("ascent", before) == group["ascent"] and same_lam

    def is_adaptive(self, group: Group, p: Tensor, name: str) -> bool:
        if group["adaptive"] is not None:
            return bool(group["adaptive"])
        return "weight" in name if name else p.dim() >= 2

    def _by_rule(self, cycle: Cycle, bucket: Bucket, lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """`rho`, and `eta` of T_w, -1 where T_w = 1."""
        names = {p: name for group in bucket.groups for p, name in zip(group["params"], names_of(group), strict=True)}
        owners = [group for group, n in zip(bucket.groups, bucket.counts, strict=True) for _ in range(n)]
        triples = zip(owners, bucket.params, lists["eta"], strict=True)
        eta = [e if self.is_adaptive(group, p, names[p]) else -1.0 for group, p, e in triples]
        unnamed = [p for p, a in zip(bucket.params, lists["adaptive"], strict=True) if a is None and not names[p]]
        if any(p.dim() < 2 for p in unnamed) and not cycle.warned_unnamed:
            cycle.warned_unnamed = True
            warn_unnamed(self.name)
        return {"rho": lists["rho"], "eta": eta}

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        extra = self.traffic_when_due(sizes)
        return extra.every(group["perturb_interval"]) if self.has_interval else extra

    def traffic_when_due(self, sizes: Sizes) -> Traffic:
        """Of a step that ascends."""
        return ascend(sizes)

    # --- the cycle -------------------------------------------------------------------------------

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        groups = cycle.groups.owner().own_groups  # type: ignore[union-attr]
        if not self.is_due(groups):
            count, interval = groups[0]["perturb_count"], groups[0]["perturb_interval"]
            raise RuntimeError(
                f"perturb: {self.name} ascends in every {interval}-th step, and step {count} is none of them; ask "
                "opt.perturb_due, and call step() alone where it is False"
            )
        if not new:
            raise RuntimeError(
                f"perturb: {self.name} ascends along the gradient at the clean weights, but there is no new one in "
                f".grad since the last step; the pattern is: {self.pattern}"
            )

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        grads = gradients_of(params)
        groups = cycle.groups.owner().param_groups  # type: ignore[union-attr]
        wanted = [group["perturb"] for group in groups for _ in group["params"]]
        triples = zip(params, grads, wanted, strict=True)
        partition = cycle.partitions.of([p for p, g, w in triples if w and g is not None and p.requires_grad])
        by_rule = partial(self._by_rule, cycle)
        calls = cycle.weights.perturb(
            partition,
            lambda stores, again: climb_calls(
                partition,
                stores,
                lambda bucket: Climb(
                    bucket.gradients(grads, again),
                    bucket.columns("ascent", ASCENT, by_rule),
                    *(() if self.state_key is None else self.means(cycle, bucket)),
                ),
            ),
        )
        norm = calls[0].args[-1] if calls else torch.zeros((), dtype=torch.float32, device=params[0].device)
        cycle.ascent_norm, cycle.before_ascent = norm, (cycle.nonfinite,)
        if not cycle.warned_rounded_away:
            warn_if_rounded_away(cycle, self.name)
        if self.mixes:
            self.keep_ascent(cycle, params, scaler)
        else:
            cycle.gradients.clear(params)
        if mean_is_over_ranks() and not (self.uses_ascent_gradient or any(map(dtensor.is_sharded, params))):
            cycle.overflow.tell(params, norm)
        else:
            nonfinite = norm.mul(0).ne_(0)  # 0 times what is not finite is not a number
            cycle.skip_if([nonfinite])
            if scaler is not None and not self.mixes:
                record(scaler, nonfinite)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)

    def keep_ascent(self, cycle: Cycle, params: list[Tensor], scaler: Any) -> None:
        """Keep the gradient that the ascent went along, which enters the update."""
        raise NotImplementedError

    def means(self, cycle: Cycle, bucket: Bucket) -> tuple[Tensors, Tensors, Numbers] | tuple[()]:
        """Means of earlier gradients, what they become, and the numbers that go with them."""
        return ()


class UnscaledAscent(AscentPerturbation):
    """SAM whose ascent's gradient goes into the update or a state, so that perturb(scaler) unscales it."""

    uses_ascent_gradient = True

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        super().check(cycle, params, new, scaler)
        if scaler is not None:
            check_can_unscale(scaler, params, f"{self.name} needs; keep float32 weights under torch.autocast")

    def unscale(self, cycle: Cycle, scaler: Any) -> list[Tensor]:
        """The scaler's flags of inf or nan; none without a scaler."""
        if scaler is None:
            return []
        cycle.unscaled.scaler = scaler
        return cycle.unscaled.unscale(cycle.groups.listed())

    def check_unscaled(self, cycle: Cycle, amp: Amp) -> None:
        """
        Raises:
            RuntimeError: the step is scaled, and perturb() was not given the scaler.
        """
        if amp.found_inf is not None and not cycle.unscaled.is_done:
            refuse_scaled_ascent(self.name)


class Climb(NamedTuple):
    """What a bucket climbs along."""

    along: list[Tensor]
    numbers: Numbers  # "rho", and "eta" of T_w
    means: Tensors = None
    new_means: Tensors = None
    of_means: Numbers | None = None  # "sigma", "momentum"


def climb_calls(partition: Partition, stores: list[CleanStore], climb_of: Callable[[Bucket], Climb]) -> list[Call]:
    """perturb_ascent_ on every bucket, by the norm over all of them, scaled by T_w where eta >= 0."""
    norms, calls = [], []
    for bucket, store in zip(partition.buckets, stores, strict=True):
        along, numbers, means, new_means, of_means = climb_of(bucket)
        of_means = of_means or {"sigma": bucket.zeros, "momentum": bucket.zeros}
        norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
        weights = (store.masters or bucket.params) if any([e >= 0 for e in numbers["eta"]]) else None
        bucket.op("ascent_norm_")(norm, weights, along, means, eta=numbers["eta"], sigma=of_means["sigma"])
        norms.append((bucket.ranks, norm))
        arguments = bucket.params, store.backups, new_means, store.masters, along, means
        calls.append(Call(bucket, "perturb_ascent_", arguments, numbers | of_means))
    total = global_norm(norms) if norms else None
    for call in calls:
        call.args += (total.to(call.bucket.device),)  # type: ignore[union-attr]
    return calls


def warn_if_rounded_away(cycle: Cycle, name: str) -> None:
    """bfloat16 weights may be too coarse for a climb; once, at the first."""
    cycle.warned_rounded_away = True
    moved, total = cycle.weights.rounded_away()
    if total:
        warn_rounded_away(name, moved, total)
