"""flatkern._C and callers that change what it is reading, or hand it memory that it must not write: no crash, and what
is refused has changed nothing. `make sanitize` runs these under AddressSanitizer, which sees reads that do no harm."""

import threading
import time

import pytest
import torch
from compare import assert_same

from flatkern.dispatch import resolve

NOISE = torch.tensor([1, 2, 3])
N = 40


@pytest.fixture(params=["libtorch", "dlpack", "attributes"])
def native(request, native):
    """The compiled module, for each way in which it reads tensors."""
    if request.param not in native._readers().split():
        pytest.skip(f"this torch cannot be read through {request.param}")
    before = native._read_through(request.param)
    yield native
    native._read_through(before)


@pytest.fixture
def params():
    return [torch.randn(300) for _ in range(N)]


def perturb(function, params, backups=None, masters=None, **numbers):
    count = len(params)
    given = {"sigma": [0.1] * count, "eta": [0.0] * count, "index": list(range(count)), "offset": [0] * count}
    function(params, backups, masters, None, None, None, NOISE, **(given | numbers))


class Hook:
    """A number or a key that runs `act` whenever it is looked at."""

    def __init__(self, value, act):
        self.value, self.act = value, act

    def __float__(self):
        self.act()
        return float(self.value)

    def __index__(self):
        self.act()
        return int(self.value)

    def __bool__(self):
        self.act()
        return True

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        self.act()
        return self.value == other


class Subclass(torch.Tensor):
    """Runs `act` once, when it is asked for anything."""

    act = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        act, cls.act = cls.act, None
        if act is not None:
            act()
        return super().__torch_function__(function, types, args, kwargs or {})


def emptying(*lists):
    def act():
        for values in lists:
            values.clear()

    return act


# Lists that change while they are read.


@pytest.mark.parametrize("name, value", [("sigma", 0.1), ("index", 1)])
def test_a_number_shortens_its_own_list(native, params, name, value):
    before, numbers = [p.clone() for p in params], [value] * N
    numbers[5] = Hook(value, emptying(numbers))
    with pytest.raises(RuntimeError, match="became shorter while it was read"):
        perturb(native.perturb_gaussian_, params, **{name: numbers})
    assert_same(params, before)


def test_a_flag_shortens_its_own_list(native, params):
    flags = [True] * N
    flags[5] = Hook(True, emptying(flags))
    floats, ints = dict.fromkeys(("lr", "momentum", "dampening", "weight_decay", "grad_weight"), [0.1] * N), [0] * N
    floats |= dict.fromkeys(("clean_weight", "kappa", "beta", "sigma", "eta"), [0.1] * N)
    with pytest.raises(RuntimeError, match="became shorter while it was read"):
        native.sgd_update_(
            params, None, None, None, None, params, *[None] * 9, **floats, nesterov=flags, index=ints, offset=ints
        )


def test_a_number_drops_the_tensors(native, params):
    """Those that were passed are written, as in any call."""
    kept, sigma = list(params[:3]), [0.1] * N
    before = [p.clone() for p in kept]
    sigma[5] = Hook(0.1, emptying(params))
    perturb(native.perturb_gaussian_, params, sigma=sigma)
    assert params == [] and not any(map(torch.equal, kept, before))


def test_a_number_frees_the_memory(native, params):
    sigma = [0.1] * N
    sigma[5] = Hook(0.1, lambda: [p.untyped_storage().resize_(0) for p in params])
    with pytest.raises(native.Mismatch, match=r"params\[0\] has no memory"):
        perturb(native.perturb_gaussian_, params, sigma=sigma)


def test_a_number_raises(native, params):
    def act():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        perturb(native.perturb_gaussian_, params, sigma=[Hook(0.1, act)] * N)


def test_a_tensor_shortens_its_list(native, params):
    params[3] = torch.randn(300).as_subclass(Subclass)
    kept, before = params[-1], params[-1].clone()
    Subclass.act = emptying(params)
    perturb(native.perturb_gaussian_, params)
    Subclass.act = None
    assert not torch.equal(kept, before)


def test_another_thread_drops_the_tensors(native):
    outs = [torch.empty(1 << 22) for _ in range(4)]  # large: freed memory would be unmapped at once
    written = outs[0].view(-1)[-1:]
    written.zero_()
    started = threading.Event()

    def drop():
        started.wait()
        time.sleep(0.002)  # until the kernel runs, without the GIL
        outs.clear()

    thread = threading.Thread(target=drop)
    thread.start()
    started.set()
    native.fill_normal_(outs, NOISE, index=[0, 1, 2, 3], offset=[0] * 4)
    thread.join()
    assert outs == [] and written != 0


class Liar(torch.Tensor):
    def stride(self):
        return ()


def test_strides_that_lie(native, params):
    params[3] = torch.randn(3, 4, 5).as_subclass(Liar)
    native._read_through("attributes")  # the others ask no such method
    with pytest.raises(ValueError, match="3 dims, but 0 strides"):
        perturb(native.perturb_gaussian_, params)


