"""How a kernel walks memory: which rows and columns a program has, what a stored number is. No operation's arithmetic.

A program has one *tile* of one tensor: whole rows, or a segment of a long one. Rows are walked in *pieces*, by the
binary digits of a number of columns: 4608 is 4096 and 512, so that a tile has no more lanes than it needs, and every
piece is a power of two as Triton demands. Types of lists are those of memory: float32, float16, and int16 for
bfloat16, whose rounding is done on the bits (Triton's interpreter would truncate). None is a list that is absent.
"""

from typing import NamedTuple

import triton
import triton.language as tl

BFLOAT16 = tl.constexpr(tl.int16)
# A row of the table of tiles: tensor, first row, first column, end of the columns, shape; int64.
ENTRY = tl.constexpr(5)
# A row of the table of tensors, int64.
FIELDS = tl.constexpr(6)
COLUMNS_OF, ROWS_OF, INDEX_OF, FIRST_ROW_OF, FIRST_EIGHT_OF, SHIFT_OF = (tl.constexpr(i) for i in range(6))
# Longer rows, and tensors walked without regard to rows, are cut into segments. Part of what a norm is: float32 inside
# a segment, float64 above. The same on every machine.
SEGMENT = tl.constexpr(4096)
MOST = tl.constexpr(1 << 20)  # rows or columns; more than any tile has


class Tile(NamedTuple):
    """Of one program: its tensor and its shape, by their numbers; its first row and column; the offset of its first
    element; how many rows and columns there are, at least as far as it reaches; elements from one row to the next."""

    k: tl.tensor
    shape: tl.tensor
    row: tl.tensor
    column: tl.tensor
    start: tl.tensor
    rows: tl.tensor
    columns: tl.tensor


class Piece(NamedTuple):
    """Where a piece of a tile is: the tile's first element, the offsets from there, and which of them are there."""

    start: tl.tensor
    inside: tl.tensor
    mask: tl.tensor


@triton.constexpr_function
def pieces(columns):
    """Into how many powers of two a number of columns is cut."""
    return columns.bit_count()


@triton.constexpr_function
def width(columns, i):
    """The columns of piece i. The last pieces of a row come first: sums are added right to left."""
    return [1 << digit for digit in range(columns.bit_length()) if columns >> digit & 1][i]


@triton.constexpr_function
def first(columns, i):
    """The first column of piece i."""
    return columns & -2 * width(columns, i)


@triton.jit
def field(tensors, k, WHICH: tl.constexpr):
    return tl.load(tensors + FIELDS * k + WHICH)


@triton.jit
def tile_coordinates(tiles, tensors, EVEN: tl.constexpr, LONG: tl.constexpr):
    """The Tile of this program.

    EVEN promises that what a tile has of a row is a multiple of eight elements, and begins at a multiple of 16 bytes.
    The compiler then knows that a mask is the same for eight neighbours, and moves 16 bytes at a time. LONG is a
    segment of one row; else rows are whole.
    """
    entry = tiles + ENTRY * tl.program_id(0).to(tl.int64)
    k, row, shape = tl.load(entry), tl.load(entry + 1), tl.load(entry + 4)
    length = field(tensors, k, COLUMNS_OF)
    rows = tl.minimum(field(tensors, k, ROWS_OF) - row, MOST).to(tl.int32)
    if LONG:
        column, end = tl.load(entry + 2), tl.load(entry + 3)
        if EVEN:
            column = tl.multiple_of(column, 8)
        columns = tl.minimum(end - column, MOST).to(tl.int32)
    else:
        column = 0 * row
        columns = length.to(tl.int32)
    start = row * length + column
    if EVEN:
        columns, start = tl.multiple_of(columns, 8), tl.multiple_of(start, 8)
    return Tile(k, shape, row, column, start, rows, columns)


