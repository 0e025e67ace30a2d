"""Tests of flatkern inside training libraries, each with the real library: `make test-stacks`.

A library that is not installed leaves its files out, and `make test-stacks` has said so.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

# Nothing is downloaded, and no library asks its server for anything.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DISABLE_TELEMETRY="1", ACCELERATE_USE_CPU="true")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# Ranks and examples are processes of their own.
STARTUP = Path(__file__).parent / "startup"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(STARTUP))
importlib.import_module("torchvision_operators")

# The models are tiny: several threads would only wait for one another.
torch.set_num_threads(1)

# test_<key>*.py needs these modules.
NEEDED = {
    "lightning": ["lightning"],
    "transformers": ["transformers", "accelerate"],
    "peft": ["peft", "transformers"],
    "accelerate": ["accelerate"],
    "timm": ["timm"],
    "skorch": ["skorch"],
}
collect_ignore_glob = [
    f"test_{key}*.py" for key, modules in NEEDED.items() if any(importlib.util.find_spec(m) is None for m in modules)
]


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same random numbers, in whichever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def warnings_of_ours_are_errors():
    """flatkern warns about training loops that cannot be meant; a test that provokes one catches it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?s).*(flatkern|rolling|perturb|ASAM|[Nn]oise)")
        yield
