"""Checks of single values, each with its one message: numbers in a range, unsigned 32-bit integers, flags.

The argument checks in front of the ops are in checks.py.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Range(NamedTuple):
    """The finite numbers that a value may be."""

    contains: Callable[[float], bool]
    text: str  # completes "should be a number"


ANY = Range(lambda v: True, "that is finite")
NOT_NEGATIVE = Range(lambda v: v >= 0, ">= 0 and finite")
UP_TO_ONE = Range(lambda v: 0 <= v <= 1, "in [0, 1]")
BELOW_ONE = Range(lambda v: 0 <= v < 1, "in [0, 1)")
BETWEEN = Range(lambda v: 0 < v < 1, "in (0, 1)")

RANGES = {
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
    "momentum": NOT_NEGATIVE,
    "dampening": ANY,
    "beta1": BELOW_ONE,
    "beta2": BELOW_ONE,
    "sigma": NOT_NEGATIVE,
    "rho": NOT_NEGATIVE,
    "eta": NOT_NEGATIVE,
    "beta": BELOW_ONE,
    "lam": UP_TO_ONE,
    "alpha": NOT_NEGATIVE,
    "perturb_momentum": BELOW_ONE,
    "kappa": NOT_NEGATIVE,
    "sharp_fraction": BETWEEN,
}
# Code that runs with torch.optim may look for torch's own messages, so ours begin with them.
TORCH_NAMES = {
    "lr": "learning rate",
    "weight_decay": "weight_decay value",
    "eps": "epsilon value",
    "momentum": "momentum value",
    "beta1": "beta parameter at index 0",
    "beta2": "beta parameter at index 1",
}


def is_number(value: Any) -> bool:
    """True for a real number of any kind, NumPy's too; a bool is not a number, nor is a tensor."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_value(
    key: str, value: Any, where: str | None = None, *, tensors: bool = True, wanted: Range | None = None
) -> None:
    """Refuse a value that is out of `key`'s range; keys without a range pass. `perturb_<key>` has the range of `<key>`.

    `wanted` is the range where a method has one of its own. With `tensors`, as in parameter groups, a tensor of one
    element is a number. Its value is read, so the host waits for a device.

    Raises:
        TypeError: not a number.
        ValueError: a number out of range, infinite or NaN; or a tensor of more than one element.
    """
    wanted = wanted or RANGES.get(key) or RANGES.get(key.removeprefix("perturb_"))
    if wanted is None:
        return
    at = f"{where}: " if where else ""
    is_tensor = tensors and isinstance(value, torch.Tensor)
    if is_tensor and value.numel() != 1:
        raise ValueError(f"Tensor {key} must be 1-element")  # as torch says it
    if not (is_number(value) or (is_tensor and value.dtype != torch.bool and not value.is_complex())):
        raise TypeError(f"{at}{key} is {value!r}, but should be a number {wanted.text}")
    try:
        number = float(value.detach() if is_tensor else value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if math.isfinite(number) and wanted.contains(number):
        return
    if key in TORCH_NAMES:
        raise ValueError(f"Invalid {TORCH_NAMES[key]}: {value} ({key} should be {wanted.text})")
    raise ValueError(f"{at}{key} is {value}, but should be a number {wanted.text}")


def check_uint32(where: str, name: str, value: Any, least: int = 0) -> int:
    """An integer in [least, 2^32), NumPy's too, as an int; a bool is not one.

    Raises:
        ValueError: anything else.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**32:
        # A round that wrapped around to 0 would draw the noise of the first rounds again.
        remedy = "; start again from round 0 with another seed or stream" if name == "round" else ""
        raise ValueError(f"{where}: {name} is {value!r}, but should be an integer in [{least}, 2^32){remedy}")
    return number


def check_positive(where: str, name: str, value: Any) -> int:
    """An integer in [1, 2^32), NumPy's too, as an int.

    Raises:
        ValueError: anything else.
    """
    return check_uint32(where, name, value, least=1)


def check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """One of some words.

    Raises:
        ValueError: anything else.
    """
    if not (isinstance(value, str) and value in choices):
        *first, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{where}: {name} is {value!r}, but should be {', '.join(first)} or {last}")


def check_flag(where: str, name: str, value: Any) -> bool:
    """True or False, NumPy's too, as a bool. A string such as "no" is true in Python, so nothing else is taken.

    Raises:
        TypeError: anything else.
    """
    numpy = sys.modules.get("numpy")
    if not (isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_))):
        raise TypeError(f"{where}: {name} is {value!r}, but should be True or False")
    return bool(value)
