"""The CUDA backend on the CPU, where its kernels are emulated: eager's bits, the noise, the order of sums.

Runs where FLATKERN_CUDA_EMULATION names the emulated library, as `make test-cuda` does. The emulation pays by thread,
so that lists of tensors are short and dense. What nvcc makes of the kernels is in test_cuda_compile.py.
"""

import copy

import cases
import numpy as np
import pytest
import torch
from compare import assert_ulp, assert_within
from emulated import (
    ALL,
    ALL_VARIANTS,
    CUDA,
    FEW,
    LONG,
    RICHEST,
    SHORT,
    UPDATES,
    VARIANTS,
    assert_like_eager,
    every_op,
    needs_emulation,
)
from test_backends import assert_same_bits, lists, make, name_of, run
from test_noise import COUNTERS, KNOWN, assert_normals_of, fill, numbers, strict_fma

from flatkern import checks
from flatkern.ops import OPS

pytestmark = needs_emulation

# Next to eager.


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op, words", ALL_VARIANTS, ids=name_of)
def test_matches_eager(op, words, dtype):
    assert_like_eager(op, (SHORT, dtype, words))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op, words", ALL_VARIANTS, ids=name_of)
def test_matches_eager_where_rows_are_long(op, words, dtype):
    assert_like_eager(op, (LONG, "mixed" if dtype == "bfloat16" and "masters" not in words else dtype, words))


