"""How long machine code takes on a multiprocessor of an H100 or H200: what its pipes can do, how long one block waits.

Assumptions, not measurements. Throughputs are those of the CUDA C++ programming guide for compute capability 9.0;
latencies are round numbers of the size that microbenchmarks of this generation find, of loads that find nothing in a
cache nearer than L2.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import numpy as np

from bench.gpu.disassembly import Instruction

Array = np.ndarray[Any, Any]
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle
# Cycles of a multiprocessor for an instruction of a warp: 32 over the results a cycle.
THROUGHPUT = {"fma": 0.25, "alu": 0.5, "special": 2.0, "memory": 1.0, "double": 0.5}
PIPES = {
    "fma": "FFMA FMUL FADD IMAD HFMA2 HADD2",
    "alu": "LOP3 IADD3 VIADD SHF SGXT ISETP FSETP SEL FSEL PRMT LEA VIMNMX VIADDMNMX PLOP3 P2R R2P MOV I2FP F2FP VOTE",
    "special": "MUFU POPC FLO I2F F2I F2F FCHK REDUX",
    "memory": "SHFL LDS STS LDSM STSM LDG STG LDL STL ATOMS ATOMG RED",
    "double": "DADD DMUL DFMA DSETP",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
ORDINARY = 5  # cycles until a result can be used
LATENCY = {
    "LDG": 500, "ATOMG": 700, "LDL": 40, "LDS": 30, "LDSM": 33, "ATOMS": 60, "SHFL": 25, "BAR": 20, "VOTE": 10,
    "MUFU": 20, "POPC": 15, "FLO": 15, "F2F": 15, "FCHK": 15, "REDUX": 25, "S2R": 20, "S2UR": 20, "R2UR": 10,
    "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16,
}  # fmt: skip
WITHOUT_RESULT = set(
    "STG STS STL STSM RED BAR BRA EXIT CALL RET BSSY BSYNC BREAK NOP MEMBAR ERRBAR CGAERRBAR CCTL".split()
)


def width(suffixes: list[str]) -> int:
    """Words of 32 bits that a thread moves."""
    return next((int(s) // 32 for s in suffixes if s in ("64", "128")), 1)


def cost(instruction: Instruction) -> tuple[str, float]:
    """The pipe that an instruction takes, and the cycles of a multiprocessor; "" for one that is only issued."""
    base, *suffixes = instruction.name.split(".")
    pipe = PIPE.get(base, "")
    if not pipe:
        return "", 0.0
    cycles = THROUGHPUT[pipe]
    if base == "IMAD":
        cycles *= 2  # half of the pipe multiplies integers
    elif base in ("LDSM", "STSM"):
        cycles *= next((int(s) for s in suffixes if s in ("2", "4")), 1)
    elif pipe == "memory":
        cycles *= width(suffixes)
    return pipe, cycles


def cycles(instructions: list[Instruction], issued: Array, passes: Array) -> dict[str, float]:
    """Cycles of a multiprocessor by pipe, and for issuing.

    Of each instruction, `issued` is how often warps issued it, and `passes` how often shared memory was asked.
    """
    found: Counter[str] = Counter({"issue": float(issued.sum()) / SCHEDULERS})
    for instruction, times, asked in zip(instructions, issued.tolist(), passes.tolist(), strict=True):
        pipe, each = cost(instruction)
        if pipe:
            found[pipe] += THROUGHPUT[pipe] * asked if asked else each * times
    return dict(found)


REGISTER = re.compile(r"\b(U?)(R|P)(\d+)\b(\.64)?")
BANKS = {("", "R"): 0, ("U", "R"): 256, ("", "P"): 320, ("U", "P"): 328}
PLACES = 336


def places(text: str, words: int) -> list[int]:
    """Registers and predicates of an operand, as places of a table."""
    found = []
    for uniform, kind, number, pair in REGISTER.findall(text):
        count = max(2 if pair else 1, words) if kind == "R" else 1
        found += [BANKS[uniform, kind] + int(number) + i for i in range(count)]
    return [place for place in found if place < PLACES]


@cache
def reads_and_writes(name: str, guard: str, operands: tuple[str, ...]) -> tuple[list[int], list[int]]:
    base, *suffixes = name.split(".")
    wide = base.removeprefix("U")
    words = 4 if wide in ("LDSM", "STSM") else width(suffixes)
    if wide in ("DADD", "DMUL", "DFMA", "DSETP") or "WIDE" in suffixes or wide == "CS2R":
        words = 2
    results = 0
    if wide not in WITHOUT_RESULT:  # predicates before and behind the register, where that is one of the first
        register = next((i for i, text in enumerate(operands[:3]) if re.match(r"U?R(\d|Z)", text)), 0)
        results = 2 if wide.endswith(("SETP", "SETP2", "PLOP3")) else register + 1
    sources = words if wide in WITHOUT_RESULT or wide.startswith("D") else 1
    taken = [place for text in operands[results:] for place in places(text, sources)]
    return taken + places(guard, 1), [place for text in operands[:results] for place in places(text, words)]


def latency(instructions: list[Instruction], trace: list[tuple[int, Array]], warps: int) -> float:
    """Cycles that one block takes on a multiprocessor of its own: warps issue in order, when what they need is there.

    `trace` has, in the order of execution, instructions and the warps that issued them.
    """
    ready, now = np.zeros((PLACES, warps)), np.zeros(warps)
    gap = max(1.0, warps / SCHEDULERS)
    for at, who in trace:
        instruction = instructions[at]
        base = instruction.name.split(".")[0]
        reads, writes = reads_and_writes(instruction.name, instruction.guard, tuple(instruction.operands))
        begin = now[who]
        if reads:
            begin = np.maximum(begin, ready[np.ix_(reads, who)].max(axis=0))
        if base == "BAR":
            begin = np.full_like(begin, begin.max() + LATENCY["BAR"])
        now[who] = begin + gap
        if writes:
            ready[np.ix_(writes, who)] = begin + LATENCY.get(base, ORDINARY)
    return float(max(now.max(), ready.max()))
