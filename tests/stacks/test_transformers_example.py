"""The example runs by the command that it names, and what it prints shows that every method learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transformers_sam.py"


def test_the_example_trains_with_every_method():
    command = re.search(r"^    python (\S+)$", EXAMPLE.read_text(), re.MULTILINE)
    assert command, "the docstring has no command"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # as a user runs it
    done = subprocess.run(
        [sys.executable, command[1]], cwd=EXAMPLE.parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\S+(?: RWP)?) +(\d\.\d{4}) +[\d.]+$", done.stdout, re.MULTILINE))
    assert list(rows) == ["AdamW", "rolling RWP", "SAM", "m-RWP", "IRE"], done.stdout
    # Nothing learnt: log(32) = 3.47. The rule known: 0.65, the entropy of what is random.
    assert all(float(loss) < 1.0 for loss in rows.values()), rows
