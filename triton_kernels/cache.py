"""What is remembered of calls: their plans, the tables made of their arguments, and their launches.

Nothing is remembered that a call could not make again, and nothing is used that the call at hand does not confirm.
"""

from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from . import devices, signature
from .launcher import bind, is_watched

MOST_PLANS = 32
TABLES = ("pointers", "scalars")


class Key(NamedTuple):
    """What a plan depends on."""

    rows: bool
    layouts: object
    drawn: tuple  # index and offset
    stream: int  # plans hold memory, which two streams must not share; last, for Plans.get


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


class OpCache:
    """Of one op: its arguments, its plans, and what it was last called with."""

    def __init__(self, op):
        self.plans, self.last_calls = Plans(), {}
        given = [a for a in op.arguments if not a.keyword_only]
        self.tensors = [a.name for a in given]
        self.numbers = [a.name for a in op.arguments if a.keyword_only]
        self.first = next(k for k, a in enumerate(given) if a.type == "Tensor[]")
        self.singles = [k for k, a in enumerate(given) if a.type in ("Tensor", "Tensor?")]
        self.noise = self.tensors.index("noise") if "noise" in self.tensors else None

    def place(self, tensors):
        """Where to remember a call with these tensors: calls with and without an optional one may take turns."""
        like = tensors[self.first]
        return id(like[0]), len(like), tuple(map(type, tensors))

    def last_call(self, tensors):
        """The last call that looked like one with these tensors; None where there was none."""
        like = tensors[self.first] if len(tensors) == len(self.tensors) else None
        return self.last_calls.get(self.place(tensors)) if isinstance(like, (list, tuple)) and like else None

    def remember(self, place, last):
        self.last_calls.pop(place, None)
        if len(self.last_calls) >= MOST_PLANS:
            del self.last_calls[next(iter(self.last_calls))]
        self.last_calls[place] = last

    def numbers_of(self, values):
        return tuple([values[name] for name in self.numbers])

    def words_of(self, tensors):
        return None if self.noise is None else signature.words_of(tensors[self.noise])


def scratch(plan, name, shape, device, dtype=torch.float32):
    """Memory that a plan keeps, because the next call needs it again."""
    found = plan.scratch.get(name)
    if found is None:
        found = plan.scratch[name] = torch.empty(shape, dtype=dtype, device=device)
    return found


class PointerTable:
    """How the table of pointers is made: its columns are `names`."""

    def __init__(self, cache, names, tensors, device):
        listed = [name for name, t in zip(cache.tensors, tensors, strict=True) if isinstance(t, (list, tuple))]
        self.columns = [listed.index(name) if name in listed else None for name in names]
        self.count, self.device = len(tensors[cache.first]), device
        # The column that points to norms of a plan's own, if there is one.
        self.norms = names.index("norms") if "norms" in names and "norms" not in listed else None

    def has_own_norms(self, plan):
        return self.norms is not None and bool(plan.long_tensors)

    def read(self, pointers):
        """The table of what was read, 0 where a list is absent."""
        return signature.table(pointers, self.columns, self.count)

    def make(self, plan, pointers):
        """The table that kernels read."""
        table = self.read(pointers)
        if self.has_own_norms(plan):
            first = scratch(plan, "norms", plan.long_row_count, self.device).data_ptr()
            table[:, self.norms] = [first + 4 * plan.long_tensors.get(k, 0) for k in range(self.count)]
        return table


def table_of(columns):
    return np.array(columns, np.float64).T.copy()


