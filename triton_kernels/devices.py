"""What a call asks of a device, and how tables get there. No host waits for a device here.

Others call these by the name of this module, so that a test can stand in for a device.
"""

import numpy as np
import torch
from triton.runtime import driver

# Tables of one kind that a plan can upload inside captures until a call outside of one makes room again.
SPARE = 8


def on_host(noise):
    """Whether the words can be looked at without waiting for a device."""
    return noise.device.type == "cpu"


def is_elsewhere(device):
    """Whether launches would go to another device, which is the current one."""
    return device.type == "cuda" and torch.cuda.current_device() != device.index


def capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device):
    return driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def is_ready(device, stream):
    """Whether launches go to this stream of the device now, and not into a graph that is being captured."""
    if device.type == "cuda" and (is_elsewhere(device) or current_stream(device) != stream):
        return False
    return not capturing(device)


def pinned(shape, dtype):
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def upload(array, device):
    """A NumPy array on the device. From pinned memory, so that the host does not wait for the copy."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph captures a call whose tables are not on the device yet; run the same steps on the same "
            "tensors before the capture, as torch.cuda.graph asks"
        )
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def captured_upload(plan, name, array, device):
    """The same inside a capture. A replay copies again, from memory that stays; it was allocated before, as a capture
    must not."""
    if not plan.spare.get(name):
        raise RuntimeError(
            f"CUDA graphs have captured {SPARE} calls of one operation on the same shapes with other gradients each; "
            "run such a step without a graph before the next capture, or capture fewer rounds in one"
        )
    host = plan.spare[name].pop()
    host.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    plan.kept.append(host)
    return host.to(device, non_blocking=True)


def set_aside(plan, tables, device):
    """Pinned memory for the tables that captures will upload, of the size of those that were."""
    if device.type != "cuda":
        return
    for name, table in tables.items():
        if len(plan.spare.get(name, ())) < SPARE:
            plan.spare[name] = list(pinned((SPARE, *table.shape), table.dtype))
