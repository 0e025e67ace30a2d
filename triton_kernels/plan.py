"""What a call's tensors are cut into, in tables on the device: tensors, tiles, long rows. Depends on shapes only.

Tensors of one *group* share a launch: their dtypes, and what the compiler may rely on. A group has few *shapes* of
tiles, by the length of rows, and its kernel is compiled for all of them: which one a tile has is found out at run time.
So a call launches each kernel once a group, however many tensors and lengths of rows there are.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from flatkern import tables

from . import tile

# Rows up to this length are held by one program, from the norm to the perturbation; longer ones spill registers.
RESIDENT = 8192
SEGMENT = tile.SEGMENT.value
PIECES = 3  # of a row, at most
FINEST = 128  # columns; pieces behind a row's first have that many, or a multiple
MOST_WARPS = 16  # with more, a thread would have too few registers
MOST_SHAPES = 12  # of a group: each is compiled for

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16, torch.uint8: tl.uint8}


@dataclass(frozen=True)
class Tuning:
    """How large a program is; no result depends on it. Nothing is tuned at run time: kernels write in place."""

    elements: int  # of the first piece of a tile with short rows
    most: int  # elements of a tile that `warps` share; of more, twice as many
    warps: int
    segment_warps: int

    def halved(self):
        """For elements that are moved one by one, each with an address of its own, which takes registers."""
        return replace(self, elements=self.elements // 2, most=self.most // 2)


class Tunings(NamedTuple):
    """By what an operation holds of an element: the more, the fewer elements a thread has."""

    usual: Tuning
    sgd: Tuning
    adam: Tuning


# Not measured yet: chosen from compiled register counts and instructions.
NVIDIA = Tunings(Tuning(2048, 4608, 4, 8), Tuning(2048, 3072, 4, 8), Tuning(4096, 6144, 8, 8))
TUNING = {
    "sm_80": NVIDIA,
    "sm_90": NVIDIA,
    "sm_100": NVIDIA,
    "gfx942": Tunings(*3 * [Tuning(4096, 8192, 4, 4)]),
    "interpreter": Tunings(*3 * [Tuning(8192, 1 << 20, 1, 1)]),  # costs per program, not per element
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
class TileConfig:
    """What the tensors of a group have in common."""

    types: tuple  # a Triton type per list of the call, None where it is absent
    long: bool  # tiles are segments of a row
    by_element: bool  # rank <= 1, and a history or a mask, which then has a number per element
    even: bool  # pointers are multiples of 16 bytes, and what is walked of a row one of eight elements
    shifted: bool  # draws normals from inside an eight
    warps: int


@dataclass
class Group:
    """One launch: its tiles, and what the kernel is compiled for."""

    config: TileConfig
    shapes: tuple  # (rows, columns) of tiles
    names: tuple
    tiles: torch.Tensor  # int64 (count, 5), see tile.py
    first: int  # number of its first tile among all that leave a partial sum
    launchers: dict = field(default_factory=dict)  # see launch.first_launch

    def __post_init__(self):
        self.types = dict(zip(self.names, self.config.types, strict=True))
        self.programs = len(self.tiles)
        self.warps, self.long, self.by_element = self.config.warps, self.config.long, self.config.by_element

    def flat(self):
        """The constants of a kernel that walks segments only."""
        return dict(EVEN=self.config.even)

    def by_rows(self):
        """Those of a kernel that may walk rows."""
        return dict(SHAPES=self.shapes, EVEN=self.config.even, LONG=self.long)

    def drawing(self):
        """Those of a kernel that draws normals."""
        return dict(**self.by_rows(), SHIFTED=self.config.shifted)


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


@dataclass(frozen=True)
class Part:
    """What is walked alike of a tensor's rows: columns from the first to the end."""

    config: TileConfig
    vector: bool
    first: int
    end: int


def parts_of(t, types, by_element, tuning, by_rows, even, shift):
    """The parts of one tensor's rows, with the warps of segments or of narrow tiles.

    Without regard to rows, a length is walked in eights up to the last: only what remains is moved one by one, or what
    is not worth a second tile. The cut depends on the length alone, because norms are summed by segments.
    """
    vector = t.dim() < 2
    if by_rows:
        length = tables.columns(t)
        long, even = length > RESIDENT, even and length % 8 == 0
        warps = tuning.segment_warps if long else tuning.warps
        return [Part(TileConfig(types, long, by_element and vector, even, shift, warps), vector, 0, length)]
    config, length = TileConfig(types, True, False, even, shift, tuning.segment_warps), t.numel()
    eights = length // 8 * 8 if length > SEGMENT or length % 8 == 0 else 0
    parts = Part(config, vector, 0, eights), Part(replace(config, even=False), vector, eights, length)
    return [part for part in parts if part.first < part.end]


