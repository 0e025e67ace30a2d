"""The kernel of bench/timing/streams_triton.py: interpreted, it touches what it is given and nothing else; compiled, it
moves 16 bytes at a time and spills nothing. The one needs TRITON_INTERPRET=1, the other a process without it."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6", reason="triton is not installed")

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind everything: only bench/ is looked for there
from bench.timing.streams_triton import LINE, NEVER, READ, UPDATE, VARIANTS, WRITE, Walk, stream_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, F16, BF16, MASK = torch.float32, torch.float16, torch.bfloat16, torch.uint8
SIZES = [(1,), (0,), (5, 7), (127,), (128,), (129,), (4, 1024), (3, 1367), (8191,)]


def stream_of(dtype):
    """Tensors of random bits."""
    counts = [torch.Size(shape).numel() for shape in SIZES]
    if dtype == MASK:
        return [torch.randint(0, 256, (-(-n // 8),), dtype=MASK) for n in counts]
    bits = [torch.randint(0, 256, (n * dtype.itemsize,), dtype=MASK) for n in counts]
    return [b.view(dtype).view(shape) for b, shape in zip(bits, SIZES, strict=True)]


def bytes_of(streams):
    return [t.view(-1).view(MASK).clone() for tensors in streams for t in tensors]


PASSES = {
    "all": ((F32, BF16, MASK), (F16, F32), (F32, F16, MASK)),
    "float32": ((F32,), (F32, F32), ()),
    "half precision": ((F16,), (BF16,), (F16,)),
    "a mask to write": ((F32,), (), (MASK,)),
}


@pytest.mark.covering(1)
@pytest.mark.skipif(not INTERPRETED, reason="nothing interprets it; make test-triton does")
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]], ids=str)
@pytest.mark.parametrize("dtypes", PASSES.values(), ids=PASSES)
def test_what_is_moved(dtypes, variant):
    """Reads and updates keep their bits, and writes become zeros; a second call launches the same."""
    torch.manual_seed(0)
    reads, updates, writes = ([stream_of(dtype) for dtype in some] for some in dtypes)
    kept = bytes_of(reads + updates)
    walk = Walk(reads, updates, writes, variant)
    for _ in range(2):
        for tensors in writes:
            for t in tensors:
                t.fill_(1)
        walk()
        assert all(map(torch.equal, bytes_of(reads + updates), kept))
        assert not any(t.count_nonzero() for t in bytes_of(writes))
    assert walk.sink.item() == 0


@pytest.mark.skipif(not INTERPRETED, reason="nothing interprets it; make test-triton does")
@pytest.mark.parametrize("place", range(3))
def test_what_is_read_is_used(place):
    """Bits that sum up to the number that must not come about, in whichever list: it is stored, so nothing read is lost
    to the compiler."""
    reads = [[torch.zeros(4096 + 8, dtype=dtype)] for dtype in (F32, F16, BF16)]
    walk = Walk(reads, [], [], VARIANTS[0])
    walk()
    assert walk.sink.item() == 0
    reads[place][0].view(torch.int32)[-4] = NEVER.value
    walk()
    assert walk.sink.item() == NEVER.value


@pytest.mark.skipif(not INTERPRETED, reason="nothing interprets it; make test-triton does")
def test_misaligned():
    with pytest.raises(ValueError, match="does not begin at a multiple of 16 bytes"):
        Walk([[torch.zeros(9)[1:]]], [], [], VARIANTS[0])


@pytest.mark.covering(1)
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("bits, access", [
    ((32, 32, 32, 32, 32), (READ, READ, READ, UPDATE, WRITE)),
    ((16, 32, 32, 16), (READ, UPDATE, UPDATE, WRITE)),
    ((32,), (READ,)),
], ids=str)  # fmt: skip
def test_compiled(bits, access, variant, tmp_path):
    from test_triton_compile import TARGETS, tool
    from triton.compiler import ASTSource

    access = tuple(a.value for a in access)
    fixed = {"BITS": bits, "ACCESS": access, "SIZE": variant.elements, "EVEN": True}
    names = stream_kernel.arg_names
    signature = {"tiles": "*i64", "pointers": "*i64", "sink": "*i32", **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(stream_kernel, signature, constexprs={(names.index(n),): value for n, value in fixed.items()})
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": variant.warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    code = tool("nvdisasm", "-c", cubin)
    threads = 32 * variant.warps
    loads, stores = (
        sum(variant.elements * b // LINE for b, a in zip(bits, access, strict=True) if a in wanted) // threads
        for wanted in ((READ.value, UPDATE.value), (UPDATE.value, WRITE.value))
    )
    assert len(re.findall(r"\bLDG\S*\.128", code)) == loads
    assert len(re.findall(r"\bSTG\S*\.128", code)) == stores
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", cubin)))
    assert used["STACK"] == used["LOCAL"] == "0" and int(used["REG"]) <= 96
