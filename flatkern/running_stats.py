"""frozen_running_stats: the second forward of a two-pass method leaves BatchNorm's statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_running_stats(model: torch.nn.Module) -> Iterator[None]:
    """Train-mode forwards inside use batch statistics as ever, but update no running ones.

        opt.perturb()
        with flatkern.frozen_running_stats(model):
            loss(model(x), y).backward()
        opt.step()

    Covers BatchNorm, SyncBatchNorm (`momentum=None` and `num_batches_tracked` too), InstanceNorm and
    custom modules with buffers of those names. Exact: the statistics are bit-identical afterwards.
    """
    toggled, saved = [], []
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            # In train mode torch passes the running statistics on only where this flag is set.
            if module.track_running_stats and module.training:
                toggled.append(module)
        else:
            for name in STATISTICS:
                value = module._buffers.get(name)
                if value is not None:
                    saved.append((module, name, value))
                    # A copy takes the updates; the buffer itself stays untouched for autograd.
                    module._buffers[name] = value.clone()
    for module in toggled:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in toggled:
            module.track_running_stats = True
        for module, name, value in saved:
            module._buffers[name] = value