def columns_for(length):
    """The columns of a tile for rows of a length: the length, rounded up to a sum of few powers of two."""
    top = max(16, 1 << max(length.bit_length() - 1, 0))
    if length <= top:
        return top
    step = max(FINEST, top // 8)
    columns = -(-length // step) * step if step <= top else 2 * top
    return columns if columns.bit_count() <= PIECES else 2 * top


def widths_of(parts):
    """Columns of the tiles for parts that are whole rows, ascending."""
    if parts[0].config.by_element:  # short and few
        return sorted({max(1024, triton.next_power_of_2(part.end)) for part in parts})
    found = {columns_for(part.end) for part in parts if not part.vector}
    # A vector is a single row; what a matrix has will do for it.
    longest = max(part.end for part in parts)
    if longest > max(found, default=-1):
        found.add(columns_for(longest))
    widths = sorted(found)
    while len(widths) > MOST_SHAPES:  # rows go to the next wider tile where that has the fewest lanes more
        ratios = [wider / width for width, wider in itertools.pairwise(widths)]
        del widths[ratios.index(min(ratios))]
    return widths


def rows_for(columns, tuning):
    """The rows of a tile: as many as make 16 bytes a thread of its last piece, too, if there is room."""
    rows, last = max(1, tuning.elements // (1 << (columns.bit_length() - 1))), columns & -columns
    while rows * last < 4 * 32 * tuning.warps and 2 * rows * columns <= 1.5 * tuning.elements:
        rows *= 2
    return rows


def warps_for(elements, tuning):
    """The warps of a tile."""
    warps, most = tuning.warps, tuning.most
    while elements > most and warps < MOST_WARPS:
        warps, most = 2 * warps, 2 * most
    return warps


def smallest_alike(t):
    """The shape of a small tensor of contiguous memory that is cut into the same tiles as `t`, by rows or not.

    That depends on the length of rows and on the sizes below; of rows that do not fit, on what remains of an eight.
    """
    count, rest = t.numel(), t.numel() % 8
    if t.dim() == 0:
        return ()
    if t.dim() == 1:
        return (count if count <= RESIDENT else RESIDENT + (rest or 8),)
    columns = tables.columns(t)
    if columns > RESIDENT:
        columns = RESIDENT + 8 + columns % 8
    if not count:
        return min(1, t.shape[0]), columns
    rows = range(1 + SEGMENT // columns if count > SEGMENT else 1, t.shape[0] + 1)
    return next((r, columns) for r in rows if r * columns % 8 == rest)


def tiles_of(k, rows, part, step, height, shape):
    """int64 (count, 5): the tiles of a part, `height` rows high and, in segments, `step` columns wide."""
    first_rows = np.arange(0, rows, height)
    first_columns = np.arange(part.first, part.end, step) if part.config.long else np.zeros(1, np.int64)
    grid = np.stack(np.meshgrid(first_rows, first_columns, indexing="ij"), axis=-1).reshape(-1, 2)
    found = np.empty((len(grid), 5), np.int64)
    found[:, 0], found[:, 1:3], found[:, 3], found[:, 4] = k, grid, part.end, shape
    return found


def shaped(config, parts, tuning):
    """(config, shapes, tiles) of each launch for parts, (k, rows, part), that have a config in common."""
    if config.long:
        return [(config, ((1, SEGMENT),), [tiles_of(k, rows, part, SEGMENT, 1, 0) for k, rows, part in parts])]
    if not config.even:
        tuning = tuning.halved()
    widths, found = widths_of([part for _, _, part in parts]), {}
    for columns in reversed(widths):  # the most work first
        rows = 1 if config.by_element else rows_for(columns, tuning)
        found.setdefault(warps_for(rows * columns, tuning), []).append((rows, columns))
    launches = []
    for warps, shapes in found.items():
        tiles = []
        for i, (height, columns) in enumerate(shapes):
            narrower = max((width for width in widths if width < columns), default=-1)
            tiles += [
                tiles_of(k, rows, part, 0, height, i)
                for k, rows, part in parts
                if narrower < part.end <= columns
            ]  # fmt: skip
        launches.append((replace(config, warps=warps), tuple(shapes), tiles))
    return launches


def build(like, names, types, even, by_rows, index, offset, upload):
    """Cut the tensors `like`; `types` and `even` have an entry per tensor, and `upload` makes a table's tensor."""
    tunings = TUNING[architecture(like[0].device)]
    tuning = tunings.adam if "exp_avg_sqs" in names else tunings.sgd if "momentum_buffers" in names else tunings.usual
    rows_of_table, found = [], {}
    for k, t in enumerate(like):
        rows, length = (tables.filters(t), tables.columns(t)) if by_rows else (1, t.numel())
        flat = t.dim() < 2
        shift = offset[k] % 8 if flat else 0
        first_row, first_eight = (0, offset[k] // 8) if flat else (offset[k], 0)
        rows_of_table.append((length, rows, index[k], first_row, first_eight, shift))
        if rows and (length or by_rows):
            given = {name for name, type_ in zip(names, types[k], strict=True) if type_ is not None}
            by_element = bool(given & {"history", "masks"})
            for part in parts_of(t, types[k], by_element, tuning, by_rows, even[k], by_rows and shift != 0):
                found.setdefault(part.config, []).append((k, rows, part))
    groups, count, long_rows, long_tensors = [], 0, [], {}
    for config, parts in found.items():
        for config_, shapes, tiles in shaped(config, parts, tuning):
            tiles = np.concatenate(tiles)
            groups.append(Group(config_, shapes, names, upload(tiles), count))
        if not config.long:
            continue
        if by_rows:
            at = count
            for k, rows, part in parts:
                segments = -(-part.end // SEGMENT)
                long_tensors[k] = len(long_rows)
                for row in range(rows):
                    long_rows.append((k, row, at, segments, int(part.vector)))
                    at += segments
        count += len(tiles)
    table = upload(np.array(rows_of_table, np.int64))
    rows = upload(np.array(long_rows, np.int64)) if long_rows else None
    return Plan(table, groups, count, rows, len(long_rows), long_tensors)
