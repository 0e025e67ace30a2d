"""Learning rates, sigmas and the noise's key: numbers of the host, or tensors that a captured CUDA graph reads.

With capturable=True group["lr"] and group["sigma"] are 0-dim float64 tensors on the device, and group["round"] a 0-dim
int64 one that all groups share. What the host must not wait for is read here only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import served_by
from ..pages import page
from ..values import RANGES, check_uint32
from .buckets import Bucket
from .groups import Group, Groups

KEYS = ("lr", "sigma")  # group values that kernels read on the device; a graph keeps all others as they were
WORDS = ("seed", "stream", "round")
CAPTURED = ("triton", "cuda")  # backends whose calls a CUDA graph can capture
LAST_ROUND = 2**32 - 1
LAST_DRAW = "drawn"  # rolling: the group key of what the present noise was drawn with
NOT_DRAWN = -1  # its round, where there has been none
DRAWN = ("eta", "perturb", "scale")  # what that is, besides sigma and the round
# Where a group's sigma, eta and perturb are read: in what this returns, or, without it, in the group itself.
Read = Callable[[Group], Group] | None


def last_draw(group: Group) -> Group:
    """Rolling: the values that the noise of this round was drawn with, if it was; else the present ones.

    A schedule may have moved them since, and drawing the round again, after an evaluation or from a checkpoint, must
    give the same noise.
    """
    last = group.get(LAST_DRAW)
    if last is None or not _is_same_round(last["round"], group["round"]):
        return group
    return last if "scale" in last else {**last, "scale": "norm"}  # noted before there was a choice


def _is_same_round(a: Any, b: Any) -> bool:
    """On a device there is one round only."""
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


def is_capturing() -> bool:
    """True while this process captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class OnHost:
    """Numbers of the host.

    Arguments:
        draws: the method draws noise, so that groups have seed, stream and round.
    """

    def __init__(self, groups: Groups, draws: bool) -> None:
        self._groups = groups
        self._draws = draws

    def sync_groups(self, call: str) -> None:
        """Take over what was assigned to the groups since the last call."""
        if torch.cuda.is_initialized() and is_capturing():
            raise RuntimeError(
                f"{call}: a CUDA graph is being captured, which would repeat this learning rate and this noise; "
                f"use flatkern.SGD, Adam or AdamW with capturable=True; {page('gpu', 'graphs')}"
            )

    def on_device(self, bucket: Bucket, key: str, read: Read = None) -> Tensor | None:
        """A group value as a vector on the bucket's device; None where ops take numbers of the host."""
        return None

    def host_value(self, group: Group, key: str) -> float | None:
        """A group value; None where the host would have to wait for it."""
        return float(group[key])

    def noise(self, ahead: int) -> Tensor:
        """(seed, stream, round + ahead) of the coming draw: int64 (3,), on the host unless capturable.

        Raises:
            ValueError: a word is out of range, or the round would be after this draw.
        """
        words = list(self._common_key())
        # Compared as a whole first: three calls cost as much as the rest of the draw's bookkeeping.
        if not all([type(word) is int and 0 <= word < LAST_ROUND for word in words]):
            where = self._groups.setup.name
            words = [check_uint32(where, key, word) for key, word in zip(WORDS, words, strict=True)]
            check_uint32(where, "round", words[2] + 1)
        words[2] += ahead
        return torch.tensor(words, dtype=torch.int64, device="cpu")  # whatever torch's default is

    def _common_key(self) -> tuple[Any, ...]:
        """(seed, stream, round) of all groups; the last may be a tensor."""
        groups = self._groups.owner().own_groups  # type: ignore[union-attr]
        keys = {(g["seed"], g["stream"], g["round"]) for g in groups}
        if len(keys) != 1:
            for key in WORDS:
                for value in (g[key] for g in groups if not isinstance(g[key], Tensor)):
                    check_uint32(self._groups.setup.name, key, value)
            raise ValueError(
                f"{self._groups.setup.name}: groups differ in (seed, stream, round): {sorted(keys, key=str)}; an "
                "optimizer has one key, and the parameter index tells its parameters apart"
            )
        return keys.pop()

    def drawn_with(self, bucket: Bucket, rolling: bool) -> tuple[Tensor | None, Tensor]:
        """Numbers of the host are what a call has kept."""
        raise NotImplementedError

    def next_round(self) -> None:
        owner = self._groups.owner()
        rounds = [group["round"] + 1 for group in owner.own_groups]  # type: ignore[union-attr]
        # In one call of C code, so that no signal handler finds groups in different rounds.
        deque(map(dict.__setitem__, owner.param_groups, owner.keys_of("round"), rounds), maxlen=0)  # type: ignore[union-attr]

    def note_draw(self, read: Read = None) -> None:
        """Rolling: keep what the noise was drawn with, because a schedule may move the groups' own values."""
        for group in self._groups.owner().own_groups:  # type: ignore[union-attr]
            used = group if read is None else read(group)
            group[LAST_DRAW] = {**{key: used[key] for key in ("sigma", *DRAWN)}, "round": group["round"]}


