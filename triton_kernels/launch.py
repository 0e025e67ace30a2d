"""From a call to launches: arguments are checked, tables that have changed are uploaded, kernels are started.

No host waits for the device here. A plan depends on shapes, strides and dtypes; tables are uploaded again where
pointers or scalars differ from the last call's. Every call looks at all of them.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from flatkern import jobs
from flatkern.checks import check
from flatkern.ops import OPS

from . import signature
from .job import announce_launch, job, options_of
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


class Recent:
    """What an op was last called with for some tensors, and the tables that were made of it.

    Where to look for it is a guess; the next call compares all of it.
    """

    def __init__(self, plan, stream, drawn):
        self.plan, self.stream, self.drawn = plan, stream, drawn
        self.pointers = self.layouts = None  # see signature.py
        self.numbers = None  # copies of the lists of host scalars
        self.scalars = self.columns = None  # the table of host scalars, and what it was made of
        self.tables = {}

    def set_pointers(self, call, pointers, layouts, table):
        self.pointers, self.layouts = pointers, layouts
        self.tables["pointers"] = upload(table, call.device)

    def set_scalars(self, call, columns, numbers):
        """Make the table of host scalars; a column takes 10 us to convert, and as a rule one has changed."""
        if self.columns is None or numbers is None:
            array = table_of(columns)
        else:
            array = self.scalars.copy()  # on the CPU the last one is the memory of a table
            for k, column in enumerate(columns):
                if column != self.columns[k]:
                    array[:, k] = column
        self.scalars, self.columns = array, None if numbers is None else [column[:] for column in columns]
        self.numbers = numbers
        self.tables["scalars"] = upload(array, call.device)


def table_of(columns):
    return np.array(columns, np.float64).T.copy()


class Call:
    """One call: its groups, tables and device scalars, and how it launches."""

    def __init__(self, plan, device, width, stream, noise, words):
        self.plan, self.device, self.width, self.stream = plan, device, width, stream
        self.groups, self.tensors = plan.groups, plan.tensors
        self.pointers = self.scalars = None
        self.noise, self.words = noise, words
        # A launch goes to the current device.
        self.elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index

    def launch(self, kernel, group, arguments, constants):
        """A kernel over the tiles of a group."""
        self.start(kernel, group.programs, group.warps, arguments, constants, group.launchers)

    def start(self, kernel, programs, warps, arguments, constants, launchers=None):
        """Every launch of this backend. `constants()` returns those of the kernel; plan and group decide them."""
        launchers = self.plan.launchers if launchers is None else launchers
        launcher = launchers.get(id(kernel))
        if self.elsewhere or launcher is None:
            with torch.cuda.device(self.device) if self.elsewhere else contextlib.nullcontext():
                if launcher is None:
                    launchers[id(kernel)] = first_launch(kernel, programs, warps, arguments, constants())
                else:
                    launcher(self.stream, arguments)
        else:
            launcher(self.stream, arguments)

    def once(self, name, make):
        """What a plan decides, found out in its first call."""
        found = self.plan.scratch.get(name)
        if found is None:
            found = self.plan.scratch[name] = make()
        return found

    def scratch(self, name, shape, dtype=torch.float32):
        """Memory that the plan keeps, because the next call needs it again."""
        return self.once(name, lambda: torch.empty(shape, dtype=dtype, device=self.device))

    def scalar(self, t):
        """A device scalar, brought to the device where it is elsewhere."""
        if t is None or t.device == self.device:
            return t
        return upload(t.reshape(1).numpy(), self.device) if t.device.type == "cpu" else t.to(self.device)

    def key(self):
        """(noise, seed, stream, round) of a kernel: by value from the host, else a pointer, for graphs."""
        return (self.noise, 0, 0, 0) if self.words is None else (None, *self.words)


class Recorder(Call):
    """A call in a recording: what it would launch is a job for the compiler."""

    def start(self, kernel, programs, warps, arguments, constants, launchers=None):
        jobs.current.get().jobs.append(job(kernel, warps, arguments, constants()))


def first_launch(kernel, programs, warps, arguments, constants):
    """Compile a kernel and launch it; returns how to launch it with arguments that are compiled alike.

    Triton's own way takes 30 us a launch to find out what the arguments are, and the compiled kernel 2. Nothing that is
    compiled for differs while the plan is the same: dtypes and absence are part of its key, and alignments and numbers
    are not specialized (a test compares what is launched in both ways). What is not known to be a compiled kernel, as
    in the interpreter, is launched in Triton's own way each time.
    """
    announce_launch(kernel, warps, arguments, constants)
    options = options_of(warps, constants)
    compiled = kernel[(programs,)](*arguments, **options)
    rest = kernel.arg_names[len(arguments) :]
    if not isinstance(compiled, CompiledKernel) or set(rest) != set(constants):
        return lambda stream, given: kernel[(programs,)](*given, **options)
    run, last = compiled[programs, 1, 1], tuple([constants[name] for name in rest])
    return lambda stream, given: run(*given, *last, stream=stream)


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


def current_stream(device):
    return driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def upload(array, device):
    """A NumPy array on the device. From pinned memory, so that the host does not wait for the copy."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph captures a call whose tables are not on the device yet; run the same steps on the same "
            "tensors before the capture, as torch.cuda.graph asks"
        )
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class Known:
    """Of one op: the names of its arguments, its plans, and what it was last called with."""

    def __init__(self, op):
        self.plans, self.recent = Plans(), {}
        self.singles = [a.name for a in op.arguments if a.type in ("Tensor", "Tensor?")]
        self.numbers = [a.name for a in op.arguments if a.keyword_only]

    def remember(self, hint, recent):
        self.recent.pop(hint, None)
        if len(self.recent) >= MOST_PLANS:
            del self.recent[next(iter(self.recent))]
        self.recent[hint] = recent
        return recent


