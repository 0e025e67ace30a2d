"""_C.stream: what benchmarks hold an operation's time against. It has to touch all it is given, and nothing else."""

import re

import pytest
import torch

_C = pytest.importorskip("flatkern._C", reason="the C++ kernels are not built")

F32, F16, BF16, MASK = torch.float32, torch.float16, torch.bfloat16, torch.uint8
# No multiples of anything; a vector's size and a block's, less one and more; several tiles of a large list.
SIZES = [(), (0,), (1,), (7, 3), (63,), (65,), (1023,), (5, 205), (1025,), (0, 4), (3, 5, 7, 11), (70_001,)]
LARGE = [(17,), (1_050_000,), (2049, 1601)]


def stream_of(shapes, dtype, start=0):
    """Tensors of random bits, NaN among them, with `start` elements before them and behind them."""
    found = []
    for shape in shapes:
        count = torch.Size(shape).numel()
        count = -(-count // 8) if dtype == MASK else count
        bits = torch.randint(0, 256, ((count + 2 * start) * dtype.itemsize,), dtype=torch.uint8)
        found.append(bits.view(dtype)[start : start + count].view((count,) if dtype == MASK else shape))
    return found


def bytes_of(streams):
    return [t.contiguous().view(-1).view(torch.uint8).clone() for tensors in streams for t in tensors]


def memory(t):
    """Bytes of a tensor, and of what is around it."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def zeroed(t):
    """The same as they should be when the tensor is zeros."""
    whole = memory(t).clone()
    begin = t.storage_offset() * t.element_size()
    whole[begin : begin + t.numel() * t.element_size()] = 0
    return whole


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("variant", range(len(_C.stream_variants)), ids=_C.stream_variants)
@pytest.mark.parametrize("start", [0, 3])
def test_what_is_moved(isa, variant, start, set_isa):
    """Reads and updates keep their bits, writes become zeros to the last byte, and what is around them stays."""
    torch.manual_seed(0)
    reads, updates, writes = ([stream_of(SIZES, d, start) for d in dtypes] for dtypes in (
        (F32, BF16, MASK), (F16, F32), (F32, F16, BF16, MASK),
    ))  # fmt: skip
    kept = bytes_of(reads + updates)
    wanted = [zeroed(t) for tensors in writes for t in tensors]
    set_isa(isa)
    _C.stream(reads, updates, writes, variant)
    assert all(map(torch.equal, bytes_of(reads + updates), kept))
    assert all(map(torch.equal, [memory(t) for tensors in writes for t in tensors], wanted))


@pytest.mark.parametrize("variant", range(len(_C.stream_variants)), ids=_C.stream_variants)
def test_large_lists(variant):
    """Of several tiles, by several threads: every element is reached, in whichever place of its tile."""
    torch.manual_seed(0)
    updates, writes = [stream_of(LARGE, F32)], [stream_of(LARGE, BF16), stream_of(LARGE, MASK)]
    kept = bytes_of(updates)
    _C.stream([], updates, writes, variant)
    assert all(map(torch.equal, bytes_of(updates), kept))
    assert not any(t.count_nonzero() for t in bytes_of(writes))


def test_versions():
    """Of what is written, as an operation would."""
    reads, updates, writes = ([stream_of(SIZES, F32)] for _ in range(3))
    _C.stream(reads, updates, writes)
    versions = [{t._version for t in tensors} for (tensors,) in (reads, updates, writes)]
    assert versions[0] == {0} and versions[1] == versions[2] == {1}


def test_what_is_in_no_call():
    """No tensors, and no elements."""
    _C.stream([[]], [], [[]])
    _C.stream((stream_of([(0,)], F32),), (), ())


W = [torch.zeros(3, 4)]
REFUSED = {
    "a tensor for a list of lists": ((W[0], [], []), TypeError, "reads is a Tensor, not a list of lists of tensors"),
    "a list of tensors for a list of lists": (([W[0]], [], []), TypeError, "expected a list of tensors, got a Tensor"),
    "a number in a list": (([[1.0]], [], []), TypeError, "entry 0 is a float, not a tensor"),
    "another length": (([W], [2 * W], []), ValueError, "list 1 has 2 tensors, but the first list of weights has 1"),
    "another size": (([W], [], [[torch.zeros(13)]]), ValueError, "list 1[0] has 13 elements, but should have 12"),
    "a mask of another size": (
        ([W, [torch.zeros(3, dtype=MASK)]], [], []), ValueError, "list 1[0] has 3 elements, but should have 2",
    ),
    "another dtype": (([[torch.zeros(12, dtype=torch.float64)]], [], []), ValueError, "list 0[0] is not float32"),
    "gaps": (([W], [[torch.zeros(3, 8)[:, ::2]]], []), ValueError, "list 1[0] is not dense in memory"),
    "masks alone": (([[torch.zeros(3, dtype=MASK)]], [], []), ValueError, "no list is of weights alone"),
    "nothing": (([], [], []), ValueError, "no list is of weights alone"),
    "too many": ((17 * [W], [], []), ValueError, "17 lists are given, but should be 16 at most"),
    "a variant beyond": (([W], [], [], len(_C.stream_variants)), ValueError, "variant is"),
    "a variant before": (([W], [], [], -1), ValueError, "variant is -1, but should be 0 to"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(arguments, error, message):
    """Before anything is written."""
    with pytest.raises(error, match=re.escape(message)):
        _C.stream(*arguments)
    assert W[0]._version == 0
