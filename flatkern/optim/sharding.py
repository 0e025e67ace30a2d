"""Ways of sharding under which an optimizer cannot work, refused when it is made, with what to do instead."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from ..pages import page
from .groups import Setup

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
CALLERS = 32  # frames between ZeroRedundancyOptimizer and us: constructors of classes that derive from ours


def check_sharding(setup: Setup, params: Sequence[Tensor]) -> None:
    """Refuse FSDP1, and whatever needs all parameters inside of a ZeroRedundancyOptimizer.

    Raises:
        ValueError: a parameter is of FSDP1, which flattens them, so that filters are gone.
        TypeError: inside a ZeroRedundancyOptimizer with a method, an enhancement or max_grad_norm.
    """
    for k, p in enumerate(params):
        if getattr(p, "_fsdp_flattened", False):  # with use_orig_params and without
            raise ValueError(
                f"{setup.name}: params[{k}] is sharded by FullyShardedDataParallel (FSDP1), which flattens parameters: "
                "there are no filters, and no rank knows which elements it has; shard by "
                "torch.distributed.fsdp.fully_shard (FSDP2), or use DistributedDataParallel; "
                f"{page('ranks', 'refused')}"
            )
    needs_all = {
        "perturb": setup.method is not None,
        "enhance": setup.enhancement is not None,
        "max_grad_norm": setup.max_grad_norm is not None,
    }
    given = [name for name, is_given in needs_all.items() if is_given]
    if given and _inside_zero():
        raise TypeError(
            f"{setup.name}: {' and '.join(given)} inside a ZeroRedundancyOptimizer, whose ranks have some of the "
            "parameters each, while the others would stay as they are; shard by torch.distributed.fsdp.fully_shard "
            f"(FSDP2), or use the optimizer without ZeroRedundancyOptimizer; {page('ranks', 'refused')}"
        )


def _inside_zero() -> bool:
    """True if a ZeroRedundancyOptimizer makes this optimizer: it keeps no trace but the call."""
    if ZERO not in sys.modules:
        return False
    frame = sys._getframe()
    for _ in range(CALLERS):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "_init_local_optimizer" and frame.f_globals.get("__name__") == ZERO:
            return True
    return False
