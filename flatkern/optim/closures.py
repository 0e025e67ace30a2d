"""step(closure): torch's convention, with as many passes as the method needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import shards
from ..methods import RWP, SAM
from . import messages, perturbations

if TYPE_CHECKING:
    from .base import FlatOptimizer

Closure = Callable[[], Any]


def step(opt: FlatOptimizer, closure: Closure | list[Closure]) -> Any:
    """Run the closures and step; on every way out the weights are clean (rolling: after a failure)."""
    cycle = opt.cycle
    messages.refuse_suspended(opt, "step")
    if getattr(opt, "grad_scale", None) is not None or getattr(opt, "found_inf", None) is not None:
        raise RuntimeError(
            "step: a closure together with a gradient scaler: the closure's gradients would be scaled after the scaler "
            "checked them; run the passes yourself (perturb(), backward, ...), then scaler.step(opt) without closure"
        )
    closures = list(closure) if isinstance(closure, (list, tuple)) else [closure]
    if not closures or not all(callable(c) for c in closures):
        raise TypeError(f"step: closure is {closure!r}, but should be a callable or a list of them")
    fresh = cycle.is_fresh(opt._parameters())
    _check_number(opt, closures, fresh)
    if not fresh and cycle.plan is None and (cycle.rounds or cycle.clean):
        raise RuntimeError("step: rounds are pending; finish them with step() without a closure, or release() them")
    try:
        if fresh and (opt.method is None or opt.rolling):
            return _accumulated(opt, closures)
        if fresh:
            return _with_gradients_on_entry(opt, closures)
        if opt.rolling or cycle.plan is not None:
            return _one(opt, closures)
        if isinstance(opt.method, SAM):
            return _rounds(opt, closures)
        if isinstance(opt.method, RWP) and opt.method.lam is not None:
            return _mixed(opt, closures)
        return _one(opt, closures)
    except BaseException:
        perturbations.abort_round(opt)
        cycle.drop_pending()
        _clear(opt)  # what a failed pass left behind is nobody's gradient
        raise


def _call(closure: Closure) -> Any:
    with torch.enable_grad():
        return closure()


def _check_number(opt: FlatOptimizer, closures: list[Closure], fresh: bool) -> None:
    """One closure; m-RWP takes two, [clean, noisy], and mSAM one for each shard."""
    method = opt.method
    whole = not fresh and opt.cycle.plan is None
    most = 1
    if whole and isinstance(method, SAM):
        most = len(closures)
    elif whole and isinstance(method, RWP) and method.lam is not None:
        most = 2
    if len(closures) > most:
        raise ValueError(
            f"step: {len(closures)} closures, but "
            + ("m-RWP takes one, or two: [clean, noisy]" if most == 2 else "this step takes one")
        )


def _accumulated(opt: FlatOptimizer, closures: list[Closure]) -> Any:
    """Plain and rolling, every gradient of a step is taken at the same weights: what is there already counts.

    Trainers that accumulate micro-batches pass a closure for the last one only.
    """
    loss = _call(closures[0])
    opt._step()
    return loss


def _with_gradients_on_entry(opt: FlatOptimizer, closures: list[Closure]) -> Any:
    """Trainers with manual optimization pass a closure that adds nothing: the gradients are there already."""
    closure = closures[0]
    before = {p: (p.grad, shards.version(p.grad)) for p in opt._parameters() if p.grad is not None}
    loss = _call(closure)
    for p in opt._parameters():
        known = before.get(p)
        changed = p.grad is not None
        if known is not None:
            changed = p.grad is not known[0] or shards.version(known[0]) != known[1]
        if changed:
            raise RuntimeError(
                "step: there were fresh gradients in .grad and the closure added to them or replaced them; "
                "call zero_grad() before step(closure), or step() without a closure"
            )
    opt._step()
    return loss


def _clear(opt: FlatOptimizer) -> None:
    for p in opt._parameters():
        p.grad = None
    opt.cycle.consumed = None


def _one(opt: FlatOptimizer, closures: list[Closure]) -> Any:
    """One pass: plain, RWP, rolling, or the perturbed pass of an explicit cycle."""
    closure = closures[0]
    if not (opt.cycle.plan is not None and opt.cycle.rounds):
        _clear(opt)
    if isinstance(opt.method, RWP) and not opt.rolling and opt.cycle.plan is None:
        opt.perturb()
    loss = _call(closure)
    opt._step()
    return loss


def _rounds(opt: FlatOptimizer, closures: list[Closure]) -> Any:
    """SAM: the closure twice. mSAM: every shard's closure twice, all from the same clean weights."""
    losses = []
    for k, closure in enumerate(closures):
        if k:
            opt.restore()
        _clear(opt)
        losses.append(_call(closure))
        opt.perturb()
        summed = {p: p.grad for p in opt._parameters() if p.grad is not None} if k else {}
        _call(closure)
        if any(p.grad is not g for p, g in summed.items()):
            raise RuntimeError(
                "step: a closure replaced the gradients that sum up earlier shards; inside closures call "
                "opt.zero_grad(), which keeps them, not model.zero_grad()"
            )
    opt._step()
    if len(losses) == 1 or any(loss is None for loss in losses):
        return losses[0]
    return sum(losses) / len(losses)


def _mixed(opt: FlatOptimizer, closures: list[Closure]) -> Any:
    """m-RWP: a clean and a perturbed pass; mix="losses" leaves both gradients to autograd."""
    method = opt.method
    assert isinstance(method, RWP)
    if method.mix == "losses":
        raise RuntimeError(
            'step: mix="losses" leaves the weighting and the zeroing to the training loop; use step() without a closure'
        )
    _clear(opt)
    loss = _call(closures[0])
    opt.perturb()
    _call(closures[-1])
    opt._step()
    return loss
