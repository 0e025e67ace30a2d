"""capturable=True: learning rates, sigmas and the noise's words on the device, where a captured CUDA graph reads them.

group["lr"] and group["sigma"] are then 0-dim float64 tensors, group["round"] a 0-dim int64 one that all groups share.
What the host must not wait for is read here only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import RANGES
from ..dispatch import served_by
from ..methods import RWP
from .plan import Bucket, Group

if TYPE_CHECKING:
    from .base import FlatOptimizer

KEYS = ("lr", "sigma")  # group values that kernels read on the device; a graph keeps all others as they were


class OnDevice:
    """The tensors of one optimizer that its graphs know by address."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):  # they are written in every mode
            self.noise = torch.zeros(3, dtype=torch.int64, device=device)  # seed, stream, round
            self.round = self.noise[2]
            self.one_round = torch.zeros_like(self.noise)
            self.one_round[2].fill_(1)
        self.key: tuple[int, int] | None = None  # seed and stream, as they are in `noise`
        self.groups: list[tuple[Group, dict[str, Tensor]]] = []

    def of(self, k: int, group: Group) -> dict[str, Tensor]:
        """Our tensors of one group: its `KEYS`, and "drawn", the sigma of the last rolling draw."""
        if k >= len(self.groups) or self.groups[k][0] is not group:
            self.groups[k:] = [(group, {})]
        return self.groups[k][1]

    def new(self, value: Any) -> Tensor:
        with torch.inference_mode(False):
            return put(torch.empty((), dtype=torch.float64, device=self.device), value)

    def fits(self, value: Any) -> bool:
        """True if kernels can read a user's own tensor where it is."""
        return isinstance(value, Tensor) and value.device == self.device and value.is_floating_point()


def put(into: Tensor, value: Any) -> Tensor:
    """Write a number or a tensor of one element; for neither does the host wait."""
    if is_under_way():
        raise RuntimeError(
            "a CUDA graph is being captured, which would write a number that was assigned to a group (lr, sigma, seed, "
            "stream or round) at every replay; run a step between the assignment and the capture, or fill_ the tensor"
        )
    return into.copy_(value.detach().reshape(into.shape)) if isinstance(value, Tensor) else into.fill_(value)


def check(opt: FlatOptimizer) -> None:
    """Refuse what no graph could repeat."""
    name, params = type(opt).__name__, opt._parameters()
    for k, p in enumerate(params):
        if p.device != params[0].device:
            raise ValueError(
                f"{name}: capturable is True, but params[{k}] is on {p.device} and params[0] on {params[0].device}; "
                "a CUDA graph is captured on one device: make an optimizer for each, or pass capturable=False"
            )
    if params:
        backend, refusals = served_by("restore_", params[0].device.type, opt.backend)
        if backend != "triton":
            why = "".join(f" ({reason})" for reason in refusals)
            raise ValueError(
                f"{name}: capturable is True, but CUDA graphs need the triton backend, and {backend} serves "
                f"{params[0].device.type}{why}; move the parameters to a GPU before the optimizer is made, "
                "or pass capturable=False"
            )
    if opt.enhancement is not None and opt.enhancement.kappa_follows_lr:
        raise ValueError(
            f"{name}: capturable is True, but IRE has kappa_follows_lr=True, and kappa is a number of the host, which "
            "does not know the learning rate; pass one of them as False"
        )


def check_group(opt: FlatOptimizer, group: Group) -> None:
    """Refuse tensors whose values would be read on the host at every step."""
    name = type(opt).__name__
    for key, value in group.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        read_on_host = key == "betas" or (key in RANGES and key not in KEYS)
        if read_on_host and any(isinstance(v, Tensor) for v in values):
            raise ValueError(
                f"{name}: {key} is a tensor, but with capturable=True only {' and '.join(KEYS)} are read on the "
                "device; pass a number"
            )


def is_under_way() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse(opt: FlatOptimizer, call: str) -> None:
    """Refuse to be captured: a graph would repeat one learning rate and one noise for ever."""
    if not opt.capturable and is_under_way():
        raise RuntimeError(
            f"{call}: a CUDA graph is being captured, which would repeat this learning rate and this noise; "
            "use flatkern.SGD, Adam or AdamW with capturable=True"
        )


