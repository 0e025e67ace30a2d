"""What the tensors of a call are, read anew in every call: tables are as good as the pointers and shapes behind them.

A tensor can get other memory, another shape or another dtype without becoming another object (`p.data = x`, `set_`,
`resize_`), and a storage can lose its memory, so nothing follows from an object being the one of last time. Both ways
of reading compare everything; neither relies on a hash. What they return is opaque and hashable, and the very object of
last time where nothing changed. Reading is most of what an unchanged call costs, 15 to 40 ns a tensor in flatkern._C
and 170 in Python: torch's price for a tensor's pointer, which is paid so that no kernel writes to memory of others.
"""

import functools
import math
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from flatkern import dispatch

from . import devices

# What arguments may raise that nobody has checked yet.
UNREADABLE = (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)
UINT32 = 2**32


class Reading(NamedTuple):
    """What was read of the arguments of a call."""

    pointers: object = b""  # of the lists, one after the other
    singles: object = b""  # pointers of single tensors
    layouts: object = b""  # of everything, and what is absent


@functools.cache
def compiled():
    """flatkern._C, which reads lists without Python's help; None where it was not built."""
    try:
        return dispatch.compiled_module("cpp")
    except ImportError:
        return None


def read(arguments, before=Reading()):  # noqa: B008 it never changes
    """The three of a Reading, for a tuple of lists of tensors, of tensors, and of None where one is absent.

    Where one is as in `before`, an earlier reading, it is that very object.
    """
    native = compiled()
    if native is not None and isinstance(before[2], bytes):
        found = native.describe(arguments, *before)
        if found is not None:
            return found
    return read_in_python(arguments, before)


def table(pointers, columns, count):
    """Pointers that were read, as int64 (count, columns). A column is a list by its place among those that are there,
    or None for zeros."""
    words = np.frombuffer(pointers, np.int64) if isinstance(pointers, bytes) else np.array(pointers, np.int64)
    rows = words.reshape(-1, count)
    found = np.zeros((count, len(columns)), np.int64)
    for k, place in enumerate(columns):
        if place is not None:
            found[:, k] = rows[place]
    return found


def integers(singles):
    """Pointers of single tensors, as integers."""
    return np.frombuffer(singles, np.int64).tolist() if isinstance(singles, bytes) else list(singles)


def same_numbers(lists, copies):
    """Whether lists of numbers are what they were, with another list of the same numbers, or the same with others."""
    native = compiled()
    return (native is not None and native.same_items(lists, copies)) or lists == copies


def checked_numbers(lists, count, copies):
    """Copies of lists of host scalars, those of `copies` where they are equal; None where one may change in place."""
    found, plain = [], True
    for k, numbers in enumerate(lists):
        if copies is not None and numbers == copies[k]:
            found.append(copies[k])
        elif len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise ValueError("a list of host scalars has another length, or holds what is not finite")
        else:
            found.append(numbers[:])
            plain = plain and {float, int, bool}.issuperset(map(type, numbers))
    return tuple(found) if plain else None


def drawn_of(values):
    """Which normals the tensors draw, of a call's arguments by name."""
    return tuple([tuple(values[name]) for name in ("index", "offset") if name in values])


def words_of(noise):
    """[seed, stream, round] where the host has them; on the device they are not read, as it would have to wait."""
    return None if noise is None or not devices.on_host(noise) else noise.tolist()


def signed(words):
    """Words as int32, whatever the value, so that nothing is compiled anew."""
    if not all([0 <= word < UINT32 for word in words]):
        raise ValueError("seed, stream or round is outside [0, 2^32)")
    return [word - UINT32 if word >= UINT32 // 2 else word for word in words]


class Layouts:
    """dtype, device, shape, strides and alignment of tensors, as Python sees them.

    Reading the attributes of a tensor takes 0.4 us. The guards by which torch.compile knows its inputs again compare
    all of them in a third of that. They are private to torch, so what they do not confirm is read.
    """

    def __init__(self, kinds, tensors, aligned):
        forms = tuple([(t.shape, t.stride(), t.dtype, t.device, t.layout) for t in tensors])
        self.kinds, self.aligned, self.key = kinds, aligned, (kinds, aligned, forms)
        try:
            from torch._C._dynamo.guards import TensorGuards

            self.guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except Exception:  # whatever is different about them in this torch
            self.guards = None

    def __eq__(self, other):
        return isinstance(other, Layouts) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def hold_for(self, kinds, tensors, aligned):
        """True only if these are the layouts of `tensors`."""
        same = self.kinds == kinds and self.aligned == aligned
        return same and self.guards is not None and self.guards.check(*tensors)


def read_in_python(arguments, before):
    kinds = tuple([None if a is None else len(a) if isinstance(a, (list, tuple)) else "tensor" for a in arguments])
    if len({kind for kind in kinds if isinstance(kind, int)}) != 1:
        raise ValueError("lists differ in length, or every list is absent")
    listed = list(chain.from_iterable(a for a in arguments if isinstance(a, (list, tuple))))
    single = [a for a, kind in zip(arguments, kinds, strict=True) if kind == "tensor"]
    pointers, singles = (list(map(torch.Tensor.data_ptr, tensors)) for tensors in (listed, single))
    tensors = listed + single
    found = pointers + singles
    if 0 in found and any(p == 0 and t.numel() for p, t in zip(found, tensors, strict=True)):
        raise ValueError("a tensor has elements but no memory")
    known = before[2] if isinstance(before[2], Layouts) else None
    moved = known is None or pointers != before[0]
    aligned = (
        tuple([p % 16 == 0 for p in pointers]) if moved else known.aligned[0],
        tuple([p % 16 == 0 for p in singles]),
    )
    layouts = known
    if known is None or not known.hold_for(kinds, tensors, aligned):
        layouts = Layouts(kinds, tensors, aligned)
        if known is not None and known == layouts:
            known.guards = layouts.guards  # these know what has become of the tensors, or of the mode torch is in
            layouts = known
    same = known is not None and singles == before[1]
    return (pointers if moved else before[0]), (before[1] if same else singles), layouts
