"""Ways of reading tensors: where torch keeps them, through its bindings, through attributes. They see the same."""

import sys

import pytest
import torch

# Of which it is known that tensors are found where they are looked for; others are read through torch's bindings.
KNOWN = ("2.13.",)


class Subclass(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    """Has no memory of its own."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def without_memory():
    t = torch.zeros(5)
    t.untyped_storage().resize_(0)
    return t


def swapped():
    a, b = torch.zeros(3), torch.ones(2, 2)
    torch.utils.swap_tensors(a, b)
    return a


def with_other_data():
    t = torch.nn.Parameter(torch.zeros(3))
    t.data = torch.zeros(4, 5)[1:, 1:]
    return t


def of_inference():
    with torch.inference_mode():
        return torch.zeros(3)


MADE = {
    "plain": lambda: torch.randn(3, 5),
    "empty": lambda: torch.zeros(4, 0),
    "a number": lambda: torch.tensor(1.5),
    "of many dims": lambda: torch.zeros(1, 2, 1, 3, 1, 2, 1, 1),
    "strided": lambda: torch.zeros(6, 8)[1::2, 3:],
    "expanded": lambda: torch.zeros(1, 5).expand(4, 5),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3, 4)),
    "a parameter with another .data": with_other_data,
    "of a graph": lambda: torch.zeros(3, requires_grad=True) * 2,
    "bfloat16": lambda: torch.zeros(3, dtype=torch.bfloat16),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "of a subclass": lambda: torch.zeros(3).as_subclass(Subclass),
    "a buffer": lambda: torch.nn.Buffer(torch.zeros(3)),
    "swapped": swapped,
    "of inference": of_inference,
}
UNREADABLE = {
    "without memory": without_memory,
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "a wrapper": lambda: Wrapper((3,)),
    "no tensor": lambda: "weights",
    "a type": lambda: torch.Tensor,
    "None": lambda: None,
}


@pytest.fixture
def through(native):
    """through(name, function, *args) calls it with tensors read so."""

    def call(name, function, *args):
        before = native._read_through(name)
        try:
            return function(*args)
        finally:
            native._read_through(before)

    if "libtorch" not in native._readers().split():
        pytest.skip("tensors of this torch are read through its bindings")
    return call


def test_the_fastest_way_is_open(native):
    """Nobody would notice otherwise, but by the time that a small step takes."""
    if not (torch.__version__.startswith(KNOWN) and sys.platform == "linux"):
        pytest.skip("it may be closed in this torch")
    assert native._readers() == "libtorch dlpack attributes"


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_same_is_read(make, native, through):
    t = make()
    direct, dlpack = (through(name, native.describe, ([t], t), b"", b"", b"") for name in ("libtorch", "dlpack"))
    assert direct == dlpack
    assert memoryview(direct[0]).cast("q").tolist() == [t.data_ptr()]


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_the_same_is_refused(make, native, through):
    t, errors = make(), []
    for name in ("libtorch", "dlpack"):
        with pytest.raises(Exception) as refused:
            through(name, native.describe, ([t],), b"", b"", b"")
        errors.append((type(refused.value), str(refused.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("reader", ["libtorch", "dlpack"])
def test_versions(reader, native, through):
    """Each tensor's grows by one, or by none where it has none, as torch counts writes."""
    some = [make() for name, make in MADE.items() if name != "of inference"]
    for tensors in (some, tuple(some), [some[0], of_inference(), some[1]], []):
        versioned = [t for t in tensors if not t.is_inference()]
        before = [t._version for t in versioned]
        through(reader, native.increment_version, tensors)
        assert [t._version for t in versioned] == [v + 1 for v in before]


@pytest.mark.parametrize("wrong", [3, [3], ["weights"], [torch.zeros(3), None]], ids=repr)
def test_versions_of_what_is_no_tensor(wrong, native, through):
    outcomes = []
    for function in (native.increment_version, torch._C._increment_version):
        with pytest.raises(Exception) as refused:
            through("libtorch", function, wrong)
        outcomes.append(type(refused.value))
    assert outcomes[0] in (outcomes[1], TypeError)


def test_a_version_that_autograd_has_saved(native, through):
    """A backward pass refuses what was written meanwhile."""
    x = torch.ones(3, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(3))
    y = (x * weight).sum()
    through("libtorch", native.increment_version, [weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
