"""The CUDA backend, emulated: orders of threads, barriers, launches, tables, values on the device, refusals."""

import contextlib
import copy

import cases
import pytest
import torch
from compare import assert_within
from emulated import CUDA, VARIANTS, every_op, needs_emulation
from test_backends import assert_same_bits, lists, make, name_of, run
from walks import FEW, richest

from flatkern import cuda
from flatkern.ops import OPS

pytestmark = needs_emulation

# Threads.

SCHEDULES = ["forward", "reverse", *(f"{kind}:{seed}" for kind in ("random", "warps") for seed in (1, 2, 3))]
# Several rows to a warp, a row to several warps, a row to a block, segments; several blocks of each.
MEETING = [(70, 9), (3, 257), (12, 1000), (300,), (2, 40001)], [(70, 9), (3, 8200), (20,), (2, 33000)]


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@every_op
def test_same_bits_in_every_order_of_threads(op, dtype, emulated):
    for shapes in MEETING:
        results = []
        for schedule in SCHEDULES:
            emulated.set_schedule(schedule)
            results.append(run(op, "cuda", make(op, shapes, dtype, richest(op))))
        for result in results[1:]:
            assert_same_bits(op, result, results[0])


# Launches and tables.


@pytest.fixture
def uploads(emulated):
    """Sizes of the tables that were uploaded."""
    allocate, upload, stream = cuda._on_the_cpu()
    found = []
    emulated.use_torch(allocate, lambda index, data: found.append(len(data)) or upload(index, data), stream)
    yield found
    emulated.use_torch(allocate, upload, stream)


@pytest.mark.parametrize("longest", [100, 9000, 32768, 32769])
@pytest.mark.parametrize("op, words", VARIANTS, ids=name_of)
def test_one_launch(op, words, longest, emulated):
    """However many tensors there are; two where noise waits for the norms of rows that are cut into segments."""
    waits = "noise" in words.split() or (op.name == "perturb_gaussian_" and "norms" not in words.split())
    for times in (1, 5):
        values = make(op, [(3, 16), (2, longest), (24,)] * times, "float32", words)
        before = emulated.launch_count()
        run(op, "cuda", values)
        assert emulated.launch_count() - before == (2 if waits and longest > 32768 else 1)


@every_op
def test_tables_are_uploaded_once(op, emulated, uploads):
    """What depends on shapes alone is there; pointers and numbers are given to each launch."""
    shapes = [(6, 11 + CUDA.index(op)), (2, 35000), (29,), (0,)]  # Adam and AdamW share tables
    for step in range(3):
        got, want = (make(op, shapes, "float32", richest(op)) for _ in range(2))
        for values in (got, want):  # other numbers, and tensors elsewhere in memory
            for argument in op.arguments:
                if argument.type == "float[]" and argument.name not in ("beta1", "beta2"):
                    values[argument.name] = [x / (1 + step) for x in values[argument.name]]
        assert_within(op, run(op, "cuda", got), run(op, "eager", want))
    assert len(uploads) == 1
    run(op, "cuda", make(op, shapes[:3], "float32", richest(op)))
    assert len(uploads) == 2


def test_tables_do_not_accumulate(uploads):
    """The last 32 of an operation are kept, and one that was given up is made anew."""
    sizes = [*range(900, 932), 900, 932, 900, 901]
    for size in sizes:
        p = torch.zeros(size)
        run(OPS["restore_"], "cuda", dict(params=[p], backups=[torch.ones(size)]))
        assert p.eq(1).all()
    assert len(uploads) == 34, "900 was used again before 932 pushed one out; 901 was not"


# Calls that cannot be.


@every_op
def test_another_device_is_current(op, emulated):
    """The native function has done nothing; the op makes the tensors' device current, and puts the other one back."""
    values = make(op, FEW, "mixed", richest(op))
    before, count = copy.deepcopy(values), emulated.launch_count()
    emulated.set_current_device(1)
    with pytest.raises(emulated.WrongDevice, match=rf"{op.name}: device 1 is current, but the tensors are on 0"):
        cases.call(getattr(emulated, op.name), op, values)
    assert_same_bits(op, values, before)
    assert emulated.launch_count() == count
    run(op, "cuda", values)
    assert emulated.current_device() == 1
    emulated.set_current_device(0)
    assert_same_bits(op, values, run(op, "cuda", before))


@every_op
def test_memory_that_cannot_be_had(op, emulated, uploads):
    """The error is torch's, nothing has changed, and the next call does everything."""
    values = make(op, [(7, 13 + CUDA.index(op)), (31,)], "float32", richest(op))
    before = copy.deepcopy(values)
    versions = [t._version for _, tensors in lists(op, values) for t in tensors]

    def refuse(index, data):
        raise torch.OutOfMemoryError("CUDA out of memory")

    allocate, upload, stream = cuda._on_the_cpu()
    emulated.use_torch(allocate, refuse, stream)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(op, "cuda", values)
    assert versions == [t._version for _, tensors in lists(op, values) for t in tensors]
    assert_same_bits(op, values, before)
    emulated.use_torch(allocate, upload, stream)
    assert_within(op, run(op, "cuda", values), run(op, "eager", before))


def test_memory_that_is_none(emulated, uploads):
    """A tensor without memory, as under FakeTensorMode, is refused, and no later call finds a plan with it."""
    op = OPS["filter_norms_"]
    values = make(op, [(7, 91)], "float32", richest(op))
    allocate, upload, stream = cuda._on_the_cpu()
    emulated.use_torch(allocate, lambda index, data: torch.empty(0), stream)
    with pytest.raises(RuntimeError, match="torch gives no memory here"):
        run(op, "cuda", values)
    emulated.use_torch(allocate, upload, stream)
    assert_within(op, run(op, "cuda", values), run(op, "eager", copy.deepcopy(values)))


@contextlib.contextmanager
def failing_launch(emulated, which):
    """The launch of this number, from 1, fails, and with it the block."""
    left = [which]

    def fail(*launch):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("no more launches")

    emulated.watch(fail)
    try:
        with pytest.raises(RuntimeError, match="no more launches"):
            yield
    finally:
        emulated.watch(None)


@pytest.mark.parametrize("name", ["ascent_norm_", "gradient_norm_", "gradient_products_", "count_magnitudes_"])
def test_a_total_after_one_that_failed(name, emulated):
    """The first launch of two leaves no sum and no count that the next call's blocks would go on with."""
    op, many = OPS[name], 4000
    values = make(op, [(3,)] * many, "float32", richest(OPS[name]))
    with failing_launch(emulated, 2):
        run(op, "cuda", values)
    for _ in range(2):
        assert_within(op, run(op, "cuda", values), run(op, "eager", copy.deepcopy(values)))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_launch_that_fails(failing, emulated):
    """The second of two: the first has written, so versions have moved. The first: nothing has changed."""
    params, ones = ([value.clone() for _ in range(3000)] for value in (torch.zeros(3), torch.ones(3)))
    with failing_launch(emulated, failing):
        run(OPS["restore_"], "cuda", dict(params=params, backups=ones))
    written = [bool(p.eq(1).all()) for p in params]
    assert written == sorted(written, reverse=True) and any(written) == (failing == 2) and not all(written)
    assert all((p._version > 0) == (failing == 2) for p in params)
