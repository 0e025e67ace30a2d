"""perturb() and restore(): which gradients they take, and the ops that move the weights there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import shards
from ..dispatch import resolve
from ..methods import ASAM, RWP, SAM
from ..tables import history_length
from . import capture, layouts, messages
from .plan import Bucket, Plan
from .scaling import check_scaled, loss_scale, unscale_pass

if TYPE_CHECKING:
    from .base import FlatOptimizer


def perturb(opt: FlatOptimizer, scaler: Any) -> None:
    cycle, method = opt.cycle, opt.method
    if method is None:
        raise RuntimeError("perturb: this optimizer has no perturbation; pass perturb=flatkern.RWP(), SAM() or ASAM()")
    if opt.rolling:
        raise RuntimeError(
            "perturb: the optimizer is rolling and perturbs in step(); use train(), eval() or follow(model)"
        )
    messages.refuse_suspended(opt, "perturb")
    if cycle.plan is not None:
        raise RuntimeError("perturb: already perturbed; call step() or restore() first")
    opt._check_groups()
    check_scaled(opt, scaler)

    params = opt._parameters()
    fresh = cycle.is_fresh(params)
    if isinstance(method, SAM):
        _climb(opt, fresh)
        for p in params:
            p.grad = None
        cycle.consumed = None
    else:
        _check_rwp(opt, method, fresh)
        scatter(opt)
        capture.advance(opt)
        cycle.scaler = scaler
        if fresh and method.mix == "gradients":
            if scaler is not None:
                unscale_pass(opt, scaler)
            cycle.clean = cycle.take_gradients(params)
    if cycle.aside:
        cycle.put_back(params)
    torch.clear_autocast_cache()


def _check_rwp(opt: FlatOptimizer, method: RWP, fresh: bool) -> None:
    cycle = opt.cycle
    if method.lam is None:
        if fresh:
            raise RuntimeError(
                "perturb: there is a fresh gradient in .grad and RWP has one gradient, taken at the perturbed weights, "
                f"so it would be lost; call zero_grad() if it is not wanted. The pattern is: {messages.pattern(opt)}"
            )
    elif method.mix == "gradients":
        if cycle.rounds and cycle.scaler_pass is not None and not cycle.clean:
            raise RuntimeError(
                "perturb: under a GradScaler m-RWP takes one noisy round before its clean pass, not several"
            )
        if fresh and cycle.clean:
            raise RuntimeError("perturb: a second clean gradient, but m-RWP has one; call step() or zero_grad() first")
    elif fresh and any(group["eta"] > 0 for group in opt.param_groups):
        raise RuntimeError(
            'perturb: m-ARWP with mix="losses" must see the perturbed gradient alone; run the noisy pass first: '
            "perturb(); backward; restore(); backward; step()"
        )


Read = Callable[[dict[str, Any], str], Any]  # how a group's value is read: the present one, or the one drawn with


def now(group: dict[str, Any], key: str) -> Any:
    return group[key]


def _perturbable(opt: FlatOptimizer, read: Read = now) -> list[Tensor]:
    return [p for group in opt.param_groups if read(group, "perturb") for p in group["params"] if p.requires_grad]


def _plan(opt: FlatOptimizer, params: list[Tensor]) -> Plan:
    return opt.cycle.plans.get(opt.param_groups, params, None, lambda g: "perturb", opt._has_master)


def _clean_stores(opt: FlatOptimizer, bucket: Bucket) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """(backups, masters) of a bucket: one of them is None."""
    if bucket.masters:
        bucket.clean = opt._masters(bucket.params)
        return None, bucket.clean
    bucket.clean = opt.cycle.backups_of(bucket)
    return bucket.clean, None


def current_plan(opt: FlatOptimizer) -> Plan:
    """What the next noise goes to."""
    return _plan(opt, _perturbable(opt))


def scatter(opt: FlatOptimizer, read: Read = now) -> None:
    """CLEAN -> PERTURBED by the noise of the current round, which does not advance here."""
    plan = _plan(opt, _perturbable(opt, read))
    noise = capture.noise_of(opt, ahead=0)

    def draw() -> None:
        with _undone_on_failure(opt, plan):
            for bucket in plan.buckets:
                scatter_bucket(opt, bucket, noise, read)

    layouts.retry(opt, plan.buckets, draw)


def scatter_bucket(opt: FlatOptimizer, bucket: Bucket, noise: Tensor, read: Read = now) -> None:
    """perturb_gaussian_ on one bucket; `read(group, key)` gives sigma and eta."""
    backups, masters = _clean_stores(opt, bucket)
    adaptive = any(read(g, "eta") > 0 for g in bucket.groups)
    norms = _norms_of_the_whole(opt, bucket, masters or bucket.params) if bucket.cut else None
    sigma, sigmas = capture.numbers(opt, bucket, "sigma", read)
    bucket.op("perturb_gaussian_", opt.backend)(
        bucket.params, backups, masters, norms, opt._histories(bucket.params) if adaptive else None, sigmas, noise,
        sigma=sigma, eta=bucket.values("eta", lambda g: float(read(g, "eta"))),
        index=bucket.index, offset=bucket.offset,
    )  # fmt: skip


def _norms_of_the_whole(opt: FlatOptimizer, bucket: Bucket, weights: list[Tensor]) -> list[Tensor]:
    """L2 norms of vectors of which every rank has a part; one sum over the ranks, a float per vector."""
    norms = torch.empty(len(weights), dtype=torch.float32, device=bucket.device)
    each = list(norms.split(1))
    bucket.op("filter_norms_", opt.backend)(each, weights)
    norms.copy_(shards.add_up(norms.double().square(), bucket.ranks).sqrt())
    return each


def _climb(opt: FlatOptimizer, fresh: bool) -> None:
    """CLEAN -> PERTURBED along the gradients in `.grad`."""
    cycle, method = opt.cycle, opt.method
    assert isinstance(method, SAM)
    if not fresh:
        raise RuntimeError(
            f"perturb: {type(method).__name__} climbs along the gradient at the clean weights, but there is no "
            f"fresh one in .grad; the pattern is: {messages.pattern(opt)}"
        )
    plan = _plan(opt, [p for p in _perturbable(opt) if p.grad is not None])

    def climb() -> None:
        norms = [(bucket.ranks, _ascent_norm(opt, bucket, method)) for bucket in plan.buckets]
        total = cycle.ascent_norm = combined(norms) if norms else torch.zeros((), device=opt._parameters()[0].device)
        with _undone_on_failure(opt, plan):
            for bucket in plan.buckets:
                bucket.values("rho")
                # Ascent of the objective that is minimised: with maximize=True that is descent.
                rho = bucket.values("climb", lambda g: -float(g["rho"]) if g.get("maximize") else float(g["rho"]))
                backups, masters = _clean_stores(opt, bucket)
                bucket.op("perturb_ascent_", opt.backend)(
                    bucket.params, backups, masters, _grads(bucket), total.to(bucket.device),
                    rho=rho, eta=_climb_eta(bucket, method),
                )  # fmt: skip
        cycle.require_finite((~total.isfinite()).float())

    layouts.retry(opt, plan.buckets, climb)
    messages.warn_rounded_away(opt, plan)


def _grads(bucket: Bucket) -> list[Tensor]:
    return [p.grad for p in bucket.params]  # type: ignore[misc]


def _ascent_norm(opt: FlatOptimizer, bucket: Bucket, method: SAM) -> Tensor:
    eta = _climb_eta(bucket, method)
    weights = None
    if any(e >= 0 for e in eta):
        weights = opt._masters(bucket.params) if bucket.masters else bucket.params
    norm = torch.zeros((), dtype=torch.float32, device=bucket.device)
    bucket.op("ascent_norm_", opt.backend)(norm, weights, _grads(bucket), eta=eta)
    return norm


def _climb_eta(bucket: Bucket, method: SAM) -> list[float]:
    """ASAM's eta per parameter; -1 stands for T_w = 1."""
    if not isinstance(method, ASAM):
        return bucket.constant(-1.0)
    eta = bucket.values("eta")
    return eta if method.all_tensors else [e if p.dim() >= 2 else -1.0 for e, p in zip(eta, bucket.params, strict=True)]