@triton.jit
def piece(at, i, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LONG: tl.constexpr):
    """Piece i of a tile of ROWS x COLUMNS."""
    r, c = tl.arange(0, ROWS), first(COLUMNS, i) + tl.arange(0, width(COLUMNS, i))
    columns = at.columns
    if EVEN:
        columns = tl.multiple_of(columns, 8)
    inside = (r * (0 if LONG else columns))[:, None] + c[None, :]
    return Piece(at.start, inside, (r < at.rows)[:, None] & (c < columns)[None, :])


@triton.jit
def segment(at, EVEN: tl.constexpr):
    """The one piece of a tile that is a segment."""
    return piece(at, 0, 1, SEGMENT, EVEN, True)


@triton.jit
def pointer(lists, WHICH: tl.constexpr, TYPE: tl.constexpr):
    """The address of a tensor in list WHICH; `lists` is the tensor's row of the table of pointers."""
    return tl.load(lists + WHICH).to(tl.pointer_type(TYPE))


@triton.jit
def to_float32(stored, TYPE: tl.constexpr):
    """What was loaded, as float32."""
    if TYPE == BFLOAT16:
        return (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def to_storage(x, TYPE: tl.constexpr):
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
def load(lists, WHICH: tl.constexpr, TYPE: tl.constexpr, where, EVEN: tl.constexpr):
    """A piece of a list, as it is stored."""
    base = pointer(lists, WHICH, TYPE) + where.start
    if EVEN:
        base = tl.multiple_of(base, 16)
    return tl.load(base + where.inside, mask=where.mask, other=0)


@triton.jit
def load_float32(lists, WHICH: tl.constexpr, TYPE: tl.constexpr, where, EVEN: tl.constexpr):
    return to_float32(load(lists, WHICH, TYPE, where, EVEN), TYPE)


@triton.jit
def store(lists, WHICH: tl.constexpr, TYPE: tl.constexpr, where, EVEN: tl.constexpr, stored, live):
    """Store a piece that `to_storage` made, or that `load` returned, where `live`; None is everywhere."""
    base = pointer(lists, WHICH, TYPE) + where.start
    if EVEN:
        base = tl.multiple_of(base, 16)
    tl.store(base + where.inside, stored, mask=where.mask if live is None else where.mask & live)


@triton.jit
def convert(stored, FROM: tl.constexpr, TO: tl.constexpr):
    """From one stored type to another; bit for bit where they are equal."""
    if FROM == TO:
        return stored
    else:
        return to_storage(to_float32(stored, FROM), TO)


@triton.jit
def row_mask(at, ROWS: tl.constexpr):
    """Which rows of a tile are there."""
    return tl.arange(0, ROWS) < at.rows


@triton.jit
def load_rows(lists, WHICH: tl.constexpr, at, ROWS: tl.constexpr):
    """A number of each row of a tile, from a list of float32 vectors; [ROWS]."""
    base = pointer(lists, WHICH, tl.float32) + at.row
    return tl.load(base + tl.arange(0, ROWS), mask=row_mask(at, ROWS), other=0.0)


@triton.jit
def scalar(scalars, WHICH: tl.constexpr):
    """A host scalar of a tensor, rounded to float32 once; `scalars` is the tensor's row of their table."""
    return tl.load(scalars + WHICH).to(tl.float32)


@triton.jit
def number(given, stride, k, scalars, WHICH: tl.constexpr):
    """The same, from the vector of float64 that is `given` on the device where there is one."""
    if given is None:
        return scalar(scalars, WHICH)
    else:
        return tl.load(given + stride * k).to(tl.float32)


@triton.jit
def value_or_one(device_scalar):
    if device_scalar is None:
        return 1.0
    else:
        return tl.load(device_scalar)


@triton.jit
def should_update(found_inf):
    """[1, 1], false where the step is to be skipped. A block, because interpreters cannot broadcast a scalar truth."""
    if found_inf is None:
        return tl.full([1, 1], 1, tl.int1)
    else:
        return tl.load(found_inf + tl.zeros([1, 1], tl.int32)) == 0.0
