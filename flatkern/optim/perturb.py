"""The perturbations, one class each: what it needs in `.grad`, the point it moves to, the final gradient it forms.

`perturbation_of` is the only place that asks which method it is. Everything else asks the class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..dispatch import resolve
from ..methods import ASAM, RWP, SAM
from ..tables import history_length
from ..values import check_uint32
from .amp import Amp, check_can_unscale
from .buckets import Bucket, Call, Partition
from .cycle import Cycle
from .draw import draw
from .errors import refuse_lost_sum, warn_rounded_away
from .gradients import Final, Grads, gradients_of, mean_is_over_ranks, resolved
from .groups import Group
from .weights import CleanStore


class NoPerturbation:
    """The plain base optimizer, and what perturbations share."""

    name = "None"
    moves = False  # the weights, in perturb()
    pattern = "loss.backward(); opt.step()"
    closures = "one"  # what step(closure) takes, and how often it calls it; see closures.py
    draws = False  # noise, so that groups have seed, stream and round
    rolling = False  # the noise stays on between steps
    refuses_perturb = "perturb: this optimizer has no perturbation; pass perturb=flatkern.RWP(), SAM() or ASAM()"
    ascends = False  # along the gradient, which has to be there before perturb()
    has_clean_pass = False  # a step needs a gradient at the clean weights, too
    mixes = False  # and mixes it with the perturbed one in the update
    accumulates = True  # all gradients of a step are taken at the same weights
    launches = 1  # op calls of perturb() and step()

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        """Refuse values of a group that do not go together."""

    def is_described_by(self, saved: Group, group: Group) -> bool:
        """True if a saved group's values mean what they mean in `group`; keys of another method have the same names."""
        return True

    def keeps_history(self, group: Group) -> bool:
        """True if parameters of the group have ARWP's history."""
        return False

    def is_adaptive(self, p: Tensor) -> bool:
        """True if the ascent of `p` is scaled by T_w = |w| + eta."""
        return False

    def loss_weight(self, groups: list[Group], perturbed: bool) -> float:
        return 1.0

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        """Refuse perturb(), before anything is written.

        Arguments:
            new: there is a gradient in `.grad` that the last call did not use up.
        """

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        """CLEAN -> PERTURBED, and the gradients to where the next backward needs them."""
        raise NotImplementedError

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        """restore() has put the clean weights back: keep this round's gradients.

        Arguments:
            counted: the round has a gradient.
        """
        if counted or cycle.gradients.rounds:
            cycle.gradients.set_aside(params, counted)
        if not counted:
            cycle.drop_ascent()

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        """A step has failed and left clean weights: this round's gradients stay where they are."""
        cycle.gradients.keep_round(params)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        """The gradients of this step; None where a round without any leaves nothing to apply. Refuses; writes nothing.

        Arguments:
            grads: `.grad` of `params`.
        """
        ledger, perturbed = cycle.gradients, cycle.weights.partition is not None
        if not perturbed and not ledger.rounds:
            return Final(grads)
        rounds = ledger.rounds + (perturbed and ledger.has_new_since_perturb(params))
        if not rounds:
            return None
        if perturbed:
            summed = with_earlier_rounds(cycle, params, grads) if ledger.rounds else grads
            return Final(summed, rounds=rounds, at_perturbed_weights=True)
        if ledger.has_new_since_perturb(params):
            raise RuntimeError(
                f"step: {self.name} has {rounds} finished rounds and a gradient at clean weights that "
                "belongs to none; call perturb() for another round, or zero_grad()"
            )
        if ledger.lost:
            refuse_lost_sum()
        summed = resolved(ledger.accumulated_grads)
        return Final(summed, rounds=rounds, at_perturbed_weights=True, from_grad=False)


class RandomPerturbation(NoPerturbation):
    """RWP and ARWP: Gaussian noise, and one gradient, taken there."""

    pattern = "opt.perturb(); loss.backward(); opt.step()"
    moves = True
    draws = True
    refuses_perturb = ""
    accumulates = False
    launches = 2

    def __init__(self, method: RWP) -> None:
        self.name = type(method).__name__
        self.lam = method.lam

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        if (group["lam"] is None) != (self.lam is None):
            raise ValueError(
                f"{optimizer}: a group has lam={group['lam']!r} and the method lam={self.lam!r}; "
                "lam may not mix None and a number"
            )
        for key in ("seed", "stream", "round"):
            if not (capturable and isinstance(group[key], Tensor)):
                check_uint32(optimizer, key, group[key])

    def is_described_by(self, saved: Group, group: Group) -> bool:
        return (
            "sigma" in saved
            and (saved["lam"] is None) == (group["lam"] is None)
            and (saved["eta"] > 0) == (group["eta"] > 0)
        )

    def keeps_history(self, group: Group) -> bool:
        return bool(group["eta"] > 0 and group["perturb"])

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        if new and not cycle.gradients.holds_zeros_only(params):
            raise RuntimeError(
                "perturb: there is a gradient in .grad that no step has used, and RWP has one gradient, taken at the "
                "perturbed weights, so it would be lost; call opt.zero_grad() if it is not wanted. "
                f"The pattern is: {self.pattern}"
            )

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        draw(cycle)
        cycle.unscaled.scaler = scaler
        if new:
            self.keep_clean_gradient(cycle, params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)
        cycle.scalars.next_round()

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        """Keep the gradient at the clean weights, which came first. Here there is none, but for zeros."""
        cycle.gradients.mark_zeroed(params)


