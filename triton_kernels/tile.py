"""How a kernel walks memory: which rows and columns a program has, what a stored number is. No operation's arithmetic.

A program has one *tile*, ROWS x COLUMNS of one tensor. Types of lists are those of memory: float32, float16, and int16
for bfloat16, whose rounding is done on the bits (Triton's interpreter would truncate). None is a list that is absent.
"""

import triton
import triton.language as tl

BFLOAT16 = tl.constexpr(tl.int16)
# A row of the table of tensors, int64.
FIELDS = tl.constexpr(6)
COLUMNS_OF, ROWS_OF, INDEX_OF, FIRST_ROW_OF, FIRST_EIGHT_OF, SHIFT_OF = (tl.constexpr(i) for i in range(6))


@triton.jit
def field(tensors, k, WHICH: tl.constexpr):
    return tl.load(tensors + FIELDS * k + WHICH)


@triton.jit
def begin(tiles, tensors, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr):
    """(tensor, first row, first column, offset of the tile, offsets inside it, mask) of this program.

    EVEN promises that what a tile has of a row is a multiple of eight elements, and begins at a multiple of 16 bytes.
    The compiler then knows that a mask is the same for eight neighbours, and moves 16 bytes at a time.
    """
    entry = tiles + 4 * tl.program_id(0).to(tl.int64)
    k, row = tl.load(entry), tl.load(entry + 1)
    length = field(tensors, k, COLUMNS_OF)
    rows = tl.minimum(field(tensors, k, ROWS_OF) - row, ROWS).to(tl.int32)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if LONG:  # a part of one row
        column, end = tl.load(entry + 2), tl.load(entry + 3)
        if EVEN:
            column = tl.multiple_of(column, 8)
        columns = tl.minimum(end - column, COLUMNS).to(tl.int32)
        inside = (0 * r)[:, None] + c[None, :]
    else:  # whole rows, which are at most COLUMNS long
        column = 0 * row
        columns = length.to(tl.int32)
        if EVEN:
            columns = tl.multiple_of(columns, 8)
        inside = (r * columns)[:, None] + c[None, :]
    start = row * length + column
    if EVEN:
        columns, start = tl.multiple_of(columns, 8), tl.multiple_of(start, 8)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    return k, row, column, start, inside, mask


@triton.jit
def pointer(pointers, k, WHICH: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """The address of tensor `k` in list WHICH of a table with WIDTH lists."""
    return tl.load(pointers + WIDTH * k + WHICH).to(tl.pointer_type(TYPE))


@triton.jit
def widen(stored, TYPE: tl.constexpr):
    """What was loaded, as float32."""
    if TYPE == BFLOAT16:
        return (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 as it will be stored, rounded to nearest even."""
    if TYPE == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The addition would carry a NaN over into infinity, or into a number.
        stored = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return stored.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def load(
    pointers, k, WHICH: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
    start, inside, mask, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of a list, as it is stored."""
    base = pointer(pointers, k, WHICH, WIDTH, TYPE) + start
    if EVEN:
        base = tl.multiple_of(base, 16)
    return tl.load(base + inside, mask=mask, other=0)


@triton.jit
def store(
    pointers, k, WHICH: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
    start, inside, mask, EVEN: tl.constexpr, stored,
):  # fmt: skip
    """Store a tile that `narrow` made, or that `load` returned."""
    base = pointer(pointers, k, WHICH, WIDTH, TYPE) + start
    if EVEN:
        base = tl.multiple_of(base, 16)
    tl.store(base + inside, stored, mask=mask)


@triton.jit
def convert(stored, FROM: tl.constexpr, TO: tl.constexpr):
    """From one stored type to another; bit for bit where they are equal."""
    if FROM == TO:
        return stored
    else:
        return narrow(widen(stored, FROM), TO)


@triton.jit
def row_mask(tensors, k, row, ROWS: tl.constexpr):
    """Which rows of a tile are there."""
    return tl.arange(0, ROWS) < field(tensors, k, ROWS_OF) - row


@triton.jit
def scalar(scalars, k, WHICH: tl.constexpr, WIDTH: tl.constexpr):
    """A host scalar of tensor `k`, rounded to float32 once."""
    return tl.load(scalars + WIDTH * k + WHICH).to(tl.float32)


@triton.jit
def number(given, stride, scalars, k, WHICH: tl.constexpr, WIDTH: tl.constexpr):
    """The same, from the vector of float64 that is `given` on the device where there is one."""
    if given is None:
        return scalar(scalars, k, WHICH, WIDTH)
    else:
        return tl.load(given + stride * k).to(tl.float32)


@triton.jit
def value_or_one(device_scalar):
    if device_scalar is None:
        return 1.0
    else:
        return tl.load(device_scalar)


@triton.jit
def is_live(found_inf):
    """[1, 1], false where the step is to be skipped. A block, because interpreters cannot broadcast a scalar truth."""
    if found_inf is None:
        return tl.full([1, 1], 1, tl.int1)
    else:
        return tl.load(found_inf + tl.zeros([1, 1], tl.int32)) == 0.0