class OnDevice(OnHost):
    """The same in memory that captured graphs know by address. It is made when there are parameters."""

    def __init__(self, groups: Groups, draws: bool) -> None:
        super().__init__(groups, draws)
        self.device: torch.device | None = None

    def _allocate(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):  # they are written in every mode
            self.words = torch.zeros(3, dtype=torch.int64, device=device)  # seed, stream, round
            self.round = self.words[2]
            self._one_round = torch.zeros_like(self.words)
            self._one_round[2].fill_(1)
        self._key: tuple[int, int] | None = None  # seed and stream, as they are in `words`
        self._of_groups: list[tuple[Group, dict[str, Tensor]]] = []

    def _tensors(self, k: int, group: Group) -> dict[str, Tensor]:
        """Our tensors of one group: its `KEYS`, and "drawn", the sigma of the last draw."""
        if k >= len(self._of_groups) or self._of_groups[k][0] is not group:
            self._of_groups[k:] = [(group, {})]
        return self._of_groups[k][1]

    def _new(self, value: Any) -> Tensor:
        with torch.inference_mode(False):
            return write_scalar(torch.empty((), dtype=torch.float64, device=self.device), value)

    def _fits(self, value: Any) -> bool:
        """True if kernels can read a user's own tensor where it is."""
        return isinstance(value, Tensor) and value.device == self.device and value.is_floating_point()

    def sync_groups(self, call: str) -> None:
        """Bring to the device what was assigned to the groups since the last call.

        A number is copied into the tensor that it displaced, which schedulers and graphs know, and the tensor is put
        back. A tensor is used as it is, as long as it is there: distributed checkpointing puts one of zero in for a
        step.
        """
        params = self._groups.params()
        if not params:
            return
        if self.device != params[0].device:
            self._allocate(params[0].device)
        if self._draws:
            self._sync_key()
        seen: set[int] = set()
        for k, group in enumerate(self._groups):
            own = self._tensors(k, group)
            for key in KEYS if self._draws else KEYS[:1]:
                self._sync_value(group, key, own, seen)
            seen.update(map(id, own.values()))
            last = group.get(LAST_DRAW) if self._draws else None
            if last is not None and last["sigma"] is not own.get("drawn"):
                own["drawn"] = write_scalar(own["drawn"], last["sigma"]) if "drawn" in own else self._new(last["sigma"])
                group[LAST_DRAW] = {**last, "sigma": own["drawn"], "round": self.round}

    def _sync_value(self, group: Group, key: str, own: dict[str, Tensor], seen: set[int]) -> None:
        value = group.get(key)
        if value is None or value is own.get(key):
            return
        if key not in own:
            # Groups share a default; each has to have its own.
            own[key] = value if self._fits(value) and id(value) not in seen else self._new(value)
        elif isinstance(value, Tensor):
            return
        else:
            write_scalar(own[key], value)
        group[key] = own[key]

    def _sync_key(self) -> None:
        seed, stream, round_ = self._common_key()
        if self._key != (seed, stream):
            write_scalar(self.words[0], seed)
            write_scalar(self.words[1], stream)
            self._key = seed, stream
        if round_ is self.round:
            return
        write_scalar(self.round, round_)
        for group in self._groups:
            last = group.get(LAST_DRAW)
            # A round that was set by hand is not the one that was drawn.
            if last is not None and not isinstance(round_, Tensor) and not _is_same_round(last["round"], round_):
                del group[LAST_DRAW]
            group["round"] = self.round

    def on_device(self, bucket: Bucket, key: str, read: Read = None) -> Tensor | None:
        values = [(group if read is None else read(group))[key] for group in bucket.groups]
        parts = [
            v.detach().reshape(()).to(bucket.device, torch.float64).expand(n)
            for v, n in zip(values, bucket.counts, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def host_value(self, group: Group, key: str) -> float | None:
        return None if self._fits(group[key]) else float(group[key])

    def noise(self, ahead: int) -> Tensor:
        return self.words + self._one_round if ahead else self.words

    def drawn_with(self, bucket: Bucket, rolling: bool) -> tuple[Tensor | None, Tensor]:
        """The sigmas and the key of the noise that is in the weights, after replays too."""
        if rolling:
            return self.on_device(bucket, "sigma", last_draw), self.words
        return self.on_device(bucket, "sigma"), self.words - self._one_round  # perturb() ends with the next round's key

    def next_round(self) -> None:
        """One for all groups."""
        self.round.add_(1)

    def note_draw(self, read: Read = None) -> None:
        used = [group if read is None else read(group) for group in self._groups]
        kept = []
        for k, (group, values) in enumerate(zip(self._groups, used, strict=True)):
            own = self._tensors(k, group)
            if "drawn" not in own:
                own["drawn"] = self._new(values["sigma"])
            kept.append(own["drawn"])
        torch._foreach_copy_(kept, [values["sigma"].detach().reshape(()) for values in used])
        for group, values, sigma in zip(self._groups, used, kept, strict=True):
            rest = {key: values[key] for key in DRAWN}
            group[LAST_DRAW] = {"sigma": sigma, **rest, "round": group["round"]}


def scalars_of(groups: Groups, draws: bool) -> OnHost:
    return (OnDevice if groups.setup.capturable else OnHost)(groups, draws)


def write_scalar(into: Tensor, value: Any) -> Tensor:
    """Write a number or a tensor of one element; for neither does the host wait."""
    if is_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, which would write a number that was assigned to a group (lr, sigma, seed, "
            "stream or round) at every replay; run a step between the assignment and the capture, or fill_ the tensor; "
            f"{page('gpu', 'graphs')}"
        )
    return into.copy_(value.detach().reshape(into.shape)) if isinstance(value, Tensor) else into.fill_(value)


def as_numbers(saved: Group, like: Group, groups: Groups) -> Group:
    """A saved group with numbers for what was on a device, unless the optimizer itself was given a tensor."""
    result = dict(saved)
    own, capturable = groups.own(result), groups.setup.capturable
    for key in ("lr", "initial_lr", "sigma", "round"):
        if isinstance(own.get(key), Tensor) and (capturable or not isinstance(like.get(key), Tensor)):
            own[key] = own[key].item()
    last = own.get(LAST_DRAW)
    if last is not None:
        own[LAST_DRAW] = {k: v.item() if isinstance(v, Tensor) else v for k, v in last.items()}
    return result


def check_can_be_captured(groups: Groups) -> None:
    """Refuse what no graph could repeat."""
    setup, params = groups.setup, groups.params()
    for k, p in enumerate(params):
        if p.device != params[0].device:
            raise ValueError(
                f"{setup.name}: capturable is True, but params[{k}] is on {p.device} and params[0] on "
                f"{params[0].device}; a CUDA graph is captured on one device: make an optimizer for each, or pass "
                "capturable=False"
            )
    if params:
        backend, refusals = served_by("restore_", params[0].device.type, setup.backend)
        if backend not in CAPTURED:
            why = "".join(f" ({reason})" for reason in refusals)
            if params[0].device.type == "cuda":
                remedy = "name no other backend, install Triton where both are missing"
            else:
                remedy = "move the parameters to a GPU before the optimizer is made"
            raise ValueError(
                f"{setup.name}: capturable is True, but CUDA graphs need the {' or the '.join(CAPTURED)} backend, and "
                f"{backend} serves {params[0].device.type}{why}; {remedy}, or pass capturable=False"
            )
    if setup.enhancement is not None and setup.enhancement.kappa_follows_lr:
        raise ValueError(
            f"{setup.name}: capturable is True, but IRE has kappa_follows_lr=True, and kappa is a number of the host, "
            "which does not know the learning rate; pass one of them as False"
        )


def check_group_can_be_captured(group: Group, optimizer: str) -> None:
    """Refuse tensors whose values would be read on the host at every step."""
    for key, value in group.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        read_on_host = key == "betas" or (key in RANGES and key not in KEYS)
        if read_on_host and any(isinstance(v, Tensor) for v in values):
            raise ValueError(
                f"{optimizer}: {key} is a tensor, but with capturable=True only {' and '.join(KEYS)} are read on the "
                "device; pass a number"
            )
