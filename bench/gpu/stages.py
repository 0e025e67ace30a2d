"""The stages of `make gpu`, in the order in which they run, and the lists of them with their seconds."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass

USUAL = 280.0  # the budget that the seconds of the lists are for
CUDA = "build/gpu-cuda"  # where flatkern with its CUDA kernels is


def build_command() -> tuple[str, ...]:
    """Compile, then say what the machine is and whether Triton works on it.

    Below `make gpu` the inner make inherits NO_VENV, PYTHON, VENV and TORCH; otherwise this Python is the one to use.
    Where C++ or CUDA do not compile, the rest goes on without, and the sentence says so. What else may be missing
    (torch, say) the second half names better than make does.
    """
    with_this_python = "" if "MAKELEVEL" in os.environ else f" NO_VENV=1 PYTHON={shlex.quote(sys.executable)}"

    def make(target: str) -> str:
        return f"make --no-print-directory {target}{with_this_python}"

    build, library = make("build"), make(f"cuda-library CUDA={CUDA}")
    # For the GPUs that are here, beside the rest. In a dry run there is none, and kernels are emulated if anything.
    capabilities = "nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr -d ."
    cuda = (
        f'rm -rf {CUDA}/tree; cuda=; if [ "$FLATKERN_GPU_DRY" != 1 ]; then '
        f'export FLATKERN_CUDA_ARCHS="${{FLATKERN_CUDA_ARCHS-$({capabilities})}}"; '
        f"timeout 60 {library} & cuda=$!; fi;"
    )
    built = f'if [ -n "$cuda" ] && wait "$cuda"; then {make(f"cuda-tree CUDA={CUDA}")}; fi;'
    # Meanwhile torch is read from a disk that is cold on a fresh machine: gigabytes of libraries.
    ahead = '"$0" -c "import torch, triton" > /dev/null 2>&1 &'
    script = f'{ahead} {cuda} {{ {build} || FLATKERN_BUILD=skip {build}; }}; {built} exec "$0" bench/gpu/stage.py live'
    return "sh", "-c", script, sys.executable


@dataclass(frozen=True)
class Stage:
    """One stage: `stage.py MODULE`, or another command."""

    name: str
    what: str
    module: str = ""  # of bench/gpu, where it is not the stage's name
    needs: tuple[str, ...] = ("build",)
    enough: str = "passed"  # what a stage that needs this one waits for: that it passed, or that it ended
    # How many times its seconds it may take. To cut off what the others need, for being late, would cost all of them.
    patience: float = 1.0
    beside: bool = False  # runs side by side with the neighbours of which this is true too
    correct: bool = False  # about right or wrong, not about speed
    interpreted: bool = True  # in a dry run by Triton's interpreter
    command: tuple[str, ...] = ()

    def argv(self) -> tuple[str, ...]:
        return self.command or (sys.executable, "bench/gpu/stage.py", self.module or self.name)


# To compile one kernel after the other would take minutes of the budget. What a stage that was cut off or crashed has
# left is compiled in steps that nobody times: better than a GPU that does nothing for the rest of the budget.
WARM = ("build", "warm")

STAGES = (
    Stage("build", "compile, name the machine, see that Triton is live", needs=(), patience=3, correct=True,
          interpreted=False, command=build_command()),
    Stage("smoke", "every operation against eager, every radius and angle of the noise", beside=True, correct=True),
    Stage("tests", "tests/test_gpu.py", module="suite", beside=True, correct=True),
    Stage("warm", "compile what the later stages need", enough="ended", patience=2, beside=True,
          interpreted=False),
    Stage("keys", "the races that the goals are about, by Triton's kernels and by the CUDA kernels", needs=WARM),
    Stage("ncu", "counters of the main kernels by Nsight Compute", module="counters", needs=WARM),
    Stage("parameters", "arguments by value, of 0.1 to 32 KB: launches, graphs", interpreted=False),
    Stage("host", "where the host's time goes in a call on many tensors", module="profiled", needs=WARM),
    Stage("rivals", "the other candidates of the races", needs=WARM),
    Stage("e2e", "a small GPT in training", needs=WARM),
    Stage("hints", "the CUDA kernels with cache hints and without", needs=WARM),
    Stage("sweep", "sizes of Triton's tiles", needs=WARM),
    Stage("sanitizer", "memcheck, racecheck, synccheck and initcheck of compute-sanitizer", module="sanitize",
          needs=WARM, correct=True),
)  # fmt: skip

# Together 273, 268 and 280 of 280. An H200 with 16 slow cores took 34 for build, 98 for smoke and tests side by side,
# 59 for warm beside them, 96 for 17 of 18 races of keys, 19 for ncu, 6 for parameters, 28 for 8 of 13 rivals, 24
# for the sanitizers. The third list is for after a repair, with TESTS='an expression for -k'.
LISTS = {
    "first": {"build": 35, "smoke": 110, "tests": 110, "warm": 110, "keys": 95, "ncu": 25, "parameters": 8},
    "second": {
        "build": 35, "warm": 40, "host": 18, "rivals": 60, "e2e": 35, "hints": 20, "sweep": 20, "sanitizer": 40,
    },
    "repaired": {
        "build": 35, "smoke": 90, "tests": 90, "warm": 90, "keys": 55, "host": 14, "rivals": 30, "e2e": 30,
        "sanitizer": 26,
    },
}  # fmt: skip


def most_seconds(lists: dict[str, dict[str, float]] = LISTS) -> dict[str, float]:
    """Of every stage the seconds that it has on the list that gives it most."""
    found: dict[str, float] = {}
    for seconds in lists.values():
        found |= {name: max(value, found.get(name, 0)) for name, value in seconds.items()}
    return found
