"""mix="ranks": m-RWP and m-ARWP in parallel, some ranks of a group clean and some noisy, with one gradient each.

What a rank is, and what noisy ranks see of their own gradients before DDP takes the mean. Everything else is RWP's.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import dtensor
from ..dispatch import resolve
from ..methods import RWP
from ..pages import page
from ..tables import history_length
from .amp import Amp
from .cycle import Cycle
from .errors import warn
from .gradients import Final, Grads
from .groups import Group
from .hooks import WeakHook, remove_all
from .layouts import like
from .mrwp import common_lam
from .phase import PERTURBED
from .rwp import RandomPerturbation

USE_GRADIENTS = 'mix="gradients", which mixes both gradients on every rank'


@dataclass(frozen=True)
class Role:
    """What this rank is in its group: odd ranks are noisy, even ones clean."""

    group: Any  # the process group, None for the world
    ranks: tuple[int, ...]  # its members, by their global ranks
    index: int  # of this rank in it
    of_mesh: bool  # given by sharded parameters

    @property
    def is_noisy(self) -> bool:
        return self.index % 2 == 1

    @property
    def noisy(self) -> int:
        """How many ranks are noisy; the others are clean."""
        return len(self.ranks) // 2

    def loss_weight(self, lam: float) -> float:
        """With it the mean over the group is lam of the noisy ranks' mean and 1 - lam of the clean ones'."""
        count = len(self.ranks)
        return count * lam / self.noisy if self.is_noisy else count * (1.0 - lam) / (count - self.noisy)


def role_of(where: str, given: Any, params: list[Tensor]) -> Role:
    """What this rank is, in the group that is given, in that along which sharded `params` are replicated, or in the
    world.

    Raises:
        RuntimeError, ValueError, TypeError: there is no such group, or this rank is alone in it, or not in it.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f'{where}: mix="ranks" divides the ranks of a training into clean and noisy ones, but torch.distributed is '
            "not initialized; call torch.distributed.init_process_group() first, in processes that torchrun starts, or "
            f"use {USE_GRADIENTS}; {page('ranks', 'mix-ranks')}"
        )
    outside = f'{where}: this rank is not in the group of mix="ranks"; give every rank a group that it is a member of'
    if given is not None and not isinstance(given, distributed.ProcessGroup):
        if given == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(outside)
        raise TypeError(
            f'{where}: the group of mix="ranks" is {given!r}, but should be a torch.distributed.ProcessGroup (of a '
            "DeviceMesh: mesh.get_group(dim)), or None for all ranks"
        )
    sharded = next((p for p in params if dtensor.is_sharded(p)), None)
    group = given if sharded is None else _replicate_group(where, sharded)
    ranks = tuple(distributed.get_process_group_ranks(group))
    if sharded is not None and given is not None:
        listed = tuple(distributed.get_process_group_ranks(given))
        if sorted(listed) != sorted(ranks):
            raise ValueError(
                f"{where}: group has the ranks {listed}, but the parameters are replicated over the ranks {ranks} of "
                "their mesh, which must share the work; pass group=None"
            )
    me = distributed.get_rank()
    if me not in ranks:
        raise ValueError(outside)
    if len(ranks) < 2:
        raise ValueError(
            f'{where}: mix="ranks" needs at least two ranks, a clean and a noisy one, but the group has one; start '
            f"more (torchrun --nproc-per-node 2), or use {USE_GRADIENTS}"
        )
    return Role(group, ranks, ranks.index(me), sharded is not None)


def _replicate_group(where: str, p: Tensor) -> Any:
    """The process group over which a DTensor is replicated."""
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    along = [d for d, placement in enumerate(placements) if placement.is_replicate()]
    if len(along) == 1:
        return mesh.get_group(along[0])
    if along:
        raise ValueError(
            f'{where}: mix="ranks" takes parameters that are replicated along one dimension of their mesh, but these '
            f"are placed {tuple(placements)}; use {USE_GRADIENTS}"
        )
    raise ValueError(
        f'{where}: with mix="ranks" some ranks are clean, but these parameters are divided among all ranks of their '
        f"mesh, so the noise of a part is in every rank's forward; use {USE_GRADIENTS}, or shard on a two-dimensional "
        f"mesh (replicate, shard); {page('ranks', 'mix-ranks')}"
    )


