"""From a call to launches: arguments are checked, tables that have changed are uploaded, kernels are started.

A plan depends on shapes, strides and dtypes; tables are uploaded again where pointers or scalars differ from the last
call's. Every call looks at all of them. Where its plan is the last call's, the launches of that are repeated with what
is new, and the op's own function does not run (see `repeatable`).
"""

import contextlib
import functools
from contextvars import ContextVar

import torch

from flatkern import jobs
from flatkern.checks import check
from flatkern.ops import OPS

from . import devices, signature
from .cache import TABLES, Key, LastCall, OpCache, PointerTable, scratch
from .job import job
from .launcher import Word, first_launch, templates
from .plan import TYPES, build

# Lists that are not walked with their tensor; a history and a mask of a vector are, but not 16 bytes at a time.
ONE_PER_FILTER = {"norms", "history", "steps", "masks"}


class Mismatch(ValueError):
    """An argument is not what a kernel can walk; flatkern.checks has the message."""


class Call:
    """One call: its groups, tables and device scalars, and how it launches."""

    is_recorded = False

    def __init__(self, plan, device, width, stream, noise, words):
        self.plan, self.device, self.width, self.stream = plan, device, width, stream
        self.groups, self.tensors = plan.groups, plan.tensors
        self.pointers = self.scalars = None
        self.noise, self.words = noise, None if words is None else [Word(word) for word in words]
        self.elsewhere = devices.is_elsewhere(device)
        self.launched = []  # (launcher, arguments)

    def launch(self, kernel, group, arguments, constants):
        """A kernel over the tiles of a group."""
        self.start(kernel, group.programs, group.warps, arguments, constants, group.launchers)

    def start(self, kernel, programs, warps, arguments, constants, launchers=None):
        """A launch. `constants()` returns those of the kernel. Plan and group decide them, and every number among the
        arguments that is not a word of the noise's."""
        launchers = self.plan.launchers if launchers is None else launchers
        launcher = launchers.get(id(kernel))
        given = tuple([int(a) if isinstance(a, Word) else a for a in arguments])  # of types that Triton knows
        with torch.cuda.device(self.device) if self.elsewhere else contextlib.nullcontext():
            if launcher is None:
                launcher = launchers[id(kernel)] = first_launch(kernel, programs, warps, given, constants())
            else:
                launcher(self.stream, given)
        self.launched.append((launcher, arguments))

    def once(self, name, make):
        """What a plan decides, found out in its first call."""
        found = self.plan.scratch.get(name)
        if found is None:
            found = self.plan.scratch[name] = make()
        return found

    def scratch(self, name, shape, dtype=torch.float32):
        """Memory that the plan keeps, because the next call needs it again."""
        return scratch(self.plan, name, shape, self.device, dtype)

    def scalar(self, t):
        """A device scalar, brought to the device where it is elsewhere."""
        if t is None or t.device == self.device:
            return t
        return devices.upload(t.reshape(1).numpy(), self.device) if t.device.type == "cpu" else t.to(self.device)

    def key(self):
        """(noise, seed, stream, round) of a kernel: by value from the host, else a pointer, for graphs."""
        return (self.noise, 0, 0, 0) if self.words is None else (None, *self.words)


class Recorder(Call):
    """A call in a recording: what it would launch is a job for the compiler."""

    is_recorded = True

    def start(self, kernel, programs, warps, arguments, constants, launchers=None):
        jobs.current.get().jobs.append(job(kernel, warps, arguments, constants()))


def strided(numbers):
    """A vector on the device, or None, as kernels take it: with its stride."""
    return numbers, 0 if numbers is None else numbers.stride(0)


_caches = {op.name: OpCache(op) for op in OPS.values()}
# (last call, call, what the next call replaces) of what an op's function begins, while it runs.
_begun = ContextVar("flatkern.begun", default=None)


