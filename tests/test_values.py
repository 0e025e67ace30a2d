"""Single values: which are taken, and that one mistake has one message wherever it is made."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import flatkern
from flatkern import ASAM, IRE, RWP, SAM, SGD, Adam, values
from flatkern.values import check_flag, check_uint32, check_value, is_number

NAN, INF = math.nan, math.inf
ENDS = {  # key: values at the ends of its range, and values beyond
    "lr": ((0, 1e30), (-1e-30, INF)),
    "weight_decay": ((0, 2.0), (-1, INF)),
    "eps": ((0, 1e-8), (-1e-8, INF)),
    "momentum": ((0, 1.5), (-0.1, INF)),
    "dampening": ((-1e9, 1e9), (-INF, INF)),
    "beta1": ((0, 1 - 2.0**-53), (-0.1, 1)),
    "beta2": ((0, 1 - 2.0**-53), (-0.1, 1.0)),
    "sigma": ((0, 5), (-1, INF)),
    "rho": ((0, 5), (-1, INF)),
    "eta": ((0, 5), (-1, INF)),
    "beta": ((0, 1 - 2.0**-53), (-0.1, 1)),
    "lam": ((0, 1), (-0.1, 1.1)),
    "alpha": ((0, 5), (-1, INF)),
    "perturb_momentum": ((0, 1 - 2.0**-53), (-0.1, 1)),
    "kappa": ((0, 5), (-1, INF)),
    "sharp_fraction": ((1e-300, 1 - 2.0**-53), (0, 1)),
}


@pytest.mark.parametrize("key", ENDS)
def test_ranges(key):
    inside, outside = ENDS[key]
    for value in inside:
        for form in (value, np.float64(value), torch.tensor(value, dtype=torch.float64)):
            check_value(key, form)
            check_value(key, form, "RWP")
    for value in (*outside, NAN):
        for form in (value, np.float64(value), torch.tensor(value, dtype=torch.float64)):
            with pytest.raises(ValueError, match="should be "):
                check_value(key, form)
    for value in (True, False, np.True_, "0.5", None, 0.5j, [0.5], torch.tensor(True), torch.tensor(0.5j)):
        with pytest.raises(TypeError, match=re.escape(f"{key} is {value!r}, but should be a number ")):
            check_value(key, value)
    for value in (10**400, -(10**400)):
        with pytest.raises(ValueError, match=r"finite|in [\[(]"):
            check_value(key, value)
    with pytest.raises(ValueError, match=f"Tensor {key} must be 1-element"):
        check_value(key, torch.ones(2))
    with pytest.raises(TypeError, match=rf"RWP: {key} is tensor\(0.5000\), but should be a number"):
        check_value(key, torch.tensor(0.5), "RWP", tensors=False)


def test_every_range_is_tried():
    assert ENDS.keys() == values.RANGES.keys()
    assert values.TORCH_NAMES.keys() <= values.RANGES.keys()


def test_keys_without_a_range_pass():
    check_value("foreach", "anything")


def test_a_tensor_that_requires_grad_is_read_without_a_warning():
    check_value("lr", torch.tensor([0.1], requires_grad=True))


TORCH_ARGUMENTS = [
    (torch.optim.SGD, SGD, {"lr": -1}),
    (torch.optim.SGD, SGD, {"lr": -0.5, "momentum": 0.9}),
    (torch.optim.SGD, SGD, {"momentum": -1.0}),
    (torch.optim.SGD, SGD, {"weight_decay": -1}),
    (torch.optim.Adam, Adam, {"lr": -1}),
    (torch.optim.Adam, Adam, {"eps": -1e-8}),
    (torch.optim.Adam, Adam, {"betas": (1.0, 0.9)}),
    (torch.optim.Adam, Adam, {"betas": (0.9, -2)}),
    (torch.optim.Adam, Adam, {"weight_decay": -0.5}),
]


@pytest.mark.parametrize(("theirs", "ours", "arguments"), TORCH_ARGUMENTS, ids=str)
def test_messages_begin_as_those_of_torch(theirs, ours, arguments):
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError) as expected:
        theirs(params, **arguments)
    with pytest.raises(ValueError) as found:
        ours(params, **arguments)
    assert str(found.value).startswith(str(expected.value))


OWN = [(RWP, "sigma", -1), (RWP, "sigma", NAN), (RWP, "eta", -0.5), (RWP, "beta", 1.0), (RWP, "lam", 2),
       (SAM, "rho", INF), (ASAM, "rho", -1), (ASAM, "eta", NAN), (RWP, "sigma", "0.1"), (RWP, "beta", None),
       (SAM, "rho", True), (RWP, "seed", -1), (RWP, "stream", 2**32), (RWP, "seed", 0.5),
       (RWP, "stream", True)]  # fmt: skip


@pytest.mark.parametrize(("method", "key", "value"), OWN, ids=str)
def test_one_mistake_has_one_text(method, key, value):
    """As an argument of the method and as a group's value, apart from who says it."""
    start = method(**({"lam": 0.5} if key == "lam" else {}))
    with pytest.raises((TypeError, ValueError)) as as_argument:
        method(**{key: value})
    name, text = str(as_argument.value).split(": ", 1)
    assert name == method.__name__
    with pytest.raises(type(as_argument.value)) as in_group:
        SGD([{"params": [torch.nn.Parameter(torch.ones(2))], key: value}], perturb=start)
    assert str(in_group.value).removeprefix("SGD: ") == text