class OwnGradients:
    """What the history takes of this rank's own gradients: seen after a backward accumulates, before DDP's all-reduce.

    Parameters keep the hooks, which hold this object weakly; it removes them when it goes.
    """

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self._hooks: dict[Tensor, Any] = {}  # with the handle that removes it
        self._watched: frozenset[Tensor] = frozenset()  # whose gradients the present round needs
        self._last: dict[Tensor, tuple[Any, int] | None] = {}  # the gradient that was seen: weak reference, version
        self._warned = False
        weakref.finalize(self, remove_all, self._hooks).atexit = False

    def watch(self, params: list[Tensor]) -> None:
        """Begin a round whose noise is in the weights."""
        ledger = self._cycle.gradients
        if not ledger.rounds:
            ledger.own = {}
            self._last.clear()
        self._watched = frozenset(params)
        for p in self._watched - self._hooks.keys():
            self._hooks[p] = p.register_post_accumulate_grad_hook(WeakHook(self.see))

    @torch.no_grad()
    def see(self, p: Tensor) -> None:
        """A backward has added to `p.grad`. Of several in a step the last one sees the sum."""
        cycle, grad = self._cycle, p.grad
        if cycle.phase is not PERTURBED or p not in self._watched or grad is None or grad.layout is not torch.strided:
            return
        own = cycle.gradients.own
        if p in own:
            self._check_own(p, grad)
        g = like(grad.detach().resolve_neg(), p)
        if p.dim() >= 2:
            own[p] = g.new_empty(history_length(g), dtype=torch.float32)
            resolve("filter_norms_", g.device.type, cycle.groups.setup.backend)([own[p]], [g])
        else:
            own[p] = g.to(torch.float32, copy=True).flatten()
        # Views of a bucket count the writes to all of its parameters, so that their versions tell nothing.
        self._last[p] = None if grad._is_view() else (weakref.ref(grad), grad._version)

    def _check_own(self, p: Tensor, grad: Tensor) -> None:
        """Autograd adds in place, once. Other writes since the last backward are DDP's, or somebody's."""
        known = self._last[p]
        if self._warned or known is None or grad.requires_grad:
            return
        if known[0]() is not grad or grad._version != known[1] + 1:
            self._warned = True
            warn(
                'm-ARWP with mix="ranks": gradients were written between two backward passes of a step, as DDP does '
                "when it takes their mean, so that the history sees other ranks' gradients too; run every backward of "
                f"a step but the last in model.no_sync(); {page('ranks', 'mix-ranks')}"
            )


def nobody(group: Group) -> Group:
    """A group's values where no parameter is perturbed."""
    return {**group, "perturb": False}