def repeatable(function):
    """The decorator of an op that does nothing but launch, so that it need not run where its launches are known.

    They are, where the layouts of the tensors are the last call's: what else is new comes to kernels in tables, single
    tensors and words of the noise's key.
    """
    name = function.__name__

    @functools.wraps(function)
    def run(*tensors, **values):
        if jobs.current.get() is not None:
            function(*tensors, **values)
            return
        cache = _caches[name]
        last = cache.last_call(tensors)
        known = last is not None and last.launches and len(values) == len(cache.numbers)
        if known and last.repeat(cache, tensors, values):
            return
        begun = []
        token = _begun.set(begun)
        try:
            function(*tensors, **values)
        finally:
            _begun.reset(token)
        for last, call, replaced in begun:
            last.launches = templates(call.launched, replaced, call.plan) if len(begun) == 1 else []

    return run


def begin_call(name, values, lists, rows, scalars=None):
    """Check the arguments `values` of op `name` and find its tables; None where there are no tensors.

    `lists` names the columns of the table of pointers; the others are like the first. `rows`: tiles follow filters.
    `scalars(values)` returns the columns of the table of host scalars, of which alone they may depend. A column "norms"
    that is not given points to memory of the plan, for the norms of long rows.
    """
    op, recording, names = OPS[name], jobs.current.get(), lists.split()
    # What is recorded is remembered by nobody.
    cache = _caches[name] if recording is None else OpCache(op)
    try:
        like = values[names[0]]
        if not like:
            check(op, values)
            return None
        tensors, numbers = tuple([values[n] for n in cache.tensors]), cache.numbers_of(values)
        place = cache.place(tensors)
        last = cache.last_calls.get(place)
        reading = signature.read(tensors, signature.Reading() if last is None else last.reading)
        device = like[0].device
        stream, captured = devices.current_stream(device), devices.capturing(device)
        # A graph is captured on a stream of its own; the tables of the steps before it serve it too.
        if last is not None and (reading[2] is not last.reading[2] or (stream != last.stream and not captured)):
            last = None
        copies, drawn = (last.numbers, last.drawn) if last is not None else (None, None)
        if copies is None or not signature.same_numbers(numbers, copies):
            copies, drawn = signature.checked_numbers(numbers, len(like), copies), signature.drawn_of(values)
            if last is not None and drawn != last.drawn:
                last = None
        words = None if recording is not None and recording.capturable else cache.words_of(tensors)
        words = None if words is None else signature.signed(words)
    except signature.UNREADABLE as error:
        check(op, values)  # says what is wrong, and what to do
        raise Mismatch(f"{name}: {error}") from error
    plan = last.plan if last is not None and stream == last.stream else None
    if plan is None:
        make = functools.partial(_make_plan, op, cache, values, names, reading, rows)
        plan = cache.plans.get(Key(rows, reading[2], drawn, stream), make, captured)
    if last is None:
        last = LastCall(plan, device, stream, drawn, PointerTable(cache, names, tensors, device), scalars)
        if not captured:
            cache.remember(place, last)
    call = (Call if recording is None else Recorder)(plan, device, len(names), stream, values.get("noise"), words)
    if captured:
        tables = last.captured_tables(plan, reading, copies, values)
    else:
        last, tables = last.updated(reading, copies, values)
        devices.set_aside(plan, tables, device)
    call.pointers, call.scalars = tables["pointers"], tables.get("scalars")
    begun = _begun.get()
    if begun is not None and last.launches is None and not captured:
        replaced = *map(tables.get, TABLES), *(call.words or [None] * 3), *[tensors[k] for k in cache.singles]
        begun.append((last, call, replaced))
    return call


def _make_plan(op, cache, values, names, reading, rows):
    """Checks every argument, for a signature that has not been seen."""
    check(op, values)
    like = values[names[0]]
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
    walked = [name for name in names if name not in ONE_PER_FILTER]
    pointers = PointerTable(cache, walked, tuple([values[n] for n in cache.tensors]), device).read(reading[0])
    even = (pointers % 16 == 0).all(axis=1).tolist()
    zeros = [0] * len(like)
    return build(
        like, names, types, even, rows, values.get("index", zeros), values.get("offset", zeros),
        lambda array: devices.upload(array, device),
    )  # fmt: skip
