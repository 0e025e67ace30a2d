"""The measured limit of a call: the time that its reads and writes take when nothing is computed.

A call is one or more *passes* over memory, one after the other; a pass is an operation with the tensors that it is
given, and flatkern.ops says which of them an operation reads and which it writes. copy_ is no limit: reads and writes
cost differently, and so does the number of tensors that are walked side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..methods import Method
from ..models import Shape

MASK = torch.uint8  # a bit per element
MOMENTS = {"sgd": ("momentum_buffers",), "adamw": ("exp_avgs", "exp_avg_sqs")}
UPDATE = {"sgd": "sgd_update_", "adamw": "adamw_update_"}


@dataclass(frozen=True)
class Streams:
    """One pass: the dtype of every list of tensors that it walks; one that comes in some steps only has a `share`."""

    op: str
    reads: tuple[torch.dtype, ...]
    updates: tuple[torch.dtype, ...]  # read, and written
    writes: tuple[torch.dtype, ...]  # written without having been read
    share: float = 1.0

    @property
    def bytes(self) -> float:
        """Per parameter, in the mean of the steps."""
        return self.share * sum(map(width, (*self.reads, *self.updates, *self.updates, *self.writes)))

    @property
    def lists(self) -> int:
        return len(self.reads) + len(self.updates) + len(self.writes)


def width(dtype: torch.dtype) -> float:
    """Bytes of an element."""
    return 1 / 8 if dtype == MASK else dtype.itemsize


def streams_of(op: str, *, noise: bool = False, **given: torch.dtype | None) -> Streams:
    """The streams of an operation, by the lists of tensors that it is `given`; None is one that is absent.

    Where clean weights are in masters or copies, they are read there, and `params` is only written. Without `noise` an
    update leaves its copies as they are, because nobody restores from them again. A mixed gradient goes to `outs`.
    """
    from flatkern.ops import OPS

    row, lists = OPS[op], {name: dtype for name, dtype in given.items() if dtype is not None}
    is_update = row.family == "update"
    reads = {*row.reads.split(), *["masks"] * is_update}
    writes = {*row.writes}
    if "masters" in lists or (is_update and "backups" in lists):
        reads -= {"params"}
    if is_update and not noise:
        writes -= {"backups"}
    if "outs" in lists:
        writes -= {"grads"}
    known = {argument.name for argument in row.arguments}
    if not lists.keys() <= known:
        raise ValueError(f"{op} takes no {', '.join(sorted(lists.keys() - known))}")
    chosen = [
        tuple(dtype for name, dtype in lists.items() if ((name in reads), (name in writes)) == wanted)
        for wanted in ((True, False), (True, True), (False, True))
    ]
    return Streams(op, *chosen)


@dataclass(frozen=True)
class _Lists:
    """The tensors of a training: dtypes of the gradients, of clean weights and state, and where clean weights are."""

    base: str
    param: torch.dtype
    clean: torch.dtype
    masters: torch.dtype | None  # one of the two is None
    backups: torch.dtype | None

    def update(self, restoring: bool = True, noise: bool = False, **more: torch.dtype | None) -> Streams:
        """The base optimizer's; `restoring` from the copies, where there are some."""
        return streams_of(
            UPDATE[self.base], noise=noise, params=self.param, masters=self.masters, grads=self.param,
            backups=self.backups if restoring else None, **dict.fromkeys(MOMENTS[self.base], self.clean), **more,
        )  # fmt: skip

    def plain(self, **more: torch.dtype | None) -> Streams:
        return self.update(restoring=False, **more)

    def gaussian(self) -> Streams:
        return streams_of("perturb_gaussian_", params=self.param, masters=self.masters, backups=self.backups)

    def ascent(self, saves: bool = True, along: torch.dtype | None = None, **more: torch.dtype | None) -> Streams:
        return streams_of(
            "perturb_ascent_", params=self.param, masters=self.masters, backups=self.backups if saves else None,
            grads=along or self.param, **more,
        )  # fmt: skip

    def restore(self) -> Streams:
        return streams_of("restore_", params=self.param, backups=self.clean)


