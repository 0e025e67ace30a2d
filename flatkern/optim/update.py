"""step(): which gradients form the final one, and one update op per bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import shards
from ..checks import LayoutError, check_storage
from ..methods import RWP
from . import capture, enhance, layouts, messages, perturbations, scaling
from .plan import Bucket

if TYPE_CHECKING:
    from .base import FlatOptimizer


@dataclass
class Forming:
    """How the final gradient of one bucket is formed, and what surrounds the rule; the ops' shared arguments."""

    backups: list[Tensor] | None
    masters: list[Tensor] | None
    history: list[Tensor] | None
    clean_grads: list[Tensor] | None
    masks: list[Tensor] | None
    sigmas: Tensor | None
    noise: Tensor | None
    grad_scale: Tensor | None
    clip: Tensor | None
    found_inf: Tensor | None
    grad_weight: list[float]
    clean_weight: list[float]
    kappa: list[float]
    beta: list[float]
    sigma: list[float]
    eta: list[float]
    index: list[int]
    offset: list[int]

    def inputs(self, grads: list[Tensor], lrs: Tensor | None) -> tuple[Any, ...]:
        """The positional arguments that follow a rule's own state."""
        return (
            self.backups, self.masters, self.history, grads, self.clean_grads, self.masks,
            lrs, self.sigmas, self.noise, self.grad_scale, self.clip, self.found_inf,
        )  # fmt: skip

    def method(self) -> dict[str, Any]:
        """The keyword arguments that every update shares."""
        names = ("grad_weight", "clean_weight", "kappa", "beta", "sigma", "eta", "index", "offset")
        return {name: getattr(self, name) for name in names}


@dataclass
class Gradients:
    """What a step applies: one entry per parameter in the optimizer's order, None where missing."""

    grads: list[Tensor | None]  # of the perturbed pass, or of the only one
    clean: list[Tensor | None] | None = None  # m-RWP's, already unscaled
    rounds: int = 1  # of perturbed passes summed up in `grads`
    perturbed: bool = False  # taken at perturbed weights, so they enter ARWP's history
    factor: float | None = None  # 1 / rounds where the gradients are unscaled already


Work = list[tuple[Bucket, list[Tensor], Forming]]


def step(opt: FlatOptimizer) -> None:
    """One optimizer step, whatever the mode; raises before anything has changed."""
    cycle = opt.cycle
    params = opt._parameters()
    opt._check_groups()
    scaling.check_recorded(opt)
    if opt.rolling:
        _rolling_step(opt, params)
        return
    gradients = _final_gradients(opt, params)
    if gradients is None:
        perturbations.restore(opt)
        return
    _apply(opt, params, gradients)
    cycle.leave()
    cycle.drop_pending()
    cycle.mark_consumed(params)


def _final_gradients(opt: FlatOptimizer, params: list[Tensor]) -> Gradients | None:
    """The gradients of this step; None where a round without any gradient leaves nothing to apply."""
    cycle, method = opt.cycle, opt.method
    if cycle.plan is None and not cycle.rounds and not cycle.clean:
        return Gradients([p.grad for p in params])
    this_round = cycle.plan is not None and perturbations.has_round_gradient(opt, params)
    rounds = cycle.rounds + this_round
    if isinstance(method, RWP) and method.lam is not None and method.mix == "gradients":
        return _mixed_gradients(opt, params, rounds)
    if this_round:
        perturbations.remember_squares(opt)
    if not rounds:
        return None
    if cycle.plan is None:
        if cycle.is_fresh(params):
            raise RuntimeError(
                f"step: {type(method).__name__} has {rounds} finished rounds and a gradient at clean weights that "
                "belongs to none; call perturb() for another round, or zero_grad()"
            )
        cycle.put_back(params)
    return Gradients([p.grad for p in params], rounds=rounds, perturbed=True)


def _mixed_gradients(opt: FlatOptimizer, params: list[Tensor], rounds: int) -> Gradients | None:
    """m-RWP: the perturbed gradients and exactly one clean one, whichever pass came first."""
    cycle = opt.cycle
    fresh_clean = cycle.plan is None and cycle.is_fresh(params)
    if not rounds:
        if cycle.plan is not None and not cycle.clean:
            return None
        raise RuntimeError(
            "step: m-RWP has a clean gradient but no perturbed one; run a backward between perturb() and step()"
        )
    if fresh_clean and cycle.clean:
        raise RuntimeError("step: m-RWP has two clean gradients, but needs exactly one; zero_grad() drops the last")
    if not fresh_clean and not cycle.clean:
        first = "call restore(), " if cycle.plan is not None else ""
        raise RuntimeError(
            f"step: m-RWP needs one clean gradient; {first}run a backward at the clean weights, then step()"
        )
    if getattr(opt, "found_inf", None) is not None and cycle.scaler_pass is None:
        raise RuntimeError(
            'step: m-RWP with mix="gradients" under a GradScaler needs perturb(scaler=scaler), which unscales the '
            "gradient that the scaler does not see in step()"
        )
    if not fresh_clean:
        noisy = [p.grad for p in params] if cycle.plan is not None else cycle.aside
        return Gradients(noisy, cycle.clean, rounds, True)
    scale = getattr(opt, "grad_scale", None)
    if scale is not None:
        # restore() has unscaled the perturbed gradients; `.grad`, the clean one, still carries the scale.
        torch._foreach_mul_([shards.local(p.grad) for p in params if p.grad is not None], scale.reciprocal())
    return Gradients(cycle.aside, [p.grad for p in params], rounds, True, 1.0 / rounds)


