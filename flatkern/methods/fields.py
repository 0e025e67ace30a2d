"""Checks of the fields of a method, under the names that its users know."""

from __future__ import annotations

from typing import Any

from ..values import check_choice, check_value

ROUNDS = ("mean", "sum")


def check_numbers(method: Any, *keys: str) -> None:
    for key in keys:
        check_value(key, getattr(method, key), type(method).__name__, tensors=False)


def check_rounds(method: Any) -> None:
    check_choice(type(method).__name__, "rounds", method.rounds, ROUNDS)


def put(method: Any, name: str, value: Any) -> None:
    """Store what a check made of a field: a plain int or bool where it was NumPy's."""
    object.__setattr__(method, name, value)
