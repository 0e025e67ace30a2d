"""follow(model): rolling noise on in training forwards, clean weights in eval forwards, checkpoints and copies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from .cycle import Cycle
from .errors import refuse_sharded_later
from .followers import Followed
from .phase import PERTURBED, SUSPENDED
from .tracing import is_observed, unobserved, untraced

GUARDS = "_flatkern_guards"


class Switch(Protocol):
    """What is switched: a rolling optimizer."""

    cycle: Cycle

    def train(self, mode: bool = True) -> None: ...

    def eval(self) -> None: ...


def end_noise(opt: Switch) -> None:
    """`eval()` that does not count as switching: a checkpoint says nothing about evaluations."""
    if opt.cycle.phase is PERTURBED:
        followers = opt.cycle.followers
        switched = followers.switched
        opt.eval()
        followers.switched = switched


class _Hook:
    """What a followed model holds. It holds the optimizer weakly, so that it does not keep a replaced one alive.

    A copied or pickled model is clean and followed by no optimizer: in place of this it has a callable of Python's own
    that does nothing, so that a model which was saved whole can be loaded where flatkern is not installed.
    """

    __slots__ = ("switch",)

    def __init__(self, switch: Callable[[], Switch | None]) -> None:
        self.switch = switch

    def end_noise(self) -> None:
        opt = self.switch()
        if opt is not None:
            end_noise(opt)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        self.end_noise()
        return getattr, (nullcontext(), "__exit__")


class _Forward(_Hook):
    """Before a forward: the noise is on where the model trains."""

    __slots__ = ("number",)

    number: int  # torch's, of this hook

    @untraced
    def __call__(self, model: torch.nn.Module, *args: Any) -> None:
        opt = self.switch()
        if opt is not None and opt.cycle.phase is not SUSPENDED:
            if self._is_behind_fsdp(model):
                refuse_sharded_later()
            if model.training:
                opt.cycle.followers.trained = True
            else:
                opt.cycle.followers.evaluated = True
            before = opt.cycle.phase
            if is_observed():
                with unobserved():
                    opt.train(model.training)
            else:
                opt.train(model.training)
            if opt.cycle.phase is not before:
                _forget_gathered(model)

    def _is_behind_fsdp(self, model: torch.nn.Module) -> bool:
        """FSDP2's hook, which gathers the weights, runs before this one: the switch would come too late."""
        for number, hook in model._forward_pre_hooks.items():
            if number == self.number:
                return False
            if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp"):
                return True
        return False


class _Inner(_Forward):
    """Before the forward of a module inside of what is followed, which holds all the parameters and runs alone, too: in
    `generate()` of a model that has adapters, or where a LightningModule calls its network.

    Inside of the whole forward the mode is that one's. So this switches on only where gradients are taken, and off only
    where none are.
    """

    __slots__ = ()

    def __call__(self, model: torch.nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():  # inside of a compiled forward, which is switched as a whole
            return
        if model.training == torch.is_grad_enabled() and not self._is_behind_fsdp(model):
            super().__call__(model, *args)


def _forget_gathered(model: torch.nn.Module) -> None:
    """After a forward without a backward FSDP2's root module keeps its whole weights, as they were then."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in () if kind is None else model.modules():
        if isinstance(module, kind):
            module.reshard()


class _Guard(_Hook):
    """Before weights are read or written as a whole: a state_dict hook, a load_state_dict hook, and what is copied or
    pickled before a module's parameters are, since it is the first entry of its `__dict__`."""

    __slots__ = ()

    def __call__(self, *args: Any) -> None:
        self.end_noise()

    def watch(self, module: torch.nn.Module) -> None:
        """Become the first that is copied of a module."""
        held = vars(module)
        others = [g for g in held.get(GUARDS, ()) if isinstance(g, _Guard) and g.switch() is not None]
        rest = {key: value for key, value in held.items() if key != GUARDS}
        # At once, so that an interrupt finds either; a module's own __setattr__ may do something else.
        object.__setattr__(module, "__dict__", {GUARDS: [*others, self], **rest})

    def leave(self, module: torch.nn.Module) -> None:
        guards = vars(module).get(GUARDS, [])
        if self in guards:
            guards.remove(self)
        if not guards:
            vars(module).pop(GUARDS, None)


class Handles:
    """Removes what `follow` has put into a model."""

    def __init__(self, guard: _Guard, followed: Followed, handles: list[Any]) -> None:
        self._guard = guard
        self._followed = followed
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        model, opt = self._followed.model(), self._guard.switch()
        for module in () if model is None else model.modules():
            self._guard.leave(module)
        if opt is not None:
            opt.cycle.followers.drop(self._followed)


def follow(cycle: Cycle, model: torch.nn.Module) -> Handles:
    """Register the hooks: one for the model's forward and those of modules that hold all its parameters, and for every
    module in it those that keep checkpoints clean.

    Parts are saved, loaded and copied on their own too: a backbone, the module inside of a wrapper.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"follow: model is {type(model).__name__}, but should be a torch.nn.Module")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module  # whose forward also runs alone, in an evaluation
    followed = cycle.followers.find(model)
    switch: Callable[[], Any] = cycle.groups.owner  # the optimizer itself, not a proxy of it
    guard = _Guard(switch)
    handles: list[Any] = []
    for module in _holders(model, cycle.groups.params()):
        forward = _Forward(switch) if module is model else _Inner(switch)
        # Before FSDP2's own, which gathers the weights.
        handles.append(module.register_forward_pre_hook(forward, prepend=True))
        forward.number = handles[-1].id
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # has no hooks; those of what it is a part of serve it
            handles.append(module.register_state_dict_pre_hook(guard))
            handles.append(module._register_load_state_dict_pre_hook(guard))
            guard.watch(module)
    cycle.weights.drop_writes(_written_by_forwards(model, cycle.groups.params()))
    cycle.followers.add(followed, cycle.steps)
    return Handles(guard, followed, handles)


def _holders(model: torch.nn.Module, params: list[torch.Tensor]) -> list[torch.nn.Module]:
    """The model, and as long as one module inside of the last one holds all that it has of `params`, that one."""
    ours = set(map(id, params))

    def held(module: torch.nn.Module) -> set[int]:
        return ours.intersection(map(id, module.parameters()))

    found, all_of_them = [model], held(model)
    while "_orig_mod" not in found[-1]._modules:  # torch.compile's: the inside is compiled
        inner = [m for m in found[-1].children() if held(m) == all_of_them]
        if len(inner) != 1 or isinstance(inner[0], torch.jit.ScriptModule):
            break
        found += inner
    return found


def _written_by_forwards(model: torch.nn.Module, params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of `params` that a forward renormalizes in place."""
    ours = set(map(id, params))
    tables = [m for m in model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))]
    weights = [m._parameters.get("weight") for m in tables if m.max_norm is not None]
    return [w for w in weights if w is not None and id(w) in ours]
