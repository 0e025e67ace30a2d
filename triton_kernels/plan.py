"""What a call's tensors are cut into, in tables on the device: tensors, tiles, long rows. Depends on shapes only.

Tensors of one *group* share a kernel: their dtypes, the size of their tiles, and what the compiler may rely on. A call
launches each kernel once a group, however many tensors there are.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import triton
import triton.language as tl

from flatkern import tables

# Rows up to this length are held by one program, from the norm to the perturbation; longer ones spill registers.
RESIDENT = 8192
# Longer rows, and tensors walked without regard to rows, are cut into segments. Part of what a norm is: float32 inside
# a segment, float64 above. The same on every machine.
SEGMENT = 4096

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16, torch.uint8: tl.uint8}


@dataclass(frozen=True)
class Tuning:
    """How large a program is; no result depends on it. Nothing is tuned at run time: kernels write in place."""

    elements: int  # of a tile with short rows
    per_warp: int


# Not measured yet: chosen from compiled register counts, 16 elements a thread.
TUNING = {
    "sm_80": Tuning(2048, 512),
    "sm_90": Tuning(2048, 512),
    "sm_100": Tuning(2048, 512),
    "gfx942": Tuning(4096, 1024),
    "interpreter": Tuning(8192, 8192),  # pays by the program, not by the element
}


def architecture(device):
    """The row of TUNING for a device; the nearest one for devices that have none."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = triton.runtime.driver.active.get_device_capability(device.index)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@dataclass(frozen=True)
class Kind:
    """What the tensors of a group have in common."""

    types: tuple  # a Triton type per list of the call, None where it is absent
    rows: int
    columns: int
    long: bool  # tiles are parts of a row
    vector: bool  # rank <= 1: one row, and a history and a mask per element
    even: bool  # pointers are multiples of 16 bytes, and what is walked of a row one of eight elements
    shifted: bool  # draws normals from inside an eight


@dataclass
class Group:
    """One launch: its tiles, and what the kernel is compiled for."""

    kind: Kind
    names: tuple
    tiles: torch.Tensor  # int64 (count, 4): tensor, first row, first column, end of the columns
    first: int  # number of its first tile among all that leave a partial sum
    warps: int
    launchers: dict = field(default_factory=dict)  # see launch.first_launch

    def __post_init__(self):
        self.types = dict(zip(self.names, self.kind.types, strict=True))
        self.programs = len(self.tiles)
        self.long, self.vector, self.shifted = self.kind.long, self.kind.vector, self.kind.shifted

    def shape(self):
        """The constants that every kernel takes."""
        return dict(ROWS=self.kind.rows, COLUMNS=self.kind.columns, EVEN=self.kind.even, LONG=self.kind.long)


@dataclass
class Plan:
    """The tables of one call signature, and what its calls share."""

    tensors: torch.Tensor  # int64 (tensors, 6), see tile.py
    groups: list
    partials: int  # how many tiles leave a partial sum
    long_rows: torch.Tensor | None  # int64 (rows, 5): tensor, row, first partial, partials, whether a vector
    long_row_count: int
    long_tensors: dict  # tensor: its first long row
    launchers: dict = field(default_factory=dict)  # of kernels that are started once for all groups
    scratch: dict = field(default_factory=dict)
    spare: dict = field(default_factory=dict)  # pinned memory for the tables that captures upload; of all streams
    kept: list = field(default_factory=list)  # what captured graphs read

    def on_another_stream(self):
        """The same with memory of its own."""
        return replace(self, scratch={}, kept=[])


def fits(length, limit):
    return max(16, triton.next_power_of_2(length)) if length <= limit else 0


def parts_of(t, types, tuning, by_rows, even, shift):
    """(kind, first column, end) for each part of one tensor's rows.

    Without regard to rows, a length is walked in eights up to the last: only what remains is moved one by one, or what
    is not worth a second tile. The cut depends on the length alone, because norms are summed by segments.
    """
    if by_rows:
        length = tables.columns(t)
        return [(kind_of(t, types, tuning, even and length % 8 == 0, shift), 0, length)]
    kind, length = Kind(types, 1, SEGMENT, True, False, even, shift), t.numel()
    eights = length // 8 * 8 if length > SEGMENT or length % 8 == 0 else 0
    parts = (kind, 0, eights), (replace(kind, even=False), eights, length)
    return [part for part in parts if part[1] < part[2]]


