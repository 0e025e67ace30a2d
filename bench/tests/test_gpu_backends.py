"""What `make gpu` finds out about the two backends, without a GPU: who is faster, what arguments cost, what is wrong.

compute-sanitizer, nvcc's output and drivers that crash are faked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import beside, compiled, goals, out, parameters, sanitize, stage, suite, tables, warm

ROOT = Path(__file__).resolve().parents[2]


def found_in(text: str) -> list[dict]:
    return [json.loads(line.removeprefix(stage.MARK)) for line in text.splitlines() if line.startswith(stage.MARK)]


# Which is faster.


def timed(candidate, us, race=0, **more):
    named = {"model": "gpt2", "method": "m-rwp", "base": "sgd", "dtype": "float32", "masters": False}
    found = {"kind": "race", "race": race, "us": us, "gbs": 2000.0, "copy_gbs": 2500.0, "spread": 0.01}
    return {**found, **named, "candidate": candidate, **more}


def test_who_is_first():
    """In each race, and in all of them: 0.8, 1.25 and 1.005 are 1.0017 together."""
    found = []
    for race, cuda in enumerate((80.0, 125.0, 100.5)):
        found += [timed(goals.OURS, 100.0, race), timed(goals.CUDA, cuda, race), timed("torch fused", 90.0, race)]
    found += [timed(goals.OURS, 100.0, 3), timed("torch fused", 90.0, 3)]
    lines = beside.lines(found)
    assert [line.winner for line in lines] == ["cuda", "triton", "even", None]
    assert lines[0][1:] == (100.0, 80.0, 90.0, 80.0, 0.01)
    assert beside.sentence(found) == (
        "cuda / triton = 1.002 (geometric mean of 3 races; first: cuda 1, triton 1, even 1)"
    )
    assert beside.sentence(found[-2:]) == ""


@pytest.mark.parametrize("without, verdict", [((103.0, 102.5, 99.0), "keep the hints"), ((101.0, 100.0, 99.0), "drop")])
def test_whether_hints_pay(without, verdict):
    found = []
    for race, us in enumerate(without):
        found += [timed(goals.CUDA, 100.0, race), timed(goals.NO_HINTS, us, race)]
    assert beside.policy(found).startswith(verdict) and "from -1.0%" in beside.policy(found)
    assert beside.policy(found[:1]) == ""


def test_a_table_of_both():
    """With a copy of as many bytes, and without what did not run."""
    found = [timed(goals.OURS, 100.0), timed(goals.CUDA, 80.0), timed(goals.OURS, 100.0, 1)]
    rows = [tables.beside_row(line) for line in beside.lines(found)]
    assert rows[0][1:] == ["100", "80", "-", "80", "0.80x", "cuda", "1 %"]
    assert rows[1][1:] == ["100", "-", "-", "80", "-", "-", "1 %"]


# Tests of CUDA kernels that are not there.


def test_tests_that_may_be_left_out_are_one_finding(capsys):
    """Any other test that is skipped is one that should have run."""
    tests = suite.Tests()
    reasons = {"a": "torch sees a GPU, but cuda is not live: no nvcc", "b": "the GPU has not enough free memory"}
    for name, reason in reasons.items():
        report = {"when": "setup", "outcome": "skipped", "seconds": 0.1, "detail": reason}
        for told in ({"event": "begin"}, {"event": "report", **report}, {"event": "end"}):
            tests.take({"name": f"x.py::{name}", **told})
    assert tests.outcomes == {"b": "skipped"} and len(found_in(capsys.readouterr().out)) == 1
    assert tests.sentence() == "0 passed, 0 failed, 1 skipped; 1 tests WITHOUT CUDA kernels left out (no nvcc): b"


# Arguments by value.


@pytest.fixture
def library(tmp_path, monkeypatch):
    """parameters.cu on a runtime that is the host's."""
    monkeypatch.setattr(compiled, "DRY", True)
    monkeypatch.setattr(parameters, "DRY", True)
    monkeypatch.setattr(parameters, "TURNS", 2)
    monkeypatch.setattr(compiled, "PARAMETERS_LIBRARY", tmp_path / "parameters.so")
    try:
        return compiled.parameters()
    except compiled.NotCompiled as error:
        pytest.skip(f"there is no g++ ({error})")


@pytest.mark.parametrize("how, launches", [("launch", [273, 9, 2, 1]), ("replay", [273, 9, 2, 1])])
def test_every_size_is_launched_and_replayed(how, launches, library, capsys):
    """15, 511, 2047 and 4094 addresses fit; each tensor is added to as often as there were passes."""
    assert parameters.inside(how) == 0
    found = found_in(capsys.readouterr().out)
    assert [(f["bytes"], f["launches"]) for f in found if f["tensors"] == parameters.MANY] == [
        *zip(parameters.SIZES, launches, strict=True)
    ]
    assert {f["launches"] for f in found if f["tensors"] == parameters.FEW} == {1}
    assert not any(f["reason"] for f in found)


def test_a_pass_that_misses_an_element_is_found(library, monkeypatch, capsys):
    turn = parameters.Cuda.turn

    def fewer(self, how, size, tensors):
        return turn(self, how, size, min(tensors, 14))

    monkeypatch.setattr(parameters.Cuda, "turn", fewer)
    assert parameters.inside("launch") == 1
    assert {f["reason"] for f in found_in(capsys.readouterr().out)} == {"1024 elements are wrong"}


