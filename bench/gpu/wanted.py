"""What the stages of `make gpu` race, most wanted first, and the optimizers whose kernels they need.

Every race has torch's fused optimizer in it, and a copy of the same minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..candidates import COPIED, DTYPES, FLOOR, untouched_optimizer
from ..methods import METHODS, is_plain
from ..models import MODELS
from ..races import Entry, Race
from .goals import CUDA, NO_HINTS, OURS, PLAIN_CUDA, PLAIN_OURS

RIVALS = ("foreach", "loop", "papers")
ASCENTS = ("m-rwp", "sam", "asam")
# plan.Tuning of all operations: as most have it, as updates of Adam have it, half the work of a thread.
TUNINGS = ((2048, 4608, 4, 8), (4096, 6144, 8, 8), (2048, 4608, 8, 16))


def race(model: str, method: str, base: str, *rivals: str) -> Race:
    """float32 weights; `rivals` beside torch's fused optimizer."""
    return Race("gpu", model, method, base, tuple(map(Entry, (OURS, FLOOR, *rivals))))


def masters(model: str) -> Race:
    """Rolling noise behind bfloat16 weights with float32 masters, against plain steps of that very layout."""
    ours = [Entry(label, "bfloat16", True) for label in (OURS, CUDA, PLAIN_OURS, PLAIN_CUDA, COPIED)]
    return Race("gpu", model, "rolling", "adamw", (*ours, Entry(FLOOR)))


def keys() -> list[Race]:
    """Triton's kernels and the CUDA kernels in one race each: in the same minute, on the same clocks."""

    def both(model: str, method: str, base: str) -> Race:
        return race(model, method, base, CUDA)

    return [
        *(both("gpt2", method, "sgd") for method in ASCENTS),
        *(both("resnet50", method, "sgd") for method in ASCENTS),
        masters("gpt2"),
        both("gpt2", "rolling", "sgd"),
        both("resnet50", "rolling", "sgd"),
        both("gpt2", "ire", "adamw"),
        both("resnet50", "ire", "adamw"),
        both("llama_1b", "m-rwp", "sgd"),
        both("gpt2", "plain", "adamw"),
        both("gpt2", "rolling", "adamw"),
        both("gpt2", "plain", "sgd"),
        both("resnet50", "plain", "adamw"),
        both("resnet50", "rolling", "adamw"),
        both("resnet50", "plain", "sgd"),
    ]


def hints() -> list[Race]:
    """The CUDA kernels with their cache hints and without, where memory is what holds them up."""

    def both(model: str, method: str, base: str, *kind: Any) -> Race:
        return Race("gpu", model, method, base, tuple(Entry(label, *kind) for label in (CUDA, NO_HINTS)))

    return [
        both("gpt2", "m-rwp", "sgd"),
        both("gpt2", "rolling", "adamw", "bfloat16", True),
        both("gpt2", "rolling", "sgd"),
        both("gpt2", "plain", "adamw"),
        both("resnet50", "m-rwp", "sgd"),
        both("llama_1b", "m-rwp", "sgd"),
    ]


def host() -> list[Race]:
    """Calls on many tensors, where the host is what takes long."""
    return [race("resnet50", "m-rwp", "sgd", CUDA), race("resnet50", "ire", "adamw", CUDA)]


def rivals() -> list[Race]:
    """Loops that a list of a thousand tensors would keep for seconds are left out there, as they are of a billion
    parameters, which leave no room. torch.compile is last: it may take all the time there is."""
    return [
        race("resnet50", "m-rwp", "sgd", *RIVALS),
        race("gpt2", "m-rwp", "sgd", *RIVALS),
        race("many_small", "m-rwp", "sgd", "foreach"),
        race("vit_b16", "m-rwp", "adamw", *RIVALS),
        race("llama_1b", "m-rwp", "sgd", "foreach"),
        race("resnet50", "sam", "sgd", *RIVALS),
        race("resnet50", "asam", "sgd", *RIVALS),
        race("tiny_160", "plain", "sgd", "torch foreach"),
        race("tiny_160", "m-rwp", "sgd", "foreach"),
        race("tiny_160", "plain", "adamw", "torch foreach"),
        race("tiny_160", "rolling", "adamw", "foreach"),
        race("resnet50", "m-rwp", "sgd", "compiled"),
        race("gpt2", "rolling", "adamw", "compiled"),
    ]