def kind_of(t, types, tuning, even, shift):
    """The kind of a tensor that is walked by rows."""
    vector = t.dim() < 2
    length = tables.columns(t)
    if length > RESIDENT:
        return Kind(types, 1, SEGMENT, True, vector, even, shift)
    # Vectors are short and few: two sizes do. Matrices get what fits.
    columns = (1024 if length <= 1024 else RESIDENT) if vector else fits(length, RESIDENT)
    rows = 1 if vector else max(1, tuning.elements // columns)
    return Kind(types, rows, columns, False, vector, even, shift)


def smallest_alike(t):
    """The shape of a small tensor of contiguous memory that is cut into the same kinds of parts as `t`, by rows or not.

    Kinds depend on the length of rows and on the sizes below; of rows that do not fit, on what remains of an eight.
    """
    count, rest = t.numel(), t.numel() % 8
    if t.dim() == 0:
        return ()
    if t.dim() == 1:
        return (max([size + (rest or 8) for size in (0, 1024, SEGMENT, RESIDENT) if size < count], default=0),)
    columns = tables.columns(t)
    if columns > RESIDENT:
        columns = RESIDENT + 8 + columns % 8
    if not count:
        return min(1, t.shape[0]), columns
    rows = range(1 + SEGMENT // columns if count > SEGMENT else 1, t.shape[0] + 1)
    return next((r, columns) for r in rows if r * columns % 8 == rest)


def tiles_of(k, rows, kind, first, end):
    """int64 (count, 4)."""
    first_rows = np.arange(0, rows, kind.rows)
    first_columns = np.arange(first, end, kind.columns) if kind.long else np.zeros(1, np.int64)
    grid = np.stack(np.meshgrid(first_rows, first_columns, indexing="ij"), axis=-1).reshape(-1, 2)
    whose, ends = np.full((len(grid), 1), k), np.full((len(grid), 1), end)
    return np.concatenate([whose, grid, ends], axis=1).astype(np.int64)


def build(like, names, types, even, by_rows, index, offset, upload):
    """Cut the tensors `like`; `types` and `even` have an entry per tensor, and `upload` makes a table's tensor."""
    tuning = TUNING[architecture(like[0].device)]
    rows_of_table, kinds = [], {}
    for k, t in enumerate(like):
        rows, length = (tables.filters(t), tables.columns(t)) if by_rows else (1, t.numel())
        flat = t.dim() < 2
        shift = offset[k] % 8 if flat else 0
        first_row, first_eight = (0, offset[k] // 8) if flat else (offset[k], 0)
        rows_of_table.append((length, rows, index[k], first_row, first_eight, shift))
        if rows and (length or by_rows):
            for kind, first, end in parts_of(t, types[k], tuning, by_rows, even[k], by_rows and shift != 0):
                kinds.setdefault(kind, []).append((k, rows, first, end))
    groups, count, long_rows, long_tensors = [], 0, [], {}
    for kind, parts in kinds.items():
        tiles = np.concatenate([tiles_of(k, rows, kind, first, end) for k, rows, first, end in parts])
        warps = min(16, max(1, kind.rows * kind.columns // tuning.per_warp))
        groups.append(Group(kind, names, upload(tiles), count, warps))
        if not kind.long:
            continue
        if by_rows:
            at = count
            for k, rows, _, end in parts:
                segments = -(-end // kind.columns)
                long_tensors[k] = len(long_rows)
                for row in range(rows):
                    long_rows.append((k, row, at, segments, int(kind.vector)))
                    at += segments
        count += len(tiles)
    table = upload(np.array(rows_of_table, np.int64))
    rows = upload(np.array(long_rows, np.int64)) if long_rows else None
    return Plan(table, groups, count, rows, len(long_rows), long_tensors)
