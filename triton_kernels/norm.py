"""The norm family in Triton. Mirrors flatkern/reference/norm.py.

Squares are added in one order, by `fold` alone: as a binary tree over the columns of a row, neighbours first. A level
adds two numbers, so that no choice of layout, tile or number of warps can change it; the zeros beyond the end of a row
change no bit of a sum of squares, so that the width of a tile cannot either. A row in one tile is added in float32; of
a longer one every segment is, and float64 above. What an update measures is therefore, bit for bit, what filter_norms_
does. Only a sum over all tensors, which nothing measures a second time, has an order of its own (`sum_lanes`).
"""

import functools

import torch
import triton
import triton.language as tl

from . import tile
from .arithmetic import mixed, root, scaled
from .job import kernel
from .launch import begin_call, repeatable
from .plan import RESIDENT

BLOCK = tl.constexpr(1024)
LANES, UNROLLED = tl.constexpr(2048), tl.constexpr(8)  # of a total
MOST_LEVELS = tl.constexpr(RESIDENT.bit_length() - 1)
# Of numbers whose squares are beyond float32.
SHRINK, GROW = tl.constexpr(2.0**-80), tl.constexpr(2.0**160)


@triton.jit
def fold(x):
    """Sum of each row of [rows, columns], as a binary tree of neighbours; [rows]."""
    # Row by row in memory order, so a level pairs neighbours until one number is left of each row.
    for _ in tl.static_range(MOST_LEVELS):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_squares(x, mask):
    """Sum of squares of each row of a piece, float32 [rows]."""
    return fold(tl.where(mask, x * x, 0.0))


@triton.jit
def partial_squares(x, mask):
    """`sum_squares` of a tile for `sum_partials`: where it overflows, minus that of 2^-80 x, as no other is negative.

    What matters for the sum is then a normal number; infinity and NaN stay.
    """
    squares = sum_squares(x, mask)
    if tl.sum(squares, axis=0) == float("inf"):
        squares = tl.where(squares == float("inf"), -sum_squares(x * SHRINK, mask), squares)
    return squares


@triton.jit
def sums_of(partials):
    """What `partial_squares` left, as float64. What is float64 has no need of it, and may be negative."""
    if partials.dtype == tl.float64:
        return partials
    else:
        x = partials.to(tl.float64)
        return tl.where(x < 0, x * -GROW, x)


