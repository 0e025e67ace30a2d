"""What `make test` leaves out is covered by what it runs, and `make test-matrix` runs just that."""

import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
from covering import chosen

FACTORS = {"a": (1, 2, 3), "b": ("x", "y", "z", "w"), "c": (True, False), "d": (None, 0.5, (1, 2), {"k": 1})}
ROWS = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]


def met(rows, strength):
    return {names for row in rows for names in combinations([(k, str(v)) for k, v in row.items()], strength)}


@pytest.mark.parametrize("strength, most", [(1, 4), (2, 20)])
def test_every_two_values_meet_in_few_rows(strength, most):
    allowed = [row for row in ROWS if (row["a"], row["b"]) != (1, "x")]
    kept = [allowed[k] for k in chosen(allowed, strength)]
    assert met(kept, strength) == met(allowed, strength)
    assert len(kept) <= most < len(allowed)


def test_what_excludes_nothing_is_kept_whole():
    rows = [{"a": k, "b": k} for k in range(5)]
    assert sorted(chosen(rows, 2)) == sorted(chosen(rows, 1)) == list(range(5))


SUITE = """
import pytest

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(2))
def test_pairs(a, b, c): pass

@pytest.mark.covering(1)
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
def test_values(a, b): pass

@pytest.mark.parametrize("a", [0, 1, pytest.param(2, marks=pytest.mark.matrix)])
def test_one(a): pass

@pytest.mark.matrix
def test_long(): pass
"""


def passed(folder, *options):
    """The tests that ran, and what is said at the end."""
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("PASSED")}, done.stdout


@pytest.mark.matrix
def test_a_run_and_what_it_leaves_out(tmp_path):
    """In processes of xdist, whose choice has to be the same, and in one."""
    pytest.importorskip("xdist")
    folder = Path(__file__).parent
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.append({str(folder)!r})\nfrom covering import *\nfrom covering import pytest_addoption\n"
    )
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    matrix\n    covering\n")
    run, said = passed(tmp_path, "--covering", "-n", "2")
    rest, quiet = passed(tmp_path, "--left-out", "-p", "no:xdist")
    whole = 4 * 4 * 2 + 4 * 4 + 3 + 1
    assert not run & rest and len(run) + len(rest) == whole
    assert {name for name in rest if "one" in name or "long" in name} == {
        "test_suite.py::test_one[2]",
        "test_suite.py::test_long",
    }
    assert sum("pairs" in name for name in run) <= 20 and sum("values" in name for name in run) == 4
    assert f"left out: {len(rest)} of {whole} tests" in said and "make test-matrix" in said
    assert "left out" not in quiet
