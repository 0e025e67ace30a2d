"""The examples of Accelerate, timm and skorch run by the command in their first line, and print what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name):
    path = f"examples/{name}.py"
    command = re.match(r'"""(python examples/\S+)', (ROOT / path).read_text()).group(1)
    assert command == f"python {path}"
    done = subprocess.run(
        [sys.executable, path],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@needs("accelerate")
def test_accelerate_trains_with_every_method():
    rows = re.findall(
        r"^(\S.*\S) +last loss [\d.]+ +test accuracy ([\d.]+) %$", run("accelerate_methods"), re.MULTILINE
    )
    assert [name.strip() for name, _ in rows] == ["AdamW", "rolling RWP", "m-RWP", "SAM", "IRE"]
    assert all(float(accuracy) > 85 for _, accuracy in rows)  # of ten classes


@needs("timm")
def test_timm_trains_and_averages():
    printed = run("timm_rwp")
    assert len(re.findall(r"^epoch \d +loss [\d.]+ +accuracy [\d.]+ %, averaged [\d.]+ %$", printed, re.MULTILINE)) == 5
    assert float(re.search(r"best accuracy of averaged weights: ([\d.]+) %", printed).group(1)) > 50  # of ten classes


@needs("skorch")
def test_skorch_searches():
    printed = run("skorch_search")
    assert len(re.findall(r"accuracy in the search [\d.]+ %$", printed, re.MULTILINE)) == 5
    best = re.findall(r"best: test accuracy ([\d.]+) %$", printed, re.MULTILINE)
    assert len(best) == 2 and all(float(accuracy) > 85 for accuracy in best)  # of ten classes
