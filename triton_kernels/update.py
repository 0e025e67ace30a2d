"""The update family in Triton: SGD, Adam and AdamW with what a method wraps around them. Mirrors reference/update.py.

One pass: fetch the clean weight, form the gradient, apply the rule, lengthen the step (IRE), remember ARWP's history,
store; in rolling mode measure and perturb what was stored. Long rows are measured in that pass, their partial sums
added by `settle`, and perturbed by perturb_gaussian_'s kernel.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from . import tile
from .arithmetic import quotient, root
from .devices import capturing, upload
from .job import kernel
from .launch import begin_call, repeatable, strided
from .norm import final_gradient, partials_of, remember, settle, sum_squares
from .perturb import launch_perturb, load_history, perturbed

# Columns of the table of pointers, and of the table of scalars; a rule's own come behind them.
LISTS = ("params", "backups", "masters", "history", "grads", "clean_grads", "masks", "norms")
SCALARS = ("grad_weight", "clean_weight", "kappa", "beta", "sigma", "eta")
KAPPA, BETA, SIGMA, ETA, OWN = (tl.constexpr(i) for i in range(2, 7))


@triton.jit
def sgd_rule(p, g, v, lr, s, k, WIDTH: tl.constexpr, MOMENTUM: tl.constexpr):
    """torch.optim.SGD; returns the weight and the momentum."""
    d = g + tile.scalar(s, k, OWN + 3, WIDTH) * p
    if MOMENTUM:
        momentum = tile.scalar(s, k, OWN + 1, WIDTH)
        v = momentum * v + tile.scalar(s, k, OWN + 2, WIDTH) * d
        d = tl.where(tile.scalar(s, k, OWN + 4, WIDTH) != 0, d + momentum * v, v)
    return p - lr * d, v


@triton.jit
def adam_rule(p, g, m, v, s, k, derived, WIDTH: tl.constexpr, DECOUPLED: tl.constexpr):
    """torch.optim.Adam, or AdamW where DECOUPLED; returns the weight and the moments. `derived` has, for each tensor,
    lr / (1 - beta1^t), sqrt(1 - beta2^t) and 1 - lr weight_decay."""
    derived += 3 * k
    if DECOUPLED:
        p = p * tl.load(derived + 2)
    else:
        decay = tile.scalar(s, k, OWN + 5, WIDTH)
        g = tl.where(decay != 0, g + decay * p, g)
    m = tile.scalar(s, k, OWN, WIDTH) * m + tile.scalar(s, k, OWN + 1, WIDTH) * g
    v = tile.scalar(s, k, OWN + 2, WIDTH) * v + tile.scalar(s, k, OWN + 3, WIDTH) * (g * g)
    denominator = quotient(root(v), tl.load(derived + 1)) + tile.scalar(s, k, OWN + 4, WIDTH)
    return p - tl.load(derived) * quotient(m, denominator), m, v


@triton.jit
def mask_bits(
    tensors, pointers, k, row, column, start, inside, mask,
    AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where the mask of a tile is set: a byte per element of a vector, else a bit, eight columns of a row to a byte."""
    base = tile.pointer(pointers, k, AT, WIDTH, tl.uint8)
    if VECTOR:
        return tl.load(base + start + inside, mask=mask, other=0) != 0
    else:
        stride = (tile.field(tensors, k, tile.COLUMNS_OF) + 7) // 8
        r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        bytes_ = tl.load(base + (row + r)[:, None] * stride + (column // 8 + c // 8)[None, :], mask=mask, other=0)
        return ((bytes_.to(tl.int32) >> (c % 8)[None, :]) & 1) != 0


@triton.jit
def amplified(w, previous, kappa):
    return w + kappa * (w - previous)


@triton.jit
def remember_tile(
    pointers, k, row, row_mask, start, inside, mask, g, beta, live, partials,
    AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """F <- beta F + sum over the row of g^2, where `live`; long rows leave a partial sum. Returns F, [ROWS, 1] or, of
    vectors, a tile."""
    out = tile.pointer(pointers, k, AT, WIDTH, tl.float32)
    history = load_history(pointers, k, AT, WIDTH, row, row_mask, start, inside, mask, ROWS, VECTOR)
    if VECTOR:
        history = tl.where(live, remember(history, g * g, beta), history)
        tl.store(out + start + inside, history, mask=mask & live)
    else:
        squares = sum_squares(g, mask, ROWS, COLUMNS)
        if LONG:
            tl.store(partials + tl.program_id(0) + tl.arange(0, ROWS), squares)
        else:
            history = tl.where(live, remember(history, squares[:, None], beta), history)
            tl.store(out + row + tl.arange(0, ROWS)[:, None], history, mask=row_mask[:, None] & live)
    return history


@kernel
def update_kernel(
    tiles, tensors, pointers, scalars, derived, lrs, lr_stride, sigmas, sigma_stride, grad_scale, clip, found_inf,
    noise, seed, stream, round_, partials, count,
    RULE: tl.constexpr, PARAM: tl.constexpr, BACKUP: tl.constexpr, MASTER: tl.constexpr, HISTORY: tl.constexpr,
    GRAD: tl.constexpr, CLEAN_GRAD: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    NOISE: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND are the types of the rule's own state. NOISE: a perturbation is part of the call."""
    k, row, column, start, inside, mask = tile.begin(tiles, tensors, ROWS, COLUMNS, EVEN, LONG)
    live = tile.is_live(found_inf)
    row_mask = tile.row_mask(tensors, k, row, ROWS)
    CLEAN: tl.constexpr = MASTER if MASTER is not None else BACKUP if BACKUP is not None else PARAM
    CLEAN_AT: tl.constexpr = 2 if MASTER is not None else 1 if BACKUP is not None else 0

    old = tile.widen(tile.load(pointers, k, CLEAN_AT, WIDTH, CLEAN, start, inside, mask, EVEN), CLEAN)
    grad = tile.widen(tile.load(pointers, k, 4, WIDTH, GRAD, start, inside, mask, EVEN), GRAD)
    g = final_gradient(
        pointers, k, grad, scalars, grad_scale, clip, start, inside, mask, CLEAN_GRAD, 5, WIDTH, 0, SCALARS, EVEN
    )  # fmt: skip

    if FIRST is not None:
        m = tile.widen(tile.load(pointers, k, 8, WIDTH, FIRST, start, inside, mask, EVEN), FIRST)
    if RULE == "sgd":
        lr = tile.number(lrs, lr_stride, scalars, k, OWN, SCALARS)
        if FIRST is not None:
            w, m = sgd_rule(old, g, m, lr, scalars, k, SCALARS, True)
        else:
            w, _ = sgd_rule(old, g, 0.0, lr, scalars, k, SCALARS, False)
    else:
        v = tile.widen(tile.load(pointers, k, 9, WIDTH, SECOND, start, inside, mask, EVEN), SECOND)
        w, m, v = adam_rule(old, g, m, v, scalars, k, derived, SCALARS, RULE == "adamw")
        tile.store(pointers, k, 9, WIDTH, SECOND, start, inside, mask & live, EVEN, tile.narrow(v, SECOND))
    if FIRST is not None:
        tile.store(pointers, k, 8, WIDTH, FIRST, start, inside, mask & live, EVEN, tile.narrow(m, FIRST))

    if MASK is not None:
        longer = mask_bits(tensors, pointers, k, row, column, start, inside, mask, 6, WIDTH, ROWS, COLUMNS, VECTOR)
        w = tl.where(longer, amplified(w, old, tile.scalar(scalars, k, KAPPA, SCALARS)), w)
    w = tl.where(live, w, old)

    if HISTORY is not None:
        unscaled = grad * tile.value_or_one(grad_scale)
        beta = tile.scalar(scalars, k, BETA, SCALARS)
        history = remember_tile(
            pointers, k, row, row_mask, start, inside, mask, unscaled, beta, live, partials + count, 3, WIDTH,
            ROWS, COLUMNS, VECTOR, LONG,
        )  # fmt: skip
    else:
        history = None

    stored = tile.narrow(w, CLEAN)
    # Without noise a backup has served, and is left as it was.
    if MASTER is not None or (BACKUP is not None and NOISE):
        tile.store(pointers, k, CLEAN_AT, WIDTH, CLEAN, start, inside, mask & live, EVEN, stored)
    if NOISE:
        # Norm and perturbation see the weight that was stored.
        w = tile.widen(stored, CLEAN)
        squares = sum_squares(w, mask, ROWS, COLUMNS)
        if LONG:
            tl.store(partials + tl.program_id(0) + tl.arange(0, ROWS), squares)
            if CLEAN_AT == 0:
                tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask & live, EVEN, stored)
        else:
            sigma = tile.number(sigmas, sigma_stride, scalars, k, SIGMA, SCALARS)
            eta = tile.scalar(scalars, k, ETA, SCALARS)
            p = perturbed(
                tensors, k, row, column, w, root(squares), history, sigma, eta, noise, seed, stream, round_,
                ROWS, COLUMNS, SHIFTED,
            )  # fmt: skip
            tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN, tile.narrow(p, PARAM))
    elif CLEAN_AT == 0:
        tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask & live, EVEN, stored)
    else:
        tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN, tile.narrow(w, PARAM))


