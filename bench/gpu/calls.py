"""The main calls of a training on a model's tensors, as operations with arguments; what of their memory is executed is
filled with ordinary numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from bench.gpu.host import NUMBERS
from bench.methods import METHODS, call_floors
from flatkern.checks import MAGNITUDE_DIGITS
from flatkern.ops import OPS
from flatkern.tables import mask_shape

SCALE = 0.02  # of weights and gradients


@dataclass(frozen=True)
class Part:
    """A call of an operation: the optional arguments that it is given, and the bytes that it has to move."""

    op: str
    bytes: float  # per element
    optional: str = ""
    bfloat16: str = ""  # lists that are not float32
    digits: int = 0  # of a magnitude that are known
    sample: int = 1  # one in so many elements is counted


MIXED = "params grads"
plain, two, sam, friendly = (call_floors(METHODS[name], "sgd", 4) for name in ("rwp", "m-rwp", "sam", "friendly"))
COUNT = "count_magnitudes_"
CALLS = {
    "perturb": [Part("perturb_gaussian_", two["perturb"], "backups")],
    "perturb, masters": [
        Part("perturb_gaussian_", call_floors(METHODS["rwp"], "sgd", 2, True)["perturb"], "masters", MIXED)
    ],
    "sgd": [Part("sgd_update_", plain["step"], "momentum_buffers")],
    "sgd, restoring": [Part("sgd_update_", plain["step"], "momentum_buffers backups")],
    "sgd, two gradients": [Part("sgd_update_", two["step"], "momentum_buffers backups clean_grads")],
    "sgd, rolling": [
        Part("sgd_update_", call_floors(METHODS["rolling"], "sgd", 4)["step"], "momentum_buffers backups noise")
    ],
    "adamw": [Part("adamw_update_", call_floors(METHODS["plain"], "adamw", 4)["step"])],
    "adamw, masters": [
        Part("adamw_update_", call_floors(METHODS["plain"], "adamw", 2, True)["step"], "masters", MIXED)
    ],
    "adamw, rolling, masters": [
        Part("adamw_update_", call_floors(METHODS["rolling"], "adamw", 2, True)["step"], "masters noise", MIXED)
    ],
    "sam": [Part("ascent_norm_", 4), Part("perturb_ascent_", sam["perturb"] - 4, "backups")],
    "asam": [Part("ascent_norm_", 8, "params"), Part("perturb_ascent_", sam["perturb"] - 4, "backups")],
    "friendly-sam": [
        Part("ascent_norm_", 8, "means"), Part("perturb_ascent_", friendly["perturb"] - 8, "backups means new_means"),
    ],
    "gsam, sgd": [
        Part("gradient_products_", 8),
        Part("sgd_update_", two["step"], "momentum_buffers backups clean_grads component"),
    ],
    "mask": [
        Part(COUNT, 4 / 64, sample=64), Part(COUNT, 4, digits=1), Part(COUNT, 4, digits=2),
        Part("pack_mask_", 4 + 1 / 8),
    ],
    "adamw, IRE": [Part("adamw_update_", call_floors(METHODS["ire"], "adamw", 4)["step"], "masks")],
    "restore": [Part("restore_", 8)],
    "mix": [Part("mix_gradients_", 12, "clean_grads")],
}  # fmt: skip


def threshold(sharp_fraction: float = METHODS["ire"].sharp_fraction) -> float:
    """The magnitude below which all but a fraction of the gradients are."""
    return SCALE * 2**0.5 * float(torch.erfinv(torch.tensor(1 - sharp_fraction, dtype=torch.float64)))


def arguments(part: Part, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Values of all arguments. Large tensors are not written, so that they take no memory."""
    op, values = OPS[part.op], {}
    if part.sample > 1:
        shapes = [(sum(prod(shape) // (16 * part.sample) * 16 for shape in shapes),)]
    for a in op.arguments:
        dtype = torch.bfloat16 if a.name in part.bfloat16.split() else torch.float32
        if a.type.endswith("?") and a.name not in part.optional.split():
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name == "prefix":
            values[a.name] = torch.tensor(digits_of(threshold())[: part.digits], dtype=torch.int64)
        elif a.name == "counts":
            values[a.name] = torch.zeros(2 ** MAGNITUDE_DIGITS[part.digits] + 2, dtype=torch.int64)
        elif a.name == "products":
            values[a.name] = torch.zeros(3, dtype=torch.float64)
        elif a.name == "component":
            values[a.name] = torch.tensor([0.5, 0.25])
        elif a.name in ("norm", "threshold"):
            values[a.name] = torch.tensor(threshold())
        elif a.name == "masks":
            values[a.name] = [torch.empty(mask_shape(torch.empty(s, device="meta")), dtype=torch.uint8) for s in shapes]
        elif a.name == "steps":
            values[a.name] = [torch.tensor(7.0) for _ in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.empty(shape, dtype=dtype) for shape in shapes]
        elif a.name == "index":
            values[a.name] = list(range(len(shapes)))
        else:
            values[a.name] = [{"rho": 0.05}.get(a.name) or NUMBERS[a.name]] * len(shapes)
    return values


def digits_of(magnitude: float) -> list[int]:
    bits, found = int(np.float32(magnitude).view(np.uint32)), []
    for width in reversed(MAGNITUDE_DIGITS):
        found.insert(0, bits & (1 << width) - 1)
        bits >>= width
    return found


def fill(values: dict[str, Any], tensor: int, start: int, count: int) -> None:
    """Normal numbers for some elements of a tensor and of those beside it, the same in every version of NumPy."""
    for seed, (name, each) in enumerate(values.items()):
        if name in ("steps", "masks") or not (isinstance(each, list) and isinstance(each[0], torch.Tensor)):
            continue
        words = np.random.Philox(key=[tensor, seed]).random_raw(count) >> np.uint64(11)
        uniform = torch.from_numpy((words.astype(np.float64) + 0.5) / 2**53)
        normal = SCALE * 2**0.5 * torch.erfinv(2 * uniform - 1)
        each[tensor].view(-1)[start : start + count] = normal.square() if name == "exp_avg_sqs" else normal
