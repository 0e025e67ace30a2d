"""What the tensors of a call are, read anew in every call: tables are as good as the pointers and shapes behind them.

A tensor can get other memory, another shape or another dtype without becoming another object (`p.data = x`, `set_`,
`resize_`), and a storage can lose its memory, so nothing follows from an object being the one of last time. Both ways
of reading compare everything; neither relies on a hash. What they return is opaque and hashable, and the very object of
last time where nothing changed. Reading is half of what a call costs, 55 ns a tensor in flatkern._C and 170 in Python:
that is torch's price for a tensor's pointer, and it is paid so that no kernel writes to memory of others.
"""

import functools
from itertools import chain

import numpy as np
import torch

from flatkern import dispatch


@functools.cache
def compiled():
    """flatkern._C, which reads lists without Python's help; None where it was not built."""
    try:
        return dispatch.compiled_module("cpp")
    except ImportError:
        return None


def read(lists, singles, pointers=b"", layouts=b""):
    """(pointers, layouts) of a tuple of lists of tensors and of a tuple of tensors; any of them may be None.

    `pointers`, of the lists, and `layouts`, of everything, are those of an earlier call.
    """
    native = compiled()
    if native is not None and isinstance(layouts, bytes):
        found = native.describe(lists, singles, pointers, layouts)
        if found is not None:
            return found
    return read_in_python(lists, singles, pointers, layouts)


def table(pointers, lists, count):
    """Pointers that were read, as int64 (count, lists); 0 where a list is absent."""
    if isinstance(pointers, bytes):
        return np.frombuffer(pointers, np.int64).reshape(count, len(lists)).copy()
    columns, absent = iter(np.array(pointers, np.int64).reshape(-1, count)), np.zeros(count, np.int64)
    return np.stack([absent if tensors is None else next(columns) for tensors in lists], axis=1)


def same_numbers(lists, copies):
    """Whether lists of numbers are what they were, with another list of the same numbers, or the same with others."""
    native = compiled()
    return (native is not None and native.same_items(lists, copies)) or lists == copies


class Layouts:
    """dtype, device, shape, strides and alignment of tensors, as Python sees them.

    Reading the attributes of a tensor takes 0.4 us. The guards by which torch.compile knows its inputs again compare
    all of them in a third of that. They are private to torch, so what they do not confirm is read.
    """

    def __init__(self, present, tensors, aligned):
        forms = tuple([(t.shape, t.stride(), t.dtype, t.device, t.layout) for t in tensors])
        self.present, self.aligned, self.key = present, aligned, (present, aligned, forms)
        try:
            from torch._C._dynamo.guards import TensorGuards

            self.guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except Exception:  # whatever is different about them in this torch
            self.guards = None

    def __eq__(self, other):
        return isinstance(other, Layouts) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def hold_for(self, present, tensors, aligned):
        """True only if these are the layouts of `tensors`."""
        same = self.present == present and self.aligned == aligned
        return same and self.guards is not None and self.guards.check(*tensors)


def read_in_python(lists, singles, pointers, layouts):
    counts = {len(tensors) for tensors in lists if tensors is not None}
    if len(counts) != 1:
        raise ValueError("lists differ in length")
    present = (*counts, *[given is not None for given in (*lists, *singles)])
    listed = list(chain.from_iterable(tensors for tensors in lists if tensors is not None))
    single = [t for t in singles if t is not None]
    found = list(map(torch.Tensor.data_ptr, listed))
    if 0 in found and any(p == 0 and t.numel() for p, t in zip(found, listed, strict=True)):
        raise ValueError("a tensor has elements but no memory")
    known = isinstance(layouts, Layouts)
    moved = not known or found != pointers
    aligned = (
        tuple([p % 16 == 0 for p in found]) if moved else layouts.aligned[0],
        tuple([t.data_ptr() % 16 == 0 for t in single]),
    )
    tensors = listed + single
    if not (known and layouts.hold_for(present, tensors, aligned)):
        now = Layouts(present, tensors, aligned)
        if known and layouts == now:
            layouts.guards = now.guards  # these know what has become of the tensors, or of the mode torch is in
        else:
            layouts = now
    return (found if moved else pointers), layouts
