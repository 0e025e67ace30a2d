"""SAM, ASAM and mSAM: up along the gradient at the clean weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..methods import SAM
from ..values import check_flag
from .amp import record
from .buckets import Bucket, Call, Partition, global_norm
from .cycle import Cycle
from .errors import warn_rounded_away, warn_unnamed
from .gradients import Grads, gradients_of
from .groups import Group
from .names import names_of
from .perturbation import NoPerturbation
from .weights import CleanStore

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
    rule by names.
    """

    pattern = "loss.backward(); opt.perturb(); loss on the same batch .backward(); opt.step()"
    closures = "twice each"
    moves = True
    ascends = True
    ops = ("ascent_norm_", "perturb_ascent_")
    refuses_perturb = ""
    accumulates = False
    launches = 3

    def __init__(self, method: SAM) -> None:
        self.name = type(method).__name__
        self.sums = method.rounds == "sum"

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        if group["adaptive"] is None:
            return
        try:
            check_flag(optimizer, "adaptive", group["adaptive"])
        except TypeError as error:
            raise TypeError(f"{error}, or None for ASAM's rule by names") from None

    def is_described_by(self, saved: Group, group: Group) -> bool:
        # Before groups told which method they are of, ASAM's had eta and SAM's had not.
        before = "ASAM" if "eta" in saved else "SAM"
        return "rho" in saved and saved.get("ascent", before) == group["ascent"]

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
        calls = cycle.weights.perturb(
            partition, lambda stores, again: self._calls(cycle, partition, stores, grads, again)
        )
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

    def _calls(
        self, cycle: Cycle, partition: Partition, stores: list[CleanStore], grads: Grads, lay_out: bool
    ) -> list[Call]:
        """perturb_ascent_ on every bucket, by the norm of the gradient over all of them, scaled by T_w for ASAM."""
        norms, calls = [], []
        for bucket, store in zip(partition.buckets, stores, strict=True):
            numbers = bucket.columns("ascent", ASCENT, partial(self._by_rule, cycle))
            eta, ascended = numbers["eta"], bucket.gradients(grads, lay_out)
            norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
            weights = (store.masters or bucket.params) if any([e >= 0 for e in eta]) else None
            bucket.op("ascent_norm_")(norm, weights, ascended, None, eta=eta, sigma=bucket.zeros)
            norms.append((bucket.ranks, norm))
            arguments = bucket.params, store.backups, None, store.masters, ascended, None
            numbers = {**numbers, "sigma": bucket.zeros, "momentum": bucket.zeros}
            calls.append(Call(bucket, "perturb_ascent_", arguments, numbers))
        total = global_norm(norms) if norms else None
        for call in calls:
            call.args += (total.to(call.bucket.device),)  # type: ignore[union-attr]
        return calls
