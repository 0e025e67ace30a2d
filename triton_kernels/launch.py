"""From a call to launches: arguments are checked, tables that have changed are uploaded, kernels are started.

No host waits for the device here. Tables are found again by shapes, strides and dtypes, and uploaded again where
pointers or scalars differ from the last call's, which every call looks at.
"""

import contextlib
import math
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from flatkern.checks import check
from flatkern.ops import OPS

from .plan import TYPES, build

MOST_PLANS = 32
# Tables of one kind that a plan can upload inside captures until a call outside of one makes room again.
ASIDE = 8
UINT32 = 2**32
# Lists that are not walked with their tensor; a history and a mask of a vector are, but not 16 bytes at a time.
ONE_PER_FILTER = {"norms", "history", "steps", "masks"}


class Mismatch(ValueError):
    """An argument is not what a kernel can walk; flatkern.checks has the message."""


class Plans:
    """The plans of one op, the least recently made one dropped first."""

    def __init__(self):
        self.found = {}

    def get(self, key, make, captured):
        plan = self.found.get(key)
        if plan is None:
            elsewhere = next((old for k, old in self.found.items() if k[:-1] == key[:-1]), None)
            # A graph is captured on a stream of its own, after all others have come to rest.
            plan = elsewhere.on_another_stream() if captured and elsewhere is not None else make()
            if plan is None:
                return None
            if elsewhere is not None:
                plan.spare = elsewhere.spare
            # What a captured graph reads has to stay.
            oldest = next((k for k, old in self.found.items() if not old.kept), None)
            if len(self.found) >= MOST_PLANS and oldest is not None:
                del self.found[oldest]
            self.found[key] = plan
        return plan


