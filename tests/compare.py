"""Copies of tensors, and how far two results may be apart.

Bit for bit: `same`, `assert_same`, for one training that is run in two ways. By ulp: `assert_ulp` and what follows it,
for one operation that is computed in two ways; there a NaN equals every NaN, because its sign and payload are not
arithmetic. For what contains a sum over many elements, a derived bound. Imports nothing of flatkern.
"""

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# ARWP's history: beta F + a sum of squares, all positive. A backend adds in float32 inside chunks of 1024 as 16 x 4
# lanes: 15 additions in a lane and 6 to fold 64 lanes, each off by at most 2^-24 of the sum, so by an ulp at most; the
# sum and beta F + sum are rounded once by either side, by half an ulp.
HISTORY_ULP = 21 + 2
# e = s z where s holds a norm that was measured inside, in units of 2^-24 of e: half of those 21 for the norm's root,
# half of 25 for the root of the history's, and two for each of six roundings that both sides make.
PERTURBATION_ERROR = 35 * 2.0**-24


def bits(t):
    """The bit pattern of every element, as integers."""
    return t.detach().contiguous().view(INTEGERS[t.element_size()])


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def same(tensors, others):
    """Bit for bit, the sign of zeros and what NaNs carry included."""
    return all(_same_bits(a, b) for a, b in zip(tensors, others, strict=True))


def assert_same(tensors, others, where="tensor"):
    """`same`, and dtypes and shapes; names the first tensor that differs, and its first element that does."""
    for k, (a, b) in enumerate(zip(tensors, others, strict=True)):
        _assert_same_bits(f"{where} {k}", a, b)


def same_state(state, other):
    """The same for {name: tensor}."""
    return state.keys() == other.keys() and all(_same_bits(a, other[name]) for name, a in state.items())


def assert_same_state(state, other):
    assert state.keys() == other.keys(), (sorted(state, key=str), sorted(other, key=str))
    for name, a in state.items():
        _assert_same_bits(name, a, other[name])


def _same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def _assert_same_bits(where, a, b):
    for what in ("dtype", "shape"):
        x, y = getattr(a, what), getattr(b, what)
        assert x == y, f"{where} has {what} {x}, but should have {y}"
    if not _same_bits(a, b):
        _report(where, a, b, bits(a) != bits(b), "differ")


def ulp_distance(a, b):
    """Elementwise, how many floats of their dtype lie between; 0 for two NaNs, 2^62 for a NaN and a number."""
    width = 8 * a.element_size()
    ordered = []
    for t in (a, b):
        i = bits(t).long()
        ordered.append(torch.where(i < 0, -(2 ** (width - 1)) - i, i))  # -0.0 and 0.0 are the same place
    distance = (ordered[0] - ordered[1]).abs()
    nans = a.isnan().int() + b.isnan().int()
    return torch.where(nans == 2, 0, torch.where(nans == 1, 2**62, distance))


def spacing(t):
    """Distance to the next larger magnitude in the tensor's dtype, as float64; 0 where it is not finite."""
    magnitude = t.detach().contiguous().abs()
    above = (bits(magnitude) + 1).view(t.dtype)
    return torch.where(above.isfinite(), above.double() - magnitude.double(), 0.0)


def assert_ulp(where, got, want, ulp=0):
    """Equal dtype, shape, strides, and no element further than `ulp`; with 0 bit for bit, so -0.0 is not 0.0."""
    for what in ("dtype", "shape", "stride"):
        a, b = (getattr(t, what)() if what == "stride" else getattr(t, what) for t in (got, want))
        assert a == b, f"{where} has {what} {a}, but eager's has {b}"
    if torch.equal(bits(got), bits(want)):
        return
    if got.is_floating_point():
        wrong = ulp_distance(got, want) > ulp
        if ulp == 0:
            wrong |= (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())
    else:
        wrong = got != want
    _report(where, got, want, wrong, f"are further off than {ulp} ulp")


def assert_same_values(got, want):
    """Lists of tensors, by `assert_ulp` with 0."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_ulp(f"tensor {k}", a.detach(), b.detach())


def assert_near(where, got, want, bound):
    """No element further from `want` than `bound`, float64; what is not finite has to be the same."""
    difference = (got.double() - want.double()).abs()
    equal = (got == want) | (got.isnan() & want.isnan())
    _report(where, got, want, ~equal & ~(difference <= bound), "are further off than the derived bound")


def _report(where, got, want, wrong, what):
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        a, b = got[first].item(), want[first].item()
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} elements {what}; "
            f"the first at {first} is {a!r}, but should be {b!r}"
        )


def assert_within(op, got, want):
    """Compare the arguments of two calls of `op` after they ran: `got` by a backend, `want` by eager.

    Arguments that the op may write have to be within op.ulp, and what contains a sum inside another operation within
    the bounds above; all other arguments, bit for bit.
    """
    for argument in op.arguments:
        name, a, b = argument.name, got[argument.name], want[argument.name]
        tensors = [("", a, b)] if isinstance(a, torch.Tensor) else _pairs(name, a, b)
        for suffix, x, y in tensors:
            where = f"{op.name}: {name}{suffix}"
            if argument.mutated and name == "history" and len(want[_like(want)][_position(suffix)].shape) >= 2:
                assert_ulp(where, x, y, HISTORY_ULP)
            elif name == "params" and argument.mutated and _measures_norm(op, want):
                assert_near(where, x, y, _perturbation_bound(want, _position(suffix)))
            elif name == "products":
                assert_near(where, x, y, op.ulp * 2.0**-53 * _lengths(y))
            else:
                assert_ulp(where, x, y, op.ulp if argument.mutated else 0)


def _pairs(name, a, b):
    if a is None or b is None:
        assert a is b is None, f"{name} is given in one call only"
        return []
    if not a or not isinstance(a[0], torch.Tensor):
        assert a == b, f"{name} is {a}, but should be {b}"
        return []
    return [(f"[{k}]", x, y) for k, (x, y) in enumerate(zip(a, b, strict=True))]


def _position(suffix):
    return int(suffix[1:-1])


def _like(values):
    return "params" if values.get("params") is not None else "grads"


def _lengths(products):
    """What bounds the magnitudes behind <a, a>, <a, g>, <g, g>: the second by Cauchy and Schwarz. 0 if not finite."""
    bounds = torch.stack([products[0], (products[0] * products[2]).sqrt(), products[2]])
    return torch.where(bounds.isfinite(), bounds, 0.0)


def _measures_norm(op, values):
    """True if the perturbation's norm is measured inside, so that the weights hold a sum."""
    return values.get("noise") is not None and (op.family == "update" or values.get("norms", ()) is None)


def _perturbation_bound(want, k):
    """|e' - e| <= PERTURBATION_ERROR |e|, and w + e may then round to the next float of its dtype."""
    clean = want["masters"] or want["backups"]
    if clean is None:
        raise ValueError("a case that measures norms needs backups or masters, to know what was added")
    p = want["params"][k]
    e = (p.double() - clean[k].double()).abs() + spacing(p) + spacing(clean[k])
    return PERTURBATION_ERROR * e + spacing(p)