class Silent(tuple):
    def __iter__(self):
        raise AssertionError("nobody asks")


def test_a_subclass_of_tuple(native, params):
    versions = [p._version for p in params]
    perturb(native.perturb_gaussian_, Silent(params))
    assert [p._version for p in params] == [v + 1 for v in versions]


@pytest.mark.parametrize("what", ["state", "params", "keys"])
def test_gathering_state_that_changes(native, params, what):
    state = {p: {"a": p + 1, "b": p + 2} for p in params}
    keys, asked = ["a", "b"], list(params)
    keys[0] = Hook("a", emptying({"state": state, "params": asked, "keys": keys}[what]))
    found = native.gather_state(state, asked, keys)
    if what == "state":
        assert found is None
    else:
        assert all(torch.equal(a, p + 1) and torch.equal(b, p + 2) for p, a, b in zip(params, *found, strict=True))


# Memory that is written and must not be, and values that lead out of memory.


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", ["backups", "masters"])
@pytest.mark.parametrize("part", ["the same", "overlapping"])
def test_weights_kept_where_the_parameters_are(native, backend, name, part):
    """They would be lost."""
    data = torch.randn(1000)
    params, kept = [torch.randn(9), data[:600]], [torch.randn(9), data[:600] if part == "the same" else data[400:]]
    if part == "overlapping":
        params[1], kept[1] = data[:500], data[499:999]
    before = data.clone()
    function = resolve("perturb_gaussian_", "cpu", backend)
    with pytest.raises(ValueError, match=rf"{name}\[1\] shares memory with params\[1\]; pass another tensor"):
        perturb(function, params, **{name: kept})
    assert torch.equal(data, before)
    kept[1] = data[500:] if part == "overlapping" else torch.empty(600)  # neighbours do not overlap
    perturb(function, params, **{name: kept})


def test_state_kept_where_the_parameters_are(native, params):
    numbers = dict.fromkeys(("lr", "momentum", "grad_weight"), [0.1] * N)
    zeros = ("dampening", "weight_decay", "clean_weight", "kappa", "beta", "sigma", "eta")
    numbers |= dict.fromkeys(zeros, [0.0] * N)
    ints = {"index": [0] * N, "offset": [0] * N, "nesterov": [False] * N}
    grads, before = [torch.randn(300) for _ in params], params[0].clone()
    with pytest.raises(native.Mismatch, match=r"momentum_buffers\[0\] shares memory with params\[0\]"):
        native.sgd_update_(params, params, None, None, None, grads, *[None] * 9, **numbers, **ints)
    assert torch.equal(params[0], before)


def test_a_parameter_given_twice(native):
    """Which write is the last one is open; none goes astray."""
    p = torch.randn(300, 50)
    perturb(native.perturb_gaussian_, [p] * 8)
    assert p.isfinite().all()


def test_a_prefix_with_a_stride(native):
    grads, digits = [torch.randn(1000)], torch.full((4,), 5)
    digits[0], digits[2] = 1016, 7
    strided, plain = (torch.zeros(1026, dtype=torch.int64) for _ in range(2))
    native.count_magnitudes_(strided, grads, digits[::2])
    native.count_magnitudes_(plain, grads, digits[::2].clone())
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("digit", [-1, 1 << 11, 1 << 40])
def test_a_prefix_out_of_range(native, digit):
    with pytest.raises(native.Mismatch, match=r"prefix\[0\] is outside the range of its digit"):
        native.count_magnitudes_(torch.zeros(1026, dtype=torch.int64), [torch.randn(10)], torch.tensor([digit]))


WRONG = {
    "nan for an index": (TypeError, {"index": [float("nan")] * N}),
    "an index beyond 64 bits": (OverflowError, {"index": [1 << 80] * N}),
    "an index beyond 32 bits": (ValueError, {"index": [1 << 32] * N}),
    "a negative index": (ValueError, {"index": [-1] * N}),
    "a negative offset": (ValueError, {"offset": [-1] * N}),
    "nan for a number": (ValueError, {"sigma": [float("nan")] * N}),
    "too few numbers": (ValueError, {"sigma": [0.1]}),
    "too many numbers": (ValueError, {"sigma": [0.1] * (N + 1)}),
    "a generator": (TypeError, {"sigma": (0.1 for _ in range(N))}),
    "words": (TypeError, {"sigma": ["0.1"] * N}),
    "no list": (TypeError, {"sigma": 0.1}),
    "no tensors": (TypeError, {"backups": [None] * N}),
    "a tensor for a list": (TypeError, {"backups": torch.randn(N, 300)}),
    "meta tensors": ((ValueError, RuntimeError), {"backups": [torch.empty(300, device="meta")] * N}),
    "sparse tensors": ((ValueError, RuntimeError), {"backups": [torch.ones(300).to_sparse()] * N}),
}


@pytest.mark.parametrize("error, values", WRONG.values(), ids=WRONG)
def test_what_is_refused(native, params, error, values):
    before = [p.clone() for p in params]
    with pytest.raises(error):
        perturb(native.perturb_gaussian_, params, **values)
    assert_same(params, before)
