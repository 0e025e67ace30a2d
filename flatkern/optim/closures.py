"""step(closure): torch's convention, with as many passes as the method needs, through the public calls alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import dtensor
from .cycle import Cycle
from .gradients import Grads, added, gradients_of
from .perturbation import NoPerturbation
from .phase import SUSPENDED

Closure = Callable[[], Any]


class Passes(Protocol):
    """The calls of an optimizer that a step with closures is made of."""

    cycle: Cycle
    perturbation: NoPerturbation

    def perturb(self) -> None: ...

    def restore(self) -> None: ...

    def step_without_closure(self) -> None: ...


def step(opt: Passes, closure: Closure | list[Closure], scaled: bool) -> Any:
    """Run the closures and step; on every way out the weights are clean (rolling: after a failure).

    Arguments:
        scaled: inside `scaler.step(opt)`.
    """
    cycle, perturbation = opt.cycle, opt.perturbation
    if scaled:
        raise RuntimeError(
            "step: a closure together with a gradient scaler: the closure's gradients would be scaled after the scaler "
            "checked them; run the passes yourself (perturb(), backward, ...), then scaler.step(opt) without closure"
        )
    closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
    if not closures or not all(callable(c) for c in closures):
        raise TypeError(f"step: closure is {closure!r}, but should be a callable or a list of them")
    params = cycle.groups.params()
    new, perturbed = cycle.gradients.was_given(params), cycle.weights.partition is not None
    kind = "one" if new or perturbed else perturbation.closures_of(cycle.groups.listed())
    _check_number(kind, closures)
    if kind == "none":
        raise RuntimeError(
            'step: mix="losses" leaves the weighting and the zeroing to the training loop; use step() without a closure'
        )
    if not new and not perturbed and (cycle.gradients.rounds or cycle.gradients.clean):
        raise RuntimeError("step: rounds are pending; finish them with step() without a closure, or release() them")
    try:
        if new:
            # Trainers that accumulate micro-batches pass a closure for the last one only: what is there already counts.
            finish = _one_more if perturbation.accumulates else _nothing_more
            return finish(opt, closures, params)
        return {"one": _one, "once each": _shards, "twice each": _rounds, "clean and perturbed": _mixed}[kind](
            opt, closures, params
        )
    except BaseException:
        abort_round(opt)
        cycle.drop_pending()
        # What a failed pass left behind is not a valid gradient.
        cycle.gradients.clear(params)
        raise


def abort_round(opt: Passes, rounds_before: int | None = None) -> None:
    """After an exception: clean weights, this round's gradients dropped, earlier rounds kept.

    Arguments:
        rounds_before: rounds that were finished before this one. A step that fails leaves clean weights and finishes
            its round, whose gradients cannot be told from those of earlier ones any more.
    """
    cycle = opt.cycle
    if cycle.weights.partition is None:
        if rounds_before is not None and cycle.gradients.rounds > rounds_before:
            cycle.gradients.clear(cycle.groups.params())
            cycle.drop_pending()
        return
    if cycle.phase is SUSPENDED:
        cycle.weights.left()
    else:
        cycle.weights.restore()
    cycle.gradients.drop_round(cycle.groups.params())
    opt.perturbation.drop_round(cycle)
    cycle.drop_ascent()
    cycle.unscaled.scaler = None
    if not cycle.gradients.rounds:
        cycle.drop_pending()


def _call(closure: Closure) -> Any:
    with torch.enable_grad():
        return closure()


def _check_number(kind: str, closures: list[Closure]) -> None:
    """One closure; m-RWP takes two, [clean, noisy], and mSAM one for each shard."""
    most = {"one": 1, "none": 2, "clean and perturbed": 2}.get(kind, len(closures))
    if len(closures) > most:
        raise ValueError(
            f"step: {len(closures)} closures, but "
            + ("m-RWP takes one, or two: [clean, noisy]" if most == 2 else "this step takes one")
        )


def _one_more(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    loss = _call(closures[0])
    opt.step_without_closure()
    return loss


def _nothing_more(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    """Trainers with manual optimization pass a closure that adds nothing: the gradients are there already."""
    before = {p: (p.grad, dtensor.version(p.grad)) for p in params if p.grad is not None}
    loss = _call(closures[0])
    for p in params:
        known = before.get(p)
        changed = p.grad is not None
        if known is not None:
            changed = p.grad is not known[0] or dtensor.version(known[0]) != known[1]
        if changed:
            raise RuntimeError(
                "step: there were gradients in .grad that no step has used, and the closure added to them or replaced "
                "them; call zero_grad() before step(closure), or step() without a closure"
            )
    opt.step_without_closure()
    return loss


def _one(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    """One pass: plain, RWP, rolling, or the perturbed pass of an explicit cycle."""
    cycle, perturbation = opt.cycle, opt.perturbation
    perturbed = cycle.weights.partition is not None
    if not (perturbed and cycle.gradients.rounds):
        cycle.gradients.clear(params)
    if perturbation.starts_perturbed and not perturbed:
        opt.perturb()
    return _one_more(opt, closures, params)


def _rounds(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    """SAM: the closure twice. mSAM: every shard's closure twice, all from the same clean weights."""
    losses = []
    for k, closure in enumerate(closures):
        if k:
            opt.restore()
        opt.cycle.gradients.clear(params)
        losses.append(_call(closure))
        if len(closures) == 1 and all(p.grad is None for p in params):
            break  # no backward has run: nothing to ascend along, and as for torch's optimizers nothing to apply
        opt.perturb()
        summed = {p: p.grad for p in params if p.grad is not None} if k else {}
        _call(closure)
        if any(p.grad is not g for p, g in summed.items()):
            raise RuntimeError(
                "step: a closure replaced the gradients that sum up earlier shards; inside closures call "
                "opt.zero_grad(), which keeps them, not model.zero_grad()"
            )
    opt.step_without_closure()
    return _combined(losses, opt.perturbation.sums)


def _shards(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    """A step between ascents: every shard's closure once, at the clean weights."""
    ledger, losses = opt.cycle.gradients, []
    ledger.clear(params)
    total: Grads = []
    for closure in closures:
        losses.append(_call(closure))
        if len(closures) > 1:
            grads = ledger.take(params, gradients_of(params))
            total = added(total, grads) if total else grads
    for p, g in zip(params, total, strict=False):
        p.grad = g if g is None or opt.perturbation.sums else g / len(closures)
    opt.step_without_closure()
    return _combined(losses, opt.perturbation.sums)


def _combined(losses: list[Any], sums: bool) -> Any:
    if len(losses) == 1 or any(loss is None for loss in losses):
        return losses[0]
    return sum(losses) if sums else sum(losses) / len(losses)


def _mixed(opt: Passes, closures: list[Closure], params: list[Tensor]) -> Any:
    """m-RWP: a clean and a perturbed pass."""
    opt.cycle.gradients.clear(params)
    loss = _call(closures[0])
    opt.perturb()
    _call(closures[-1])
    opt.step_without_closure()
    return loss
