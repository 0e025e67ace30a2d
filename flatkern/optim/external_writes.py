"""What others have written to perturbed weights, told from the noise element by element: a draw repeats bit for bit.

Functions of tensors alone. Which weights are perturbed, and where their clean values are, is in weights.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .. import dtensor, jobs
from ..dispatch import resolve
from ..tables import same_layout
from .buckets import Bucket, Call

REPEATABLE = "perturb_gaussian_"  # of the same clean weights it makes the same perturbed ones
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # a model may be converted meanwhile
SAMPLE = 1024  # elements of a tensor that a look at values takes, and at least one row
ALL_ROWS = (0, -1)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits, or both NaN."""
    kind = BITS[a.element_size()]
    return (a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())


def _rows(t: Tensor, rows: tuple[int, int]) -> Tensor:
    """Some rows; a vector is one row, whose norm is that of all of it."""
    return t if rows == ALL_ROWS or t.dim() < 2 else t.narrow(0, *rows)


def draw_again(
    call: Call, clean: Sequence[Tensor], at: Sequence[int], rows: Sequence[tuple[int, int]] | None = None
) -> list[Tensor]:
    """The perturbed values that `call` made of clean weights, drawn once more; nothing is sent to other ranks.

    Arguments:
        call: of op `REPEATABLE`; it has run.
        clean: the clean weights of its bucket, or masters.
        at: positions in the bucket.
        rows: (first, count) for each of them; None: all.
    """
    bucket, numbers = call.bucket, call.kwargs
    norms, history, sigmas, noise = call.repeated()
    rows = rows or [ALL_ROWS] * len(at)
    # Copies, which are aligned as whole tensors are, so that the same kernels serve.
    sources = [_rows(dtensor.local(clean[k]), r).clone() for k, r in zip(at, rows, strict=True)]
    outs = sources
    if bucket.has_master:
        outs = [torch.empty_like(s, dtype=bucket.dtypes[k]) for s, k in zip(sources, at, strict=True)]
    if history is not None:
        # One number per row, but per element of a vector.
        wide = [sources[j].dim() >= 2 and rows[j] != ALL_ROWS for j in range(len(at))]
        own = [dtensor.local(history[k]) for k in at]
        history = [h.narrow(0, *r).clone() if w else h for h, r, w in zip(own, rows, wide, strict=True)]
    if norms is not None:  # of all rows, or of the whole vector
        norms = [norms[k] if r == ALL_ROWS else norms[k].narrow(0, *r).clone() for k, r in zip(at, rows, strict=True)]
    resolve(call.op, bucket.device.type, bucket.backend)(
        outs,
        None,
        sources if bucket.has_master else None,
        norms,
        history,
        None if sigmas is None else sigmas[list(at)],
        noise,
        sigma=[numbers["sigma"][k] for k in at],
        eta=[numbers["eta"][k] for k in at],
        index=[numbers["index"][k] for k in at],
        offset=[
            numbers["offset"][k] + (r[0] if s.dim() >= 2 else 0) for k, r, s in zip(at, rows, sources, strict=True)
        ],
    )
    return outs


def is_as_drawn(p: Tensor, noisy: Tensor) -> bool:
    """True if every element of `p` is what was drawn. The host waits."""
    part = dtensor.local(p)
    return part.shape == noisy.shape and bool(same_bits(part, noisy.to(part)).all())


@torch.no_grad()
def end_element_by_element(p: Tensor, clean: Tensor, noisy: Tensor, is_master: bool) -> None:
    """Elements that are as drawn become clean; all others keep what others wrote, and a master takes it over.

    Half-precision numbers are few, and of a tensor that others have written as a whole some elements are as drawn by
    chance: where fewer than a quarter are, all of it stays.
    """
    part, value = dtensor.local(p), dtensor.local(clean)
    if part.shape != value.shape:
        return  # others have put another tensor there
    as_drawn = same_bits(part, noisy.to(part))
    if part.element_size() >= 4 or 4 * int(as_drawn.sum()) >= part.numel():
        part.copy_(torch.where(as_drawn, value.to(part), part))
    if is_master:
        take_over(value, part)


@torch.no_grad()
def take_over(master: Tensor, part: Tensor) -> None:
    """Float32 weights where their parameter was written: there they are the parameter's. The host does not wait."""
    master.copy_(torch.where(same_bits(master.to(part), part), master, part.to(master)))


