"""Roots and the mixing of gradients, for loaded numbers. Mirrors flatkern/reference/arithmetic.py."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once.

    Triton 3.6's interpreter does not fuse. There, the product is exact in float64 and the sum rounds twice; over the
    65536 radii and 65536 angles that exist, which are all that is computed with it, the result is the same (a test
    compares every one).
    """
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def root(x):
    """Correctly rounded."""
    return tl.sqrt_rn(x)


@triton.jit
def quotient(a, b):
    """Correctly rounded; `/` is not on a GPU."""
    return tl.div_rn(a, b)


@triton.jit
def mixed(g, clean, factor, clean_weight, clip):
    """clip (factor g + clean_weight g_clean)."""
    return (factor * g + clean_weight * clean) * clip


@triton.jit
def scaled(g, factor, clip):
    """The same without a clean gradient: nothing is added, so a negative zero stays one."""
    return factor * g * clip
