"""The machine code that nvcc makes for sm_90 writes the same bits as the same sources emulated, without a GPU.

It is executed by bench/gpu/sass.py, block by block: slowly, so that tensors are few and small.
"""

import sys
from pathlib import Path

import pytest
import torch
from disassembled import kernels_of

sys.path.append(str(Path(__file__).parents[1]))
from bench.gpu import counted, sass

SHAPES = [
    (3, 768),  # a warp has a row
    (2, 2304),  # several warps have one
    (40, 8),  # several rows share a warp
    (3, 147), (7,),  # eights that are cut short
    (1, 33000),  # cut into segments
]  # fmt: skip
CASES = counted.CASES | {
    "fill": counted.Case("fill_normal_", "noise.cu"),
    "norms": counted.Case("filter_norms_", "norm.cu"),
    "restore": counted.Case("restore_", "perturb.cu"),
}


def made(case, shapes):
    values = counted.arguments(case, shapes)
    for k, shape in enumerate(shapes):
        counted.fill(values, k, 0, torch.Size(shape).numel())
    return values


def execute(case, values):
    memory = sass.Memory()
    for launch in counted.launches(case, values):
        memory.look()
        for block in range(launch.grid):
            launch.run(kernels_of("sm_90")[launch.kernel], memory, block)


def tensors(values):
    listed = {name: each if isinstance(each, list) else [each] for name, each in values.items()}
    return {
        (name, k): tensor
        for name, each in listed.items()
        for k, tensor in enumerate(each)
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_machine_code_writes_the_same_bits(case):
    got, want = made(case, SHAPES), made(case, SHAPES)
    before = {key: tensor.clone() for key, tensor in tensors(want).items()}
    execute(case, got)
    counted.call(case, want)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in tensors(want).items())
    assert [key for key, tensor in tensors(got).items() if not torch.equal(tensor, tensors(want)[key])] == []


# Instructions for an element, in rows of GPT-2 and ResNet-50: with more of them the kernels would wait for the
# multiprocessors instead of for memory. A count and a norm have one tile a block here; with the 15 of GPT-2 they take
# 20 and 7.
FEW = {
    "perturb": 50, "sgd": 30, "sgd, rolling": 72, "adamw, rolling, masters": 125, "ascent norm": 10, "ascent": 14,
    "mix": 14, "count": 27, "pack": 14, "amplify": 17,
}  # fmt: skip


@pytest.mark.parametrize("which", FEW)
def test_few_instructions(which):
    case, memory = CASES[which], sass.Memory()
    values, counts = made(case, [(16, 768), (2, 4608)]), []
    for launch in counted.launches(case, values):
        memory.look()
        counts += counted.counted(case, launch, kernels_of("sm_90")[launch.kernel], values, memory)
    assert counted.summary(which, "", counts)["whole"] <= FEW[which]


# Longer than 8192 columns, so that a block has 1024 threads.
@pytest.mark.parametrize("which", ["perturb", "adamw, rolling, masters"])
def test_machine_code_for_long_rows_writes_the_same_bits(which):
    got, want = (made(CASES[which], [(2, 9000)]) for _ in range(2))
    execute(CASES[which], got)
    counted.call(CASES[which], want)
    assert [key for key, tensor in tensors(got).items() if not torch.equal(tensor, tensors(want)[key])] == []