def streams(method: Method, base: str, call: str, dtype: torch.dtype, masters: bool = False) -> list[Streams]:
    """The passes of all calls of a step with one name; their bytes are those of methods.call_floors.

    Tensors of rank <= 1 count as all others do, and what has one number per row is left out. Rows stay on chip between
    their norm and their noise.
    """
    clean = torch.float32 if masters else dtype
    lists = _Lists(base, dtype, clean, clean if masters else None, None if masters else dtype)
    if call == "perturb":
        return _perturb_passes(method, lists)
    if call == "restore":
        return (method.rounds - 1) * [lists.restore()]
    if call == "step":
        return _step_passes(method, lists)
    if call == "update_mask":
        return _mask_passes(lists)
    raise ValueError(f"call is {call!r}, but should be one of methods.METHODS")


def _mask_passes(lists: _Lists) -> list[Streams]:
    """Every tenth step; the threshold is found in three passes."""
    count = streams_of("count_magnitudes_", grads=lists.param)
    return [replace(p, share=0.1) for p in (*3 * [count], streams_of("pack_mask_", masks=MASK, grads=lists.param))]


def _momentum_ascent(lists: _Lists, ascent: Streams) -> list[Streams]:
    return [streams_of("ascent_norm_", grads=lists.clean), ascent]


def _perturb_passes(method: Method, lists: _Lists) -> list[Streams]:
    if method.rule == "momentum":
        return _momentum_ascent(lists, lists.ascent(along=lists.clean))
    if not method.rho:
        return [lists.gaussian()]
    mean = lists.clean if method.rule == "friendly" else None
    weights = lists.clean if method.floor is not None else None
    norm = streams_of("ascent_norm_", grads=lists.param, means=mean, params=weights)
    # The clean weights stay saved between rounds.
    ascents = [lists.ascent(saves=k == 0, means=mean, new_means=mean) for k in range(method.rounds)]
    return [replace(p, share=1 / method.every) for ascent in ascents for p in (norm, ascent)]


def _step_passes(method: Method, lists: _Lists) -> list[Streams]:
    if method.kappa:
        return [lists.plain(masks=MASK)]
    if method.rule == "momentum" and method.rolling:
        return _rolling_momentum(lists)
    if method.rolling:
        return [lists.update(), lists.gaussian()] if method.absolute else [lists.update(noise=True)]
    if not (method.rho or method.sigma):
        return [lists.plain()]
    if method.every > 1:
        return _periodic(method, lists)
    grad = lists.param
    if method.rule == "gsam":
        return [streams_of("gradient_products_", grads=grad, clean_grads=grad), lists.update(clean_grads=grad)]
    return [lists.update(clean_grads=grad if method.lam is not None else None)]


def _rolling_momentum(lists: _Lists) -> list[Streams]:
    """float32 weights are updated in their copies, and climbed from there."""
    if lists.backups != torch.float32:
        return [lists.update(), *_momentum_ascent(lists, lists.ascent(along=lists.clean))]
    ascent = streams_of("perturb_ascent_", params=lists.param, masters=lists.backups, grads=lists.clean)
    return [lists.plain(), *_momentum_ascent(lists, ascent)]


def _periodic(method: Method, lists: _Lists) -> list[Streams]:
    """The step behind an ascent, and those without one, which find clean weights."""
    grad, kept = lists.param, lists.clean if method.rule == "looksam" else None
    behind, between = [lists.update()], [lists.plain(clean_grads=kept)]
    if kept is not None:
        products = streams_of("gradient_products_", grads=grad, clean_grads=grad)
        mixing = streams_of("mix_gradients_", grads=grad, clean_grads=grad, outs=kept)
        behind = [products, mixing, *behind]
        between = [streams_of("gradient_norm_", grads=grad), *between]
    share = 1 / method.every
    return [*(replace(p, share=share) for p in behind), *(replace(p, share=1 - share) for p in between)]


Move = Callable[[], None]