class RollingPerturbation(RandomPerturbation):
    """RWP and ARWP whose noise stays on between steps; step() renews it."""

    pattern = "opt.train(); loss.backward(); opt.step(); or opt.follow(model) once"
    rolling = True
    refuses_perturb = "perturb: the optimizer is rolling and perturbs in step(); use train(), eval() or follow(model)"
    accumulates = True
    launches = 1

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        """There are no rounds."""

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        """There are no rounds."""

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final:
        return Final(grads, at_perturbed_weights=cycle.weights.partition is not None)


class MixedPerturbation(RandomPerturbation):
    """m-RWP and m-ARWP: (1 - lam) of the gradient at the clean weights and lam of the perturbed one."""

    pattern = "loss on A .backward(); opt.perturb(); loss on B .backward(); opt.step()"
    closures = "clean and perturbed"
    has_clean_pass = True
    mixes = True

    def loss_weight(self, groups: list[Group], perturbed: bool) -> float:
        lam = {group["lam"] for group in groups}
        if len(lam) > 1:
            raise RuntimeError(f"loss_weight: groups have different lam {sorted(lam)}, so no single loss weight exists")
        value = float(lam.pop())
        return value if perturbed else 1.0 - value

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        ledger = cycle.gradients
        if ledger.rounds and cycle.unscaled.is_done and not ledger.clean:
            raise RuntimeError(
                "perturb: under a GradScaler m-RWP takes one noisy round before its clean pass, not several"
            )
        if ledger.clean and new:
            raise RuntimeError("perturb: a second clean gradient, but m-RWP has one; call step() or zero_grad() first")
        if scaler is not None:
            check_can_unscale(scaler, params)

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        if cycle.unscaled.scaler is not None:
            cycle.skip_if(cycle.unscaled.unscale(cycle.groups.listed()))
        cycle.gradients.clean = cycle.gradients.take(params, gradients_of(params))

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if counted and cycle.unscaled.scaler is not None and not cycle.gradients.clean:
            cycle.skip_if(cycle.unscaled.unscale(cycle.groups.listed()))
        super().end_round(cycle, params, counted)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        """The perturbed gradients and exactly one clean one, whichever pass came first."""
        ledger, perturbed = cycle.gradients, cycle.weights.partition is not None
        if not perturbed and not ledger.rounds and not ledger.clean:
            return Final(grads)
        rounds = ledger.rounds + (perturbed and ledger.has_new_since_perturb(params))
        if not rounds and perturbed and not ledger.clean:
            return None
        new_clean = not perturbed and ledger.is_new(params)
        self._check_passes(cycle, rounds, new_clean, amp)
        if ledger.lost:
            refuse_lost_sum()
        if not new_clean:
            if not perturbed:
                grads = resolved(ledger.accumulated_grads)
            elif ledger.rounds:
                grads = with_earlier_rounds(cycle, params, grads)
            return Final(grads, ledger.clean, rounds, True)
        # restore() has unscaled the perturbed gradients; `.grad`, the clean one, still carries the scale.
        clean = grads if amp.grad_scale is None else unscaled_copies(grads, amp.grad_scale.reciprocal())
        return Final(resolved(ledger.accumulated_grads), clean, rounds, True, unscaled=True)

    def _check_passes(self, cycle: Cycle, rounds: int, new_clean: bool, amp: Amp) -> None:
        perturbed, clean = cycle.weights.partition is not None, cycle.gradients.clean
        if not rounds:
            raise RuntimeError(
                "step: m-RWP has a clean gradient but no perturbed one; run a backward between perturb() and step()"
            )
        if new_clean and clean:
            raise RuntimeError("step: m-RWP has two clean gradients, but needs exactly one; zero_grad() drops the last")
        if not new_clean and not clean:
            first = "call restore(), " if perturbed else ""
            raise RuntimeError(
                f"step: m-RWP needs one clean gradient; {first}run a backward at the clean weights, then step()"
            )
        if amp.found_inf is not None and not cycle.unscaled.is_done:
            raise RuntimeError(
                'step: m-RWP with mix="gradients" under a GradScaler needs perturb(scaler=scaler), which unscales the '
                "gradient that the scaler does not see in step()"
            )