@pytest.mark.parametrize("columns", [6144, 6152, 8192, 8200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@every_op
def test_the_longest_rows_of_small_blocks(op, dtype, columns):
    """In blocks of 256 threads, each of which takes 24 or 32 columns; and the next longer rows."""
    for words in (RICHEST[op.name], "backups noise"):
        assert_like_eager(op, ([(2, columns), (3, 5)], dtype, words))


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@every_op
def test_rows_of_every_short_length(op, dtype):
    """Each length has its own number of lanes, of eights that are cut short, and of rows to a warp."""
    shapes = [shape for n in range(1, 41) for shape in ((1 + n % 7, n), (n,))]
    assert_like_eager(op, (shapes, dtype, RICHEST[op.name]))


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("op, words", VARIANTS, ids=name_of)
def test_other_layouts(op, words, dtype):
    """channels_last everywhere; dim 1 outermost where no filter is walked, and refused where one is."""
    layouts = words + " channels_last transposed"
    shapes = [(8, 3, 5, 5), (17,), (4, 16, 2, 2), (1, 5, 3, 3), (40, 24)]
    if op.name in checks.WALKS_FILTERS or {"noise", "history", "masks"} & set(words.split()):
        values = make(op, shapes, dtype, layouts)
        before = copy.deepcopy(values)
        with pytest.raises(ValueError, match=r"\[4\] .* dim 0 is not outermost .*contiguous\(\)"):
            run(op, "cuda", values)
        assert_same_bits(op, values, before)
        shapes.pop()
    assert_like_eager(op, (shapes, dtype, layouts))


def shifted(values, only=None):
    """Tensors of lists, or of the one that is named, moved to where their element size alone divides their address."""

    def move(t):
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        return room[1:].as_strided(t.shape, t.stride()).copy_(t)

    def is_moved(name, value):
        return only in (None, name) and isinstance(value, list) and isinstance(value[0], torch.Tensor)

    return {name: [move(t) for t in value] if is_moved(name, value) else value for name, value in values.items()}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@every_op
def test_unaligned_addresses(op, dtype):
    """Of all lists, and of any one of them: vectors of 16 bytes are then not to be moved."""
    case = [*FEW, (1, 8200)], dtype, RICHEST[op.name]
    names = {argument.name for argument, _ in lists(op, make(op, *case)) if argument.type.startswith("Tensor[]")}
    for only in [None, *sorted(names)]:
        assert_like_eager(op, case, lambda values, only=only: shifted(values, only))


# Bytes of a kernel's arguments that a tensor takes, at most: those of up to 4 KB and of up to 32,764 bytes are two
# kernels, and what does not fit these is for further launches.
BYTES = {
    "fill_normal_": 9, "filter_norms_": 17, "ascent_norm_": 21, "gradient_norm_": 25, "perturb_gaussian_": 50,
    "perturb_ascent_": 41, "restore_": 17, "mix_gradients_": 37, "count_magnitudes_": 9, "pack_mask_": 17,
    "amplify_": 29,
    "sgd_update_": 106, "adam_update_": 170, "adamw_update_": 170,
}  # fmt: skip


# What these write is one number, or one table of counts, of all tensors.
TOTALS = [op for op in CUDA if not any(a.mutated and a.type.startswith("Tensor[]") for a in op.arguments)]


def parts(values, length):
    """The same call as several of so many tensors."""
    for k in range(0, max(len(x) for x in values.values() if isinstance(x, list)), length):
        yield {name: x[k : k + length] if isinstance(x, list) else x for name, x in values.items()}


@pytest.mark.parametrize("room, launches", [(4096, 1), (32764, 2), (65528, 3)])
@pytest.mark.parametrize("op", [op for op in CUDA if op not in TOTALS], ids=name_of)
def test_many_tensors(op, emulated, room, launches):
    """Are what they are in calls of a few: each has its own scalars."""
    small = [(1,), (3, 5), (2, 3), (), (9,), (1, 300), (0,)]
    case = [small[k % len(small)] for k in range(room // BYTES[op.name] + 2)], "float32", RICHEST[op.name]
    got, want = make(op, *case), make(op, *case)
    before = emulated.launch_count()
    run(op, "cuda", got)
    assert emulated.launch_count() - before == launches
    for part in parts(want, 20):
        run(op, "cuda", part)
    assert_same_bits(op, got, want)


@pytest.mark.parametrize("room, launches", [(4096, 1), (32764, 2), (65528, 3)])
@pytest.mark.parametrize("op", TOTALS, ids=name_of)
def test_a_total_of_many_tensors(op, emulated, room, launches):
    """It goes on through all launches."""
    before = emulated.launch_count()
    assert_like_eager(op, ([(1 + k % 9,) for k in range(room // BYTES[op.name] + 2)], "mixed", RICHEST[op.name]))
    assert emulated.launch_count() - before == launches


@every_op
def test_no_tensors_at_all(op):
    assert_like_eager(op, ([], "float32", ""))


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("op, words", [v for v in VARIANTS if v[0] in TOTALS and "norm" in v[0].name], ids=name_of)
@pytest.mark.parametrize("largest", [1e30, float("inf"), float("nan")])
def test_norms_of_large_gradients(op, words, dtype, largest):
    """As finite as the gradients are; infinity and NaN stay."""
    case = make(op, FEW, dtype, words)
    if dtype == "float32":
        case = cases.enlarge_gradients(case, largest)
    want = run(op, "eager", copy.deepcopy(case))
    assert want["norm"].isfinite() or not abs(largest) < 1e38 or "specials" in words
    assert_within(op, run(op, "cuda", copy.deepcopy(case)), want)


# The noise.


def test_normals_of_every_radius_and_angle():
    """Two million words have each of the 65536 halves, unless the key is one of a billion."""
    shape, noise = (1024, 4096), [0x9E3779B9, 0x243F6A88, 0xB7E15162]
    assert_ulp("normals", fill("cuda", shape, noise), fill("eager", shape, noise))


@pytest.mark.parametrize("key", [numbers(key) for _, key, _ in KNOWN], ids="{0[0]:08x}".format)
def test_which_normals_a_counter_gives(key):
    """As test_noise.py has it."""
    for counter in COUNTERS:
        assert_normals_of("cuda", counter, key)


@pytest.mark.parametrize("length", [5, 64, 300, 5000, 9000, 40000])
def test_a_shard_draws_what_the_whole_does(length):
    """Vectors that begin anywhere in an eight."""
    noise, whole = [1, 2, 3], fill("cuda", (length + 40,), [1, 2, 3], 7)
    for offset in range(1, 20):
        assert_ulp(f"offset {offset}", fill("cuda", (length,), noise, 7, offset), whole[offset:][:length])


DRAWING = [(op, words) for op, words in ALL_VARIANTS if "noise" in words.split() or op.name == "perturb_gaussian_"]


@pytest.mark.parametrize("op, words", DRAWING, ids=name_of)
def test_noise_read_on_the_device(op, words, emulated):
    """As under a captured graph: the kernel reads the words, and the host does not look at them."""
    want = run(op, "cuda", make(op, FEW, "float32", words))
    emulated.noise_is_on_device(True)
    assert_same_bits(op, run(op, "cuda", make(op, FEW, "float32", words)), want)


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


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("words", ["", "masters", "backups history", "masters history offset"])
def test_norms_measured_inside_are_those_of_filter_norms(words, dtype):
    """perturb(norms=None) = perturb(norms=filter_norms_(w)), to the bit."""
    op = OPS["perturb_gaussian_"]
    inside, given = make(op, ALL, dtype, words), make(op, ALL, dtype, words + " norms")
    given |= {name: copy.deepcopy(inside[name]) for name in ("params", "backups", "masters", "history")}
    run(OPS["filter_norms_"], "cuda", dict(norms=given["norms"], params=given["masters"] or given["params"]))
    assert_same_bits(op, run(op, "cuda", inside), run(op, "cuda", given) | {"norms": None})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "words", ["", "masters", "backups grad_scale clip", "masters history offset skip", "backups masks"]
)
@pytest.mark.parametrize("name", UPDATES)
def test_a_rolling_update_is_an_update_and_a_perturbation(name, words, dtype):
    """update(noise) = update(), then perturb_gaussian_ of the weights that it stored, to the bit, backups included."""
    op, perturb = OPS[name], OPS["perturb_gaussian_"]
    fused, steps = (make(op, ALL, dtype, words + " noise") for _ in range(2))
    run(op, "cuda", fused)
    noise, steps["noise"] = steps["noise"], None
    run(op, "cuda", steps)
    given = {a.name: steps.get(a.name) for a in perturb.arguments} | {"noise": noise, "norms": None}
    run(perturb, "cuda", given)
    assert_same_bits(op, fused, steps | {"noise": noise})
