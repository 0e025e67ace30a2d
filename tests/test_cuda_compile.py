"""What nvcc makes of every kernel, without a GPU: no spills, few registers, 16 bytes a load and a store.

Looked at is the module that `make test-cuda` has built, for every architecture that it is built for.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import pytest
from disassembled import kernels_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Case:
    """Blocks that a multiprocessor has registers for. Where there is one way to move elements, how often that is done:
    16 bytes at a time, and in updates 8, which are four of a 16-bit type.
    """

    blocks: int
    loads: int | None = None
    stores: int | None = None
    short_loads: int = 0


# By operation, types, what an update does, and threads of a block: 1024 are for rows that 256 threads cannot hold.
# Of five blocks of 256 threads a thread has 48 registers, 62 % of the threads that there can be; of four, or of one of
# 1024, it has 64, 50 %. A kernel for any type moves elements one by one, or has a way for each type.
CASES = {
    "clear": Case(8, 0, 0),
    "fill float": Case(6, 0, 4),
    "fill AnyFloat": Case(6),
    "norms float 256": Case(6, 8, 0),
    "norms float 1024": Case(1, 8, 0),
    "norms AnyFloat 256": Case(6),
    "norms AnyFloat 1024": Case(2),
    "ascent_norm float": Case(8, 16, 0),
    "ascent_norm BFloat16": Case(8, 8, 0),
    "ascent_norm BFloat16 float": Case(8, 12, 0),
    "ascent_norm AnyFloat": Case(6),
    "ascent_norm float means": Case(6, 24, 0),
    "ascent_norm BFloat16 means": Case(8, 12, 0),
    "ascent_norm BFloat16 float means": Case(8, 20, 0),
    "ascent_norm AnyFloat means": Case(6),
    "gradient_norm float": Case(6, 16, 0),
    "gradient_norm BFloat16": Case(6, 8, 0),
    "gradient_norm AnyFloat": Case(5),
    "gradient_products float": Case(5, 16, 0),
    "gradient_products BFloat16": Case(5, 8, 0),
    "gradient_products AnyFloat": Case(5),
    "perturb float 256": Case(5, 6, 12),
    "perturb float 1024": Case(1, 8, 16),
    "perturb BFloat16 256": Case(4, 3, 6),
    "perturb BFloat16 1024": Case(1, 4, 8),
    "perturb BFloat16 float 256": Case(4, 6, 3),
    "perturb BFloat16 float 1024": Case(1, 8, 4),
    "perturb AnyFloat 256": Case(4),
    "perturb AnyFloat 1024": Case(1),
    "ascent float": Case(6, 8, 8),
    "ascent BFloat16": Case(6, 4, 4),
    "ascent BFloat16 float": Case(8, 6, 2),
    "ascent AnyFloat": Case(4),
    "ascent float means": Case(4, 12, 12),
    "ascent BFloat16 means": Case(4, 6, 6),
    "ascent BFloat16 float means": Case(4, 10, 6),
    "ascent AnyFloat means": Case(4),
    "restore float": Case(4, 8, 8),
    "restore BFloat16": Case(6, 4, 4),
    "restore AnyFloat": Case(4),
    "mix float": Case(5, 16, 8),
    "mix BFloat16": Case(5, 8, 4),
    "mix AnyFloat": Case(6),
    "mix_rows 256": Case(5),
    "mix_rows 1024": Case(1),
    "count float": Case(8, 8, 0),
    "count BFloat16": Case(8, 4, 0),
    "count AnyFloat": Case(8),
    "pack float": Case(8, 8, 0),
    "pack BFloat16": Case(8, 4, 0),
    "pack AnyFloat": Case(8),
    "amplify float": Case(8, 8, 4),
    "amplify BFloat16": Case(8, 4, 2),
    "amplify AnyFloat": Case(6),
    "sgd float plain 256": Case(5, 8, 6),
    "sgd float rolling 256": Case(5, 8, 8),
    "sgd float rolling 1024": Case(1, 8, 8),
    "sgd float general 256": Case(4, 12, 10),
    "sgd BFloat16 plain 256": Case(5, 0, 0, 8),
    "sgd BFloat16 rolling 256": Case(5, 1, 1, 6),
    "sgd BFloat16 rolling 1024": Case(1, 1, 1, 6),
    "sgd BFloat16 float plain 256": Case(4, 4, 4, 4),
    "sgd BFloat16 float rolling 256": Case(5, 6, 5, 2),
    "sgd BFloat16 float rolling 1024": Case(1, 6, 5, 2),
    "sgd BFloat16 float general 256": Case(4, 8, 7, 4),
    "sgd AnyFloat general 256": Case(4),
    "sgd AnyFloat general 1024": Case(1),
    "adam float plain 256": Case(5, 10, 8),
    "adam float rolling 256": Case(5, 10, 10),
    "adam float rolling 1024": Case(1, 10, 10),
    "adam float general 256": Case(4, 16, 14),
    "adam BFloat16 plain 256": Case(5, 0, 0, 10),
    "adam BFloat16 rolling 256": Case(5, 1, 1, 8),
    "adam BFloat16 rolling 1024": Case(1, 1, 1, 8),
    "adam BFloat16 float plain 256": Case(5, 6, 6, 4),
    "adam BFloat16 float rolling 256": Case(5, 8, 7, 2),
    "adam BFloat16 float rolling 1024": Case(1, 8, 7, 2),
    "adam BFloat16 float general 256": Case(4, 12, 11, 4),
    "adam AnyFloat general 256": Case(4),
    "adam AnyFloat general 1024": Case(1),
}


def label(name):
    """As CASES names update_kernel<Sgd<UpdateTypes<float, ..., (Kind)1> >, ..., 256, 5, 4, Arguments<4096> >."""
    rule, kind = re.search(r"<(Sgd|Adam)<", name), re.search(r"Kind\)(\d)", name)
    threads = re.search(r"[<, ](256|1024), ", name)
    types = dict.fromkeys(re.findall(r"\b(?:float|BFloat16|AnyFloat)\b", name))
    words = [rule[1].lower() if rule else re.match(r"(\w+)_kernel\b", name)[1], *types]
    words += [("plain", "rolling", "general")[int(kind[1])]] if kind else []
    words += ["means"] if "MeanArguments<" in name else []
    return " ".join(words + ([threads[1]] if threads else []))


@cache
def kernels(architecture):
    """All kernels of the module by their labels: one for each size of arguments."""
    found = defaultdict(list)
    for name, code in kernels_of(architecture).items():
        found[label(name)].append(code)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_here(architecture):
    assert set(kernels(architecture)) == set(CASES)
    sizes = {which: len(found) for which, found in kernels(architecture).items()}
    assert sizes == dict.fromkeys(CASES, 2) | {"clear": 1}


@pytest.mark.parametrize("which", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled(which, architecture):
    case, threads = CASES[which], 1024 if which.endswith("1024") else 256
    for code in kernels(architecture)[which]:
        # A multiprocessor has 65536 registers, and a thread gets a multiple of 8.
        # As blocks_here() of csrc/cuda/device.cuh says.
        wide = architecture == "sm_100" or (architecture == "sm_80" and which.startswith("adam"))
        blocks = min(case.blocks, 4) if wide and threads == 256 and case.blocks == 5 else case.blocks
        assert code.used["REG"] <= 65536 // (blocks * threads) // 8 * 8
        assert (code.used["STACK"], code.used["LOCAL"]) == (0, 0), "registers are spilled"
        assert not code.count(r"(?:LDL|STL)\S*")
        assert not code.count(r"(?:LD|ST)(?:\.\S+)?"), "it is not known that an address is in global memory"
        if case.loads is not None:
            # Elements are loaded as what is not needed again soon, unlike tiles and partial sums.
            moved = [code.count(p) for p in (r"LDG\.E\.EF\.128", r"STG\.E(?:\.EF)?\.128", r"LDG\.E\.EF\.64")]
            assert moved == [case.loads, case.stores, case.short_loads]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_normals_are_made_without_a_call(architecture):
    for which in ("fill float", "fill AnyFloat"):
        assert not [code for code in kernels(architecture)[which] if code.count(r"CALL\S*")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_argument_lies_beyond_32_kilobytes(architecture):
    """Of the constant bank: ptxas 13.0 makes a negative offset of a longer one, and a GPU reads elsewhere. Small
    ones are those of an index that is counted from 1."""
    offset = re.compile(r"c\[0x0\]\[(?:U?R\w+\+)?(-?0x[0-9a-f]+)\]")
    for name, code in kernels_of(architecture).items():
        found = [int(text, 16) for text in offset.findall(code.listing)]
        assert found and min(found) > -0x1000 and max(found) < 0x8000, name
