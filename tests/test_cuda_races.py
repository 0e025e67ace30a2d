"""Races in the CUDA kernels, found by ThreadSanitizer in the emulation; no barrier and no fence can be left out.

Operations are called from C++ (tests/cuda_emulation/driver). `make races-cuda` builds that and runs these.
"""

import re
import subprocess

import pytest
from sanitized import BUILT, OPTIONS, ROOT, cases, names_a_line, needs_sanitized, run

from flatkern.ops import OPS

pytestmark = needs_sanitized("races-cuda")
RACE = 66  # ThreadSanitizer's exit status

# What it sees.


@pytest.mark.parametrize("case", cases("wrong_races.cpp"))
def test_races_are_seen(case):
    status, text = run("thread/wrong", case)
    if case.startswith("ordered_"):
        assert (status, text) == (0, "")
    else:
        assert status == RACE and "WARNING: ThreadSanitizer: data race" in text, text
        assert names_a_line("wrong_races.cpp", "racy", text), text


# Operations.

DRIVEN = [name for name, op in OPS.items() if "cuda" in op.backends.split() and name != "adamw_update_"]


def test_every_operation_is_driven():
    """AdamW is Adam with another flag, in C++."""
    assert sorted(run("thread/driver", "--list")[1].split()) == sorted(DRIVEN)


@pytest.mark.parametrize("op", DRIVEN)
def test_no_race(op):
    status, text = run("thread/driver", op)
    assert status == 0, text


def test_names_of_no_operation_are_refused():
    assert run("thread/driver", "no_such_") == (1, "no such operation: no_such_\n")


def test_every_kernel_is_driven():
    """Of the two sizes of arguments the small one: a launch of hundreds of tensors has too many threads."""
    listed = subprocess.run(["nm", "-C", f"{BUILT}/thread/driver"], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for line in listed.splitlines():
        found = re.match(r"([0-9a-f]+) \w void (.*Arguments<4096ul> >)\(", line)
        if found and "_kernel<" in found[2]:
            kernels[int(found[1], 16)] = re.sub(r"flatkern::cuda::|\(anonymous namespace\)::", "", found[2])
    assert len(kernels) > 30
    status, text = run("thread/driver", "--kernels")
    assert status == 0, text
    ran = {int(line, 16) for line in text.split()}
    missing = [name for address, name in kernels.items() if address not in ran]
    assert not missing, "\n".join(["no way of driver/main.cpp runs", *sorted(missing)])


# Barriers and fences.

SITES = [
    (f"{path.name}:{number}", line.strip())
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b__(?:sync(?:threads|warp)|threadfence)\(", line)
]


def likely_first(place):
    """Operations, those first whose file or whose family's file it is in; then those that sum and count."""
    stem, families = place.split(".")[0], ["norm", "mask", "update", "perturb", "noise"]
    return sorted(DRIVEN, key=lambda op: (stem not in op, OPS[op].family != stem, families.index(OPS[op].family)))


@pytest.mark.parametrize("place, line", SITES, ids=lambda x: x.split("(")[0])
def test_nothing_can_be_left_out(place, line):
    """Where one is switched off, some operation races."""
    environment = {"FLATKERN_EMULATION_WITHOUT": place, "TSAN_OPTIONS": f"{OPTIONS['TSAN_OPTIONS']}:halt_on_error=1"}
    assert any(run("thread/driver", op, **environment)[0] == RACE for op in likely_first(place)), f"{place}: {line}"


def test_a_place_that_is_none_is_refused():
    status, text = run("thread/driver", "restore_", FLATKERN_EMULATION_WITHOUT="update.cu")
    assert status == 1 and "should name places like" in text


def test_sites_are_found():
    """Each on a line of its own, so that a line is a place."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert len(SITES) == len(re.findall(r"\b__(?:sync|threadfence)\w*\(", sources)) > 10
