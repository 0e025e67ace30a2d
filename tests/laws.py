"""What laws of operations are written with: eager on seeded values, and how far it may be from float64.

`LAWS` counts the laws of every operation.
"""

import math

import numpy as np
import pytest
import torch
from compare import spacing
from hypothesis import settings
from hypothesis import strategies as st

from flatkern.dispatch import resolve
from flatkern.ops import OPS

LAWS = {}  # op: the tests that know what it does; test_table.py asks that none is missing
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(
    st.sampled_from([(), (1,), (7,), (40,), (3, 5), (1, 9), (6, 1), (4, 3, 2, 2), (0,), (2, 0)]), min_size=1, max_size=3
)
weights = st.floats(0.0, 1.0, width=32)
U = 2.0**-24  # a rounding to float32 is off by at most this, relative


def law(*ops):
    """Names the ops that a test is a law of."""

    def note(test):
        for op in ops:
            LAWS.setdefault(op, []).append(test.__name__)
        return test

    return note


class Values:
    """Seeded tensors of a list of shapes, and an op run on them with every absent argument filled in."""

    def __init__(self, shapes, seed, dtype=torch.float32):
        self.shapes, self.generator, self.dtype = shapes, torch.Generator().manual_seed(seed), dtype

    def tensors(self, scale=1.0, dtype=None):
        draw = [torch.randn(s, generator=self.generator) * scale for s in self.shapes]
        return [t.to(dtype or self.dtype) for t in draw]

    def history(self):
        lengths = [s[0] if len(s) > 1 else math.prod(s) for s in self.shapes]
        return [torch.rand(n, generator=self.generator) * 4 for n in lengths]

    def run(self, name, **given):
        """Run an op in place; scalars are repeated for every entry."""
        op, n = OPS[name], len(self.shapes)
        zero = dict.fromkeys(("offset", "kappa", "eta", "sigma", "beta", "momentum"), 0.0) | dict(offset=0)
        defaults = dict(index=list(range(n)), grad_weight=1.0, clean_weight=1.0, **zero)
        values = {}
        for a in op.arguments:
            value = given.pop(a.name, defaults.get(a.name) if a.keyword_only else None)
            values[a.name] = [value] * n if a.keyword_only and not isinstance(value, list) else value
        assert not given, f"{name} has no {list(given)}"
        tensors = [values[a.name] for a in op.arguments if not a.keyword_only]
        resolve(name, "cpu", "eager")(*tensors, **{a.name: values[a.name] for a in op.arguments if a.keyword_only})


def scalar(value):
    return torch.tensor(value, dtype=torch.float32)


def noise(seed=1, stream=2, round=3):
    return torch.tensor([seed, stream, round])


def rows64(t):
    """Filters of a contiguous tensor as float64 rows."""
    return t.double().numpy().reshape(t.shape[0], -1) if t.dim() > 1 else t.double().numpy().reshape(1, -1)


def assert_close(got, want, roundings, scale=None):
    """|got - want| <= roundings x 2^-24 x scale, and one rounding to got's dtype; `scale`: the largest term."""
    want = torch.as_tensor(np.asarray(want)).reshape(got.shape).double()
    scale = want.abs() if scale is None else torch.as_tensor(np.asarray(scale)).double().reshape(got.shape)
    bound = roundings * U * scale + spacing(got) / 2 + 1e-42
    assert ((got.double() - want).abs() <= bound).all(), (got, want)
