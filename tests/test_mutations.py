"""Wrong kernels, each wrong in one way that kernels are wrong in, are caught by the cases of test_backends.py."""

import functools
import itertools

import cases
import pytest
import wrong_methods  # noqa: F401  (it notes its kernels)
from compare import assert_within
from wrong_kernels import WRONG, eager

from flatkern.ops import OPS


def grid(dtypes=("mixed", "float32", "bfloat16", "float16")):
    """(dtypes, shapes) of the cases of test_backends.py; not the long rows, which show what short ones do."""
    return itertools.product(dtypes, ("mixed ranks", "vector ends", "chunk ends"))


def make(op, dtype, shapes, words):
    return getattr(cases, op.name)(cases.SHAPES[shapes], cases.DTYPES[dtype], "cpu", words)


@functools.cache
def right(op, *case):
    """What eager makes of a case; all kernels of an operation are compared with it."""
    want = make(op, *case)
    eager(op, want)
    return want


@pytest.mark.parametrize("op, kernel", WRONG, ids=lambda x: getattr(x, "name", None) or x.__name__)
def test_a_wrong_kernel_is_caught(op, kernel, monkeypatch):
    for (dtype, shapes), words in itertools.product(grid(), cases.VARIANTS[op.name]):
        got = make(op, dtype, shapes, words)
        with monkeypatch.context() as patch:
            kernel(op, got, *([patch] if kernel.__code__.co_argcount == 3 else []))
        try:
            assert_within(op, got, right(op, dtype, shapes, words))
        except AssertionError:
            return
    pytest.fail(f"no case tells this kernel from {op.name}")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_right_kernel_is_not(op):
    for (dtype, shapes), words in itertools.product(grid(["mixed"]), cases.VARIANTS[op.name]):
        got = make(op, dtype, shapes, words)
        eager(op, got)
        assert_within(op, got, right(op, dtype, shapes, words))
