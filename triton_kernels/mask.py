"""The mask family in Triton: which gradients are small, and longer steps there. Mirrors flatkern/reference/mask.py."""

import torch
import triton
import triton.language as tl

from flatkern.checks import MAGNITUDE_DIGITS

from . import tile
from .job import kernel
from .launch import begin_call, repeatable
from .update import amplified, bytes_of_rows, mask_bits

COPIES = tl.constexpr(32)  # of the counts
BLOCK = tl.constexpr(512)  # counts that a program sums
FIRST_BITS = tl.constexpr(MAGNITUDE_DIGITS[0])
# Near the golden section of 2048, so that neighbours end far apart; odd, so that it has an inverse.
SPREAD, GATHER = tl.constexpr(1265), tl.constexpr(pow(1265, -1, 2 ** MAGNITUDE_DIGITS[0]))
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def column_of(digit, BITS: tl.constexpr, INVERSE: tl.constexpr):
    """The column in which a digit is counted; INVERSE: the digit that a column counts.

    Most gradients have a few dozen first digits, which are neighbours. In neighbouring columns their additions would
    queue at a few slices of the cache.
    """
    if BITS == FIRST_BITS:
        return (digit * (GATHER if INVERSE else SPREAD)) & ((1 << BITS) - 1)
    else:
        return digit