def _apply(opt: FlatOptimizer, params: list[Tensor], gradients: Gradients, noise: Tensor | None = None) -> None:
    """Update every parameter that has a gradient; restore the perturbed ones that have none."""
    cycle = opt.cycle
    if _complete(gradients.grads):
        present = params
    else:
        pairs = zip(params, gradients.grads, gradients.clean or gradients.grads, strict=True)
        present = [p for p, g, c in pairs if g is not None or c is not None]
    plan = cycle.plans.get(
        opt.param_groups, present, cycle.plan, lambda g: (opt._flags(g), enhance.is_on(opt, g)), opt._has_master
    )
    try:
        work = _gather(opt, plan.buckets, gradients, noise)
        _clip(opt, work)
    except LayoutError:
        work = _gather(opt, plan.buckets, gradients, noise, lay_out=True)
        _clip(opt, work)
    _refuse_sparse(work)
    for k in range(len(work)):
        try:
            opt._update_bucket(*work[k])
        except LayoutError:
            clip = work[k][2].clip
            work = _gather(opt, plan.buckets, gradients, noise, lay_out=True)
            work[k][2].clip = clip
            opt._update_bucket(*work[k])
        cycle.note_masters(work[k][0])
        cycle.created.clear()
    opt._finish(work)
    if noise is not None:
        # The norm of a vector that is divided among ranks is known only when all of them have updated it.
        for bucket in (b for b in plan.buckets if b.perturbed and b.cut):
            perturbations.scatter_bucket(opt, bucket, noise)
    enhance.count_step(opt, work)
    if not plan.covers_perturbed:
        _serve_the_rest(opt, plan.members, noise)
    if cycle.squares:
        _fold_squares(opt)
    torch.clear_autocast_cache()


def _gather(
    opt: FlatOptimizer, buckets: list[Bucket], gradients: Gradients, noise: Tensor | None, lay_out: bool = False
) -> Work:
    """Buckets with their gradients and the arguments that surround the rule. A missing one counts as zero."""
    if lay_out:
        layouts.follow_parameters(opt, buckets)
    work = []
    for bucket in buckets:
        grads = _filled(bucket, gradients.grads)
        clean = None if gradients.clean is None else _filled(bucket, gradients.clean)
        if lay_out:
            grads = [layouts.like(g, p) for g, p in zip(grads, bucket.params, strict=True)]
            if clean is not None:
                clean = [layouts.like(c, p) for c, p in zip(clean, bucket.params, strict=True)]
        work.append((bucket, grads, _forming(opt, bucket, clean, gradients, noise)))
    return work


def _complete(values: list[Any]) -> bool:
    return all([v is not None for v in values])  # a list takes half the time of a generator


def _filled(bucket: Bucket, gradients: list[Tensor | None]) -> list[Tensor]:
    """The gradients of a bucket; zeros where one is missing."""
    found: list[Any] = bucket.select(gradients)
    if not _complete(found):
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, bucket.params, strict=True)]
    return found


def _forming(opt: FlatOptimizer, bucket: Bucket, clean: Any, gradients: Gradients, noise: Tensor | None) -> Forming:
    mixing = clean is not None
    zero, one = bucket.constant(0.0), bucket.constant(1.0)
    grad_weight, clean_weight = one, zero
    if mixing:
        bucket.values("lam")
        grad_weight = bucket.values("grad_weight", lambda g: opt._sign(g) * float(g["lam"]))
        clean_weight = bucket.values("clean_weight", lambda g: opt._sign(g) * (1.0 - float(g["lam"])))
    elif any(g.get("maximize") for g in bucket.groups):
        grad_weight = bucket.values("sign", opt._sign)

    adaptive = isinstance(opt.method, RWP) and any(g["eta"] > 0 and g["perturb"] for g in bucket.groups)
    # Made at the first step, whatever it is: checkpoints are loaded into the state that a first step makes.
    history = opt._histories(bucket.params) if adaptive else None
    remembers = adaptive and gradients.perturbed and not opt.cycle.squares
    draws = noise is not None and bucket.perturbed and not bucket.cut
    factor = gradients.factor
    masks, kappa = enhance.of(opt, bucket)
    sigma, sigmas = capture.numbers(opt, bucket, "sigma") if draws else (zero, None)
    return Forming(
        backups=opt.cycle.backups_of(bucket) if bucket.perturbed and not bucket.masters else None,
        masters=opt._masters(bucket.params) if bucket.masters else None,
        history=history if remembers else None,
        clean_grads=clean,
        masks=masks,
        sigmas=sigmas,
        noise=noise if draws else None,
        grad_scale=(
            scaling.factor(opt, gradients.rounds, bucket.device)
            if factor is None
            else scaling.constant(factor, bucket.device)
        ),
        clip=None,
        found_inf=scaling.found_inf(opt, bucket.device),
        grad_weight=grad_weight,
        clean_weight=clean_weight,
        kappa=kappa,
        beta=bucket.values("beta") if remembers else zero,
        sigma=sigma,
        eta=bucket.values("eta") if remembers else zero,
        index=bucket.index,
        offset=bucket.offset,
    )


