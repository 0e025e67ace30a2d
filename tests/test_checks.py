"""Which parameters are taken: those that share no memory, and of which a kernel can walk what is trained."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from flatkern.checks import LayoutError, check_parameters

SHARED = "SGD: params[1] shares memory with params[0]; pass every tensor once, without overlap"


def frozen(t):
    return Parameter(t, requires_grad=False)


class Wrapper(torch.Tensor):
    """A tensor that consists of others, as quantized weights do; it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def fakes():
    with FakeTensorMode():
        return [Parameter(torch.ones(3, 2)), Parameter(torch.ones(4))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("only_trained", [False, True])
def test_tensors_without_memory_cannot_overlap(only_trained):
    meta = [Parameter(torch.ones(3, 2, device="meta")), Parameter(torch.ones(4, device="meta"))]
    for params in (meta, fakes(), [*meta, *fakes(), Parameter(torch.ones(2))], [torch.ones(0), torch.ones(0)]):
        check_parameters("SGD", params, only_trained=only_trained)


def test_fakes_are_checked_otherwise():
    with FakeTensorMode():
        wide = Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch.float64"):
        check_parameters("SGD", [wide], only_trained=True)


UNKNOWN = {
    "uint8": torch.ones(3, dtype=torch.uint8),
    "int8": torch.ones(3, dtype=torch.int8),
    "bool": torch.ones(3, dtype=torch.bool),
    "float64": torch.ones(3, dtype=torch.float64),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, dtype=torch.complex64),
    "sparse": torch.eye(3).to_sparse(),
    "gaps": torch.ones(6)[::2],
    "expanded": torch.ones(1).expand(4),
    "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "wrapper": Wrapper(torch.ones(3, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_frozen_parameters_may_be_of_any_kind(kind):
    t = UNKNOWN[kind]
    trained = Parameter(torch.ones(2))
    check_parameters("SGD", [trained, t], only_trained=True)
    check_parameters("SGD", [t, trained], only_trained=True)
    with pytest.raises((TypeError, LayoutError), match=r"^perturb_: params\[1\] (has|is) "):
        check_parameters("perturb_", [trained, t])


@pytest.mark.parametrize("kind", ["float64", "complex", "sparse", "gaps", "expanded"])
def test_trained_parameters_may_not(kind):
    with pytest.raises((TypeError, LayoutError), match=r"^SGD: params\[1\] (has|is) "):
        check_parameters("SGD", [frozen(torch.ones(2)), Parameter(UNKNOWN[kind])], only_trained=True)


def overlaps():
    data, rows = torch.arange(24.0), torch.arange(24.0).view(4, 6)
    return {
        "twice": [data, data],
        "views": [data[:6], data[4:]],
        "inside": [data, data[3:5]],
        "frozen": [frozen(data[:6]), data[5:]],
        "both frozen": [frozen(data[:6]), frozen(data[5:])],
        "other dtype": [frozen(data[:6].view(torch.int32)), data[5:]],
        "frozen with gaps": [frozen(rows[:, 0]), rows[2]],
    }


@pytest.mark.parametrize("case", overlaps())
def test_overlap(case):
    params = [p if isinstance(p, Parameter) else Parameter(p) for p in overlaps()[case]]
    for order in (params, params[::-1]):
        with pytest.raises(ValueError, match=re.escape(SHARED)):
            check_parameters("SGD", order, only_trained=True)


def test_neighbours_do_not_overlap():
    data = torch.arange(24.0)
    check_parameters("SGD", [Parameter(data[:6]), frozen(data[6:9]), Parameter(data[9:])], only_trained=True)
    check_parameters("perturb_", [data[:6], data[6:]])