@triton.jit
def sum_partials(partials, count):
    """Sum of `count` float32 numbers of `partial_squares`, in float64 and in their order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([1], tl.float64)
    # `range` over a number of run time fails in Triton 3.6's interpreter with NumPy 2.4.
    i = count * 0
    while i < count:
        block = tl.load(partials + i + lanes, mask=i + lanes < count, other=0.0)
        total += fold(sums_of(block)[None, :])
        i += BLOCK
    return total


@triton.jit
def updated_history(history, squares, beta):
    """F <- beta F + sum of g^2."""
    return beta * history + squares


@kernel
def filter_norms_kernel(
    tiles, tensors, pointers, partials,
    PARAM: tl.constexpr, AT: tl.constexpr, OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The norms of rows, or the partial sums of long ones; weights are list AT, norms list OUT_AT."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists = pointers + WIDTH * at.k
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            squares = tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                squares = sum_squares(tile.load_float32(lists, AT, PARAM, where, EVEN), where.mask) + squares
            if LONG:
                store_partial(partials, squares)
            else:
                out = tile.pointer(lists, OUT_AT, tl.float32) + at.row + tl.arange(0, ROWS)
                tl.store(out, root(squares), mask=tile.row_mask(at, ROWS))


@triton.jit
def store_partial(partials, sums):
    """What the segment of this program has, [1]; `partials` are those of its group."""
    tl.store(partials + tl.program_id(0) + tl.arange(0, 1), sums)


@kernel
def finish_rows_kernel(
    rows, pointers, scalars, partials, count, found_inf,
    NORM: tl.constexpr, HISTORY: tl.constexpr, BETA: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr,
):  # fmt: skip
    """Of one long row: its norm, from the first `count` partial sums, and its history, from those behind them.

    NORM and HISTORY are lists, BETA a scalar; None where there is nothing to do.
    """
    entry = rows + 5 * tl.program_id(0).to(tl.int64)
    k, row, first, parts = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    lists, one = pointers + WIDTH * k, tl.arange(0, 1)
    if NORM is not None:
        norm = tl.sqrt(sum_partials(partials + first, parts)).to(tl.float32)
        tl.store(tile.pointer(lists, NORM, tl.float32) + row + one, norm)
    if HISTORY is not None:
        # Of a vector the history is per element, and done.
        mask = (one == tl.load(entry + 4)) & tl.reshape(tile.should_update(found_inf), [1])
        out = tile.pointer(lists, HISTORY, tl.float32) + row + one
        squares = sum_partials(partials + count + first, parts).to(tl.float32)
        beta = tile.scalar(scalars + SCALARS * k, BETA)
        tl.store(out, updated_history(tl.load(out, mask=mask, other=0.0), squares, beta), mask=mask)


def finish_rows(call, norm=None, history=None, beta=None, found_inf=None, scalars=1):
    """Finish the long rows of a call whose partial sums are there."""
    if call.plan.long_row_count and (norm is not None or history is not None):
        numbers = call.scalars
        if history is None:  # norms depend on nothing else
            beta, scalars, numbers, found_inf = None, 1, None, None
        call.start(
            finish_rows_kernel, call.plan.long_row_count, 4,
            (call.plan.long_rows, call.pointers, numbers, partials_of(call), call.plan.partials, found_inf),
            lambda: dict(NORM=norm, HISTORY=history, BETA=beta, WIDTH=call.width, SCALARS=scalars),
        )  # fmt: skip


def partials_of(call, group=None, sums=2, dtype=torch.float32):
    """Room for so many partial sums of each tile that leaves any; from the first tile of `group` on."""
    found = call.scratch("partials", max(1, sums * call.plan.partials), dtype)
    return found if group is None else call.once(("partials", group.first), lambda: found[group.first :])


@repeatable
def filter_norms_(norms, params):
    """The L2 norm of every filter."""
    call = begin_call("filter_norms_", locals(), lists="params norms", rows=True)
    if call is None:
        return
    for group in call.groups:
        call.launch(
            filter_norms_kernel, group, (group.tiles, call.tensors, call.pointers, partials_of(call, group)),
            lambda group=group: dict(
                PARAM=group.types["params"], AT=0, OUT_AT=None if group.long else 1, WIDTH=call.width,
                **group.by_rows(),
            ),
        )  # fmt: skip
    finish_rows(call, norm=1)


@triton.jit
def sum_lanes(partials, count):
    """The sum of all partial sums, float64 [1].

    In two levels: each of LANES sums adds every LANES-th number, in their order, and a tree adds the sums at the end.
    Inside the loop nothing waits but for memory, and a turn takes the numbers of 67 million elements, so that one
    program is enough. The order is the same on every machine.
    """
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    i = count * 0
    while i < count:
        for _ in tl.static_range(UNROLLED):
            sums += sums_of(tl.load(partials + i + lanes, mask=i + lanes < count, other=0.0))
            i += LANES
    return fold(sums[None, :])


@functools.partial(kernel, aligned=("partials",))  # whose memory begins there
def total_kernel(norm, partials, count):
    """The root of the sum of all partial sums."""
    tl.store(norm + tl.arange(0, 1), tl.sqrt(sum_lanes(partials, count)).to(tl.float32))


def total(call, norm):
    call.start(total_kernel, 1, 16, (norm, partials_of(call), call.plan.partials), dict)


@triton.jit
def direction(g, mean, sigma):
    """What Friendly-SAM climbs along: g - sigma m."""
    return g - sigma * mean


@kernel
def ascent_norm_kernel(
    tiles, tensors, pointers, scalars, partials,
    GRAD: tl.constexpr, PARAM: tl.constexpr, MEAN: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where, lists = tile.segment(at, EVEN), pointers + WIDTH * at.k
    d = tile.load_float32(lists, 0, GRAD, where, EVEN)
    if MEAN is not None:
        mean = tile.load_float32(lists, 2, MEAN, where, EVEN)
        d = direction(d, mean, tile.scalar(scalars + SCALARS * at.k, 2))
    if PARAM is not None:
        eta = tile.scalar(scalars + SCALARS * at.k, 0)
        w = tile.load_float32(lists, 1, PARAM, where, EVEN)
        d = tl.where(tile.scalar(scalars + SCALARS * at.k, 1) != 0, (tl.abs(w) + eta) * d, d)
    store_partial(partials, partial_squares(d, where.mask))


def adaptive(eta):
    """eta of the kernels, and whether it is >= 0: rounding to float32 may lose the sign."""
    return [eta, [float(e >= 0) for e in eta]]


@repeatable
def ascent_norm_(norm, params, grads, means, *, eta, sigma):
    """The norm that scales SAM's climb, over all tensors at once."""
    has_means = means is not None  # without them the tables are as narrow as if there were none
    call = begin_call(
        "ascent_norm_", locals(), lists="grads params" + " means" * has_means, rows=False,
        scalars=lambda v: adaptive(v["eta"]) + [v["sigma"]] * has_means,
    )  # fmt: skip
    if call is None:
        norm.zero_()
        return
    for group in call.groups:
        call.launch(
            ascent_norm_kernel, group,
            (group.tiles, call.tensors, call.pointers, call.scalars, partials_of(call, group)),
            lambda group=group: dict(
                GRAD=group.types["grads"], PARAM=group.types["params"], MEAN=group.types.get("means"),
                WIDTH=call.width, SCALARS=call.scalars.shape[1], **group.flat(),
            ),
        )  # fmt: skip
    total(call, norm)