def test_a_driver_that_crashes_costs_its_line(library, monkeypatch, capsys):
    """In a replay it is a finding; a launch that fails is a failure."""

    def crashing(how_it_ends):
        def run(command, **options):
            *_, how, size = command if command[-1].isdigit() else [*command, "0"]
            line = {"kind": "parameters", "how": how, "bytes": int(size), "tensors": parameters.MANY, "launches": 1}
            crashes = how == how_it_ends and int(size) in (0, 16384)
            line |= {"host_us": 1.0, "device_us": 2.0, "reason": ""}
            text = "Segmentation fault\n" if crashes else f"{stage.MARK}{json.dumps(line)}\n"
            return subprocess.CompletedProcess(command, -11 if crashes else 0, text)

        return run

    for how, status in (("replay", 0), ("launch", 1)):
        monkeypatch.setattr(parameters.subprocess, "run", crashing(how))
        monkeypatch.setattr(parameters.compiled, "parameters", lambda: library)
        assert parameters.main([]) == status
        text = capsys.readouterr().out
        (bad,) = [f for f in found_in(text) if f["reason"]]
        assert bad["how"] == how and bad["reason"] == "ended with status -11: Segmentation fault"
        assert "ended with status -11" in text.splitlines()[-1] and len(found_in(text)) == 5
        assert all(len(tables.parameter_row(f)) == len(tables.PARAMETERS) for f in found_in(text))


@pytest.mark.matrix
def test_nvcc_takes_it(tmp_path, monkeypatch):
    if compiled.nvcc() is None:
        pytest.skip("there is no nvcc")
    monkeypatch.setattr(compiled, "DRY", False)
    monkeypatch.setattr(compiled, "PARAMETERS_LIBRARY", tmp_path / "parameters.so")
    monkeypatch.setenv("FLATKERN_GPU_OUT", str(tmp_path))
    (tmp_path / out.MACHINE).write_text('{"compute_capability": "8.0"}')
    assert compiled.architecture() == "80"
    assert compiled.parameters().stat().st_size > 0
    (tmp_path / out.MACHINE).unlink()
    assert compiled.architecture() == "90"


# The library without hints.


@pytest.mark.parametrize("status, made", [(0, True), (1, False), (0, False)])
def test_a_library_that_is_not_built_is_named(status, made, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiled, "no_hints", lambda: tmp_path if made else None)
    command = [sys.executable, "-S", "-c", f"print('nvcc: no such option'); raise SystemExit({status})"]
    compiler = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert warm.wait_for(compiler) == (0 if made else 1)
    (found,) = found_in(capsys.readouterr().out)
    assert found["failed"] == (not made) and found["detail"] == ("" if made else "nvcc: no such option")


# compute-sanitizer.

TOOL = str(ROOT / "bench" / "gpu" / "tools" / "compute-sanitizer")
WRONG = "print('========= ERROR SUMMARY: 3 errors', flush=True); raise SystemExit(9)"


@pytest.mark.parametrize(
    "command, seconds, expected",
    [
        ([TOOL, *sanitize.options("memcheck"), "true"], 20, (0, "")),
        ([TOOL, *sanitize.options("racecheck"), "true"], 20, (0, "")),
        ([TOOL, *sanitize.options("initcheck"), "true"], 20, (0, "")),
        ([TOOL, "--tool", "memcheck", "sh", "-c", "echo broken; exit 5"], 20, (None, "failed under it .exit status 5")),
        ([sys.executable, "-S", "-c", WRONG], 20, (3, "")),
        (["true"], 20, (None, "printed no summary")),
        (["sleep", "50"], 0.2, (None, "stopped after 0 s")),
        (["/no/such/tool"], 20, (None, "cannot be started")),
    ],
    ids=["memcheck", "racecheck", "initcheck", "program fails", "errors", "no summary", "hangs", "absent"],
)
def test_sanitizer(tmp_path, command, seconds, expected):
    log = out.File(tmp_path / "sanitizer.log")
    beside = [sys.executable, "-S", "-c", "print('========= ERROR SUMMARY: 1 error')"]
    found = sanitize.check_all({"tool": command, "another": beside}, seconds, log)
    errors, reason, _ = found["tool"]
    assert errors == expected[0] and re.search(expected[1], reason)
    assert found["another"][0] == 1 or command[0] == "sleep"
    if command[0] != "/no/such/tool":
        assert (tmp_path / "sanitizer.log").read_text().startswith(f"[tool] $ {command[0]}")


def test_sanitizer_without_the_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize.signal, "signal", lambda *_: None)
    monkeypatch.setenv("FLATKERN_GPU_OUT", str(tmp_path / "nowhere"))  # its log cannot be written either
    assert sanitize.main([]) == 1
    *found, sentence = capsys.readouterr().out.splitlines()
    assert [json.loads(line[2:])["errors"] for line in found] == [None] * len(sanitize.TOOLS)
    assert "compute-sanitizer is not installed" in sentence and "sanitizer.log could not be written" in sentence
