"""opt.state: entries are created when a call first needs them, laid out and sharded as their parameter is.

Our own keys beside a base rule's are "master", "history", "mask", "ascent_mean" and "orthogonal".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..dispatch import state_gatherer
from ..tables import history_length, mask_shape
from .buckets import Bucket
from .external_writes import take_over
from .groups import Groups
from .layouts import like

NONE_CREATED: frozenset[int] = frozenset()
LIKE_PARAMS = ("ascent_mean", "orthogonal")  # what methods keep in the parameters' shape
OWN_KEYS = ("history", "mask", *LIKE_PARAMS)  # that any base can have; masters are of our own rules


class State:
    """The state of one optimizer.

    Arguments:
        deferred: the state belongs to a base that creates its own at its first step, many of them where the entry of a
            parameter is empty: ours waits in `self.deferred` until then.
    """

    def __init__(self, groups: Groups, deferred: bool) -> None:
        self._groups = groups
        self._defers = deferred
        self.deferred: dict[Tensor, dict[str, Any]] = {}
        self._gather = state_gatherer()
        self.created: list[tuple[dict[str, Any], Tensor, str]] = []  # by the present call
        self._master_versions: dict[Tensor, int] = {}  # of parameters, when their master was last right

    # --- get or create ---------------------------------------------------------------------------

    def get(self, bucket: Bucket, keys: tuple[str, ...]) -> tuple[list[list[Tensor]], Collection[int]]:
        """A rule's state: a list of tensors for each of `keys`, and the positions where it is new, and so zero."""
        state = self._groups.owner().state  # type: ignore[union-attr]
        found = self._gather(state, bucket.params, keys)
        if found is not None:
            return found, NONE_CREATED
        created = set()
        for k, p in enumerate(bucket.params):
            entry = state[p]
            for key in keys:
                if entry.get(key) is None:
                    created.add(k)
                    self._create(p, entry, key, self._zeros(p, key))
        return [[state[p][key] for p in bucket.params] for key in keys], created

    def _zeros(self, p: Tensor, key: str) -> Tensor:
        if key == "step":
            # Beside the parameter, so that on a GPU a skipped step is known where it counts.
            return torch.zeros((), dtype=torch.float32, device=p.device)
        dtype = torch.float32 if self._groups.setup.has_master(p) else p.dtype
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def histories(self, params: list[Tensor]) -> list[Tensor]:
        """ARWP's history: float32 (filters,), or per element for tensors of rank <= 1."""
        return self._own(params, "history", history_length, torch.float32)

    def masks(self, params: list[Tensor]) -> list[Tensor]:
        """IRE's masks; zero where a parameter has none yet."""
        return self._own(params, "mask", mask_shape, torch.uint8)

    def _own(
        self, params: list[Tensor], key: str, shape: Callable[[Tensor], int | tuple[int, ...]], dtype: torch.dtype
    ) -> list[Tensor]:
        found = self._gather(self._groups.owner().state, params, (key,))  # type: ignore[union-attr]
        if found is not None:
            return found[0]
        result = []
        for p in params:
            entry = self.entry(p)
            if key not in entry:
                with torch.inference_mode(False):
                    part = torch.zeros(shape(dtensor.local(p)), dtype=dtype, device=p.device)
                    self._create(p, entry, key, dtensor.wrap_like(p, part, shape(p)))
            result.append(entry[key])
        return result

    def like_params(self, params: list[Tensor], key: str) -> tuple[list[Tensor], Collection[int]]:
        """What a method keeps in the parameters' shape, and the positions where it is new, and so zero."""
        found = self._gather(self._groups.owner().state, params, (key,))  # type: ignore[union-attr]
        if found is not None:
            return found[0], NONE_CREATED
        created = set()
        for k, p in enumerate(params):
            entry = self.entry(p)
            if key not in entry:
                created.add(k)
                with torch.inference_mode(False):
                    self._create(p, entry, key, self._zeros(p, key))
        return [self.entry(p)[key] for p in params], created

    def replace(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        """Put another tensor in the place of our own state; returns that which was there."""
        entry = self.entry(p)
        known, entry[key] = entry[key], value
        return known  # type: ignore[no-any-return]

    def drop(self, p: Tensor, key: str) -> None:
        """Our own state `key` of `p` goes, and its entry if nothing else is there."""
        for store in (self._groups.state(), self.deferred):
            entry = store.get(p, {})
            if entry.pop(key, None) is not None and not entry:
                del store[p]

    def entry(self, p: Tensor) -> dict[str, Any]:
        """Where our own state of `p` is kept."""
        state = self._groups.state()
        if self._defers and not (state.get(p)):
            return self.deferred.setdefault(p, {})
        return state[p]  # type: ignore[no-any-return]

    def existing(self, key: str, params: Iterable[Tensor]) -> Iterator[Tensor]:
        """Our own state `key` of those of `params` that have it."""
        state = self._groups.state()
        for p in params:
            for entry in (state.get(p, {}), self.deferred.get(p, {})):
                if key in entry:
                    yield entry[key]

    def settle_deferred(self) -> None:
        """What waited joins the state that the base has created by now."""
        state = self._groups.state()
        for p in [p for p in self.deferred if state.get(p)]:
            state[p].update(self.deferred.pop(p))

    # --- float32 masters -------------------------------------------------------------------------

    def masters(self, params: list[Tensor], held: Container[int], clean: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The float32 weights behind `params`; where somebody else has written an element, it is the parameter's.

        Arguments:
            held: ids of parameters that hold a perturbation, and so differ from their master by right.
            clean: gives the clean value of one of those, which may have lost its state.
        """
        state, versions = self._groups.state(), self._master_versions
        result = []
        for p in params:
            entry = state[p]
            master = entry.get("master")
            if master is None:
                source = clean(p) if id(p) in held else p.detach()
                with torch.inference_mode(False):
                    part = dtensor.local(source).to(torch.float32, copy=True, memory_format=torch.preserve_format)
                    master = dtensor.wrap_like(p, part, p.shape)
                self._create(p, entry, "master", master)
            elif versions.get(p) != dtensor.version(p) and id(p) not in held:
                take_over(dtensor.local(master), dtensor.local(p))
            result.append(master)
        return result

    def note_masters(self, params: list[Tensor], versions: list[int]) -> None:
        """A master is right as long as its parameter is what we wrote, so as long as it has this version."""
        self._master_versions.update(zip(params, versions, strict=True))

    def forget_masters(self) -> None:
        """Compare every master with its parameter at the next call."""
        self._master_versions.clear()

    # --- the present call ------------------------------------------------------------------------

    def _create(self, p: Tensor, entry: dict[str, Any], key: str, value: Tensor) -> None:
        entry[key] = value
        self.created.append((entry, p, key))

    def keep_created(self) -> None:
        """From here on the state that the present call has created is in use."""
        self.created.clear()

    def undo_created(self) -> None:
        """The present call is refused: what it has created goes again."""
        state = self._groups.state()
        for entry, p, key in self.created:
            entry.pop(key, None)
            for store in (state, self.deferred):
                if store.get(p) is entry and not entry:
                    del store[p]
        self.created.clear()

    def lay_out(self, params: list[Tensor]) -> None:
        """Give what is walked together with `params` their memory format."""
        state = self._groups.state()
        for p in params:
            for entry in (state.get(p, {}), self.deferred.get(p, {})):
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        entry[key] = like(value, p)