@triton.jit
def final_gradient(
    lists, g, scalars, component, grad_scale, clip, where, CLEAN: tl.constexpr, AT: tl.constexpr, WEIGHT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """clip (grad_weight grad_scale g + clean_weight (q g_clean - r grad_scale g)), where q and r are the component;
    list AT has the clean gradients, and the weights are scalars WEIGHT and WEIGHT + 1."""
    weight = tile.scalar(scalars, WEIGHT)
    if component is not None:
        weight = weight - tile.scalar(scalars, WEIGHT + 1) * tl.load(component + 1)
    factor = weight * tile.value_or_one(grad_scale)
    if CLEAN is None:
        return scaled(g, factor, tile.value_or_one(clip))
    else:
        clean, clean_weight = tile.load_float32(lists, AT, CLEAN, where, EVEN), tile.scalar(scalars, WEIGHT + 1)
        if component is not None:
            clean_weight = clean_weight * tl.load(component)
        return mixed(g, clean, factor, clean_weight, tile.value_or_one(clip))


@kernel
def gradient_norm_kernel(
    tiles, tensors, pointers, scalars, partials, component, grad_scale,
    GRAD: tl.constexpr, CLEAN: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where, lists = tile.segment(at, EVEN), pointers + WIDTH * at.k
    g = tile.load_float32(lists, 0, GRAD, where, EVEN)
    g = final_gradient(lists, g, scalars + 2 * at.k, component, grad_scale, None, where, CLEAN, 1, 0, EVEN)
    store_partial(partials, partial_squares(g, where.mask))


@repeatable
def gradient_norm_(norm, grads, clean_grads, component, grad_scale, *, grad_weight, clean_weight):
    """The norm of the final gradient, as the update forms it before clipping."""
    call = begin_call(
        "gradient_norm_", locals(), lists="grads clean_grads", rows=False,
        scalars=lambda v: [v["grad_weight"], v["clean_weight"]],
    )  # fmt: skip
    if call is None:
        norm.zero_()
        return
    for group in call.groups:
        call.launch(
            gradient_norm_kernel, group,
            (
                group.tiles, call.tensors, call.pointers, call.scalars, partials_of(call, group), component,
                call.scalar(grad_scale),
            ),
            lambda group=group: dict(
                GRAD=group.types["grads"], CLEAN=group.types["clean_grads"], WIDTH=call.width, **group.flat(),
            ),
        )  # fmt: skip
    total(call, norm)


@kernel
def gradient_products_kernel(
    tiles, tensors, pointers, partials, count,
    GRAD: tl.constexpr, CLEAN: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The partial sums of a product are `count` after those of the one before it."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where, lists = tile.segment(at, EVEN), pointers + WIDTH * at.k
    # Beyond the end of a tensor both are zero. Of two float32 the product is exact.
    g = tile.load_float32(lists, 0, GRAD, where, EVEN).to(tl.float64)
    clean = tile.load_float32(lists, 1, CLEAN, where, EVEN).to(tl.float64)
    store_partial(partials, fold(clean * clean))
    store_partial(partials + count, fold(clean * g))
    store_partial(partials + 2 * count, fold(g * g))


@kernel
def total_products_kernel(products, partials, count):
    """Each of the products is the sum of its partial sums."""
    k = tl.program_id(0)
    tl.store(products + k + tl.arange(0, 1), sum_lanes(partials + k * count, count))


@repeatable
def gradient_products_(products, grads, clean_grads):
    """The inner products of two gradients, over all tensors at once."""
    call = begin_call("gradient_products_", locals(), lists="grads clean_grads", rows=False)
    if call is None:
        products.zero_()
        return
    count, room = call.plan.partials, dict(sums=3, dtype=torch.float64)
    for group in call.groups:
        call.launch(
            gradient_products_kernel, group,
            (group.tiles, call.tensors, call.pointers, partials_of(call, group, **room), count),
            lambda group=group: dict(
                GRAD=group.types["grads"], CLEAN=group.types["clean_grads"], WIDTH=call.width, **group.flat(),
            ),
        )  # fmt: skip
    call.start(total_products_kernel, 3, 16, (products, partials_of(call, **room), count), dict)
