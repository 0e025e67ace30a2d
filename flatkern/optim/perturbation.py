"""What every perturbation answers: what it needs in `.grad`, the point it moves to, the final gradient it forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..values import Range
from .amp import Amp
from .buckets import Bucket, SharedArguments
from .cycle import Cycle
from .errors import refuse_lost_sum
from .gradients import Final, Grads, mean_is_over_ranks, resolved
from .groups import Group
from .traffic import Sizes, Traffic

Weights = Mapping[str, Callable[[Group], float]]  # "grad_weight", "clean_weight"
MIXED_BY_LAM: Weights = {
    "grad_weight": lambda group: float(group["lam"]),
    "clean_weight": lambda group: 1.0 - float(group["lam"]),
}


class NoPerturbation:
    """The plain base optimizer, and what perturbations share."""

    name = "None"
    moves = False  # the weights, in perturb()
    pattern = "loss.backward(); opt.step()"
    closures = "one"  # what step(closure) takes, and how often it calls it; see closures.py, and `closures_of`
    draws = False  # noise, so that groups have seed, stream and round
    rolling = False  # the noise stays on between steps
    refuses_perturb = "perturb: this optimizer has no perturbation; pass perturb=flatkern.RWP(), SAM(), ..."
    starts_perturbed = False  # a step begins with perturb(), before its only gradient
    ascends = False  # along the gradient, which has to be there before perturb()
    uses_ascent_gradient = False  # in the update or in its state: under DDP that backward has to be synchronized
    counts_steps = False  # by `count_step`
    combines = False  # what the update takes of the clean gradients, by `combine`
    has_interval = False  # only some steps are perturbed; groups have perturb_interval and perturb_count
    has_clean_pass = False  # a step needs a gradient at the clean weights, too
    mixes = False  # the gradient at the clean weights enters the update, too
    weights: ClassVar[Weights] = {}  # of both gradients in the update, where it mixes
    state_key: str | None = None  # of what it keeps per parameter, like a momentum
    ranges: ClassVar[Mapping[str, Range]] = {}  # of group values that have another range than elsewhere
    accumulates = True  # all gradients of a step are taken at the same weights
    sums = False  # losses are divided by the number of passes, so that rounds are not
    counts = False  # those passes
    ops: tuple[str, ...] = ()  # that it calls, besides restore_
    launches = 1  # see `launches_of`
    is_clean_rank = False  # perturb() moves nothing here, because other ranks are noisy

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        """Refuse values of a group that do not go together."""

    def check_common(self, groups: list[Group], optimizer: str) -> None:
        """Refuse groups with different values where all share one."""

    def is_due(self, groups: list[Group]) -> bool:
        """True if the coming step is one that perturb() belongs to."""
        return self.moves and not self.rolling

    def closures_of(self, groups: list[Group]) -> str:
        """`closures` of the coming step."""
        return self.closures

    def is_described_by(self, saved: Group, group: Group) -> bool:
        """True if a saved group's values mean what they mean in `group`; keys of another method have the same names."""
        return True

    def keeps_history(self, group: Group) -> bool:
        """True if parameters of the group have ARWP's history."""
        return False

    def is_adaptive(self, group: Group, p: Tensor, name: str) -> bool:
        """True if the ascent of `p` is scaled by T_w = |w| + eta; `name` is "" where nobody has told it."""
        return False

    def loss_weight(self, groups: list[Group], perturbed: bool) -> float:
        return 1.0

    def saw_gradient(self, p: Tensor) -> None:
        """A backward has added to `p.grad`, and no other rank has yet; what a hook of `p` does."""

    def check(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        """Refuse perturb(), before anything is written.

        Arguments:
            new: there is a gradient in `.grad` that the last call did not use up.
        """

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        """CLEAN -> PERTURBED, and the gradients to where the next backward needs them."""
        raise NotImplementedError

    def combine(self, cycle: Cycle, final: Final, parts: list[tuple[Bucket, SharedArguments]]) -> None:
        """What enters the update of the clean gradients, where numbers of the host do not say it. Reads gradients, and
        writes nothing: `SharedArguments.keep` is a call that does, when the step is made."""

    def create_state(self, cycle: Cycle) -> None:
        """What it keeps per parameter, as zeros: distributed checkpoints load what an optimizer has already."""
        if self.state_key is not None:
            perturbed = [p for group in cycle.groups if group["perturb"] for p in group["params"] if p.requires_grad]
            cycle.state.like_params(perturbed, self.state_key)
            cycle.state.keep_created()

    def check_step(self, cycle: Cycle) -> None:
        """Refuse a rolling step, before anything is written."""

    def count_step(self, cycle: Cycle, skipped: bool) -> None:
        """A step has been made, unless it is known to be skipped."""

    def launches_of(self, groups: list[Group]) -> int:
        """Op calls of perturb() and step()."""
        return self.launches

    def traffic(self, group: Group, sizes: Sizes) -> Traffic:
        """Bytes per parameter that a step of this method moves beside its base, at the least."""
        return Traffic()

    def drop_round(self, cycle: Cycle) -> None:
        """A round has failed, and the weights are clean: what its perturb() has changed is as before."""

    def forget(self) -> None:
        """What is pending goes: rounds are dropped, or other state is loaded."""

    def release(self) -> None:
        """Free the scratch."""

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
        divisor = 1 if self.sums else rounds
        if perturbed:
            summed = with_earlier_rounds(cycle, params, grads) if ledger.rounds else grads
            return Final(summed, rounds=divisor, at_perturbed_weights=True)
        if ledger.has_new_since_perturb(params):
            raise RuntimeError(
                f"step: {self.name} has {rounds} finished rounds and a gradient at clean weights that "
                "belongs to none; call perturb() for another round, or zero_grad()"
            )
        if ledger.lost:
            refuse_lost_sum()
        summed = resolved(ledger.accumulated_grads)
        return Final(summed, rounds=divisor, at_perturbed_weights=True, from_grad=False)


class StaysPerturbed(NoPerturbation):
    """Rolling: the perturbation stays on between steps, and step() renews it. There are no rounds."""

    pattern = "opt.train(); loss.backward(); opt.step(); or opt.follow(model) once"
    rolling = True
    starts_perturbed = False
    refuses_perturb = "perturb: the optimizer is rolling and perturbs in step(); use train(), eval() or follow(model)"
    accumulates = True
    renews_inside = False  # in the update, in the same pass, where the same parameters are perturbed again

    def put_on(self, cycle: Cycle) -> None:
        """CLEAN -> PERTURBED, as it was before an evaluation, if it was."""
        raise NotImplementedError

    def nothing_drawn(self, group: Group) -> Group:
        """What stands in a checkpoint for the values of a perturbation, where there has been none."""
        raise NotImplementedError

    def put_on_after_clean(self, cycle: Cycle) -> None:
        """CLEAN -> PERTURBED after a step whose gradient was taken at clean weights."""
        raise NotImplementedError

    def check_next(self, cycle: Cycle) -> None:
        """Refuse a step that no perturbation could follow."""

    def climbs_from_copies(self, cycle: Cycle) -> bool:
        """True if `put_on_next` takes clean weights from their copies, which the step may update in place."""
        return False

    def put_on_next(self, cycle: Cycle) -> None:
        """CLEAN -> PERTURBED after a step from perturbed weights, where it is not renewed inside."""
        raise NotImplementedError

    def end_round(self, cycle: Cycle, params: list[Tensor], counted: bool) -> None:
        """There is none."""

    def keep_round(self, cycle: Cycle, params: list[Tensor]) -> None:
        """There is none."""

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final:
        return Final(grads, at_perturbed_weights=cycle.weights.partition is not None)


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