def differ_from_draw(call: Call, params: list[Tensor], clean: list[Tensor], look: int) -> list[int]:
    """Positions of parameters that hold anything else than what was drawn. The host waits.

    Arguments:
        look: the how-many-th this is. The first and every hundredth see all elements, the others some rows.
    """
    bucket = call.bucket
    pairs = enumerate(zip(params, clean, strict=True))
    at = [k for k, (p, c) in pairs if _has_not_moved(bucket, k, p, c) and dtensor.local(p).numel()]
    parts = {k: dtensor.local(params[k]) for k in at}
    if jobs.current.get() is not None:  # nothing is computed, and what would be launched is all that counts
        for k in at:
            draw_again(call, clean, [k])
        draw_again(call, clean, at, [_sampled(parts[k], look) for k in at])
        return []
    if look % 100 == 0:
        return [k for k in at if not is_as_drawn(parts[k], draw_again(call, clean, [k])[0])]
    rows = {k: _sampled(parts[k], look) for k in at}
    drawn = dict(zip(at, draw_again(call, clean, at, [rows[k] for k in at]), strict=True))
    if all([_are_as_drawn([(_rows(parts[k], rows[k]), drawn[k]) for k in at if parts[k].dtype is dtype])
            for dtype in {part.dtype for part in parts.values()}]):  # fmt: skip
        return []
    return [k for k in at if not is_as_drawn(_rows(parts[k], rows[k]), drawn[k])]


def _are_as_drawn(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """For many small tensors of one dtype at once."""
    found, drawn = (torch.cat([t.reshape(-1) for t in side]) for side in zip(*pairs, strict=True))
    return is_as_drawn(found, drawn)


def is_laid_out_as_drawn(bucket: Bucket, clean: list[Tensor]) -> bool:
    """True if all parameters of a bucket have the dtype, device and memory format that they were drawn in."""
    return all(_has_not_moved(bucket, k, p, c) for k, (p, c) in enumerate(zip(bucket.params, clean, strict=True)))


def _has_not_moved(bucket: Bucket, k: int, p: Tensor, clean: Tensor) -> bool:
    part, value = dtensor.local(p), dtensor.local(clean)
    placed = part.device == bucket.device == value.device and part.dtype == bucket.dtypes[k]
    return placed and same_layout(part, value)


def _sampled(part: Tensor, look: int) -> tuple[int, int]:
    """Rows that hold about `SAMPLE` elements: other ones at every look."""
    if part.dim() < 2:
        return ALL_ROWS
    rows = part.shape[0]
    count = min(max(1, SAMPLE * rows // part.numel()), rows)
    return look * count % (rows - count + 1), count


def ascent_kept(p: Tensor, perturbed: Tensor | None, clean: Tensor) -> Tensor:
    """The perturbed value of a parameter whose clean one others may have changed since: the bits that it had where
    nobody wrote, elsewhere the new value plus the difference, in float32. Without `perturbed` it is what it is."""
    part, before = dtensor.local(p), dtensor.local(clean)
    if perturbed is None or part.shape != before.shape:
        return part.clone()
    difference = perturbed.to(part).float() - before.to(part.device, torch.float32)
    moved = (part.float() + difference).to(part.dtype)
    return torch.where(same_bits(part, before.to(part)), perturbed.to(part), moved)


def written_by_interrupted(call: Call | None, clean: Sequence[Tensor], versions: list[int]) -> list[int]:
    """The positions of the parameters that an interrupted call has written.

    Arguments:
        clean: copies of the clean weights, or masters.
        versions: what `call.marks()` was before the call.
    """
    assert call is not None
    bucket, count = call.bucket, len(call.bucket.params)
    if call.args[1] is None:
        return list(range(count))  # it writes no copies, so that those, or masters, are right in either case
    if call.progress == "whole":
        return list(range(count)) if call.marks() != versions else []
    if call.progress == "versions":
        return [k for k, v in enumerate(bucket.versions()) if v != versions[k]]
    # Kernels are launched one after another, and a copy is right only where its kernel has run. The same call on the
    # copies gives what is in the parameters there, bit for bit, and nowhere else.
    again = [c.clone() for c in clean]
    call.on(again)
    return [k for k, (p, a) in enumerate(zip(bucket.params, again, strict=True)) if is_as_drawn(p, a)]


def untouched(bucket: Bucket, versions: list[int], unknown: Collection[int]) -> list[int]:
    """The positions of the parameters whose versions are still these, and of those (by id) whose versions do not
    tell."""
    triples = zip(bucket.params, bucket.versions(), versions, strict=True)
    return [k for k, (p, now, before) in enumerate(triples) if now == before or id(p) in unknown]