class LastCall:
    """What an op was last called with for some tensors, the tables that were made of it, and what was launched.

    Where to look for it is a guess; the next call compares all of it. One call at a time, which holds the lock: another
    thread's, or a signal handler's in the middle of this one, does without it.
    """

    def __init__(self, plan, device, stream, drawn, pointer_table, columns_of):
        self.lock = Lock()
        self.plan, self.device, self.stream = plan, device, stream
        self.drawn = drawn  # index and offset
        self.pointer_table = pointer_table
        self.columns_of = columns_of  # makes the columns of the table of host scalars, of a call's arguments by name
        self.reading = signature.Reading()
        self.numbers = None  # copies of the lists of host scalars; None where one may change in place
        self.scalars = self.columns = None  # the table of host scalars, and what it was made of
        self.tables = {}
        self.launches = None  # see launcher.templates; empty where they cannot be repeated
        self.bound = None  # the launches with all of their arguments; None where a table or a single tensor is another
        self.words = self.signed = None  # of the noise, in `bound`

    def has_moved(self, reading):
        return reading[0] is not self.reading[0] or "pointers" not in self.tables

    def has_changed(self, numbers):
        """Whether there is another table of host scalars to make."""
        same = numbers is not None and numbers is self.numbers and "scalars" in self.tables
        return self.columns_of is not None and not same

    def update(self, reading, numbers, values):
        """Upload what is not as in the last call.

        It is forgotten before: a call that is interrupted leaves nothing that the next one would rely on.
        """
        moved, changed = self.has_moved(reading), self.has_changed(numbers)
        if moved or changed or reading[1] is not self.reading[1]:
            self.reading, self.bound = signature.Reading(), None
            if moved:
                self.set_table("pointers", self.pointer_table.make(self.plan, reading[0]))
            if changed:
                self.set_scalars(self.columns_of(values), numbers)
            self.reading = reading

    def updated(self, reading, numbers, values):
        """A LastCall that is up to date, and its tables: this one, or another one while this one is in use."""
        if not self.lock.acquire(blocking=False):
            own = LastCall(self.plan, self.device, self.stream, self.drawn, self.pointer_table, self.columns_of)
            return own.updated(reading, numbers, values)
        try:
            self.update(reading, numbers, values)
            return self, self.tables
        finally:
            self.lock.release()

    def set_table(self, name, array):
        # A new dict: another thread may still be launching with the old one.
        self.tables = {**self.tables, name: devices.upload(array, self.device)}

    def set_scalars(self, columns, numbers):
        """Make the table of host scalars; a column takes 10 us to convert, and as a rule one has changed."""
        self.numbers = None
        if self.columns is None or numbers is None:
            array = table_of(columns)
        else:
            array = self.scalars.copy()  # on the CPU the last one is the memory of a table
            for k, column in enumerate(columns):
                if column != self.columns[k]:
                    array[:, k] = column
        self.set_table("scalars", array)
        self.scalars, self.columns = array, None if numbers is None else [column[:] for column in columns]
        self.numbers = numbers

    def captured_tables(self, plan, reading, numbers, values):
        """The tables of a call in a capture, on a stream of its own. What only a replay fills is worth nothing before
        it, and what is there already a later call may replace."""
        tables = dict(self.tables)
        if self.has_moved(reading) or (plan is not self.plan and self.pointer_table.has_own_norms(plan)):
            table = self.pointer_table.make(plan, reading[0])
            tables["pointers"] = devices.captured_upload(plan, "pointers", table, self.device)
        if self.has_changed(numbers):
            table = table_of(self.columns_of(values))
            tables["scalars"] = devices.captured_upload(plan, "scalars", table, self.device)
        plan.kept += tables.values()
        return tables

    def repeat(self, cache, tensors, values):
        """Launch again what the last call launched, with what is new; False where that is not enough.

        `tensors` are the call's, in the schema's order, and `values` its host scalars by name. Where it comes out False
        nothing has changed, and `begin_call` finds out why.
        """
        if not devices.is_ready(self.device, self.stream) or is_watched() or not self.lock.acquire(blocking=False):
            return False
        try:
            tables, bound = self.bound_for(cache, tensors, values)
        finally:
            self.lock.release()
        for run, given in bound or ():
            run(*given)
        del tables  # they stay until everything is launched
        return bound is not None

    def bound_for(self, cache, tensors, values):
        """The tables of a call, and its launches with all of their arguments; None and None where it is not alike."""
        try:
            reading = signature.read(tensors, self.reading)
            if reading[2] is not self.reading[2]:
                return None, None
            given, numbers = cache.numbers_of(values), self.numbers
            if numbers is None or not signature.same_numbers(given, numbers):
                numbers = signature.checked_numbers(given, len(tensors[cache.first]), numbers)
                if signature.drawn_of(values) != self.drawn:
                    return None, None
            words = cache.words_of(tensors)
            signed = self.signed if words == self.words else signature.signed(words or [])
        except signature.UNREADABLE:
            return None, None
        self.update(reading, numbers, values)
        devices.set_aside(self.plan, self.tables, self.device)
        if self.bound is None or words != self.words:
            self.bound = None
            bound = bind(self.launches, self.stream, self.replaced(cache, tensors, signed, reading))
            self.bound, self.words, self.signed = bound, words, signed
        return self.tables, self.bound

    def replaced(self, cache, tensors, words, reading):
        """What every call has its own of, as integers: TABLES, the noise's words, and single tensors."""
        pointers = iter(signature.integers(reading[1]))
        singles = [None if tensors[k] is None else next(pointers) for k in cache.singles]
        at = [self.tables[name].data_ptr() if name in self.tables else None for name in TABLES]
        return *at, *(words or [None] * 3), *singles