# A memory of calls, in which nothing is that a call could not make again.
_known = {op.name: Known(op) for op in OPS.values()}


def begin_call(name, values, lists, rows, scalars=None):
    """Check the arguments `values` of op `name` and find its tables; None where there are no tensors.

    `lists` names the columns of the table of pointers; the others are like the first. `rows`: tiles follow filters.
    `scalars(values)` returns the columns of the table of host scalars. A column "norms" that is not given points to
    memory of the plan, for the norms of long rows.
    """
    op, recording, names = OPS[name], jobs.current.get(), lists.split()
    # What is recorded is remembered by nobody.
    known = _known[name] if recording is None else Known(op)
    try:
        like = values[names[0]]
        if not like:
            check(op, values)
            return None
        given = tuple([values.get(n) for n in names])
        singles = tuple([values[n] for n in known.singles])
        numbers = tuple([values[n] for n in known.numbers])
        hint = id(like[0]), len(like), rows
        recent = known.recent.get(hint)
        before = (recent.pointers, recent.layouts) if recent is not None and recent.layouts is not None else ()
        pointers, layouts = signature.read(given, singles, *before)
        device = like[0].device
        stream, captured = current_stream(device), capturing(device)
        # A graph is captured on a stream of its own; the tables of the steps before it serve it too.
        if recent is not None and (layouts is not recent.layouts or (stream != recent.stream and not captured)):
            recent = None
        copies, drawn = (recent.numbers, recent.drawn) if recent is not None else (None, None)
        if copies is None or not signature.same_numbers(numbers, copies):
            copies = _checked_numbers(numbers, len(like), copies)
            drawn = tuple([tuple(values[n]) for n in ("index", "offset") if n in values])
            if recent is not None and drawn != recent.drawn:
                recent = None
        noise = values.get("noise")
        words = None if recording is not None and recording.capturable else _words(noise)
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        check(op, values)  # says what is wrong, and what to do
        raise Mismatch(f"{name}: {error}") from error
    plan = recent.plan if recent is not None and stream == recent.stream else None
    if plan is None:
        table = signature.table(pointers, given, len(like))
        make = functools.partial(_make_plan, op, values, names, table, rows, like)
        plan = known.plans.get(Key(rows, layouts, drawn, stream), make, captured)
        if not captured:
            recent = known.remember(hint, Recent(plan, stream, drawn))
        elif recent is None:
            recent = Recent(plan, stream, drawn)
    call = (Call if recording is None else Recorder)(plan, device, len(names), stream, noise, words)

    own_norms = "norms" in names and values.get("norms") is None and bool(plan.long_tensors)

    def pointer_table():
        table = signature.table(pointers, given, len(like))
        if own_norms:
            start = call.scratch("norms", plan.long_row_count).data_ptr()
            table[:, names.index("norms")] = [start + 4 * plan.long_tensors.get(k, 0) for k in range(len(like))]
        return table

    moved = pointers is not recent.pointers or "pointers" not in recent.tables
    changed = scalars is not None and (copies is None or copies is not recent.numbers or "scalars" not in recent.tables)
    if captured:
        # What a replay writes is worth nothing before it, and what is there already a later call may replace.
        tables = dict(recent.tables)
        if moved or (plan is not recent.plan and own_norms):
            tables["pointers"] = _captured_upload(plan, "pointers", pointer_table(), device)
        if changed:
            tables["scalars"] = _captured_upload(plan, "scalars", table_of(scalars(values)), device)
        plan.kept += tables.values()
    else:
        if moved:
            recent.set_pointers(call, pointers, layouts, pointer_table())
        if changed:
            recent.set_scalars(call, scalars(values), copies)
        tables = recent.tables
        _set_aside(plan, tables, device)
    call.pointers, call.scalars = tables["pointers"], tables.get("scalars")
    return call


def _checked_numbers(lists, count, copies):
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


def _words(noise):
    """[seed, stream, round] where the host has them; on the device they are not read, as it would have to wait."""
    if noise is None or not on_host(noise):
        return None
    words = noise.tolist()
    if not all([0 <= word < UINT32 for word in words]):
        raise ValueError("seed, stream or round is outside [0, 2^32)")
    # Always int32, whatever the value, so that nothing is compiled anew.
    return [word - UINT32 if word >= UINT32 // 2 else word for word in words]


def _make_plan(op, values, names, table, rows, like):
    """Checks every argument, for a signature that has not been seen."""
    check(op, values)
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
    walked = [i for i, name in enumerate(names) if name not in ONE_PER_FILTER]
    even = (table[:, walked] % 16 == 0).all(axis=1).tolist()
    zeros = [0] * len(like)
    return build(
        like, names, types, even, rows, values.get("index", zeros), values.get("offset", zeros),
        lambda array: upload(array, device),
    )  # fmt: skip


class Key(NamedTuple):
    """What a plan depends on."""

    rows: bool
    layouts: object
    drawn: tuple  # index and offset
    stream: int  # plans hold memory, which two streams must not share; last, for Plans.get


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


def _set_aside(plan, tables, device):
    """Pinned memory for the tables that captures will upload, of the size of those that were."""
    if device.type != "cuda":
        return
    for name, table in tables.items():
        if len(plan.spare.get(name, ())) < ASIDE:
            plan.spare[name] = list(pinned((ASIDE, *table.shape), table.dtype))
