"""What the Triton backend cuts tensors into: few launches, few lanes that have nothing to do, every element once."""

import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="triton is not installed, so nothing is cut for it")

from flatkern.triton_kernels import plan

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind everything: only bench/ is looked for there
from bench.models import MODELS

LISTS = {  # of a call: its names
    "perturb": ("params", "backups", "masters", "norms", "history"),
    "sgd": ("params", "backups", "momentum_buffers"),
    "adam": ("params", "backups", "exp_avgs", "exp_avg_sqs"),
    "mask": ("params", "masks"),
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90")


def cut(shapes, names, given=(), even=True, by_rows=True):
    """The plan of a call whose lists `names` have float32 tensors of these shapes; of the optional ones those given."""
    like = [torch.empty(shape, device="meta") for shape in shapes]
    optional = ("backups", "masters", "norms", "history", "masks")
    types = tuple(None if name in optional and name not in given else 1 for name in names)
    zeros = [0] * len(like)
    return plan.build(like, names, [types] * len(like), [even] * len(like), by_rows, zeros, zeros, torch.from_numpy)


def walked(cut_):
    """How often each row's columns are in a tile, as {(tensor, row): {(first, end): times}}."""
    found = {}
    for group in cut_.groups:
        for k, row, column, end, shape in group.tiles.tolist():
            rows, columns = group.shapes[shape]
            for r in range(row, min(row + rows, int(cut_.tensors[k, 1]))):
                found.setdefault((k, r), Counter())[column, min(end, column + columns)] += 1
    return found


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_every_row_is_in_one_tile(names):
    """Of any length: whole, or in segments that follow each other."""
    dice = random.Random(2)
    lengths = [*range(1, 40), 127, 128, 129, 255, 257, 768, 1600, 4608, 8191, 8192, 8193, 20003]
    lengths += [dice.randrange(1, 9000) for _ in range(40)]
    shapes = [(dice.randrange(1, 40), n) for n in lengths] + [(n,) for n in lengths] + [(0,), (), (3, 0)]
    for given in ((), ("history", "masks")):
        found = walked(cut(shapes, names, given))
        for k, shape in enumerate(shapes):
            rows, length = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0] if shape else 1)
            for row in range(rows):
                spans = sorted(found.pop((k, row)))
                assert spans[0][0] == 0 and spans[-1][1] == length, shape
                assert all(a[1] == b[0] for a, b in itertools.pairwise(spans)), shape
        assert not found


def test_pieces_of_rows():
    """At most three powers of two, none smaller than an eighth of the first one; of long rows few idle lanes."""
    for length in range(1, plan.RESIDENT + 1):
        columns = plan.columns_for(length)
        digits = [1 << d for d in range(14) if columns >> d & 1]
        assert length <= columns <= max(16, 2 * length - 1) and len(digits) <= plan.PIECES
        assert digits[-1] <= 8 * digits[0] and (len(digits) == 1 or digits[0] >= plan.FINEST)
        if length > 1024:
            assert columns <= 1.151 * length, length
    exact = "64 128 256 512 640 768 896 1024 1152 1536 2048 2304 3072 3584 4096 4608 5120 5632 6144 8192"
    assert all(plan.columns_for(n) == n for n in map(int, exact.split()))


LAUNCHES = {  # of what walks rows: model, lists, those that are given, launches, at most so many lanes an element
    "ResNet-50, perturb": ("resnet50", "perturb", ("backups",), 2, 1.02),
    "ResNet-50, rolling SGD": ("resnet50", "sgd", ("backups",), 3, 1.02),
    "ResNet-50, rolling AdamW": ("resnet50", "adam", ("backups",), 2, 1.02),
    "ResNet-50, mask": ("resnet50", "mask", ("masks",), 3, 1.02),
    "GPT-2, perturb": ("gpt2", "perturb", ("backups",), 1, 1.01),
    "GPT-2, perturb with a history": ("gpt2", "perturb", ("backups", "history"), 2, 1.01),
    "GPT-2, rolling AdamW": ("gpt2", "adam", ("backups",), 1, 1.01),
    "Llama 1.1B, perturb": ("llama_1b", "perturb", ("backups",), 2, 1.01),
}


@pytest.mark.parametrize("model, names, given, launches, lanes", LAUNCHES.values(), ids=LAUNCHES)
def test_a_model_takes_few_launches_and_few_idle_lanes(model, names, given, launches, lanes):
    found = cut(MODELS[model].shapes(), LISTS[names], given)
    assert len(found.groups) <= launches and not found.long_row_count
    room = sum(
        int(times) * rows * columns
        for group in found.groups
        for times, (rows, columns) in zip(group.tiles[:, 4].bincount().tolist(), group.shapes, strict=True)
    )
    assert room <= lanes * MODELS[model].numel


def test_many_lengths_share_tiles():
    """What is compiled does not grow with the lengths of rows, and nothing is walked by much wider tiles."""
    lengths = [8 * n for n in range(2, 1000, 7)]
    (group, *more) = cut([(4, n) for n in lengths], LISTS["perturb"], ("backups",)).groups
    shapes = [shape for g in (group, *more) for shape in g.shapes]
    assert len(shapes) <= plan.MOST_SHAPES
    widths = sorted(columns for _, columns in shapes)
    assert all(next(w for w in widths if w >= n) < 2.6 * n for n in lengths if n > 64)


def test_a_vector_alone_is_a_row_like_others():
    """Unless a history or a mask has a number for each of its elements."""
    assert len(cut([(64, 768), (768,), (24,)], LISTS["perturb"], ("backups",)).groups) == 1
    assert len(cut([(64, 768), (768,), (24,)], LISTS["perturb"], ("backups", "history")).groups) == 2
