"""What Triton's compiler makes of every kernel, without a GPU: 16 bytes a load and a store, no spills, few registers.

Compiled for each architecture that has a tuning, and read with the disassembler that Triton brings along. Needs kernels
that are not interpreted, so it does not run in test_triton.py's process.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from covering import also, also_of

triton = pytest.importorskip(
    "triton", minversion="3.6", reason="triton is not installed, so nothing is compiled with it"
)

import triton.language as tl  # noqa: E402
from flatkern.triton_kernels import mask, noise, norm, perturb, update  # noqa: E402
from flatkern.triton_kernels.job import limits_of  # noqa: E402
from flatkern.triton_kernels.plan import RESIDENT, SEGMENT, TUNING, rows_for, warps_for  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flatkern.checks import MAGNITUDE_DIGITS  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = (
    {name: "*i64" for name in ("tiles", "tensors", "pointers", "rows", "noise", "prefix", "counts")}
    | {name: "*fp64" for name in ("scalars", "lrs", "sigmas", "products")}
    | {"copies": "*i32"}
)
WORDS = ("seed", "stream", "round_", "count", "padding", "lr_stride", "sigma_stride")
F32, BF16 = tl.float32, tl.int16  # bfloat16 is moved as its bits

FLAT = dict(EVEN=True)
SEGMENTS = dict(SHAPES=((1, SEGMENT),), EVEN=True, LONG=True)


def rows_of(*columns):
    """Whole rows of a matrix; plan.py says how many are in a tile."""
    return dict(SHAPES=columns, EVEN=True, LONG=False)


@dataclass
class Case:
    """A kernel with its constants, and which pointers are absent; bytes per element that tiles load and store."""

    kernel: object
    constants: dict
    loads: int
    stores: int
    registers: int = 96
    absent: tuple = ()
    types: dict = field(default_factory=dict)
    warps: int = 4  # where there are no tiles


def updating(rule, shape, loads, stores, registers, type_=F32, absent=("found_inf", "clip"), **given):
    adam = rule != "sgd"
    constants = dict(
        RULE=rule, PARAM=type_, BACKUP=None, MASTER=None, HISTORY=None, GRAD=type_, CLEAN_GRAD=None, MASK=None,
        FIRST=type_, SECOND=type_ if adam else None, NOISE=False, WIDTH=11 if adam else 9, SCALARS=15 if adam else 11,
        BY_ELEMENT=False, SHIFTED=False,
    )  # fmt: skip
    absent = (*absent, *(() if adam else ("derived",)))
    absent += () if given.get("NOISE") == "device" else ("noise", "lrs", "sigmas")
    absent += () if given.pop("component", False) else ("component",)
    given = given | ({"NOISE": True} if given.get("NOISE") else {})
    return Case(update.update_kernel, constants | given | shape, loads, stores, registers, absent)


def perturbing(shape, loads, stores, registers, param=F32, **given):
    constants = dict(
        PARAM=param, BACKUP=None, CLEAN=param, CLEAN_AT=0, NORM=None, NORM_AT=None, HISTORY=None, HISTORY_AT=4, WIDTH=5,
        SIGMA=0, ETA=1, SCALARS=2, BY_ELEMENT=False, SHIFTED=False,
    )  # fmt: skip
    absent = () if given.pop("device", False) else ("noise", "sigmas")
    return Case(perturb.perturb_gaussian_kernel, constants | given | shape, loads, stores, registers, absent)


ONE = rows_of(2048)
SEVERAL = rows_of(4608, 2048, 768, 64)  # a choice at run time; 4608 = 4096 + 512, 768 = 512 + 256
FEW = rows_of(4608, 64)
UNEVEN = rows_of(1152, 256) | {"EVEN": False}  # rows that are no multiples of eight
LONGEST = rows_of(RESIDENT)


def counting(known, type_, loads):
    constants = dict(
        GRAD=type_, WIDTH=1, KNOWN=known, SHIFT=sum(MAGNITUDE_DIGITS[known + 1 :]), BITS=MAGNITUDE_DIGITS[known],
        KNOWN_BITS=MAGNITUDE_DIGITS[1],
    )  # fmt: skip
    return Case(mask.count_magnitudes_kernel, constants | FLAT, loads, 0, 64)


CASES = {
    "fill": Case(noise.fill_normal_kernel, dict(OUT=F32, WIDTH=1, SHIFTED=False) | FEW, 0, 4, absent=("noise",)),
    "norms": Case(norm.filter_norms_kernel, dict(PARAM=F32, AT=0, OUT_AT=1, WIDTH=2) | FEW, 4, 0, 64),
    "ascent norm": Case(
        norm.ascent_norm_kernel, dict(GRAD=F32, PARAM=F32, MEAN=None, WIDTH=2, SCALARS=2) | FLAT, 8, 0, 64,
    ),
    "ascent norm, a mean": Case(
        norm.ascent_norm_kernel, dict(GRAD=F32, PARAM=F32, MEAN=F32, WIDTH=3, SCALARS=3) | FLAT, 12, 0, 64,
    ),
    "gradient norm": Case(
        norm.gradient_norm_kernel, dict(GRAD=F32, CLEAN=F32, WIDTH=2) | FLAT, 8, 0, 64, ("component",),
    ),
    "gradient norm, a component": Case(norm.gradient_norm_kernel, dict(GRAD=F32, CLEAN=F32, WIDTH=2) | FLAT, 8, 0, 64),
    "gradient products": Case(
        norm.gradient_products_kernel, dict(GRAD=F32, CLEAN=F32, WIDTH=2) | FLAT, 8, 0, 96, types={"partials": "*fp64"},
    ),
    "gradient products, bfloat16": Case(
        norm.gradient_products_kernel, dict(GRAD=BF16, CLEAN=BF16, WIDTH=2) | FLAT, 4, 0, 96,
        types={"partials": "*fp64"},
    ),
    "total": Case(norm.total_kernel, {}, 0, 0, 64, warps=16),
    "total of products": Case(norm.total_products_kernel, {}, 0, 0, 104, warps=16, types={"partials": "*fp64"}),
    "finish rows": Case(norm.finish_rows_kernel, dict(NORM=7, HISTORY=3, BETA=3, WIDTH=11, SCALARS=15), 0, 0, 104),
    "perturb": perturbing(SEVERAL, 4, 8, 96, BACKUP=F32),
    "perturb, captured": perturbing(ONE, 4, 8, 64, BACKUP=F32, device=True),
    "perturb the longest rows": perturbing(LONGEST, 4, 8, 96, BACKUP=F32, HISTORY=F32),
    "perturb from masters": perturbing(SEVERAL, 4, 2, 128, BF16, CLEAN=F32, CLEAN_AT=2),
    "perturb bfloat16": perturbing(SEGMENTS, 2, 2, 72, BF16, NORM=F32, NORM_AT=3),
    "ascent": Case(
        perturb.perturb_ascent_kernel,
        dict(PARAM=F32, BACKUP=F32, MASTER=None, GRAD=F32, MEAN=None, NEW_MEAN=None, WIDTH=4, SCALARS=3) | FLAT,
        8, 8, 72,
    ),
    "ascent, a mean": Case(
        perturb.perturb_ascent_kernel,
        dict(PARAM=F32, BACKUP=F32, MASTER=None, GRAD=F32, MEAN=F32, NEW_MEAN=F32, WIDTH=6, SCALARS=6) | FLAT,
        12, 12, 72,
    ),
    "restore": Case(perturb.restore_kernel, dict(PARAM=F32, BACKUP=F32, WIDTH=2) | FLAT, 4, 4, 64),
    "mix": Case(
        update.mix_gradients_kernel,
        dict(GRAD=F32, HISTORY=F32, CLEAN_GRAD=F32, OUT=None, WIDTH=3, BY_ELEMENT=False) | FEW, 8, 4, 112,
        ("component", "found_inf"),
    ),
    "mix, a component, kept": Case(
        update.mix_gradients_kernel,
        dict(GRAD=F32, HISTORY=F32, CLEAN_GRAD=F32, OUT=F32, WIDTH=4, BY_ELEMENT=False) | FEW, 8, 4, 112,
    ),
    "count, first digit": counting(0, F32, 4),
    "count, second digit": counting(1, F32, 4),
    "count, last digit": counting(2, F32, 4),
    "count bfloat16": counting(1, BF16, 2),
    "sum of counts": Case(mask.sum_counts_kernel, dict(BITS=11), 0, 0, 80, warps=8),
    "pack": Case(mask.pack_mask_kernel, dict(GRAD=F32, WIDTH=2, BY_ELEMENT=False) | FEW, 4, 0, 80),
    "amplify": Case(
        mask.amplify_kernel, dict(PARAM=F32, PREVIOUS=F32, WIDTH=3, BY_ELEMENT=False) | FEW, 8, 4,
    ),
    "advance": Case(
        update.advance_kernel, dict(STEP=10, WIDTH=11, SCALARS=15, LANES=128), 0, 0, 64, ("lrs", "found_inf"),
    ),
    "advance, captured": Case(update.advance_kernel, dict(STEP=10, WIDTH=11, SCALARS=15, LANES=128), 0, 0, 64),
    "sgd": updating("sgd", SEGMENTS, 12, 8, 80),
    "sgd, restoring, two gradients": updating("sgd", SEGMENTS, 16, 8, 96, BACKUP=F32, CLEAN_GRAD=F32, absent=()),
    "sgd, restoring, a component": updating(
        "sgd", SEGMENTS, 16, 8, 96, BACKUP=F32, CLEAN_GRAD=F32, component=True, absent=(),
    ),
    "sgd, rolling": updating("sgd", rows_of(2304, 2048, 768, 64), 12, 12, 128, BACKUP=F32, NOISE=True),
    "sgd, rolling, uneven rows": updating("sgd", UNEVEN, 0, 0, 96, BACKUP=F32, NOISE=True),
    "sgd, rolling, captured": updating("sgd", ONE, 12, 12, 96, BACKUP=F32, NOISE="device"),
    "adamw": updating("adamw", SEGMENTS, 16, 12, 128),
    "adam, rolling, masters": updating(
        "adam", SEVERAL, 14, 14, 128, BF16, MASTER=F32, FIRST=F32, SECOND=F32, NOISE=True,
    ),
    "adamw, everything": updating(
        "adamw", FEW, 20, 16, 128, absent=(), BACKUP=F32, HISTORY=F32, CLEAN_GRAD=F32, MASK=tl.uint8,
        NOISE="device", component=True,
    ),
    "adamw, everything, uneven rows": updating(
        "adamw", UNEVEN, 0, 0, 128, absent=(), BACKUP=F32, HISTORY=F32, CLEAN_GRAD=F32, MASK=tl.uint8,
        NOISE="device", component=True,
    ),
    "adamw, everything, the longest rows": updating(
        "adamw", LONGEST, 20, 16, 128, absent=(), BACKUP=F32, HISTORY=F32, CLEAN_GRAD=F32, MASK=tl.uint8,
        NOISE="device", component=True,
    ),
}  # fmt: skip


def compiled(case, architecture):
    """The compiled kernel, and the elements that its code has for a thread: of pieces that are wide enough for 16 bytes
    a thread, whatever the dtype, and all. What is neither a constant nor absent is a number, or a pointer that may be
    unaligned."""
    tunings = TUNING[architecture]
    tuning = {None: tunings.usual, "sgd": tunings.sgd}.get(case.constants.get("RULE"), tunings.adam)
    fixed, sizes, warps = dict(case.constants), [SEGMENT], tuning.segment_warps
    if not fixed.get("EVEN", True):
        tuning = tuning.halved()
    if not fixed.get("LONG", True):
        fixed["SHAPES"] = tuple((rows_for(columns, tuning), columns) for columns in fixed["SHAPES"])
        sizes = [rows * (columns & 1 << digit) for rows, columns in fixed["SHAPES"] for digit in range(14)]
        largest = max(rows * columns for rows, columns in fixed["SHAPES"])
        warps = warps_for(largest, tuning)
    if "EVEN" not in fixed:
        sizes, warps = [], case.warps
    signature, constants = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in fixed or name in case.absent:
            signature[name], constants[i,] = "constexpr", fixed.get(name)
        elif name in WORDS:
            signature[name] = "i32"
        else:
            signature[name] = (POINTERS | case.types).get(name, "*fp32")
    target = TARGETS[architecture]
    options = dict(num_warps=warps, enable_fp_fusion=False, **(limits_of(fixed) if target.backend == "cuda" else {}))
    source = ASTSource(case.kernel, signature, constexprs=constants)
    each = [size / (target.warp_size * warps) for size in sizes]
    return triton.compile(source, target=target, options=options), sum(n for n in each if n >= 8), sum(each)


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


# Every kernel is compiled in `make test`, most of them in one of their forms.
FURTHER = {
    "ascent norm", "gradient norm", "gradient products, bfloat16", "perturb", "perturb the longest rows",
    "perturb from masters", "perturb bfloat16", "ascent", "mix", "count, second digit", "count, last digit",
    "count bfloat16", "advance", "sgd, restoring, two gradients", "sgd, restoring, a component",
    "sgd, rolling", "sgd, rolling, uneven rows", "sgd, rolling, captured", "adamw", "adam, rolling, masters",
    "adamw, everything, uneven rows", "adamw, everything, the longest rows",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_90", *also("sm_80", "sm_100")])
@pytest.mark.parametrize("case", also_of(CASES, FURTHER))
def test_cuda(case, architecture, tmp_path):
    cubin, (kernel, wide, elements) = tmp_path / "kernel.cubin", compiled(case, architecture)
    cubin.write_bytes(kernel.asm["cubin"])
    code = tool("nvdisasm", "-c", cubin)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", cubin)))
    assert case.loads * wide <= 16 * len(re.findall(r"\bLDG\S*\.128", code)) <= case.loads * elements
    assert case.stores * wide <= 16 * len(re.findall(r"\bSTG\S*\.128", code)) <= case.stores * elements
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    assert used["STACK"] == used["LOCAL"] == "0"
    assert int(used["REG"]) <= case.registers


@pytest.mark.covering(1)
@pytest.mark.parametrize("known", range(3))
@pytest.mark.parametrize("type_", [F32, tl.float16, BF16], ids=str)
def test_what_counting_takes(type_, known, tmp_path):
    """Atomic additions, and nothing that grows with the number of bins. Memory takes as long as 27 instructions of
    float32 do on an H200."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(counting(known, type_, 0), "sm_90")[0].asm["cubin"])
    code = tool("nvdisasm", "-c", cubin)
    elements = SEGMENT // (32 * 8)  # of a thread
    instructions = re.findall(r"^ {8}/\*[0-9a-f]{4}\*/ +(?:@!?U?P\w+ +)?(?!NOP)\w", code, re.MULTILINE)
    assert len(instructions) <= 30 * elements
    assert elements <= len(re.findall(r"\bREDG?\.", code)) <= elements + 8
    assert not re.findall(r"\b(?:ATOMS|MEMBAR)\b", code)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_amd(case):
    kernel, wide, elements = compiled(case, "gfx942")
    code = kernel.asm["amdgcn"]
    assert 16 * len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code)) >= case.loads * wide
    stores = 16 * len(re.findall(r"\b(?:global|buffer)_store_dwordx4", code))
    if elements:  # what has no tiles may store its few numbers as it likes
        assert case.stores * wide <= stores <= case.stores * elements
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"]
    assert re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code) == ["0"]


def test_every_kernel_is_here():
    kernels = {
        value
        for module in (mask, noise, norm, perturb, update)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert kernels == {case.kernel for case in CASES.values()}