class MixedLosses(MixedPerturbation):
    """mix="losses": losses are weighted by lam, and autograd adds the gradients up in `.grad`."""

    closures = "none"
    mixes = False

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        if any(group["eta"] > 0 for group in cycle.groups) and new:
            raise RuntimeError(
                'perturb: m-ARWP with mix="losses" must see the perturbed gradient alone; run the noisy pass first: '
                "perturb(); backward; restore(); backward; step()"
            )

    def keep_clean_gradient(self, cycle: Cycle, params: list[Tensor]) -> None:
        """It stays in `.grad`."""

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        if counted:
            cycle.gradients.squares = self._squares(cycle)

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        self.end_round(cycle, params, counted=True)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        if amp.found_inf is not None and cycle.gradients.squares and cycle.unscaled.scaler is None:
            raise RuntimeError(
                'step: m-ARWP with mix="losses" under a GradScaler needs perturb(scaler=scaler), for the scale of '
                "the perturbed gradient"
            )
        final = NoPerturbation.final(self, cycle, params, grads, amp)
        if final is None:
            return None
        return replace(final, squares=self._squares(cycle) if final.at_perturbed_weights else cycle.gradients.squares)

    def _squares(self, cycle: Cycle) -> dict[Tensor, Tensor]:
        """What the history needs of the perturbed gradient, which is in `.grad` only now."""
        squares = {}
        for group in filter(self.keeps_history, cycle.groups):
            params = [p for p in group["params"] if p.grad is not None]
            wide = [dtensor.local(p.grad) for p in params if p.dim() >= 2]
            norms = [g.new_empty(history_length(g), dtype=torch.float32) for g in wide]
            if wide:
                resolve("filter_norms_", wide[0].device.type, cycle.groups.setup.backend)(norms, wide)
            rest = iter(norms)
            scale = float(group["lam"]) * cycle.unscaled.loss_scale()
            for p in params:
                g = next(rest) if p.dim() >= 2 else dtensor.local(p.grad).float().flatten()
                squares[p] = (g / scale).square() if group["lam"] else torch.zeros_like(g)
        return squares


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
        cycle.skip_if([(~norm.isfinite()).float()])
        if not cycle.warned_rounded_away:
            cycle.warned_rounded_away = True
            moved, total = cycle.weights.rounded_away()
            if total:
                warn_rounded_away(self.name, moved, total)
        cycle.gradients.clear(params)
        if cycle.gradients.accumulated_grads:
            cycle.gradients.give_back(params)

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


def perturbation_of(method: RWP | SAM | None, where: str = "perturbation_of") -> NoPerturbation:
    """The class behind a method.

    Raises:
        TypeError: it is none of ours.
    """
    if method is None:
        return NoPerturbation()
    if isinstance(method, ASAM):
        return AdaptiveAscent(method)
    if isinstance(method, SAM):
        return AscentPerturbation(method)
    if isinstance(method, RWP):
        if method.rolling:
            return RollingPerturbation(method)
        if method.lam is None:
            return RandomPerturbation(method)
        return (MixedLosses if method.mix == "losses" else MixedPerturbation)(method)
    raise TypeError(f"{where}: perturb is {method!r}, but should be flatkern.RWP, SAM or ASAM, or None")


def global_norm(norms: list[tuple[dtensor.Ranks, Tensor]]) -> Tensor:
    """The norm over several buckets, on the device of the first; each is summed over the ranks that share it."""
    first = norms[0][1]
    if len(norms) == 1 and not norms[0][0]:
        return first
    shared: dict[dtensor.Ranks, list[Tensor]] = {}
    for ranks, norm in norms:
        shared.setdefault(ranks, []).append(norm.to(first.device).double().square())
    squares = [dtensor.all_reduce_sum(torch.stack(each).sum(), ranks) for ranks, each in shared.items()]
    return torch.stack(squares).sum().sqrt().float()


def with_earlier_rounds(cycle: Cycle, params: list[Tensor], grads: Grads) -> Grads:
    """`grads` with the sum of earlier rounds, which is in `.grad` unless somebody else has cleared it since."""
    ledger = cycle.gradients
    if ledger.lost:
        refuse_lost_sum()
    if not ledger.sum_was_replaced(grads):
        return grads
    if ledger.sum_is_lost(params):
        refuse_lost_sum()
    if not ledger.sum_was_cleared(params):
        return grads
    if mean_is_over_ranks():
        # Earlier rounds ran unsynchronized, so that a sum kept by each rank would part the replicas.
        raise RuntimeError(
            "step: the sum of earlier rounds in .grad was cleared between the rounds, and with several ranks it cannot "
            "be added afterwards; between rounds call opt.zero_grad(), which keeps it, not model.zero_grad(). "
            "restore() gives the clean weights back"
        )
    ledger.add_cleared_sum(params)
    return [p.grad for p in params]


def unscaled_copies(grads: Grads, factor: Tensor) -> Grads:
    copies = [dtensor.local(g).clone() for g in grads if g is not None]
    torch._foreach_mul_(copies, factor)
    parts = iter(copies)
    return [None if g is None else dtensor.wrap_like(g, next(parts), g.shape) for g in grads]
