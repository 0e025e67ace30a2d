"""The CUDA backend on the CPU, where its kernels are emulated: eager's bits, the noise, the order of sums.

Runs where FLATKERN_CUDA_EMULATION names the emulated library, as `make test-cuda` does. The emulation pays by thread,
so that lists of tensors are short and dense. What nvcc makes of the kernels is in test_cuda_compile.py.
"""

import numpy as np
import pytest
import torch
from compare import assert_within
from emulated import CUDA, every_op, needs_emulation
from test_backends import UPDATES, assert_like_eager, assert_same_bits, make, name_of, run
from test_noise import strict_fma
from walks import FEW, richest

from flatkern.ops import OPS

pytestmark = needs_emulation

# Next to eager.


@pytest.mark.parametrize("columns", [6144, 6152, 8192, 8200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@every_op
def test_the_longest_rows_of_small_blocks(op, dtype, columns):
    """In blocks of 256 threads, each of which takes 24 or 32 columns; and the next longer rows."""
    for words in (richest(op), "backups noise"):
        assert_like_eager(op, "cuda", ([(2, columns), (3, 5)], dtype, words))


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@every_op
def test_rows_of_every_short_length(op, dtype):
    """Each length has its own number of lanes, of eights that are cut short, and of rows to a warp."""
    shapes = [shape for n in range(1, 41) for shape in ((1 + n % 7, n), (n,))]
    assert_like_eager(op, "cuda", (shapes, dtype, richest(op)))


# Beside gradients of bfloat16: those of weights that are float32, too, have kernels of their own.
FLOAT32_MEANS = {
    "norm": ("ascent_norm_", "params means", "params means"),
    "masters": ("perturb_ascent_", "new_means masters means", "means new_means"),
    "bfloat16 weights": ("perturb_ascent_", "backups new_means means", "means new_means"),
    "only the old ones": ("perturb_ascent_", "backups new_means means", "means"),
}


@pytest.mark.parametrize("name, words, wide", FLOAT32_MEANS.values(), ids=FLOAT32_MEANS)
def test_means_of_float32(name, words, wide):
    op, got, want = OPS[name], *(make(OPS[name], [*FEW, (1, 8200)], "bfloat16", words) for _ in range(2))
    for values in (got, want):
        values |= {which: [t.float() for t in values[which]] for which in wide.split()}
    assert_within(op, run(op, "cuda", got), run(op, "eager", want))


# Bytes of a kernel's arguments that a tensor takes, at most: those of up to 4 KB and of up to 25 KB are two kernels,
# and what does not fit these is for further launches.
SMALL, LARGE = 4096, 25 * 1024
BYTES = {
    "fill_normal_": 9, "filter_norms_": 17, "ascent_norm_": 36, "gradient_norm_": 25, "gradient_products_": 17,
    "perturb_gaussian_": 50, "perturb_ascent_": 72, "restore_": 17, "mix_gradients_": 45, "count_magnitudes_": 9,
    "pack_mask_": 17, "amplify_": 29,
    "sgd_update_": 106, "adam_update_": 170, "adamw_update_": 170,
}  # fmt: skip


# What these write is one number, or one table of counts, of all tensors.
TOTALS = [op for op in CUDA if not any(a.mutated and a.type.startswith("Tensor[]") for a in op.arguments)]


def parts(values, length):
    """The same call as several of so many tensors."""
    for k in range(0, max(len(x) for x in values.values() if isinstance(x, list)), length):
        yield {name: x[k : k + length] if isinstance(x, list) else x for name, x in values.items()}


@pytest.mark.parametrize("room, launches", [(SMALL, 1), (LARGE, 2), (2 * LARGE, 3)])
@pytest.mark.parametrize("op", [op for op in CUDA if op not in TOTALS], ids=name_of)
def test_many_tensors(op, emulated, room, launches):
    """Are what they are in calls of a few: each has its own scalars."""
    small = [(1,), (3, 5), (2, 3), (), (9,), (1, 300), (0,)]
    case = [small[k % len(small)] for k in range(room // BYTES[op.name] + 2)], "float32", richest(op)
    got, want = make(op, *case), make(op, *case)
    before = emulated.launch_count()
    run(op, "cuda", got)
    assert emulated.launch_count() - before == launches
    for part in parts(want, 20):
        run(op, "cuda", part)
    assert_same_bits(op, got, want)


@pytest.mark.parametrize("room, launches", [(SMALL, 1), (LARGE, 2), (2 * LARGE, 3)])
@pytest.mark.parametrize("op", TOTALS, ids=name_of)
def test_a_total_of_many_tensors(op, emulated, room, launches):
    """It goes on through all launches."""
    before = emulated.launch_count()
    assert_like_eager(op, "cuda", ([(1 + k % 9,) for k in range(room // BYTES[op.name] + 2)], "mixed", richest(op)))
    assert emulated.launch_count() - before == launches


# Sums.

LENGTHS = [1, 2, 5, 8, 9, 31, 40, 255, 256, 257, 1000, 2049, 6144, 6152, 8192, 8200, 20000, 32768, 32769, 70001, 135177]


def tree(x):
    """The sum of a last dimension of 32 numbers, halves first."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def padded(x, step):
    return np.concatenate([x, np.zeros(-len(x) % step, x.dtype)]).reshape(-1, step)


def lanes(x):
    """32 lanes, each adding every 32nd number."""
    total = np.zeros(32, x.dtype)
    for row in padded(x, 32):
        total = total + row
    return tree(total)


def sum_of_squares(x):
    """In the one order of rows.cuh; in float64 where a row is cut into segments."""
    if len(x) > 32768:
        return lanes(np.array([sum_of_squares(x[k : k + 4096]) for k in range(0, len(x), 4096)], np.float64))
    chains = np.zeros((2, -(-len(x) // 8)), np.float32)
    for j, column in enumerate(padded(x, 8).T):
        chains[j % 2] = strict_fma(column, column, chains[j % 2])
    return lanes(tree(padded(chains[0] + chains[1], 32)))


@pytest.fixture(scope="module")
def measured():
    """A row of each length, and its sum of squares in float32, or in float64."""
    generator = np.random.default_rng(5)
    found = [generator.standard_normal(n).astype(np.float32) for n in LENGTHS]
    return [torch.from_numpy(row) for row in found], [sum_of_squares(row) for row in found]


# Alone, or how else rows may lie: which lengths are in a call, how many rows, where in memory, how shaped.
NEIGHBOURS = {
    "alone": lambda found: [[row.view(1, -1)] for row in found],
    "a vector": lambda found: [[row] for row in found],
    "unaligned": lambda found: [[torch.cat([row[:1], row])[1:].view(1, -1)] for row in found],
    "eleven rows": lambda found: [[row.expand(11, -1).contiguous()] for row in found[:-3]],
    "longer ones beside it": lambda found: [[row.view(1, -1) for row in found]],
    "shorter ones beside it": lambda found: [[row.view(1, -1) for row in found[:k]] for k in range(len(found))],
    "in another order": lambda found: [[row.view(1, -1) for row in reversed(found)]],
}


@pytest.mark.parametrize("calls", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_the_order_of_a_sum_is_that_of_its_length(calls, measured):
    """Whatever is beside a row, its norm has the bits that rows.cuh describes."""
    rows, sums = measured
    roots = {len(row): np.float32(np.sqrt(total)) for row, total in zip(rows, sums, strict=True)}
    for params in calls(rows):
        norms = [torch.zeros(p.shape[0] if p.dim() == 2 else 1) for p in params]
        run(OPS["filter_norms_"], "cuda", dict(norms=norms, params=params))
        for p, norm in zip(params, norms, strict=True):
            assert norm.tolist() == [roots[p.shape[-1]]] * len(norm), p.shape


@pytest.mark.parametrize("name", UPDATES)
def test_histories_are_summed_in_the_same_order(name, measured):
    op, (rows, sums) = OPS[name], measured
    values = make(op, [(1, n) for n in LENGTHS], "float32", "history")
    values |= dict(grads=[row.view(1, -1).clone() for row in rows], beta=[0.0] * len(LENGTHS))
    run(op, "cuda", values)
    assert [h.item() for h in values["history"]] == [np.float32(total) for total in sums]
