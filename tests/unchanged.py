"""A picture of all that a call may change, and a call that is refused and has changed none of it."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


def frozen(value):
    """Tensors by type, layout and bits, containers by what is in them, so that == tells whether something changed."""
    if isinstance(value, Tensor):
        kind = value.dtype, str(value.device), tuple(value.shape), str(value.layout)
        if value.is_meta:
            return kind
        if value.layout != torch.strided:
            return *kind, frozen(value.to_dense())
        whole = value.detach().resolve_neg().resolve_conj().contiguous()
        return *kind, value.stride(), whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(frozen(v) for v in value)
    return value


def picture(params, opt=None, scaler=None):
    """Weights, gradients, state, groups, phase, and what a scaler knows; {name: value}.

    Gradients count by identity, version and bits, weights and state by bits. `opt` is ours or torch's.
    """
    seen = {}
    for k, p in enumerate(params):
        seen[f"weights[{k}]"] = frozen(p)
        seen[f"grads[{k}]"] = p.grad is None or (id(p.grad), p.grad._version, frozen(p.grad))
    if opt is not None:
        # opt.state is a defaultdict: reading an entry would make it.
        seen["who has state"] = [k for k, p in enumerate(params) if p in opt.state]
        for k, p in enumerate(params):
            for key, value in opt.state.get(p, {}).items():
                seen[f"state[{k}][{key!r}]"] = frozen(value)
        for k, group in enumerate(opt.param_groups):
            seen[f"members of group {k}"] = [id(p) for p in group["params"]]
            for key in group.keys() - {"params"}:
                seen[f"param_groups[{k}][{key!r}]"] = frozen(group[key])
        for name in ("is_perturbed", "ascent_norm", "grad_norm", "mask_due", "grad_scale", "found_inf"):
            seen[name] = frozen(getattr(opt, name, None))
        seen["phase"] = getattr(getattr(opt, "cycle", None), "phase", None)
    if scaler is not None:
        seen["scaler"] = scaler.state_dict()
    return seen


def changed(before, after):
    """The names of what differs between two pictures."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@contextmanager
def refused(error, message, params=(), opt=None, scaler=None):
    """The body raises `error` with a message that matches, and nothing has changed."""
    params = list(params)
    held = [p.grad for p in params]  # so that no other gradient gets the id of one of these
    before = picture(params, opt, scaler)
    with pytest.raises(error, match=message):
        yield
    names = changed(before, picture(params, opt, scaler))
    assert not names, f"the refused call has changed {', '.join(names)}"
    del held