def adopt(opt: FlatOptimizer) -> None:
    """Bring to the device what was assigned to the groups since the last call.

    A number is copied into the tensor that it displaced, which schedulers and graphs know, and the tensor is put back.
    A tensor is used as it is, as long as it is there: distributed checkpointing puts one of zero in for a step.
    """
    params = opt._parameters() if opt.capturable else []
    if not params:
        return
    there = opt.cycle.on_device
    if there is None or there.device != params[0].device:
        there = opt.cycle.on_device = OnDevice(params[0].device)
    if isinstance(opt.method, RWP):
        _adopt_key(opt, there)
    seen: set[int] = set()
    for k, group in enumerate(opt.param_groups):
        ours = there.of(k, group)
        for key in KEYS:
            value = group.get(key)
            if value is None or value is ours.get(key):
                continue
            if key not in ours:
                # Groups share a default; each has to have its own.
                ours[key] = value if there.fits(value) and id(value) not in seen else there.new(value)
            elif isinstance(value, Tensor):
                continue
            else:
                put(ours[key], value)
            group[key] = ours[key]
        seen.update(map(id, ours.values()))
        drawn = group.get("drawn")
        if drawn is not None and drawn["sigma"] is not ours.get("drawn"):
            ours["drawn"] = put(ours["drawn"], drawn["sigma"]) if "drawn" in ours else there.new(drawn["sigma"])
            group["drawn"] = {**drawn, "sigma": ours["drawn"], "round": there.round}


def _adopt_key(opt: FlatOptimizer, there: OnDevice) -> None:
    seed, stream, round_ = common_key(opt)
    if there.key != (seed, stream):
        put(there.noise[0], seed)
        put(there.noise[1], stream)
        there.key = seed, stream
    if round_ is there.round:
        return
    put(there.round, round_)
    for group in opt.param_groups:
        drawn = group.get("drawn")
        # A round that was set by hand is not the one that was drawn.
        if drawn is not None and not isinstance(round_, Tensor) and not is_round(drawn["round"], round_):
            del group["drawn"]
        group["round"] = there.round


def common_key(opt: FlatOptimizer) -> tuple[Any, ...]:
    """(seed, stream, round) of all groups; the last may be a tensor."""
    keys = {(g["seed"], g["stream"], g["round"]) for g in opt.param_groups}
    if len(keys) != 1:
        raise ValueError(
            f"{type(opt).__name__}: groups differ in (seed, stream, round): {sorted(keys, key=str)}; an optimizer has "
            "one key, and the parameter index tells its parameters apart"
        )
    return keys.pop()


def is_round(a: Any, b: Any) -> bool:
    """True if two rounds are one; on a device there is one only."""
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


def noise_of(opt: FlatOptimizer, ahead: int) -> Tensor:
    """(seed, stream, round + ahead) of the coming draw: int64 (3,), on the host unless capturable."""
    there = opt.cycle.on_device
    if there is not None:
        return there.noise + there.one_round if ahead else there.noise
    seed, stream, round_ = common_key(opt)
    return torch.tensor([seed, stream, round_ + ahead], dtype=torch.int64)


def advance(opt: FlatOptimizer) -> None:
    """The next round; on the device it is one for all groups."""
    there = opt.cycle.on_device
    if there is not None:
        there.round.add_(1)
        return
    for group in opt.param_groups:
        group["round"] += 1


def numbers(opt: FlatOptimizer, bucket: Bucket, key: str, read: Any = None) -> tuple[list[float], Tensor | None]:
    """A group value as ops take it: (list of the host, vector on the device), of which the second counts.

    `read(group, key)` gives the value of a group.
    """
    if not opt.capturable:
        return bucket.values(key, (lambda g: float(read(g, key))) if read else None), None
    values = [read(g, key) if read else g[key] for g in bucket.groups]
    parts = [
        v.detach().reshape(()).to(bucket.device, torch.float64).expand(n)
        for v, n in zip(values, bucket.counts, strict=True)
    ]
    return bucket.constant(0.0), parts[0] if len(parts) == 1 else torch.cat(parts)


def note_drawn(opt: FlatOptimizer, sigmas: list[Any]) -> list[Any]:
    """What to keep of the sigmas, one a group, that were drawn with: a schedule may move the groups' own."""
    there = opt.cycle.on_device
    if there is None:
        return sigmas
    kept = []
    for k, (group, sigma) in enumerate(zip(opt.param_groups, sigmas, strict=True)):
        ours = there.of(k, group)
        if "drawn" not in ours:
            ours["drawn"] = there.new(sigma)
        kept.append(ours["drawn"])
    torch._foreach_copy_(kept, [sigma.detach().reshape(()) for sigma in sigmas])
    return kept


def host_value(opt: FlatOptimizer, group: Group, key: str) -> float | None:
    """A group value, or None where the host would have to wait for it."""
    there = opt.cycle.on_device
    return None if there is not None and there.fits(group[key]) else float(group[key])


def as_numbers(group: Group, like: Group, capturable: bool) -> Group:
    """A saved group with numbers for what was on a device, unless the optimizer itself was given a tensor."""
    result = dict(group)
    for key in ("lr", "initial_lr", "sigma", "round"):
        if isinstance(group.get(key), Tensor) and (capturable or not isinstance(like.get(key), Tensor)):
            result[key] = group[key].item()
    if group.get("drawn") is not None:
        result["drawn"] = {k: v.item() if isinstance(v, Tensor) else v for k, v in group["drawn"].items()}
    return result
