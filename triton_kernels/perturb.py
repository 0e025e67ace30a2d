"""The perturb family in Triton. Mirrors flatkern/reference/perturb.py."""

import triton
import triton.language as tl

from . import tile
from .arithmetic import quotient, root
from .job import kernel
from .launch import begin_call, repeatable, strided
from .noise import key_of, tile_normals
from .norm import adaptive, filter_norms_kernel, partials_of, settle, sum_squares


@triton.jit
def noise_scale(norm, sigma):
    """sigma norm."""
    return sigma * norm


@triton.jit
def damped(scale, history, eta):
    """The same with ARWP's history: scale / sqrt(1 + eta F)."""
    return quotient(scale, root(1.0 + eta * history))


@triton.jit
def perturb_gaussian(w, z, scale):
    """w + e, e = s z rounded before it is added."""
    e = scale * z
    return w + e


@triton.jit
def perturbed(
    tensors, k, row, column, w, norm, history, sigma, eta, noise, seed, stream, round_,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """A tile of weights `w` with the noise of its elements; `norm` [ROWS]; `history` of a tile's shape, or None."""
    scale = noise_scale(norm, sigma)[:, None]
    if history is not None:
        scale = damped(scale, history, eta)
    seed, stream, round_ = key_of(noise, seed, stream, round_)
    z = tile_normals(tensors, k, row, column, seed, stream, round_, ROWS, COLUMNS, SHIFTED)
    return perturb_gaussian(w, z, scale)


@triton.jit
def load_history(
    pointers, k, WHICH: tl.constexpr, WIDTH: tl.constexpr, row, row_mask, start, inside, mask,
    ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """History of a tile: per element of tensors of rank <= 1, else per row, [ROWS, 1]."""
    base = tile.pointer(pointers, k, WHICH, WIDTH, tl.float32)
    if VECTOR:
        return tl.load(base + start + inside, mask=mask, other=0.0)
    else:
        return tl.load(base + row + tl.arange(0, ROWS), mask=row_mask, other=0.0)[:, None]


@kernel
def perturb_gaussian_kernel(
    tiles, tensors, pointers, scalars, sigmas, sigma_stride, noise, seed, stream, round_,
    PARAM: tl.constexpr, BACKUP: tl.constexpr, CLEAN: tl.constexpr, CLEAN_AT: tl.constexpr, NORM: tl.constexpr,
    NORM_AT: tl.constexpr, HISTORY: tl.constexpr, HISTORY_AT: tl.constexpr, WIDTH: tl.constexpr,
    SIGMA: tl.constexpr, ETA: tl.constexpr, SCALARS: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """p <- clean + s z. *_AT are columns of the table of pointers; params are column 0, backups 1."""
    k, row, column, start, inside, mask = tile.begin(tiles, tensors, ROWS, COLUMNS, EVEN, LONG)
    row_mask = tile.row_mask(tensors, k, row, ROWS)
    stored = tile.load(pointers, k, CLEAN_AT, WIDTH, CLEAN, start, inside, mask, EVEN)
    w = tile.widen(stored, CLEAN)
    if BACKUP is not None:
        if CLEAN_AT == 0:
            old = stored
        else:
            old = tile.load(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN)
        tile.store(pointers, k, 1, WIDTH, BACKUP, start, inside, mask, EVEN, tile.convert(old, PARAM, BACKUP))
    if NORM is not None:
        norms = tile.pointer(pointers, k, NORM_AT, WIDTH, tl.float32)
        norm = tl.load(norms + row + tl.arange(0, ROWS), mask=row_mask, other=0.0)
    else:
        norm = root(sum_squares(w, mask, ROWS, COLUMNS))
    if HISTORY is not None:
        history = load_history(pointers, k, HISTORY_AT, WIDTH, row, row_mask, start, inside, mask, ROWS, VECTOR)
    else:
        history = None
    sigma = tile.number(sigmas, sigma_stride, scalars, k, SIGMA, SCALARS)
    eta = tile.scalar(scalars, k, ETA, SCALARS)
    p = perturbed(
        tensors, k, row, column, w, norm, history, sigma, eta, noise, seed, stream, round_, ROWS, COLUMNS, SHIFTED
    )  # fmt: skip
    tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN, tile.narrow(p, PARAM))


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
            ETA=sigma_at + 1, SCALARS=scalars, VECTOR=by_history and group.vector, **group.shape(),
            SHIFTED=group.shifted,
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
                PARAM=group.types[clean], AT=PERTURB.index(clean), OUT_AT=None, WIDTH=call.width, **group.shape(),
            ),
        )  # fmt: skip
    if measured:
        settle(call, norm=PERTURB.index("norms"))
    for group in call.groups:
        given = "norms" if norms is not None or group.long else None
        launch_perturb(call, group, clean, given, backups, PERTURB, 0, 2, sigmas)


@triton.jit
def ascent_scale(rho, norm):
    """rho / (norm + 1e-12); a norm that is not finite gives a climb of zero."""
    finite = (norm.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(finite, quotient(rho, norm + 1e-12), 0.0)


@triton.jit
def perturb_ascent(p, g, scale, eta, is_adaptive):
    t = tl.abs(p) + eta
    t = tl.where(is_adaptive, t * t, 1.0)
    return tl.where(scale == 0.0, p, p + scale * t * g)


@kernel
def perturb_ascent_kernel(
    tiles, tensors, pointers, scalars, norm,
    PARAM: tl.constexpr, BACKUP: tl.constexpr, MASTER: tl.constexpr, GRAD: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    k, _row, _column, start, inside, mask = tile.begin(tiles, tensors, ROWS, COLUMNS, EVEN, LONG)
    g = tile.widen(tile.load(pointers, k, 3, WIDTH, GRAD, start, inside, mask, EVEN), GRAD)
    if BACKUP is not None or MASTER is None:
        stored = tile.load(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN)
    if BACKUP is not None:
        tile.store(pointers, k, 1, WIDTH, BACKUP, start, inside, mask, EVEN, tile.convert(stored, PARAM, BACKUP))
    if MASTER is not None:
        w = tile.widen(tile.load(pointers, k, 2, WIDTH, MASTER, start, inside, mask, EVEN), MASTER)
    else:
        w = tile.widen(stored, PARAM)
    scale = ascent_scale(tile.scalar(scalars, k, 2, 3), tl.load(norm))
    p = perturb_ascent(w, g, scale, tile.scalar(scalars, k, 0, 3), tile.scalar(scalars, k, 1, 3) != 0)
    tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN, tile.narrow(p, PARAM))


@repeatable
def perturb_ascent_(params, backups, masters, grads, norm, *, rho, eta):
    """Climb to the SAM ascent point and remember the way back."""
    call = begin_call(
        "perturb_ascent_", locals(), lists="params backups masters grads", rows=False,
        scalars=lambda v: [*adaptive(v["eta"]), v["rho"]],
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
                WIDTH=call.width, **group.shape(),
            ),
        )  # fmt: skip


@kernel
def restore_kernel(
    tiles, tensors, pointers,
    PARAM: tl.constexpr, BACKUP: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    k, _row, _column, start, inside, mask = tile.begin(tiles, tensors, ROWS, COLUMNS, EVEN, LONG)
    stored = tile.load(pointers, k, 1, WIDTH, BACKUP, start, inside, mask, EVEN)
    tile.store(pointers, k, 0, WIDTH, PARAM, start, inside, mask, EVEN, tile.convert(stored, BACKUP, PARAM))


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
                PARAM=group.types["params"], BACKUP=group.types["backups"], WIDTH=call.width, **group.shape(),
            ),
        )  # fmt: skip