class Call:
    """One call: its groups, tables and device scalars, and how it launches."""

    def __init__(self, plan, device, width):
        self.plan, self.device, self.width = plan, device, width
        self.groups, self.tensors = plan.groups, plan.tensors
        self.pointers = self.scalars = None
        self.noise = None

    def launch(self, kernel, group, *args, **constants):
        """A kernel over the tiles of a group."""
        self.start(kernel, len(group.tiles), group.warps, *args, **constants)

    def start(self, kernel, programs, warps, *args, **constants):
        """Every launch of this backend."""
        context = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with context:
            # A fusion would change a rounding from one machine to the next; where one is meant, tl.fma says so.
            kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)

    def scratch(self, name, shape, dtype=torch.float32):
        """Memory that the plan keeps, because the next call needs it again."""
        found = self.plan.scratch.get(name)
        if found is None:
            found = self.plan.scratch[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return found

    def scalar(self, t):
        """A device scalar, brought to the device where it is elsewhere."""
        if t is None or t.device == self.device:
            return t
        return upload(t.reshape(1).numpy(), self.device) if t.device.type == "cpu" else t.to(self.device)

    def key(self):
        """(noise, seed, stream, round) of a kernel: by value from the host, else a pointer, for graphs."""
        if self.noise is None:
            return None, 0, 0, 0
        if not on_host(self.noise):
            return self.noise, 0, 0, 0
        # Always int32, whatever the value, so that nothing is compiled anew.
        return None, *(word - UINT32 if word >= UINT32 // 2 else word for word in self.noise.tolist())


def on_host(noise):
    """Whether the words can be looked at without waiting for a device."""
    return noise.device.type == "cpu"


def strided(numbers):
    """A vector on the device, or None, as kernels take it: with its stride."""
    return numbers, 0 if numbers is None else numbers.stride(0)


def capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pinned(shape, dtype):
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def upload(array, device):
    """A NumPy array on the device. From pinned memory, so that the host does not wait for the copy."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph captures a call whose tables are not on the device yet; run the same steps on the same "
            "tensors before the capture, as torch.cuda.graph asks"
        )
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# A memory of calls, in which nothing is that a call could not make again.
_plans = {name: Plans() for name in OPS}


def begin_call(name, values, lists, rows, scalars=None):
    """Check the arguments `values` of op `name` and find its tables; None where there are no tensors.

    `lists` names the columns of the table of pointers; the others are like the first. `rows`: tiles follow filters.
    `scalars(values)` returns the columns of the table of host scalars. A column "norms" that is not given points to
    memory of the plan, for the norms of long rows.
    """
    op, names = OPS[name], tuple(lists.split())
    try:
        key, pointers, like = _fingerprint(op, values, names, rows)
        host = [list(values[a.name]) for a in op.arguments if a.keyword_only]
        if any(len(column) != len(like) for column in host) or not all(map(math.isfinite, chain.from_iterable(host))):
            raise Mismatch(f"{name}: a list of host scalars has another length, or holds what is not finite")
        noise = values.get("noise")
        if noise is not None and on_host(noise) and not all(0 <= w < UINT32 for w in noise.tolist()):
            raise Mismatch(f"{name}: seed, stream or round is outside [0, 2^32)")
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        check(op, values)  # says what is wrong, and what to do
        raise Mismatch(f"{name}: {error}") from error
    captured = bool(like) and capturing(like[0].device)
    plan = _plans[name].get(key, lambda: _make_plan(op, values, names, key, rows, like), captured)
    if plan is None:
        return None
    call = Call(plan, like[0].device, len(names))
    if "norms" in names and values.get("norms") is None and plan.long_tensors:
        start = call.scratch("norms", plan.long_row_count).data_ptr()
        pointers[names.index("norms")] = [start + 4 * plan.long_tensors.get(k, 0) for k in range(len(like))]
    call.pointers = _table(plan, "pointers", pointers.tobytes(), call.device, lambda: pointers.T)
    if scalars is not None:
        call.scalars = _table(
            plan, "scalars", host, call.device, lambda: np.array(scalars(values), np.float64).T
        )  # fmt: skip
    call.noise = noise
    if captured:
        plan.kept += [call.pointers, call.scalars]  # a later call may replace them
    else:
        _set_aside(plan, call.device)
    return call


def _make_plan(op, values, names, key, rows, like):
    """Checks every argument, for a signature that has not been seen."""
    check(op, values)
    if not like:
        return None
    device = like[0].device
    for k, t in enumerate(like):
        if t.device != device:
            raise ValueError(
                f"{op.name}: {names[0]}[{k}] is on {t.device}, but {names[0]}[0] is on {device}; "
                "call it once for each device"
            )
    for a in op.arguments:
        if a.mutated and a.type == "Tensor" and values[a.name].device != device:
            raise ValueError(
                f"{op.name}: {a.name} is on {values[a.name].device}, but {names[0]}[0] is on {device}; move one of them"
            )
    types = [
        tuple(TYPES[values[name][k].dtype] if values.get(name) is not None else None for name in names)
        for k in range(len(like))
    ]
    zeros = [0] * len(like)
    return build(
        like, names, types, key.even, rows, values.get("index", zeros), values.get("offset", zeros),
        lambda array: upload(array, device),
    )  # fmt: skip


class Key(NamedTuple):
    """What a plan depends on."""

    rows: bool
    layouts: tuple
    even: tuple  # per tensor, whether all pointers are multiples of 16
    singles: tuple
    drawn: tuple  # index and offset
    stream: int  # plans hold memory, which two streams must not share; last, for Plans.get


def _fingerprint(op, values, names, rows):
    """The key of a call, the pointers, a row for each list, and the list that the others are like."""
    like = values[names[0]]
    pointers, layouts, absent = [], [], [0] * len(like)
    for name in names:
        tensors = values.get(name)
        if tensors is None:
            pointers.append(absent)
            layouts.append(None)
            continue
        if len(tensors) != len(like):
            raise Mismatch(f"{name} has {len(tensors)} entries, but {names[0]} has {len(like)}")
        pointers.append([t.data_ptr() for t in tensors])
        layouts.append(tuple([(t.shape, t.stride(), t.dtype, t.device, t.layout) for t in tensors]))
    table = np.array(pointers, np.int64)
    walked = [i for i, name in enumerate(names) if name not in ONE_PER_FILTER]
    even = tuple((table[walked] % 16 == 0).all(axis=0).tolist())
    single = [values[a.name] for a in op.arguments if a.type in ("Tensor", "Tensor?")]
    singles = tuple((t.dtype, t.shape, t.device) if t is not None else None for t in single)
    drawn = tuple(tuple(values[name]) for name in ("index", "offset") if name in values)
    stream = torch.cuda.current_stream(like[0].device).cuda_stream if like and like[0].is_cuda else 0
    return Key(rows, tuple(layouts), even, singles, drawn, stream), table, like


def _table(plan, name, key, device, make):
    """The table as uploaded last, or anew where its key has changed."""
    found = plan.uploads.get(name)
    if found is None or found[0] != key:
        if capturing(device):
            # Nothing is in it until the graph runs, so that no other call may take it for its own.
            return _captured_upload(plan, name, make(), device)
        found = plan.uploads[name] = (key, upload(make(), device))
    return found[1]


def _captured_upload(plan, name, array, device):
    """A replay copies again, from memory that stays; it was allocated before, as a capture must not."""
    if not plan.spare.get(name):
        raise RuntimeError(
            f"CUDA graphs have captured {ASIDE} calls of one operation on the same shapes with other gradients each; "
            "run such a step without a graph before the next capture, or capture fewer rounds in one"
        )
    host = plan.spare[name].pop()
    host.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    plan.kept.append(host)
    return host.to(device, non_blocking=True)


def _set_aside(plan, device):
    """Pinned memory for the tables that captures will upload, of the size of those that were."""
    if device.type != "cuda":
        return
    for name, (_, table) in plan.uploads.items():
        if len(plan.spare.get(name, ())) < ASIDE:
            plan.spare[name] = list(pinned((ASIDE, *table.shape), table.dtype))