def test_the_text():
    with pytest.raises(ValueError, match=r"^RWP: sigma is -1, but should be a number >= 0 and finite$"):
        RWP(sigma=-1)
    with pytest.raises(ValueError, match=r"^sigma is -1, but should be a number >= 0 and finite$"):
        check_value("sigma", -1)
    with pytest.raises(TypeError, match=r"^IRE: kappa is '2', but should be a number >= 0 and finite$"):
        IRE(kappa="2")
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -1 \(lr should be >= 0 and finite\)$"):
        check_value("lr", -1, "SGD")


def test_numbers():
    assert all(map(is_number, (1, 0.5, NAN, Fraction(1, 2), np.float32(1), np.int64(1))))
    assert not any(map(is_number, (True, np.True_, "1", None, 1j, torch.tensor(1.0))))


@pytest.mark.parametrize("value", [0, 7, 2**32 - 1, np.uint32(7), np.int64(7), torch.tensor(7)])
def test_uint32(value):
    found = check_uint32("RWP", "seed", value)
    assert type(found) is int and found == int(value)


@pytest.mark.parametrize("value", [-1, 2**32, 10**400, 0.0, NAN, "1", None, True, np.True_, np.float64(1), [1]])
def test_not_uint32(value):
    with pytest.raises(ValueError, match=re.escape(f"RWP: seed is {value!r}, but should be an integer in [0, 2^32)")):
        check_uint32("RWP", "seed", value)


def test_the_last_round_names_the_remedy():
    text = (
        "SGD: round is 4294967296, but should be an integer in [0, 2^32); "
        "start again from round 0 with another seed or stream"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        check_uint32("SGD", "round", 2**32)


FLAGS = [(RWP, "rolling", {}), (ASAM, "all_tensors", {}), (IRE, "kappa_follows_lr", {"kappa": 1.0})]


@pytest.mark.parametrize(("method", "name", "others"), FLAGS, ids=str)
def test_flags(method, name, others):
    for value in (True, False, np.True_, np.False_):
        found = getattr(method(**others, **{name: value}), name)
        assert found is bool(value)
        assert check_flag("SGD", "maximize", value) is found
    for value in ("no", "", 0, 1, 1.0, None, np.int64(1), torch.tensor(True)):
        text = f"{method.__name__}: {name} is {value!r}, but should be True or False"
        with pytest.raises(TypeError, match=re.escape(text)):
            method(**others, **{name: value})


def test_methods_keep_plain_values():
    """NumPy's integers and bools would be saved as such, and a checkpoint could not be loaded with weights_only."""
    method = RWP(seed=np.int64(3), stream=np.uint8(1), rolling=np.True_)
    assert [type(v) for v in (method.seed, method.stream, method.rolling)] == [int, int, bool]
    assert type(IRE(1.0, interval=np.int32(5)).interval) is int


@pytest.mark.parametrize("arguments", [("0.1", 1, 10), (0.1, None, 10), (0.1, 1, True), (0.1, 1, "10")])
def test_schedules_name_their_arguments(arguments):
    with pytest.raises(ValueError, match=r"cosine_increase: start .* but should be start >= 0"):
        flatkern.schedules.cosine_increase(*arguments)