def combined(norms: list[tuple[shards.Ranks, Tensor]]) -> Tensor:
    """The norm over several buckets, on the device of the first; each is summed over the ranks that share it."""
    first = norms[0][1]
    if len(norms) == 1 and not norms[0][0]:
        return first
    shared: dict[shards.Ranks, list[Tensor]] = {}
    for ranks, norm in norms:
        shared.setdefault(ranks, []).append(norm.to(first.device).double().square())
    squares = [shards.add_up(torch.stack(each).sum(), ranks) for ranks, each in shared.items()]
    return torch.stack(squares).sum().sqrt().float()


@contextmanager
def _undone_on_failure(opt: FlatOptimizer, plan: Plan) -> Iterator[None]:
    """Enter `plan` when the body succeeds; put the clean weights back when it does not."""
    # A compiled op writes all of its bucket or nothing; only eager code stops between two parameters.
    alone = len(plan.buckets) == 1 and plan.buckets[0].op("restore_", opt.backend).whole  # type: ignore[attr-defined]
    before = [] if alone else [b.versions_now() for b in plan.buckets]
    try:
        yield
    except BaseException:
        for bucket, versions in zip(plan.buckets, before, strict=False):
            written = [k for k, v in enumerate(bucket.versions_now()) if v != versions[k]]
            if written:
                opt.cycle.restore([bucket.params[k] for k in written], [bucket.clean[k] for k in written])
        raise
    opt.cycle.enter(plan)


