"""The update family in Triton: SGD, Adam and AdamW with what a method wraps around them. Mirrors reference/update.py.

One pass: fetch the clean weight, form the gradient, apply the rule, lengthen the step (IRE), update ARWP's history,
store; in rolling mode measure and perturb what was stored. Long rows are measured in that pass, their partial sums
added by `finish_rows`, and perturbed by perturb_gaussian_'s kernel.
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
from .noise import counters_of, key_of, normals
from .norm import final_gradient, finish_rows, partials_of, store_partial, sum_squares, updated_history
from .perturb import launch_perturb, load_by_element, noise_scale, perturb_gaussian, with_history

# Columns of the table of pointers, and of the table of scalars; a rule's own come behind them.
LISTS = ("params", "backups", "masters", "history", "grads", "clean_grads", "masks", "norms")
SCALARS = ("grad_weight", "clean_weight", "kappa", "beta", "sigma", "eta")
KAPPA, BETA, SIGMA, ETA, OWN = (tl.constexpr(i) for i in range(2, 7))


@triton.jit
def sgd_rule(p, g, v, lr, s, MOMENTUM: tl.constexpr):
    """torch.optim.SGD; returns the weight and the momentum."""
    d = g + tile.scalar(s, OWN + 3) * p
    if MOMENTUM:
        momentum = tile.scalar(s, OWN + 1)
        v = momentum * v + tile.scalar(s, OWN + 2) * d
        d = tl.where(tile.scalar(s, OWN + 4) != 0, d + momentum * v, v)
    return p - lr * d, v


@triton.jit
def adam_rule(p, g, m, v, s, derived, DECOUPLED: tl.constexpr):
    """torch.optim.Adam, or AdamW where DECOUPLED; returns the weight and the moments. `derived` has, of the tensor,
    lr / (1 - beta1^t), sqrt(1 - beta2^t) and 1 - lr weight_decay."""
    if DECOUPLED:
        p = p * tl.load(derived + 2)
    else:
        decay = tile.scalar(s, OWN + 5)
        g = tl.where(decay != 0, g + decay * p, g)
    m = tile.scalar(s, OWN) * m + tile.scalar(s, OWN + 1) * g
    v = tile.scalar(s, OWN + 2) * v + tile.scalar(s, OWN + 3) * (g * g)
    denominator = quotient(root(v), tl.load(derived + 1)) + tile.scalar(s, OWN + 4)
    return p - tl.load(derived) * quotient(m, denominator), m, v


@triton.jit
def bytes_of_rows(tensors, at, ROWS: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr):
    """Where the bytes of a mask of bits are, BYTES of each row of a tile from byte FIRST on, and which are there."""
    stride = (tile.field(tensors, at.k, tile.COLUMNS_OF) + 7) // 8
    r, c = tl.arange(0, ROWS), at.column // 8 + FIRST + tl.arange(0, BYTES)
    there = tile.row_mask(at, ROWS)[:, None] & (c < stride)[None, :]
    return (at.row + r)[:, None] * stride + c[None, :], there


@triton.jit
def mask_bits(
    tensors, lists, at, where, AT: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    BY_ELEMENT: tl.constexpr,
):  # fmt: skip
    """Where the mask of a piece is set: a byte per element of a vector, else a bit, eight columns to a byte.
    Every byte is loaded once."""
    base = tile.pointer(lists, AT, tl.uint8)
    if BY_ELEMENT:
        return tl.load(base + where.start + where.inside, mask=where.mask, other=0) != 0
    else:
        places, there = bytes_of_rows(tensors, at, ROWS, FIRST // 8, COLUMNS // 8)
        bytes_ = tl.load(base + places, mask=there, other=0).to(tl.int32)
        bits = (bytes_[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        return tl.reshape(bits, [ROWS, COLUMNS]) != 0


@triton.jit
def amplified(w, previous, kappa):
    return w + kappa * (w - previous)


@triton.jit
def update_history_by_element(lists, AT: tl.constexpr, where, g, beta, live):
    """F <- beta F + g^2 of a piece of a vector, where `live`; returns F."""
    history = load_by_element(lists, AT, where)
    history = tl.where(live, updated_history(history, g * g, beta), history)
    out = tile.pointer(lists, AT, tl.float32) + where.start + where.inside
    tl.store(out, history, mask=where.mask & live)
    return history


@triton.jit
def update_history(lists, AT: tl.constexpr, at, squares, beta, live, ROWS: tl.constexpr):
    """F <- beta F + sum over the row of g^2, where `live`; returns F, [ROWS, 1]."""
    history = tile.load_rows(lists, AT, at, ROWS)[:, None]
    history = tl.where(live, updated_history(history, squares[:, None], beta), history)
    out = tile.pointer(lists, AT, tl.float32) + at.row + tl.arange(0, ROWS)[:, None]
    tl.store(out, history, mask=tile.row_mask(at, ROWS)[:, None] & live)
    return history


@kernel
def update_kernel(
    tiles, tensors, pointers, scalars, derived, lrs, lr_stride, sigmas, sigma_stride, component, grad_scale, clip,
    found_inf, noise, seed, stream, round_, partials, count,
    RULE: tl.constexpr, PARAM: tl.constexpr, BACKUP: tl.constexpr, MASTER: tl.constexpr, HISTORY: tl.constexpr,
    GRAD: tl.constexpr, CLEAN_GRAD: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    NOISE: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, BY_ELEMENT: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND are the types of the rule's own state. NOISE: a perturbation is part of the call."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists, scalars = pointers + WIDTH * at.k, scalars + SCALARS * at.k
    live = tile.should_update(found_inf)
    CLEAN: tl.constexpr = MASTER if MASTER is not None else BACKUP if BACKUP is not None else PARAM
    CLEAN_AT: tl.constexpr = 2 if MASTER is not None else 1 if BACKUP is not None else 0
    DRAWS: tl.constexpr = NOISE and not LONG  # of long rows the norm is not known yet
    # Without noise a backup has served, and is left as it was.
    KEEPS_CLEAN: tl.constexpr = (MASTER is not None or NOISE) if CLEAN_AT != 0 else not DRAWS
    BY_ROW: tl.constexpr = HISTORY is not None and not BY_ELEMENT

    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            weights, histories = (), ()
            squares, gradient_squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                old = tile.load_float32(lists, CLEAN_AT, CLEAN, where, EVEN)
                grad = tile.load_float32(lists, 4, GRAD, where, EVEN)
                g = final_gradient(lists, grad, scalars, component, grad_scale, clip, where, CLEAN_GRAD, 5, 0, EVEN)
                if FIRST is not None:
                    m = tile.load_float32(lists, 8, FIRST, where, EVEN)
                if RULE == "sgd":
                    lr = tile.number(lrs, lr_stride, at.k, scalars, OWN)
                    if FIRST is not None:
                        w, m = sgd_rule(old, g, m, lr, scalars, True)
                    else:
                        w, _ = sgd_rule(old, g, 0.0, lr, scalars, False)
                else:
                    v = tile.load_float32(lists, 9, SECOND, where, EVEN)
                    w, m, v = adam_rule(old, g, m, v, scalars, derived + 3 * at.k, RULE == "adamw")
                    tile.store(lists, 9, SECOND, where, EVEN, tile.to_storage(v, SECOND), live)
                if FIRST is not None:
                    tile.store(lists, 8, FIRST, where, EVEN, tile.to_storage(m, FIRST), live)
                if MASK is not None:
                    longer = mask_bits(
                        tensors, lists, at, where, 6, ROWS, tile.first(COLUMNS, i), tile.width(COLUMNS, i), BY_ELEMENT
                    )
                    w = tl.where(longer, amplified(w, old, tile.scalar(scalars, KAPPA)), w)
                w = tl.where(live, w, old)

                if HISTORY is not None:
                    unscaled = grad * tile.value_or_one(grad_scale)
                    if BY_ELEMENT:
                        histories = histories + (
                            update_history_by_element(lists, 3, where, unscaled, tile.scalar(scalars, BETA), live),
                        )
                    else:
                        gradient_squares = sum_squares(unscaled, where.mask) + gradient_squares
                stored = tile.to_storage(w, CLEAN)
                if KEEPS_CLEAN:
                    tile.store(lists, CLEAN_AT, CLEAN, where, EVEN, stored, live)
                if CLEAN_AT != 0 and not NOISE:
                    tile.store(lists, 0, PARAM, where, EVEN, tile.to_storage(w, PARAM), None)
                if NOISE:
                    # Norm and perturbation see the weight that was stored.
                    w = tile.to_float32(stored, CLEAN)
                    squares = sum_squares(w, where.mask) + squares
                    weights = weights + (w,)

            if BY_ROW and LONG:
                store_partial(partials + count, gradient_squares)
            elif BY_ROW:
                history = update_history(lists, 3, at, gradient_squares, tile.scalar(scalars, BETA), live, ROWS)
            if NOISE and LONG:
                store_partial(partials, squares)
            if DRAWS:
                sigma, eta = tile.number(sigmas, sigma_stride, at.k, scalars, SIGMA), tile.scalar(scalars, ETA)
                scale = noise_scale(root(squares), sigma)[:, None]
                if BY_ROW:
                    scale = with_history(scale, history, eta)
                key, counters = key_of(noise, seed, stream, round_), counters_of(tensors, at, SHIFTED)
                for i in tl.static_range(tile.pieces(COLUMNS)):
                    where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                    if HISTORY is not None and BY_ELEMENT:
                        each = with_history(scale, histories[i], eta)
                    else:
                        each = scale
                    z = normals(counters, key, ROWS, tile.first(COLUMNS, i), tile.width(COLUMNS, i), SHIFTED)
                    p = perturb_gaussian(weights[i], z, each)
                    tile.store(lists, 0, PARAM, where, EVEN, tile.to_storage(p, PARAM), None)


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
    for group in call.groups:
        types = group.types
        call.launch(
            update_kernel, group,
            (
                group.tiles, call.tensors, call.pointers, call.scalars, derived,
                *strided(None if derive else values["lrs"]), *strided(values["sigmas"]), values["component"],
                grad_scale, clip, found_inf, *call.key(), partials_of(call, group), call.plan.partials,
            ),
            lambda group=group, types=types: dict(
                RULE=rule, PARAM=types["params"], BACKUP=types["backups"], MASTER=types["masters"],
                HISTORY=types["history"], GRAD=types["grads"], CLEAN_GRAD=types["clean_grads"], MASK=types["masks"],
                FIRST=types[state[0]], SECOND=types[state[1]] if len(state) > 1 else None, NOISE=given["noise"],
                WIDTH=call.width, SCALARS=width, BY_ELEMENT=group.by_element,
                **(group.drawing() if given["noise"] else group.by_rows() | {"SHIFTED": False}),
            ),
        )  # fmt: skip
    finish_rows(
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
    component, grad_scale, clip, found_inf, *, lr, momentum, dampening, weight_decay, nesterov,
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
    tl.store(at, step, mask=mask & tl.reshape(tile.should_update(found_inf), [1]))
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
    noise, component, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
):  # fmt: skip
    """Restore, form the gradient, and take one Adam step; in rolling mode perturb for the next one."""
    _adam("adam_update_", "adam", locals())


@repeatable
def adamw_update_(
    params, exp_avgs, exp_avg_sqs, steps, backups, masters, history, grads, clean_grads, masks, lrs, sigmas,
    noise, component, grad_scale, clip, found_inf, *, lr, beta1, beta2, eps, weight_decay,
    grad_weight, clean_weight, kappa, beta, sigma, eta, index, offset,
):  # fmt: skip
    """As adam_update_, with decoupled weight decay."""
    _adam("adamw_update_", "adamw", locals())


@kernel
def mix_gradients_kernel(
    tiles, tensors, pointers, scalars, component, grad_scale, clip, found_inf, partials, count,
    GRAD: tl.constexpr, HISTORY: tl.constexpr, CLEAN_GRAD: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    BY_ELEMENT: tl.constexpr, SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists, scalars = pointers + WIDTH * at.k, scalars + 3 * at.k
    live, beta = tile.should_update(found_inf), tile.scalar(scalars, 2)
    FINAL: tl.constexpr = GRAD if OUT is None else OUT
    FINAL_AT: tl.constexpr = 0 if OUT is None else 3
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            squares = tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                grad = tile.load_float32(lists, 0, GRAD, where, EVEN)
                if HISTORY is not None:
                    unscaled = grad * tile.value_or_one(grad_scale)
                    if BY_ELEMENT:
                        update_history_by_element(lists, 1, where, unscaled, beta, live)
                    else:
                        squares = sum_squares(unscaled, where.mask) + squares
                g = final_gradient(lists, grad, scalars, component, grad_scale, clip, where, CLEAN_GRAD, 2, 0, EVEN)
                stored = tile.to_storage(g, FINAL)
                tile.store(lists, FINAL_AT, FINAL, where, EVEN, stored, None if found_inf is None else live)
            if HISTORY is not None and not BY_ELEMENT:
                if LONG:
                    store_partial(partials + count, squares)
                else:
                    update_history(lists, 1, at, squares, beta, live, ROWS)


@repeatable
def mix_gradients_(
    grads, history, outs, clean_grads, component, grad_scale, clip, found_inf, *, grad_weight, clean_weight, beta
):  # fmt: skip
    """Form the final gradient in place, for a base optimizer that is not ours; or in `outs`, to keep it."""
    call = begin_call(
        "mix_gradients_", locals(), lists="grads history clean_grads" + " outs" * (outs is not None),
        rows=history is not None,
        scalars=lambda v: [v["grad_weight"], v["clean_weight"], v["beta"]],
    )  # fmt: skip
    if call is None:
        return
    grad_scale, clip, found_inf = call.scalar(grad_scale), call.scalar(clip), call.scalar(found_inf)
    for group in call.groups:
        types = group.types
        call.launch(
            mix_gradients_kernel, group,
            (
                group.tiles, call.tensors, call.pointers, call.scalars, component, grad_scale, clip, found_inf,
                partials_of(call, group), call.plan.partials,
            ),
            lambda group=group, types=types: dict(
                GRAD=types["grads"], HISTORY=types["history"], CLEAN_GRAD=types["clean_grads"],
                OUT=types.get("outs"), WIDTH=call.width, BY_ELEMENT=group.by_element, **group.by_rows(),
            ),
        )  # fmt: skip
    finish_rows(call, None, 1 if history is not None else None, 2, found_inf, 3)
