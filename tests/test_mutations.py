"""Wrong kernels, each wrong in one way that kernels are wrong in, are caught by those cases of test_backends.py that
`make test` runs.
"""

import functools

import cases
import pytest
import wrong_methods  # noqa: F401  (it notes its kernels)
from compare import assert_within
from covering import chosen
from test_backends import CASES, NAMES
from wrong_kernels import WRONG, eager

from flatkern.ops import OPS


@functools.cache
def covered():
    """{operation: [(words, shapes, dtype)]}; not the long rows, which show what short ones do and take longer."""
    found = {}
    for name in OPS:
        of_it = [case for case in CASES if case[0].name == name]
        kept = [of_it[k][2:] for k in chosen([dict(zip(NAMES, case, strict=True)) for case in of_it], 2)]
        found[name] = [(words, shapes, dtype) for words, shapes, dtype in kept if shapes != "long rows"]
    return found


def make(op, words, shapes, dtype):
    return getattr(cases, op.name)(cases.SHAPES[shapes], cases.DTYPES[dtype], "cpu", words)


@functools.cache
def right(op, *case):
    """What eager makes of a case; all kernels of an operation are compared with it."""
    want = make(op, *case)
    eager(op, want)
    return want


@pytest.mark.parametrize("op, kernel", WRONG, ids=lambda x: getattr(x, "name", None) or x.__name__)
def test_a_wrong_kernel_is_caught(op, kernel, monkeypatch):
    for case in covered()[op.name]:
        got = make(op, *case)
        with monkeypatch.context() as patch:
            kernel(op, got, *([patch] if kernel.__code__.co_argcount == 3 else []))
        try:
            assert_within(op, got, right(op, *case))
        except AssertionError:
            return
    pytest.fail(f"no case tells this kernel from {op.name}")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_right_kernel_is_not(op):
    for case in covered()[op.name]:
        got = make(op, *case)
        eager(op, got)
        assert_within(op, got, right(op, *case))