def restore(opt: FlatOptimizer) -> None:
    """Clean weights; the round's gradient joins the sum that is set aside."""
    cycle = opt.cycle
    if cycle.plan is None:
        return
    messages.refuse_suspended(opt, "restore")
    params = opt._parameters()
    counted = has_round_gradient(opt)
    cycle.put_clean_weights(cycle.plan)
    cycle.leave()
    method = opt.method
    if isinstance(method, RWP) and method.lam is not None:
        if method.mix == "losses":
            if counted:
                remember_squares(opt)
            return
        if counted and cycle.scaler is not None and not cycle.clean:
            unscale_pass(opt, cycle.scaler)
    if counted or cycle.rounds:
        cycle.aside = cycle.take_gradients(params)
        cycle.rounds += counted


def has_round_gradient(opt: FlatOptimizer, params: list[Tensor] | None = None) -> bool:
    """True if a backward has added to `.grad` since perturb()."""
    cycle = opt.cycle
    params = params or opt._parameters()
    if not cycle.rounds:
        return cycle.is_fresh(params)
    # The sum of earlier rounds is in `.grad`; any parameter may be the one that this round has added to.
    pairs = zip(params, cycle.sum_versions, strict=True)
    return any(p.grad is not None and shards.version(p.grad) != version for p, version in pairs)


def remember_squares(opt: FlatOptimizer) -> None:
    """mix="losses": the perturbed gradient is in `.grad` only now; keep what the history needs of it."""
    if not (isinstance(opt.method, RWP) and opt.method.mix == "losses"):
        return
    for group in opt.param_groups:
        if group["eta"] > 0 and group["perturb"]:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            wide = [shards.local(p.grad) for p in params if p.dim() >= 2]
            norms = [g.new_empty(history_length(g), dtype=torch.float32) for g in wide]
            if wide:
                resolve("filter_norms_", wide[0].device.type, opt.backend)(norms, wide)
            rest = iter(norms)
            scale = float(group["lam"]) * loss_scale(opt.cycle.scaler)
            for p in params:
                g = next(rest) if p.dim() >= 2 else shards.local(p.grad).float().flatten()
                opt.cycle.squares[p] = (g / scale).square() if group["lam"] else torch.zeros_like(g)


def abort_round(opt: FlatOptimizer) -> None:
    """After an exception: clean weights, this round's gradients dropped, earlier rounds kept."""
    cycle = opt.cycle
    if cycle.plan is None:
        return
    params = opt._parameters()
    if not cycle.suspended:
        cycle.put_clean_weights(cycle.plan)
    cycle.suspended = False
    cycle.leave()
    if cycle.rounds:
        # Autograd may have added to the sum in place, and what it added cannot be taken out again.
        if has_round_gradient(opt):
            cycle.rounds = 0
        else:
            cycle.aside = cycle.take_gradients(params)
    for p in params:
        p.grad = None
    cycle.clean = []
    cycle.scaler = None
    if not cycle.rounds:
        cycle.drop_pending()


def roll_on(opt: FlatOptimizer, read: Read | None = None) -> None:
    """Rolling: from clean weights to the noise of the current round, which does not advance."""
    messages.refuse_suspended(opt, "train")
    capture.refuse(opt, "train")
    capture.adopt(opt)
    scatter(opt, read or drawn)
    note_drawn(opt, read or drawn)
    torch.clear_autocast_cache()


def drawn(group: dict[str, Any], key: str) -> Any:
    """Rolling: the value that the noise of this round was drawn with, if it was; else the present one.

    A schedule may have moved the value since, and drawing the round again, after an evaluation or from
    a checkpoint, must give the same noise.
    """
    last = group.get("drawn")
    return last[key] if last is not None and capture.is_round(last["round"], group["round"]) else group[key]


def note_drawn(opt: FlatOptimizer, read: Read = now) -> None:
    sigmas = capture.note_drawn(opt, [read(group, "sigma") for group in opt.param_groups])
    for group, sigma in zip(opt.param_groups, sigmas, strict=True):
        rest = {key: read(group, key) for key in ("eta", "perturb")}
        group["drawn"] = {"sigma": sigma, **rest, "round": group["round"]}


@contextmanager
def clean(opt: FlatOptimizer) -> Iterator[None]:
    """Exchange perturbed for clean weights and back; the perturbed values are kept, not drawn again."""
    cycle = opt.cycle
    plan = cycle.plan
    if plan is None or cycle.suspended:
        yield
        return
    with torch.no_grad():
        kept = [[p.detach().clone() for p in b.params] for b in plan.buckets]
        cycle.put_clean_weights(plan)
    cycle.suspended = True
    try:
        yield
    finally:
        if cycle.plan is plan and cycle.suspended:
            cycle.suspended = False
            with torch.no_grad():
                for bucket, values in zip(plan.buckets, kept, strict=True):
                    cycle.restore(bucket.params, values)
            cycle.enter(plan)
            torch.clear_autocast_cache()
