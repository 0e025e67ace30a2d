"""The perturb family in Triton. Mirrors flatkern/reference/perturb.py."""

import triton
import triton.language as tl

from . import tile
from .arithmetic import quotient, root
from .job import kernel
from .launch import begin_call, repeatable, strided
from .noise import counters_of, key_of, normals
from .norm import adaptive, direction, filter_norms_kernel, finish_rows, partials_of, sum_squares


@triton.jit
def noise_scale(norm, sigma):
    """sigma norm."""
    return sigma * norm


@triton.jit
def with_history(scale, history, eta):
    """The same with ARWP's history: scale / sqrt(1 + eta F)."""
    return quotient(scale, root(1.0 + eta * history))


@triton.jit
def perturb_gaussian(w, z, scale):
    """w + e, e = s z rounded before it is added."""
    e = scale * z
    return w + e


@triton.jit
def load_by_element(lists, WHICH: tl.constexpr, where):
    """A piece of a vector's history."""
    return tl.load(tile.pointer(lists, WHICH, tl.float32) + where.start + where.inside, mask=where.mask, other=0.0)


@kernel
def perturb_gaussian_kernel(
    tiles, tensors, pointers, scalars, sigmas, sigma_stride, noise, seed, stream, round_,
    PARAM: tl.constexpr, BACKUP: tl.constexpr, CLEAN: tl.constexpr, CLEAN_AT: tl.constexpr, NORM: tl.constexpr,
    NORM_AT: tl.constexpr, HISTORY: tl.constexpr, HISTORY_AT: tl.constexpr, WIDTH: tl.constexpr,
    SIGMA: tl.constexpr, ETA: tl.constexpr, SCALARS: tl.constexpr, BY_ELEMENT: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """p <- clean + s z. *_AT are columns of the table of pointers; params are column 0, backups 1."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists, scalars = pointers + WIDTH * at.k, scalars + SCALARS * at.k
    sigma, eta = tile.number(sigmas, sigma_stride, at.k, scalars, SIGMA), tile.scalar(scalars, ETA)
    key, counters = key_of(noise, seed, stream, round_), counters_of(tensors, at, SHIFTED)
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            weights, squares = (), tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                stored = tile.load(lists, CLEAN_AT, CLEAN, where, EVEN)
                w = tile.to_float32(stored, CLEAN)
                if BACKUP is not None:
                    old = stored if CLEAN_AT == 0 else tile.load(lists, 0, PARAM, where, EVEN)
                    tile.store(lists, 1, BACKUP, where, EVEN, tile.convert(old, PARAM, BACKUP), None)
                if NORM is None:
                    squares = sum_squares(w, where.mask) + squares
                weights = weights + (w,)
            scale = noise_scale(root(squares) if NORM is None else tile.load_rows(lists, NORM_AT, at, ROWS), sigma)
            scale = scale[:, None]
            if HISTORY is not None and not BY_ELEMENT:
                scale = with_history(scale, tile.load_rows(lists, HISTORY_AT, at, ROWS)[:, None], eta)
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                if HISTORY is not None and BY_ELEMENT:
                    each = with_history(scale, load_by_element(lists, HISTORY_AT, where), eta)
                else:
                    each = scale
                z = normals(counters, key, ROWS, tile.first(COLUMNS, i), tile.width(COLUMNS, i), SHIFTED)
                p = perturb_gaussian(weights[i], z, each)
                tile.store(lists, 0, PARAM, where, EVEN, tile.to_storage(p, PARAM), None)


def launch_perturb(call, group, clean, norms, backup, names, sigma_at, scalars, sigmas):
    """perturb_gaussian_kernel for a group; `clean` and `norms` name the lists that hold weights and norms, if any."""
    types, by_history = group.types, group.types["history"] is not None
    call.launch(
        perturb_gaussian_kernel, group,
        (group.tiles, call.tensors, call.pointers, call.scalars, *strided(sigmas), *call.key()),
        lambda: dict(
            PARAM=types["params"], BACKUP=types["backups"] if backup else None, CLEAN=types[clean],
            CLEAN_AT=names.index(clean), NORM=None if norms is None else tl.float32,
            NORM_AT=None if norms is None else names.index(norms), HISTORY=types["history"],
            HISTORY_AT=names.index("history") if by_history else None, WIDTH=call.width, SIGMA=sigma_at,
            ETA=sigma_at + 1, SCALARS=scalars, BY_ELEMENT=by_history and group.by_element, **group.drawing(),
        ),
    )  # fmt: skip


PERTURB = ("params", "backups", "masters", "norms", "history")


@repeatable
def perturb_gaussian_(params, backups, masters, norms, history, sigmas, noise, *, sigma, eta, index, offset):
    """Add filter-wise Gaussian noise to the weights and remember the way back.

    Rows that fit on chip are measured and perturbed in one pass. Longer ones are measured first.
    """
    call = begin_call(
        "perturb_gaussian_", locals(), lists=" ".join(PERTURB), rows=True,
        scalars=lambda v: [v["sigma"], v["eta"]],
    )  # fmt: skip
    if call is None:
        return
    clean = "masters" if masters else "params"
    measured = [group for group in call.groups if group.long and norms is None]
    for group in measured:
        call.launch(
            filter_norms_kernel, group, (group.tiles, call.tensors, call.pointers, partials_of(call, group)),
            lambda group=group: dict(
                PARAM=group.types[clean], AT=PERTURB.index(clean), OUT_AT=None, WIDTH=call.width, **group.by_rows(),
            ),
        )  # fmt: skip
    if measured:
        finish_rows(call, norm=PERTURB.index("norms"))
    for group in call.groups:
        given = "norms" if norms is not None or group.long else None
        launch_perturb(call, group, clean, given, backups, PERTURB, 0, 2, sigmas)


@triton.jit
def is_finite(norm):
    return (norm.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def ascent_scale(rho, norm):
    """rho / (norm + 1e-12); a norm that is not finite gives a climb of zero."""
    return tl.where(is_finite(norm), quotient(rho, norm + 1e-12), 0.0)


@triton.jit
def perturb_ascent(p, d, scale, eta, is_adaptive):
    t = tl.abs(p) + eta
    t = tl.where(is_adaptive, t * t, 1.0)
    return tl.where(scale == 0.0, p, p + scale * t * d)


@triton.jit
def renewed_mean(mean, g, momentum, rest, norm):
    """momentum m + (1 - momentum) g; where the norm is not finite, m."""
    return tl.where(is_finite(norm), momentum * mean + rest * g, mean)


@kernel
def perturb_ascent_kernel(
    tiles, tensors, pointers, scalars, norm,
    PARAM: tl.constexpr, BACKUP: tl.constexpr, MASTER: tl.constexpr, GRAD: tl.constexpr, MEAN: tl.constexpr,
    NEW_MEAN: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where, lists, scalars = tile.segment(at, EVEN), pointers + WIDTH * at.k, scalars + SCALARS * at.k
    d = tile.load_float32(lists, 3, GRAD, where, EVEN)
    if MEAN is not None:
        g, mean = d, tile.load_float32(lists, 4, MEAN, where, EVEN)
        d = direction(g, mean, tile.scalar(scalars, 3))
        if NEW_MEAN is not None:
            new = renewed_mean(mean, g, tile.scalar(scalars, 4), tile.scalar(scalars, 5), tl.load(norm))
            tile.store(lists, 5, NEW_MEAN, where, EVEN, tile.to_storage(new, NEW_MEAN), None)
    if BACKUP is not None or MASTER is None:
        stored = tile.load(lists, 0, PARAM, where, EVEN)
    if BACKUP is not None:
        tile.store(lists, 1, BACKUP, where, EVEN, tile.convert(stored, PARAM, BACKUP), None)
    if MASTER is not None:
        w = tile.load_float32(lists, 2, MASTER, where, EVEN)
    else:
        w = tile.to_float32(stored, PARAM)
    scale = ascent_scale(tile.scalar(scalars, 2), tl.load(norm))
    p = perturb_ascent(w, d, scale, tile.scalar(scalars, 0), tile.scalar(scalars, 1) != 0)
    tile.store(lists, 0, PARAM, where, EVEN, tile.to_storage(p, PARAM), None)


@repeatable
def perturb_ascent_(params, backups, new_means, masters, grads, means, norm, *, rho, eta, sigma, momentum):
    """Climb to the SAM ascent point and remember the way back."""
    has_means = means is not None  # without them the tables are as narrow as if there were none
    call = begin_call(
        "perturb_ascent_", locals(), lists="params backups masters grads" + " means new_means" * has_means, rows=False,
        scalars=lambda v: [
            *adaptive(v["eta"]), v["rho"],
            *([v["sigma"], v["momentum"], [1 - m for m in v["momentum"]]] if has_means else []),
        ],
    )  # fmt: skip
    if call is None:
        return
    norm = call.scalar(norm)
    for group in call.groups:
        types = group.types
        call.launch(
            perturb_ascent_kernel, group, (group.tiles, call.tensors, call.pointers, call.scalars, norm),
            lambda group=group, types=types: dict(
                PARAM=types["params"], BACKUP=types["backups"], MASTER=types["masters"], GRAD=types["grads"],
                MEAN=types.get("means"), NEW_MEAN=types.get("new_means"), WIDTH=call.width,
                SCALARS=call.scalars.shape[1], **group.flat(),
            ),
        )  # fmt: skip


@kernel
def restore_kernel(
    tiles, tensors, pointers, PARAM: tl.constexpr, BACKUP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr
):
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where, lists = tile.segment(at, EVEN), pointers + WIDTH * at.k
    stored = tile.load(lists, 1, BACKUP, where, EVEN)
    tile.store(lists, 0, PARAM, where, EVEN, tile.convert(stored, BACKUP, PARAM), None)


@repeatable
def restore_(params, backups):
    """Put the clean weights back, exactly."""
    call = begin_call("restore_", locals(), lists="params backups", rows=False)
    if call is None:
        return
    for group in call.groups:
        call.launch(
            restore_kernel, group, (group.tiles, call.tensors, call.pointers),
            lambda group=group: dict(
                PARAM=group.types["params"], BACKUP=group.types["backups"], WIDTH=call.width, **group.flat(),
            ),
        )  # fmt: skip
