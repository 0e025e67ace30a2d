"""examples/lightning_sam.py runs by the command of its first line, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "lightning_sam.py"


@pytest.mark.parametrize("method", ["SAM"])
def test_the_example_trains(method):
    first = EXAMPLE.read_text().splitlines()[0]
    assert first.startswith("# python examples/lightning_sam.py [--method SAM|rolling|plain]")
    command = first.removeprefix("# python ").split(" [")[0].split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"^epoch \d: loss ([\d.]+), accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert len(epochs) == 5, done.stdout
    assert float(epochs[-1][0]) < float(epochs[0][0])
    last = re.search(rf"^{method}: test accuracy ([\d.]+)%, at clean weights$", done.stdout, re.MULTILINE)
    assert last and float(last[1]) == float(epochs[-1][1]) > 80, done.stdout  # of ten classes