def _clip(opt: FlatOptimizer, work: Work) -> None:
    """max_grad_norm: scale the final gradient so that its norm over all parameters is at most that."""
    if opt.max_grad_norm is None or not work:
        return
    norms = []
    for bucket, grads, forming in work:
        norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
        bucket.op("gradient_norm_", opt.backend)(
            norm, grads, forming.clean_grads, forming.grad_scale,
            grad_weight=forming.grad_weight, clean_weight=forming.clean_weight,
        )  # fmt: skip
        norms.append((bucket.ranks, norm))
    total = opt.cycle.grad_norm = perturbations.combined(norms)
    clip = (opt.max_grad_norm / (total + 1e-6)).clamp(max=1.0)
    for bucket, _, forming in work:
        forming.clip = clip.to(bucket.device)


def _serve_the_rest(opt: FlatOptimizer, updated: frozenset[int], noise: Tensor | None) -> None:
    """Perturbed parameters without any gradient: restore them; rolling draws their next noise too."""
    cycle = opt.cycle
    assert cycle.plan is not None
    missing = [p for b in cycle.plan.buckets for p in b.params if id(p) not in updated]
    rest = cycle.plans.get(opt.param_groups, missing, cycle.plan, lambda g: "rest", opt._has_master)
    for bucket in rest.buckets:
        cycle.restore(bucket.params, opt._masters(bucket.params) if bucket.masters else cycle.backups_of(bucket))
        if noise is not None:
            perturbations.scatter_bucket(opt, bucket, noise)
        cycle.note_masters(bucket)


def _fold_squares(opt: FlatOptimizer) -> None:
    """mix="losses": F <- beta F + the squares that restore() took from the perturbed gradient."""
    for group in opt.param_groups:
        if not (group["eta"] > 0 and group["perturb"]):
            continue
        params = [p for p in group["params"] if p.grad is not None]
        for p, history in zip(params, opt._histories(params), strict=True):
            part = shards.local(history)
            folded = part * float(group["beta"])
            if p in opt.cycle.squares:
                folded += opt.cycle.squares[p]
            found = scaling.found_inf(opt, part.device)
            part.copy_(folded if found is None else torch.where(found != 0, part, folded))


def _rolling_step(opt: FlatOptimizer, params: list[Tensor]) -> None:
    cycle, plan = opt.cycle, opt.cycle.plan
    messages.refuse_suspended(opt, "step")
    gradients = Gradients([p.grad for p in params], perturbed=plan is not None)
    if plan is None:
        # Distributed checkpointing creates the state by a step with lr 0, on weights it wants unchanged.
        initial = not opt.state and all(capture.host_value(opt, g, "lr") == 0 for g in opt.param_groups)
        _apply(opt, params, gradients)
        cycle.mark_consumed(params)
        if not initial:
            perturbations.roll_on(opt)
        return
    if perturbations.current_plan(opt) is plan:
        _apply(opt, params, gradients, capture.noise_of(opt, ahead=1))
        capture.advance(opt)
        perturbations.note_drawn(opt)
    else:
        # A group or a parameter was switched: one pass cannot serve two sets, so update, then perturb.
        _apply(opt, params, gradients)
        cycle.leave()
        capture.advance(opt)
        cycle.mark_consumed(params)
        perturbations.roll_on(opt, perturbations.now)
        return
    for bucket in plan.buckets:
        # Masters are new tensors after the first update of a freshly loaded model.
        bucket.clean = opt._masters(bucket.params) if bucket.masters else cycle.backups_of(bucket)
    cycle.enter(plan)
    cycle.mark_consumed(params)


def _refuse_sparse(work: Work) -> None:
    """Autograd can put a sparse gradient anywhere; the last bucket must not find it when the first is updated."""
    for bucket, grads, _ in work if len(work) > 1 else ():
        for i, g in zip(bucket.index, grads, strict=True):
            check_storage(f"step: grads[{i}]", shards.local(g), (g.dtype,))