class ParallelPerturbation(RandomPerturbation):
    """mix="ranks": every rank has one gradient, at the clean or at the perturbed weights, and DDP's mean mixes them."""

    pattern = "opt.perturb(); (opt.loss_weight * loss).backward(); opt.step()"

    def __init__(self, method: RWP, where: str) -> None:
        super().__init__(method)
        self._where = where
        self._given = method.group
        self._role: Role | None = None
        self._weight: float | None = None  # the loss weight that was read last
        self._warned = False
        self._own: OwnGradients | None = None

    # --- the rank --------------------------------------------------------------------------------

    def check_group(self, group: Group, optimizer: str, capturable: bool) -> None:
        super().check_group(group, optimizer, capturable)
        self._settle(group, optimizer)
        if self.keeps_history(group) and any(map(dtensor.is_sharded, group["params"])):
            raise ValueError(
                f'{optimizer}: mix="ranks" with eta > 0 needs the gradient of each rank, but FSDP2 shows sharded '
                f"parameters only the mean over all ranks; pass eta=0, or use {USE_GRADIENTS}; "
                f"{page('ranks', 'mix-ranks')}"
            )

    def _settle(self, group: Group, optimizer: str) -> Role:
        """Find out what this rank is, from the first group, or from the first that is sharded."""
        role = self._role
        if role is None or any(map(dtensor.is_sharded, group["params"])):
            found = role_of(optimizer, self._given, group["params"])
            if role is not None and role.of_mesh and found.ranks != role.ranks:
                raise ValueError(
                    f"{optimizer}: parameters are replicated over the ranks {role.ranks} and over {found.ranks}, but "
                    'mix="ranks" divides one group; make an optimizer for each'
                )
            self._role = role = found
            self.is_clean_rank = not role.is_noisy
            self.read = nobody if self.is_clean_rank else None
        return role

    def loss_weight(self, groups: list[Group], perturbed: bool) -> float:
        role = self._role
        for group in groups if role is None else ():  # in a copy, which has not been used
            role = self._settle(group, self._where)
        assert role is not None
        self._weight = role.loss_weight(common_lam(groups))
        return self._weight

    # --- the cycle -------------------------------------------------------------------------------

    def move(self, cycle: Cycle, params: list[Tensor], new: bool, scaler: Any) -> None:
        """Clean ranks count a round, too, and their weights stay."""
        watched = [] if self.is_clean_rank else self._with_history(cycle)
        if watched or self._own is not None:
            self._own = self._own or OwnGradients(cycle)
            self._own.watch(watched)
        super().move(cycle, params, new, scaler)

    def saw_gradient(self, p: Tensor) -> None:
        if self._own is not None:
            self._own.see(p)

    def final(self, cycle: Cycle, params: list[Tensor], grads: Grads, amp: Amp) -> Final | None:
        final = super().final(cycle, params, grads, amp)
        if final is None or not final.at_perturbed_weights:
            return final
        if self._weight is None and not self._warned:
            self._warned = True
            warn(
                f'{self._where}: mix="ranks", but opt.loss_weight was not read before the first step, so the losses '
                f"were not multiplied by it, and the mix is not lam's; the pattern is: {self.pattern}"
            )
        watched = self._with_history(cycle)
        return final if not watched else replace(final, squares=self._squares(cycle, watched, final.rounds, amp))

    def _with_history(self, cycle: Cycle) -> list[Tensor]:
        return [p for g in filter(self.keeps_history, cycle.groups) for p in g["params"] if p.requires_grad]

    def _squares(self, cycle: Cycle, params: list[Tensor], rounds: float, amp: Amp) -> dict[Tensor, Tensor]:
        """The mean over the noisy ranks of the squares of their own gradients, with every factor of the loss off.

        All of `params`, with a gradient here or not, so that the ranks send equally much: 4 bytes a filter or element
        of a vector.
        """
        role, own = self._role, cycle.gradients.own
        assert role is not None
        if amp.found_inf is not None and amp.grad_scale is None and cycle.unscaled.scaler is None:
            raise RuntimeError(
                'step: m-ARWP with mix="ranks" whose gradients scaler.unscale_() has unscaled needs '
                "perturb(scaler=scaler), for the scale of this rank's own gradient; or clip with max_grad_norm"
            )
        weight = self._weight if self._weight is not None else role.loss_weight(common_lam(cycle.groups.listed()))
        scale = amp.grad_scale if amp.grad_scale is not None else cycle.unscaled.loss_scale()
        squares: dict[Tensor, Tensor] = {}
        for device in dict.fromkeys(p.device for p in params):
            here = [p for p in params if p.device == device]
            lengths = [history_length(p) for p in here]
            total = torch.zeros(sum(lengths), dtype=torch.float32, device=device)
            if role.is_noisy and weight:
                for p, part in zip(here, total.split(lengths), strict=True):
                    if p in own:
                        part.copy_(own[p])
                factor = weight * rounds * (scale.to(device) if isinstance(scale, Tensor) else scale)
                total.div_(factor).square_()
            dtensor.all_reduce_sum(total, (role.group,)).div_(role.noisy)
            squares.update(zip(here, total.split(lengths), strict=True))
        return squares
