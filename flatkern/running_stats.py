"""frozen_running_stats: the second forward of a two-pass method leaves what a model measures alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SWITCHES = ("fake_quant_enabled", "observer_enabled")  # of fake quantization, which users set


@contextmanager
def frozen_running_stats(model: torch.nn.Module) -> Iterator[None]:
    """Train-mode forwards inside compute what they would, but what they measure is forgotten afterwards.

        opt.perturb()
        with flatkern.frozen_running_stats(model):
            loss(model(x), y).backward()
        opt.step()

    Covers BatchNorm, SyncBatchNorm (`momentum=None` and `num_batches_tracked` too), InstanceNorm and custom modules
    with buffers of those names; the vectors of spectral norm (`torch.nn.utils.spectral_norm` and
    `torch.nn.utils.parametrizations.spectral_norm`), whose power iteration goes on in copies; and the observers of fake
    quantization in `torch.ao.quantization`, whose ranges, scales and zero points follow the forwards in copies. Exact:
    all of them are bit-identical afterwards.
    """
    toggled: list[torch.nn.modules.batchnorm._BatchNorm] = []
    replaced: list[tuple[torch.nn.Module, str, Tensor]] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                # In train mode torch passes the running statistics on only where this flag is set.
                if module.track_running_stats and module.training:
                    toggled.append(module)
                    module.track_running_stats = False
                continue
            for name in _measured(module):
                value = module._buffers.get(name)
                if value is not None:
                    replaced.append((module, name, value))
                    # A copy takes the updates; the buffer itself stays untouched for autograd.
                    module._buffers[name] = value.clone()
        yield
    finally:
        for norm in toggled:
            norm.track_running_stats = True
        for module, name, value in replaced:
            module._buffers[name] = value


def _measured(module: torch.nn.Module) -> tuple[str, ...]:
    """The buffers of a module in which its training forwards keep what they measure."""
    names = tuple(module._buffers)
    if isinstance(module, torch.nn.utils.parametrizations._SpectralNorm):
        return names
    if isinstance(module, _observers()):
        return tuple(name for name in names if name not in SWITCHES)
    # torch.nn.utils.spectral_norm is a hook: NAME_u and NAME_v are beside the parameter NAME_orig.
    vectors = [name for name in names if name.endswith(("_u", "_v")) and f"{name[:-2]}_orig" in module._parameters]
    return (*STATISTICS, *vectors)


def _observers() -> tuple[type, ...]:
    """Classes that measure ranges. Importing them takes long, and a program that has not imported them has none."""
    places = {"fake_quantize": "FakeQuantizeBase", "observer": "ObserverBase"}
    loaded = {sys.modules.get(f"torch.ao.quantization.{place}"): name for place, name in places.items()}
    return tuple(getattr(module, name) for module, name in loaded.items() if module is not None)
