"""bench/results/model.json is what the compiled code gives, and what the model counts is there.

Exact for every Triton that the table has a section of; `make gpu-model` writes it.
"""

import json

import numpy as np
import pytest
import stand_in_driver

driver = stand_in_driver.driver  # without Triton, nothing below is imported

import triton  # noqa: E402

from bench.gpu import model, sass, sass_time, triton_code  # noqa: E402
from bench.gpu.disassembly import Code, Instruction  # noqa: E402
from bench.gpu.sass_numbers import directed  # noqa: E402

# Those that compile in seconds, with every kind of kernel among them.
CHECKED = [
    ("perturb", "gpt2"),
    ("sgd, rolling", "gpt2"),
    ("adamw, rolling, masters", "gpt2"),
    ("sam", "resnet50"),
    ("restore", "llama_1b"),
]


@pytest.mark.matrix
@pytest.mark.parametrize("call, name", CHECKED)
def test_the_table_is_what_the_code_gives(call, name, driver):
    parts = model.executed(call, name, driver)
    elements = model.MODELS[name].numel
    for part, counts, _ in parts:
        # All of the bytes that have to move do so, once, and hardly more: tables, and sectors that rows share.
        assert sum(c.elements for c in counts) == elements
        assert part.bytes <= sum(c.bytes for c in counts if c.elements) / elements <= 1.03 * part.bytes
    versions = json.loads(model.RESULTS.read_text())["triton"]
    if triton.__version__ not in versions:
        pytest.skip(f"the table has no section of triton {triton.__version__}; make gpu-model adds one")
    (recorded,) = [row for row in versions[triton.__version__] if (row["call"], row["model"]) == (call, name)]
    found = json.loads(json.dumps(model.modelled(call, name, parts)))
    assert found == recorded, "the code has changed: make gpu-model writes the table anew"


@pytest.mark.parametrize("version", ["3.6.0"])
def test_the_table_is_complete(version):
    rows = json.loads(model.RESULTS.read_text())["triton"][version]
    assert [(row["call"], row["model"]) for row in rows] == [(c, m) for c in model.CALLS for m in model.MAIN]


# Programs that are alike.


def kinds(tiles, tensors):
    return [tuple(vars(kind).values())[:5] for kind in triton_code.alike(np.array(tiles), np.array(tensors))]


def test_programs_are_alike_whose_tiles_have_the_same_size():
    """Of rows, 2 at a time: (index, programs, elements, tensor, start)."""
    tensors = [(768, 5), (768, 4), (512, 2)]
    tiles = [(0, 0, 0, 768), (0, 2, 0, 768), (0, 4, 0, 768), (1, 0, 0, 768), (1, 2, 0, 768), (2, 0, 0, 512)]
    assert sorted(kinds(tiles, tensors)) == [(0, 4, 1536, 0, 0), (2, 1, 768, 0, 4 * 768), (5, 1, 1024, 2, 0)]


def test_programs_with_parts_of_a_row():
    tiles = [(0, 0, 0, 9000), (0, 0, 4096, 9000), (0, 0, 8192, 9000), (1, 0, 0, 4096)]
    assert sorted(kinds(tiles, [(9000, 1), (4096, 1)])) == [(0, 3, 4096, 0, 0), (2, 1, 808, 0, 8192)]


def test_what_else_a_table_says_tells_programs_apart():
    tiles, tensors = [(0, 0, 0, 64, 1), (0, 2, 0, 64, 1), (1, 0, 0, 64, 7)], [(64, 4), (64, 2)]
    assert sorted(kinds(tiles, tensors)) == [(0, 2, 128, 0, 0), (2, 1, 128, 1, 0)]
    assert {kind.rest for kind in triton_code.alike(np.array(tiles), np.array(tensors))} == {(1,), (7,)}


# Time.


def instruction(text):
    name, *operands = text.replace(",", "").split()
    return Instruction("", name, operands)


def test_a_chain_waits_and_what_is_independent_does_not():
    chain = [instruction("FADD R1, R1, R2")] * 10
    apart = [instruction(f"FADD R{i}, R30, R31") for i in range(10)]
    trace = [(i, np.array([0])) for i in range(10)]
    assert sass_time.latency(chain, trace, 1) == 10 * sass_time.ORDINARY
    assert sass_time.latency(apart, trace, 1) == 9 + sass_time.ORDINARY


def test_a_load_is_waited_for_by_who_needs_it():
    code = [
        instruction("LDG.E.128 R4, desc[UR4][R2.64]"),
        instruction("FADD R9, R7, R8"),
        instruction("FADD R1, R8, R8"),
    ]
    trace = [(i, np.array([0])) for i in (0, 2, 1)]  # R7 is the last of the four words
    assert sass_time.latency(code, trace, 1) == sass_time.LATENCY["LDG"] + sass_time.ORDINARY
    trace = [(i, np.array([0])) for i in (0, 2)]
    assert sass_time.latency(code, trace, 1) == sass_time.LATENCY["LDG"]


def test_pipes():
    code = [
        instruction(text) for text in ("POPC R1, R2", "LOP3.LUT R1, R2, R3, R4", "BRA `(.L_1)", "IMAD R1, R2, R3, R4")
    ]
    found = sass_time.cycles(code, np.full(4, 8), np.zeros(4))
    assert found == {"issue": 8, "special": 16, "alu": 4, "fma": 4}
    found = sass_time.cycles([instruction("LDS R1, [R2]")] * 2, np.full(2, 8), np.array([0, 32]))
    assert found["memory"] == 8 + 32


@pytest.mark.parametrize(
    "size, stride, one_by_one, passes",
    [
        (4, 4, False, 1),
        (4, 8, False, 2),
        (4, 128, False, 32),
        (4, 0, False, 1),
        (4, 0, True, 32),
        (8, 8, False, 2),
        (16, 16, False, 4),
        (16, 144, False, 4),
        (16, 128, False, 32),
    ],
)
def test_passes_over_the_banks_of_shared_memory(size, stride, one_by_one, passes):
    nothing = Code("", {"STACK": 0})
    block = sass.Block(nothing, sass.Memory(), b"", 64, 0)
    block.passes = np.zeros(1, int)
    addresses = sass.SHARED + stride * (np.arange(64) % 32)
    block.in_shared(addresses, size, np.ones(64, bool), one_by_one)
    assert block.passes.tolist() == [2 * passes]  # of two warps


def test_directed_rounding():
    exact = np.array([1 + 2.0**-30, -1 - 2.0**-30])
    near = exact.astype(np.float32)
    above, below = np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))
    assert directed(near, exact, ["RP"]).tolist() == [above, -1]
    assert directed(near, exact, ["RM"]).tolist() == [1, -above]
    assert directed(near, exact, ["RZ"]).tolist() == [1, -1]
    inside = np.array([1 - 2.0**-40, -1 + 2.0**-40])
    assert directed(inside.astype(np.float32), inside, ["RZ"]).tolist() == [below, -below]
    assert directed(near, exact, []).tolist() == near.tolist()