def update(name, values, rule, state, own, derive=None):
    """The launches of one update; `state` names its lists of the rule, `own` makes its columns of scalars."""
    given = {n: values[n] is not None for n in ("backups", "masters", "history", "noise", "masks")}
    lists = (*LISTS, *state)
    call = begin_call(
        name, values, lists=" ".join(lists), rows=given["noise"] or given["history"] or given["masks"],
        scalars=lambda v: [*(v[n] for n in SCALARS), *own(v)],
    )  # fmt: skip
    if call is None:
        return
    found_inf, grad_scale, clip = (call.scalar(values[n]) for n in ("found_inf", "grad_scale", "clip"))
    derived = derive(call, found_inf) if derive else None
    width = call.scalars.shape[1]
    by_element = given["history"] or given["masks"]  # of a vector
    for group in call.groups:
        types = group.types
        call.launch(
            update_kernel, group,
            (
                group.tiles, call.tensors, call.pointers, call.scalars, derived,
                *strided(None if derive else values["lrs"]), *strided(values["sigmas"]), grad_scale, clip, found_inf,
                *call.key(), partials_of(call, group), call.plan.partials,
            ),
            lambda group=group, types=types: dict(
                RULE=rule, PARAM=types["params"], BACKUP=types["backups"], MASTER=types["masters"],
                HISTORY=types["history"], GRAD=types["grads"], CLEAN_GRAD=types["clean_grads"], MASK=types["masks"],
                FIRST=types[state[0]], SECOND=types[state[1]] if len(state) > 1 else None, NOISE=given["noise"],
                WIDTH=call.width, SCALARS=width, VECTOR=by_element and group.vector, **group.shape(),
                SHIFTED=given["noise"] and group.shifted and not group.long,
            ),
        )  # fmt: skip
    settle(
        call, LISTS.index("norms") if given["noise"] else None, LISTS.index("history") if given["history"] else None,
        SCALARS.index("beta"), found_inf, width,
    )  # fmt: skip
    if given["noise"]:
        clean = "masters" if given["masters"] else "backups" if given["backups"] else "params"
        for group in call.groups:
            if group.long:
                launch_perturb(
                    call, group, clean, "norms", False, lists, SCALARS.index("sigma"), width, values["sigmas"]
                )


