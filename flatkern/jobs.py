"""Recording: launches of the Triton backend are kept as jobs for its compiler. No Triton here, and no tensors' values.

Everything that behaves otherwise in a recording asks this module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Job:
    """One kernel that has to be compiled.

    Its `key` is the same in every process, and equal keys are one compiled kernel on one kind of device. `name` is for
    people.
    """

    key: Hashable
    name: str = field(compare=False)
    run: Callable[[], None] = field(compare=False, repr=False)

    def compile(self) -> None:
        """Compile it by Triton's active driver for the current device, and load it there; nothing is launched."""
        self.run()


class Shard(NamedTuple):
    """What a small tensor stands for, of a tensor that is divided among ranks."""

    ranks: tuple[Any, ...]
    first: int  # of the row that it begins with, or the element


WHOLE = Shard((), 0)


@dataclass
class Recording:
    """What is going on in a recording."""

    jobs: list[Job] = field(default_factory=list)
    capturable: bool = False  # the noise's words are read on the device, as a captured graph has to
    shards: dict[int, Shard] = field(default_factory=dict)  # by the id of a tensor that stands for one


current: ContextVar[Recording | None] = ContextVar("flatkern.recording", default=None)


@contextmanager
def recording(capturable: bool = False, shards: dict[int, Shard] | None = None) -> Iterator[list[Job]]:
    """Inside, in this thread, launches of the Triton backend become jobs of the list and nothing runs on a device.

    Tensors on the CPU will do, for ops that are called as `dispatch.load(OPS[name], "triton")(...)`. Nobody's sums
    over ranks are taken.
    """
    here = Recording([], capturable, shards or {})
    token = current.set(here)
    try:
        yield here.jobs
    finally:
        current.reset(token)


def shard_of(t: Any) -> Shard:
    """What the plain tensor `t` stands for."""
    here = current.get()
    return WHOLE if here is None else here.shards.get(id(t), WHOLE)
