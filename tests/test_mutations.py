"""Wrong kernels, each wrong in one way that kernels are wrong in, are caught by the cases of test_backends.py."""

import functools

import cases
import pytest
import wrong_methods  # noqa: F401  (it notes its kernels)
from compare import assert_within
from wrong_kernels import WRONG, eager

from flatkern.ops import OPS


def grid(op, dtypes=("mixed", "float32", "bfloat16", "float16")):
    """Functions that make the cases of test_backends.py; not the long rows, which show what short ones do."""
    for words in cases.VARIANTS[op.name]:
        for shapes in ("mixed ranks", "vector ends", "chunk ends"):
            for dtype in dtypes:
                args = cases.SHAPES[shapes], cases.DTYPES[dtype], "cpu", words
                yield functools.partial(getattr(cases, op.name), *args)


@pytest.mark.parametrize("op, kernel", WRONG, ids=lambda x: getattr(x, "name", None) or x.__name__)
def test_a_wrong_kernel_is_caught(op, kernel, monkeypatch):
    for make in grid(op):
        got, want = make(), make()
        eager(op, want)
        with monkeypatch.context() as patch:
            kernel(op, got, *([patch] if kernel.__code__.co_argcount == 3 else []))
        try:
            assert_within(op, got, want)
        except AssertionError:
            return
    pytest.fail(f"no case tells this kernel from {op.name}")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_right_kernel_is_not(op):
    for make in grid(op, ["mixed"]):
        got, want = make(), make()
        eager(op, got)
        eager(op, want)
        assert_within(op, got, want)
