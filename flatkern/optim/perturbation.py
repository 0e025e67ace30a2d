"""What every perturbation answers: what it needs in `.grad`, the point it moves to, the final gradient it forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .amp import Amp
from .cycle import Cycle
from .errors import refuse_lost_sum
from .gradients import Final, Grads, mean_is_over_ranks, resolved
from .groups import Group


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
    sums = False  # losses are divided by the number of passes, so that rounds are not
    counts = False  # those passes
    ops: tuple[str, ...] = ()  # that it calls, besides restore_
    launches = 1  # op calls of perturb() and step()
    is_clean_rank = False  # perturb() moves nothing here, because other ranks are noisy

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        """Refuse values of a group that do not go together."""

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
