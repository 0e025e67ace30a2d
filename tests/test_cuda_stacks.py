"""FSDP2 and DDP with the CUDA kernels beneath them, emulated: each rank is a process that has an emulated GPU.

The bodies are those of test_sharded.py and test_replicas.py, which run them on the CPU's backends.
"""

import pytest
import test_replicas
import test_sharded
import torch
from emulated import needs_emulation

import flatkern

pytestmark = needs_emulation

METHODS = ["plain", "RWP", "m-RWP", "m-ARWP, losses", "rolling ARWP", "SAM", "ASAM"]


@pytest.mark.parametrize("base", test_sharded.BASES)
@pytest.mark.parametrize("method", METHODS)
def test_shards_are_those_of_one_process(two, base, method):
    """The noise of a shard is that of its rows, masks are those of all gradients."""
    options = {"backend": "cuda", "enhance": flatkern.IRE(2.0, interval=2)}
    two.call(test_sharded.compare_trajectories, (2,), base, method, torch.float32, options)


@pytest.mark.parametrize("method", ["m-RWP", "rolling ARWP", "SAM"])
def test_masters_clipping_and_bfloat16(two, method):
    options = {"backend": "cuda", "master_weights": True, "max_grad_norm": 0.5}
    two.call(test_sharded.compare_trajectories, (2,), "AdamW", method, torch.bfloat16, options)


def fully_sharded(method, base):
    test_sharded.compare_training(method, base, backend="cuda")


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("method", ["RWP", "m-RWP", "rolling ARWP", "SAM"])
def test_fully_shard_trains_as_one_process(two, base, method):
    two.call(fully_sharded, method, base)


@pytest.mark.parametrize("method", ["RWP", "m-RWP", "rolling ARWP", "SAM", "ASAM"])
def test_the_weights_come_back_bit_for_bit(two, method):
    two.call(test_sharded.restored, method, "cuda")


@pytest.mark.parametrize("base, method", [("SGD", "m-ARWP"), ("AdamW", "rolling ARWP"), ("AdamW", "SAM")])
def test_a_checkpoint_of_two_ranks_continues(two, tmp_path, base, method):
    """Bit for bit, and with another backend nearly."""
    options = {"base": base, "method": method, "backend": "cuda"}
    want = two.call(test_sharded.saved, (2,), options, tmp_path)[0]
    for got in two.call(test_sharded.resumed, (2,), options, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for got in two.call(test_sharded.resumed, (2,), options | {"backend": "eager"}, tmp_path):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize("method", test_replicas.METHODS)
def test_replicas_are_equal(two, method, views):
    two.call(test_replicas.trained, "SGD", method, views, 6, 1, "cuda")


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
def test_shards_of_msam_are_reduced_once(two, views):
    two.call(test_replicas.trained, "SGD", "SAM", views, 6, 3, "cuda")


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
def test_two_ranks_do_what_one_process_does_with_both_batches(two, views):
    two.call(test_replicas.gradients_of_both_passes, views, "cuda")
