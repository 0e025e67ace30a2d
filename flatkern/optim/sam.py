"""SAM, ASAM and mSAM: up along the gradient at the clean weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods import ASAM, SAM
from .amp import record
from .buckets import Bucket, Call, Partition, global_norm
from .cycle import Cycle
from .errors import warn_rounded_away
from .gradients import Grads, gradients_of
from .groups import Group
from .perturbation import NoPerturbation
from .weights import CleanStore

# Ascent of the objective that is minimised: with maximize=True that is descent.
RHO = {"rho": lambda group: -float(group["rho"]) if group.get("maximize") else float(group["rho"])}


class AscentPerturbation(NoPerturbation):
    """SAM: up along the gradient, by rho in the norm over all perturbed parameters. Several rounds make mSAM."""

    pattern = "loss.backward(); opt.perturb(); loss on the same batch .backward(); opt.step()"
    closures = "twice each"
    moves = True
    ascends = True
    refuses_perturb = ""
    accumulates = False
    launches = 3

    def __init__(self, method: SAM) -> None:
        self.name = type(method).__name__
        self.sums = method.rounds == "sum"

    def is_described_by(self, saved: Group, group: Group) -> bool:
        return "rho" in saved and ("eta" in saved) == ("eta" in group)

    def rho(self, bucket: Bucket) -> list[float]:
        """The radius per parameter; negative ones descend."""
        return bucket.columns("rho", RHO)["rho"]

    def eta(self, bucket: Bucket) -> list[float]:
        """eta of T_w per parameter, -1 where T_w = 1."""
        return bucket.constant(-1.0)

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
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
        calls = cycle.weights.perturb(partition, lambda stores, again: self._calls(partition, stores, grads, again))
        norm = calls[0].args[-1] if calls else torch.zeros((), dtype=torch.float32, device=params[0].device)
        cycle.ascent_norm, cycle.before_ascent = norm, (cycle.nonfinite,)
        nonfinite = norm.mul(0).ne_(0)  # 0 times what is not finite is not a number
        cycle.skip_if([nonfinite])
        if not cycle.warned_rounded_away:
            cycle.warned_rounded_away = True
            moved, total = cycle.weights.rounded_away()
            if total:
                warn_rounded_away(self.name, moved, total)
        cycle.gradients.clear(params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)
        if scaler is not None:
            record(scaler, nonfinite)

    def _calls(self, partition: Partition, stores: list[CleanStore], grads: Grads, lay_out: bool) -> list[Call]:
        """perturb_ascent_ on every bucket, by the norm of the gradient over all of them, scaled by T_w for ASAM."""
        norms, calls = [], []
        for bucket, store in zip(partition.buckets, stores, strict=True):
            rho, eta, ascended = self.rho(bucket), self.eta(bucket), bucket.gradients(grads, lay_out)
            norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
            weights = (store.masters or bucket.params) if any([e >= 0 for e in eta]) else None
            bucket.op("ascent_norm_")(norm, weights, ascended, eta=eta)
            norms.append((bucket.ranks, norm))
            calls.append(Call(bucket, "perturb_ascent_", (bucket.params, *store, ascended), {"rho": rho, "eta": eta}))
        total = global_norm(norms) if norms else None
        for call in calls:
            call.args += (total.to(call.bucket.device),)  # type: ignore[union-attr]
        return calls


class AdaptiveAscent(AscentPerturbation):
    """ASAM: the ascent is scaled by T_w = |w| + eta."""

    def __init__(self, method: ASAM) -> None:
        super().__init__(method)
        self.all_tensors = method.all_tensors

    def is_adaptive(self, p: Tensor) -> bool:
        return self.all_tensors or p.dim() >= 2

    def eta(self, bucket: Bucket) -> list[float]:
        eta = bucket.values("eta")
        return [e if self.is_adaptive(p) else -1.0 for e, p in zip(eta, bucket.params, strict=True)]