class Limit:
    """The passes of a call, on memory of their own: no stream may find another's in a cache."""

    def __init__(self, shapes: Iterable[Shape], passes: list[Streams], device: torch.device | str = "cpu") -> None:
        self.passes, shapes, device = passes, list(shapes), torch.device(device)
        alike = {
            each: {f"{k}: {name}": move for name, move in moves_of(each, shapes, device).items()}
            for k, each in enumerate(distinct(passes))
        }
        self._of_pass = [alike[replace(each, op="", share=1.0)] for each in passes]
        self.chosen = [next(iter(moves)) for moves in self._of_pass]

    def variants(self) -> dict[str, Move]:
        """What to race, each of one pass; `choose` takes their seconds."""
        return {name: move for moves in self._of_pass for name, move in moves.items()}

    def choose(self, seconds: dict[str, float]) -> float:
        """Keep the fastest variant of each pass; the seconds of all passes, with their share."""
        self.chosen = [
            min((name for name in moves if name in seconds), key=seconds.__getitem__) for moves in self._of_pass
        ]
        return sum(each.share * seconds[name] for each, name in zip(self.passes, self.chosen, strict=True))

    def __call__(self) -> None:
        """Every pass once, whatever its share."""
        for moves, name in zip(self._of_pass, self.chosen, strict=True):
            moves[name]()


def moves_of(each: Streams, shapes: list[Shape], device: torch.device) -> dict[str, Move]:
    """The ways to run a pass, by name."""
    reads, updates, writes = (
        [allocated(shapes, dtype, device) for dtype in dtypes] for dtypes in (each.reads, each.updates, each.writes)
    )
    if device.type == "cpu":
        from flatkern import _C

        def moving(variant: int) -> Move:
            return lambda: _C.stream(reads, updates, writes, variant)

        return {name: moving(variant) for variant, name in enumerate(_C.stream_variants)}
    from .streams_triton import Walk, variants

    return {name: Walk(reads, updates, writes, variant) for name, variant in variants().items()}


def allocated(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A list of tensors with something in every page: what was never written is one page of zeros to some systems."""
    if dtype == MASK:
        shapes = [(-(-prod(shape) // 8),) for shape in shapes]
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


def distinct(passes: Iterable[Streams]) -> list[Streams]:
    """Passes whose streams are alike are measured once."""
    return list(dict.fromkeys(replace(each, op="", share=1.0) for each in passes))


class RaceLimits:
    """The limits of all calls of a race: of each kind of weights, which is a dtype and whether there are masters."""

    PREFIX = "limit "  # of what is raced

    @staticmethod
    def held_bytes(method: Method, base: str, kinds: Iterable[tuple[torch.dtype, bool]]) -> float:
        """Of an element of the weights: every stream has memory of its own."""
        calls = dict.fromkeys(turn.call for turn in method.cycle)
        found = (streams(method, base, call, *kind) for kind in dict.fromkeys(kinds) for call in calls)
        return sum(width(d) for passes in found for p in distinct(passes) for d in (*p.reads, *p.updates, *p.writes))

    def __init__(
        self,
        method: Method,
        base: str,
        kinds: Iterable[tuple[torch.dtype, bool]],
        shapes: Iterable[Shape],
        device: torch.device | str,
    ) -> None:
        calls, shapes = dict.fromkeys(turn.call for turn in method.cycle), list(shapes)
        self.of = {
            (*kind, call): Limit(shapes, streams(method, base, call, *kind), device)
            for kind in dict.fromkeys(kinds)
            for call in calls
        }

    def candidates(self) -> dict[str, Move]:
        """What to race, by labels."""
        return {
            f"{self.PREFIX}{key} {name}": move
            for key, limit in self.of.items()
            for name, move in limit.variants().items()
        }

    def seconds(self, timings: dict[str, float], dtype: torch.dtype, masters: bool) -> dict[str, float]:
        """Of a step's calls by name, from the seconds of the candidates, which must all be there."""
        found = {}
        for (kind, with_masters, call), limit in self.of.items():
            if (kind, with_masters) == (dtype, masters):
                prefix = f"{self.PREFIX}{(kind, with_masters, call)} "
                found[call] = limit.choose({name: timings[prefix + name] for name in limit.variants()})
        return found
