"""What kernels read where it lies: the noise's words under a captured graph; a step's number, where it is on the host.

For backends of GPUs: Triton's in its interpreter, CUDA's emulated.
"""

import pytest
from test_backends import FEW, UPDATES, assert_same_bits, make, name_of, run
from walks import rows, variants

from flatkern.ops import OPS

DRAWING = rows(
    [
        (OPS[name], words)
        for name in ("fill_normal_", "perturb_gaussian_", *UPDATES)
        for words in [*variants(OPS[name], "cuda"), "backups noise norms"]
        if "noise" in words.split() or name not in UPDATES
    ],
    lambda op, words: words == "backups noise norms" and not op.name.startswith("adam"),
)


@pytest.fixture
def noise_is_on_device(request, backend, monkeypatch):
    """Switches to words that the host does not look at."""
    if backend == "cuda":
        return lambda: request.getfixturevalue("emulated").noise_is_on_device(True)
    from flatkern.triton_kernels import launch

    return lambda: monkeypatch.setattr(launch.Call, "key", lambda call: (call.noise, 0, 0, 0))


@pytest.mark.parametrize("backend, op, words", DRAWING, ids=name_of, indirect=["backend"])
def test_noise_read_on_the_device(op, words, backend, noise_is_on_device):
    """As under a captured graph: the kernel reads the words, and draws the same."""
    want = run(op, backend, make(op, FEW, "mixed", words))
    noise_is_on_device()
    assert_same_bits(op, run(op, backend, make(op, FEW, "mixed", words)), want)


@pytest.fixture
def steps_are_on_host(request, backend, monkeypatch):
    """Switches to steps that the host counts, as torch's optimizers have them without capturable=True."""
    if backend == "cuda":
        return lambda: request.getfixturevalue("emulated").steps_are_on_host(True)
    from flatkern.triton_kernels import update

    return lambda: monkeypatch.setattr(update, "advance", update.advance_on_host)


COUNTING = rows(
    [(OPS[name], words) for name in ("adam_update_", "adamw_update_") for words in variants(OPS[name], "cuda")],
    lambda op, words: (op.name, words) == ("adam_update_", "unit"),
)


@pytest.mark.parametrize("backend, op, words", COUNTING, ids=name_of, indirect=["backend"])
def test_steps_that_are_kept_on_the_host(op, words, backend, steps_are_on_host):
    """The bias corrections that a kernel would compute, to the bit."""
    want = run(op, backend, make(op, FEW, "mixed", words))
    steps_are_on_host()
    assert_same_bits(op, run(op, backend, make(op, FEW, "mixed", words)), want)