@repeatable
def sgd_update_(
    params, momentum_buffers, backups, masters, history, grads, clean_grads, masks, lrs, sigmas, noise,
    grad_scale, clip, found_inf, *, lr, momentum, dampening, weight_decay, nesterov,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
):  # fmt: skip
    """Restore, form the gradient, and take one SGD step; in rolling mode perturb for the next one."""
    values = locals()
    update(
        "sgd_update_", values, "sgd", ("momentum_buffers",),
        lambda v: [v["lr"], v["momentum"], [1 - d for d in v["dampening"]], v["weight_decay"], v["nesterov"]],
    )  # fmt: skip


LANES = 128
# Columns of Adam's scalars behind those that updates share.
DECAY, LR, LOG_BETA1, LOG_BETA2 = (tl.constexpr(OWN.value + i) for i in range(5, 9))


@kernel
def advance_kernel(
    pointers, scalars, derived, lrs, lr_stride, found_inf, count,
    STEP: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Count the step of every tensor, and compute what depends on it: float64, rounded once."""
    k = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = k < count
    at = tl.load(pointers + WIDTH * k + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(at, mask=mask, other=0.0) + 1.0
    tl.store(at, step, mask=mask & tl.reshape(tile.is_live(found_inf), [1]))
    t = step.to(tl.float64)
    if lrs is None:
        lr = tl.load(scalars + SCALARS * k + LR, mask=mask, other=0.0)
    else:
        lr = tl.load(lrs + lr_stride * k, mask=mask, other=0.0)
    decay = tl.load(scalars + SCALARS * k + DECAY, mask=mask, other=0.0)
    power1 = tl.exp2(t * tl.load(scalars + SCALARS * k + LOG_BETA1, mask=mask, other=-1.0))
    power2 = tl.exp2(t * tl.load(scalars + SCALARS * k + LOG_BETA2, mask=mask, other=-1.0))
    tl.store(derived + 3 * k, (lr / (1.0 - power1)).to(tl.float32), mask=mask)
    tl.store(derived + 3 * k + 1, tl.sqrt(1.0 - power2).to(tl.float32), mask=mask)
    tl.store(derived + 3 * k + 2, (1.0 - lr * decay).to(tl.float32), mask=mask)


def log2(beta):
    return math.log2(beta) if beta > 0 else -math.inf


def adam_scalars(v):
    """beta and 1 - beta of each moment, eps, decay; then what only advance_kernel reads."""
    return [
        v["beta1"], [1 - b for b in v["beta1"]], v["beta2"], [1 - b for b in v["beta2"]], v["eps"], v["weight_decay"],
        v["lr"], [log2(b) for b in v["beta1"]], [log2(b) for b in v["beta2"]],
    ]  # fmt: skip


def advance(call, found_inf, values):
    """Count the steps; returns float32 (tensors, 3) on the device, what depends on them."""
    steps = values["steps"]
    if call.once("steps elsewhere", lambda: any(step.device != call.device for step in steps)):
        return advance_on_host(call, found_inf, values)
    derived = call.scratch("derived", (len(steps), 3))
    call.start(
        advance_kernel, -(-len(steps) // LANES), 4,
        (call.pointers, call.scalars, derived, *strided(values["lrs"]), found_inf, len(steps)),
        lambda: dict(
            STEP=LISTS_OF_ADAM.index("steps"), WIDTH=call.width, SCALARS=call.scalars.shape[1], LANES=LANES,
        ),
    )  # fmt: skip
    return derived


def advance_on_host(call, found_inf, values):
    """The same for steps that torch keeps on the CPU. Whether they count then has to be known there."""
    if capturing(call.device):
        raise RuntimeError("steps are on the CPU, which a captured graph cannot count; move them beside the parameters")
    lr = values["lr"] if values["lrs"] is None else values["lrs"].tolist()
    skip = found_inf is not None and bool(found_inf)
    if not skip:
        torch._foreach_add_(values["steps"], 1)
    found = np.zeros((len(values["steps"]), 3), np.float32)
    for k, t in enumerate(0 if skip else step.item() for step in values["steps"]):
        if t:
            found[k, 0] = lr[k] / (1 - values["beta1"][k] ** t)
            found[k, 1] = math.sqrt(1 - values["beta2"][k] ** t)
            found[k, 2] = 1 - lr[k] * values["weight_decay"][k]
    return upload(found, call.device)


LISTS_OF_ADAM = (*LISTS, "exp_avgs", "exp_avg_sqs", "steps")


def _adam(name, rule, values):
    update(
        name, values, rule, LISTS_OF_ADAM[len(LISTS) :], adam_scalars,
        lambda call, found_inf: advance(call, found_inf, values),
    )  # fmt: skip


@repeatable
def adam_update_(
    params, exp_avgs, exp_avg_sqs, steps, backups, masters, history, grads, clean_grads, masks, lrs, sigmas,
    noise, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
):  # fmt: skip
    """Restore, form the gradient, and take one Adam step; in rolling mode perturb for the next one."""
    _adam("adam_update_", "adam", locals())


@repeatable
def adamw_update_(
    params, exp_avgs, exp_avg_sqs, steps, backups, masters, history, grads, clean_grads, masks, lrs, sigmas,
    noise, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
):  # fmt: skip
    """As adam_update_, with decoupled weight decay."""
    _adam("adamw_update_", "adamw", locals())


@kernel
def mix_gradients_kernel(
    tiles, tensors, pointers, scalars, grad_scale, clip, partials, count,
    GRAD: tl.constexpr, HISTORY: tl.constexpr, CLEAN_GRAD: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    k, row, _column, start, inside, mask = tile.begin(tiles, tensors, ROWS, COLUMNS, EVEN, LONG)
    grad = tile.widen(tile.load(pointers, k, 0, WIDTH, GRAD, start, inside, mask, EVEN), GRAD)
    if HISTORY is not None:
        row_mask = tile.row_mask(tensors, k, row, ROWS)
        remember_tile(
            pointers, k, row, row_mask, start, inside, mask, grad * tile.value_or_one(grad_scale),
            tile.scalar(scalars, k, 2, 3), tile.is_live(None), partials + count, 1, WIDTH, ROWS, COLUMNS, VECTOR, LONG,
        )  # fmt: skip
    g = final_gradient(
        pointers, k, grad, scalars, grad_scale, clip, start, inside, mask, CLEAN_GRAD, 2, WIDTH, 0, 3, EVEN
    )  # fmt: skip
    tile.store(pointers, k, 0, WIDTH, GRAD, start, inside, mask, EVEN, tile.narrow(g, GRAD))


@repeatable
def mix_gradients_(grads, history, clean_grads, grad_scale, clip, *, grad_weight, clean_weight, beta):
    """Form the final gradient in place, for a base optimizer that is not ours."""
    call = begin_call(
        "mix_gradients_", locals(), lists="grads history clean_grads", rows=history is not None,
        scalars=lambda v: [v["grad_weight"], v["clean_weight"], v["beta"]],
    )  # fmt: skip
    if call is None:
        return
    grad_scale, clip = call.scalar(grad_scale), call.scalar(clip)
    for group in call.groups:
        types = group.types
        call.launch(
            mix_gradients_kernel, group,
            (
                group.tiles, call.tensors, call.pointers, call.scalars, grad_scale, clip, partials_of(call, group),
                call.plan.partials,
            ),
            lambda group=group, types=types: dict(
                GRAD=types["grads"], HISTORY=types["history"], CLEAN_GRAD=types["clean_grads"], WIDTH=call.width,
                VECTOR=history is not None and group.vector, **group.shape(),
            ),
        )  # fmt: skip
    settle(call, None, 1 if history is not None else None, 2, None, 3)