@triton.jit
def add_one(
    counts, bits, first, span, SHIFT: tl.constexpr, BITS: tl.constexpr, LENGTH: tl.constexpr, PIECES: tl.constexpr
):
    """Count the digits of those of LENGTH magnitudes that are in [first, first + span).

    In PIECES, each with every PIECES-th element: a thread has that many neighbours, so a piece lies in the threads as
    Triton wants an atomic addition to. The addresses of the whole would go through shared memory to get there, which
    doubles the instructions.
    """
    if PIECES == 1:
        column = column_of((bits >> SHIFT) & ((1 << BITS) - 1), BITS, False)
        counted = (bits - first).to(tl.uint32, bitcast=True) < span
        tl.atomic_add(counts + column, tl.full([LENGTH], 1, tl.int32), mask=counted, sem="relaxed")
    else:
        HALF: tl.constexpr = LENGTH // 2
        left, right = tl.split(tl.reshape(bits, [HALF, 2]))
        add_one(counts, left, first, span, SHIFT, BITS, HALF, PIECES // 2)
        add_one(counts, right, first, span, SHIFT, BITS, HALF, PIECES // 2)


@triton.jit
def count_negative(x, LENGTH: tl.constexpr, PIECES: tl.constexpr):
    """How many of LENGTH int32 are negative, in parts: of the numbers that a thread has next to each other."""
    sign = (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    if PIECES == 1:
        return tl.sum(tl.reshape(sign, [16, LENGTH // 16]), axis=0)
    else:
        return tl.sum(tl.reshape(sign, [LENGTH // PIECES, PIECES]), axis=1)


@triton.jit
def known_digits(prefix, KNOWN: tl.constexpr, KNOWN_BITS: tl.constexpr):
    """The KNOWN digits in a row, as the upper bits of a magnitude."""
    if KNOWN == 0:
        return tl.program_id(0) * 0
    elif KNOWN == 1:
        return tl.load(prefix).to(tl.int32)
    else:
        return (tl.load(prefix).to(tl.int32) << KNOWN_BITS) | tl.load(prefix + 1).to(tl.int32)


@kernel
def count_magnitudes_kernel(
    tiles, tensors, pointers, prefix, copies,
    GRAD: tl.constexpr, WIDTH: tl.constexpr, KNOWN: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    KNOWN_BITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add a tile to a copy of the counts: a histogram of a digit of |g|, how many are low, how many are not finite.

    An element that has the known digits is one atomic addition in memory. Few elements have them: the first digit of
    many elements is guessed from a sample (flatkern/selection.py), a few per cent share it, and hardly any share two.
    Additions to one address wait for each other, hence the copies, which sum_counts_kernel sums. Zeros, often most of a
    gradient, are *low*: they are counted with what is below the known digits, in registers. All counts are integers, so
    that no order matters.

    (tl.histogram is no way: it compares each element with each bin in Triton 3.6, in 168 to 249 instructions.)
    """
    LENGTH: tl.constexpr = tile.SEGMENT
    PIECES: tl.constexpr = 128 // GRAD.primitive_bitwidth if EVEN else 1  # what a thread loads at a time
    at = tile.tile_coordinates(tiles, tensors, EVEN, True)
    g = tile.load_float32(pointers + WIDTH * at.k, 0, GRAD, tile.segment(at, EVEN), EVEN)
    bits = tl.reshape(g, [LENGTH]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    begin = known_digits(prefix, KNOWN, KNOWN_BITS) << (SHIFT + BITS)
    first, last = tl.maximum(begin, 1 << SHIFT), begin + ((1 << (SHIFT + BITS)) - 1)
    own = copies + (tl.program_id(0) % COPIES) * ((1 << BITS) + 2)
    # Two sums in one number. Lanes beyond the end of a tensor are zeros, so they are low, and finite.
    tl.static_assert(LENGTH < 1 << 15)
    both = count_negative(bits - first, LENGTH, PIECES) + (count_negative(bits - INFINITY, LENGTH, PIECES) << 16)
    both = tl.sum(both, axis=0)
    low, infinite = both & 0xFFFF, -(both >> 16) + LENGTH
    tl.atomic_add(own + (1 << BITS), low, mask=low > 0, sem="relaxed")
    tl.atomic_add(own + (1 << BITS) + 1, infinite, mask=infinite > 0, sem="relaxed")
    add_one(own, bits, first, (last - first).to(tl.uint32) + 1, SHIFT, BITS, LENGTH, PIECES)


@triton.jit
def take_copies(first_copy, mask, STRIDE: tl.constexpr):
    """The sum of the copies of a block of counts, given as pointers into the first one. Leaves zeros."""
    pointers, mask = first_copy[None, :] + (tl.arange(0, COPIES) * STRIDE)[:, None], mask[None, :]
    counts = tl.load(pointers, mask=mask, other=0)
    tl.store(pointers, tl.zeros_like(counts), mask=mask)
    # Unsigned, because a copy's share of 2^36 elements fits then.
    return tl.sum(counts.to(tl.uint32, bitcast=True).to(tl.int64), axis=0)


@kernel
def sum_counts_kernel(counts, prefix, copies, padding, count, BITS: tl.constexpr):
    """Sum the copies of the counts, and leave zeros there for the next time. `count` digits are known; `padding` lanes
    of all tiles are beyond tensors' ends."""
    STRIDE: tl.constexpr = (1 << BITS) + 2
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    digit = column_of(column, BITS, True)
    found = take_copies(copies + column, column >= 0, STRIDE)
    one = tl.arange(0, 1)
    is_first = (tl.program_id(0) + one) == 0  # of the programs, which has the digit 0
    low = take_copies(copies + (1 << BITS) + one, is_first, STRIDE) - padding
    infinite = take_copies(copies + (1 << BITS) + 1 + one, is_first, STRIDE)
    # Low are those below the known digits; where these are zeros, nothing is below, and low are those with a digit 0.
    known = tl.load(prefix, mask=count > 0, other=0)
    known |= tl.load(prefix + tl.maximum(count - 1, 0), mask=count > 0, other=0)
    tl.store(counts + digit, tl.where((digit == 0) & (known == 0), low, found))
    tl.store(counts + (1 << BITS) + one, tl.where(known == 0, 0, low), mask=is_first)
    tl.store(counts + (1 << BITS) + 1 + one, infinite, mask=is_first)


def count_magnitudes_(counts, grads, prefix):
    """One step of a radix selection: a histogram of the next digit of |g|."""
    call = begin_call("count_magnitudes_", locals(), lists="grads", rows=False)
    if call is None or call.is_recorded:
        counts.zero_()  # a recording's caller looks at the counts though nothing is launched
    if call is None:
        return
    known, prefix = prefix.numel(), prefix.contiguous()
    bits = MAGNITUDE_DIGITS[known]
    copies, scratch = call.scratch("copies", COPIES.value * counts.numel(), torch.int32), call.plan.scratch
    if not scratch.get("are zeros"):
        copies.zero_()  # they are new, or a call was interrupted
    scratch["are zeros"] = False
    for group in call.groups:
        call.launch(
            count_magnitudes_kernel, group, (group.tiles, call.tensors, call.pointers, prefix, copies),
            lambda group=group: dict(
                GRAD=group.types["grads"], WIDTH=call.width, KNOWN=known, SHIFT=sum(MAGNITUDE_DIGITS[known + 1 :]),
                BITS=bits, KNOWN_BITS=MAGNITUDE_DIGITS[1], **group.flat(),
            ),
        )  # fmt: skip
    lanes = tile.SEGMENT.value * sum(group.programs for group in call.groups)
    padding = call.once("padding", lambda: lanes - sum(g.numel() for g in grads))
    given = counts, prefix, copies, padding, known
    call.start(sum_counts_kernel, 2**bits // BLOCK.value, 8, given, lambda: dict(BITS=bits))
    scratch["are zeros"] = True


@triton.jit
def store_bits(tensors, base, at, bits, ROWS: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr):
    """Store [ROWS, 8 BYTES] bits of a tile's rows from their byte FIRST on."""
    places, there = bytes_of_rows(tensors, at, ROWS, FIRST, BYTES)
    eights = tl.reshape(bits << (tl.arange(0, 8 * BYTES) % 8)[None, :], [ROWS, BYTES, 8])
    tl.store(base + places, tl.sum(eights, axis=2).to(tl.uint8), mask=there)


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