def sweep() -> list[Race]:
    """Ours alone, once a tuning."""

    def tuned(model: str, method: str, base: str, *kind: Any) -> Race:
        return Race("gpu", model, method, base, tuple(Entry(OURS, *kind, tuning=tuning) for tuning in TUNINGS))

    return [
        tuned("gpt2", "m-rwp", "sgd", "float32", False),
        tuned("resnet50", "m-rwp", "sgd", "float32", False),
        tuned("gpt2", "rolling", "adamw", "bfloat16", True),
    ]


class Subject(NamedTuple):
    """What is counted, kernel by kernel."""

    model: str
    method: str
    base: str
    entry: Entry
    calls: tuple[str, ...]


def counters() -> list[Subject]:
    return [
        Subject("gpt2", "m-rwp", "sgd", Entry(OURS), ("perturb", "step")),
        Subject("gpt2", "m-rwp", "sgd", Entry(CUDA), ("perturb", "step")),
        Subject("gpt2", "rolling", "adamw", Entry(OURS, "bfloat16", True), ("step",)),
        Subject("gpt2", "rolling", "adamw", Entry(CUDA, "bfloat16", True), ("step",)),
        Subject("resnet50", "m-rwp", "sgd", Entry(OURS), ("perturb",)),
        Subject("gpt2", "sam", "sgd", Entry(OURS), ("perturb",)),
        Subject("gpt2", "ire", "adamw", Entry(OURS), ("update_mask",)),
    ]


# ---- what has to be compiled for them

STAGES: dict[str, Callable[[], Iterable[Race | Subject]]] = {
    "keys": keys,
    "host": host,
    "rivals": rivals,
    "sweep": sweep,
    "ncu": counters,
}


def optimizers(stage: str) -> Iterator[tuple[str, Any]]:
    """The optimizers whose Triton kernels a stage will launch, each once, under a label.

    Their weights are on the CPU and are never touched, so that they take no memory. Each is to be used before the next
    is asked for: until then the kernels have its tuning.
    """
    found = set()
    for item in STAGES[stage]():
        for entry in (item.entry,) if isinstance(item, Subject) else item.entries:
            method = "plain" if is_plain(entry.label) else item.method
            key = item.model, method, item.base, entry.dtype, entry.masters, entry.tuning
            if "flatkern" not in entry.label or entry.label in (CUDA, PLAIN_CUDA) or key in found:
                continue
            found.add(key)
            shapes = MODELS[item.model].shapes()
            params = [torch.nn.Parameter(torch.empty(shape, dtype=DTYPES[entry.dtype])) for shape in shapes]
            with tuned(entry.tuning, torch.device("cpu")):
                yield (
                    " ".join(str(word) for word in key),
                    untouched_optimizer(params, METHODS[method], item.base, masters=entry.masters),
                )


# ---- other tunings


@contextmanager
def tuned(tuning: tuple[int, ...] | None, device: torch.device) -> Iterator[None]:
    """Inside, tensors that have not been walked yet are cut into tiles of this tuning; None: into the usual ones."""
    if tuning is None:
        yield
        return
    from flatkern.triton_kernels.plan import Tuning, Tunings

    with replaced(Tunings(*3 * [Tuning(*tuning)]), device):
        yield


@contextmanager
def no_new_plans(device: torch.device) -> Iterator[None]:
    """Inside, cutting tensors that have not been walked yet is an error."""
    with replaced(None, device):
        yield


@contextmanager
def replaced(tuning: Any, device: torch.device) -> Iterator[None]:
    """Other tensors get plans of their own; those that were walked keep theirs."""
    from flatkern.triton_kernels import launch, plan

    def forget() -> None:
        for cache in launch._caches.values():
            cache.plans.found.clear()

    row = plan.architecture(device)
    usual = plan.TUNING[row]
    forget()
    plan.TUNING[row] = tuning
    try:
        yield
    finally:
        plan.TUNING[row] = usual
        forget()
