"""What torch.compile leaves to Python, which call may come when and every write of weights, and what other tracers and
transforms of a followed forward must not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._compile import _disable_dynamo

# torch.compiler.disable() imports Dynamo, which takes a second, where it decorates. This one imports it at the first
# call, and torch's own optimizers need it as well.
untraced = _disable_dynamo


def is_observed() -> bool:
    """True inside torch.func's transforms, torch.jit.trace, torch.export and other dispatch modes."""
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return in_transform or torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


@contextmanager
def unobserved() -> Iterator[None]:
    """Plain tensors inside: there a transform would wrap what is computed, a fake mode give it no memory, and a trace
    make it a part of the model."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    state = torch._C._get_tracing_state()
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
