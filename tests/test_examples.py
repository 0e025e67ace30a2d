"""The examples run as their docstrings say, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "parallel_m_rwp.py"


def run(*command):
    found = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([found] if found else [])])
    names = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, **names}, capture_output=True, text=True, timeout=180
    )


@pytest.mark.matrix
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_parallel_m_rwp_trains_on_two_ranks():
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    done = run(*launch, EXAMPLE, "--epochs", "2", "--steps", "10", "--eta", "0.1")
    assert done.returncode == 0, done.stderr
    assert "clean ranks [0], noisy ranks [1]" in done.stdout
    rows = re.findall(r"^ +(\d) +([\d.]+) +([\d.]+) +([\d.]+) % +[\d.]+  equal$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"], done.stdout
    assert all(float(after) < float(before) for before, after in zip(*(row[1:3] for row in rows), strict=True))
    assert float(rows[-1][3]) > 30  # of ten classes


def test_parallel_m_rwp_says_how_it_is_started():
    assert "torchrun --nproc-per-node 2 examples/parallel_m_rwp.py" in run(EXAMPLE, "--help").stdout
    done = run(EXAMPLE)
    assert done.returncode == 1 and "start it by torchrun" in done.stderr
