"""The mask family in Triton: which gradients are small, and longer steps there. Mirrors flatkern/reference/mask.py."""

import triton
import triton.language as tl

from flatkern.checks import MAGNITUDE_DIGITS

from . import tile
from .job import kernel
from .launch import begin_call, repeatable
from .update import amplified, mask_bits


@kernel
def count_magnitudes_kernel(
    tiles, tensors, pointers, prefix, counts,
    GRAD: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    KNOWN_BITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A histogram of a digit of |g| for a tile, what is below the known digits, what is not finite; added to all.
    Integers, so that the order does not matter."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    where = tile.segment(at, EVEN)
    g, mask = tile.load_float32(pointers + WIDTH * at.k, 0, GRAD, where, EVEN), where.mask
    ROWS: tl.constexpr = 1
    COLUMNS: tl.constexpr = tile.SEGMENT
    bits = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    BINS: tl.constexpr = 1 << BITS
    infinite = tl.sum(tl.reshape((mask & (bits >= 0x7F800000)).to(tl.int32), [ROWS * COLUMNS]), axis=0)
    tl.atomic_add(counts + BINS + 1, infinite.to(tl.int64), mask=infinite > 0)
    if KNOWN > 0:
        higher = tl.load(prefix).to(tl.int32)
        if KNOWN > 1:
            higher = (higher << KNOWN_BITS) | tl.load(prefix + 1).to(tl.int32)
        begins = bits >> (SHIFT + BITS)
        below = tl.sum(tl.reshape((mask & (begins < higher)).to(tl.int32), [ROWS * COLUMNS]), axis=0)
        tl.atomic_add(counts + BINS, below.to(tl.int64), mask=below > 0)
        mask = mask & (begins == higher)
    # What is not to be counted goes to bin 0 and is taken off again: tl.histogram takes no mask in every version.
    digit = tl.where(mask, (bits >> SHIFT) & (BINS - 1), 0)
    b = tl.arange(0, BINS)
    others = ROWS * COLUMNS - tl.sum(tl.reshape(mask.to(tl.int32), [ROWS * COLUMNS]), axis=0)
    found = tl.histogram(tl.reshape(digit, [ROWS * COLUMNS]), BINS) - tl.where(b == 0, others, 0)
    tl.atomic_add(counts + b, found.to(tl.int64), mask=found > 0)


def count_magnitudes_(counts, grads, prefix):
    """One step of a radix selection: a histogram of the next digit of |g|."""
    call = begin_call("count_magnitudes_", locals(), lists="grads", rows=False)
    counts.zero_()
    if call is None:
        return
    known = prefix.numel()
    for group in call.groups:
        call.launch(
            count_magnitudes_kernel, group, (group.tiles, call.tensors, call.pointers, prefix, counts),
            lambda group=group: dict(
                GRAD=group.types["grads"], WIDTH=call.width, KNOWN=known, SHIFT=sum(MAGNITUDE_DIGITS[known + 1 :]),
                BITS=MAGNITUDE_DIGITS[known], KNOWN_BITS=MAGNITUDE_DIGITS[1], **group.flat(),
            ),
        )  # fmt: skip


@triton.jit
def store_bits(tensors, base, at, bits, ROWS: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr):
    """Store [ROWS, 8 BYTES] bits of a tile's rows from their byte FIRST on."""
    stride = (tile.field(tensors, at.k, tile.COLUMNS_OF) + 7) // 8
    r, c = tl.arange(0, ROWS), at.column // 8 + FIRST + tl.arange(0, BYTES)
    eights = tl.reshape(bits << (tl.arange(0, 8 * BYTES) % 8)[None, :], [ROWS, BYTES, 8])
    there = tile.row_mask(at, ROWS)[:, None] & (c < stride)[None, :]
    tl.store(base + (at.row + r)[:, None] * stride + c[None, :], tl.sum(eights, axis=2).to(tl.uint8), mask=there)


@kernel
def pack_mask_kernel(
    tiles, tensors, pointers, threshold,
    GRAD: tl.constexpr, WIDTH: tl.constexpr, BY_ELEMENT: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """n = [ |g| <= threshold ]: a byte per element of a vector, else a bit, eight columns of a row to a byte."""
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists = pointers + WIDTH * at.k
    base = tile.pointer(lists, 1, tl.uint8)
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                g = tile.load_float32(lists, 0, GRAD, where, EVEN)
                small = (where.mask & (tl.abs(g) <= tl.load(threshold))).to(tl.int32)
                if BY_ELEMENT:
                    tl.store(base + where.start + where.inside, small.to(tl.uint8), mask=where.mask)
                else:
                    store_bits(tensors, base, at, small, ROWS, tile.first(COLUMNS, i) // 8, tile.width(COLUMNS, i) // 8)


@repeatable
def pack_mask_(masks, grads, threshold):
    """The mask of the small gradients, a bit per element."""
    call = begin_call("pack_mask_", locals(), lists="grads masks", rows=True)
    if call is None:
        return
    threshold = call.scalar(threshold)
    for group in call.groups:
        call.launch(
            pack_mask_kernel, group, (group.tiles, call.tensors, call.pointers, threshold),
            lambda group=group: dict(
                GRAD=group.types["grads"], WIDTH=call.width, BY_ELEMENT=group.by_element, **group.by_rows(),
            ),
        )  # fmt: skip


@kernel
def amplify_kernel(
    tiles, tensors, pointers, scalars,
    PARAM: tl.constexpr, PREVIOUS: tl.constexpr, WIDTH: tl.constexpr, BY_ELEMENT: tl.constexpr,
    SHAPES: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    at = tile.tile_coordinates(tiles, tensors, EVEN, LONG)
    lists, kappa = pointers + WIDTH * at.k, tile.scalar(scalars + at.k, 0)
    for shape in tl.static_range(len(SHAPES)):
        if at.shape == shape:
            ROWS: tl.constexpr = SHAPES[shape][0]
            COLUMNS: tl.constexpr = SHAPES[shape][1]
            for i in tl.static_range(tile.pieces(COLUMNS)):
                where = tile.piece(at, i, ROWS, COLUMNS, EVEN, LONG)
                w = tile.load_float32(lists, 0, PARAM, where, EVEN)
                previous = tile.load_float32(lists, 1, PREVIOUS, where, EVEN)
                longer = mask_bits(
                    tensors, lists, at, where, 2, ROWS, tile.first(COLUMNS, i), tile.width(COLUMNS, i), BY_ELEMENT
                )
                p = tl.where(longer, amplified(w, previous, kappa), w)
                tile.store(lists, 0, PARAM, where, EVEN, tile.to_storage(p, PARAM), None)


@repeatable
def amplify_(params, previous, masks, *, kappa):
    """Lengthen the step that led from `previous` to `params`, where the mask is set."""
    call = begin_call(
        "amplify_", locals(), lists="params previous masks", rows=True, scalars=lambda v: [v["kappa"]]
    )  # fmt: skip
    if call is None:
        return
    for group in call.groups:
        call.launch(
            amplify_kernel, group, (group.tiles, call.tensors, call.pointers, call.scalars),
            lambda group=group: dict(
                PARAM=group.types["params"], PREVIOUS=group.types["previous"], WIDTH=call.width,
                BY_ELEMENT=group.by_element, **group.by_rows(),
            ),
        )  # fmt: skip
