"""Lightning under DDP and under FSDP2 (ModelParallelStrategy), two ranks on the CPU: equal to loops by hand."""

import socket
import time

import pytest
import torch
import torch.multiprocessing as mp
from common import assert_other_tensors, assert_same_tensors, make_model, weights
from lightning_ranks import AUTOMATIC, MANUAL, RESUMED, WORLD, serve

PATIENCE = 150  # seconds

automatic = pytest.mark.parametrize("method", AUTOMATIC)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks have found, by the name of the check. They are started once: importing takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = mp.spawn(serve, (port, str(folder)), WORLD, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, f"the ranks have not finished in {PATIENCE} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def results(ranks, name):
    """Of both ranks; an error there is one here."""
    for found in ranks:
        assert not isinstance(found[name], str), found[name]
    return [found[name] for found in ranks]


@automatic
def test_ddp_equals_a_loop_by_hand(method, ranks):
    """And the replicas are equal, bit for bit."""
    first, second = results(ranks, f"DDP {method}")
    assert_same_tensors(first, second)
    assert_same_tensors(first, results(ranks, f"DDP {method} by hand")[0])
    assert_other_tensors(first, weights(make_model()))


@pytest.mark.parametrize("method", MANUAL)
def test_ddp_by_manual_optimization_equals_a_loop_by_hand(method, ranks):
    first, second = results(ranks, f"DDP {method} manual")
    assert_same_tensors(first, second)
    assert_same_tensors(first, results(ranks, f"DDP {method} by hand")[0])


@automatic
def test_ddp_lr_zero_returns_the_weights(method, ranks):
    for found in results(ranks, f"DDP {method} lr=0"):
        assert_same_tensors(found, weights(make_model()))


@pytest.mark.parametrize("method", ["m-RWP"])
def test_ddp_mixes_gradients_of_clean_and_noisy_ranks(method, ranks):
    first, second = results(ranks, "DDP by ranks")
    assert_same_tensors(first, second)
    assert_same_tensors(first, results(ranks, "DDP by ranks by hand")[0])


def test_ddp_refuses_masks_that_would_differ_between_ranks(ranks):
    for found in ranks:
        assert "DDP does not reduce a backward inside of training_step" in found["DDP IRE without mask_loss"]
        assert "FlatkernCallback(mask_loss=" in found["DDP IRE without mask_loss"]


@automatic
def test_fsdp2_equals_a_loop_by_hand(method, ranks):
    first, second = results(ranks, f"FSDP2 {method}")
    assert_same_tensors(first, second)
    assert_same_tensors(first, results(ranks, f"FSDP2 {method} by hand")[0])
    assert_other_tensors(first, weights(make_model()))


@automatic
def test_fsdp2_lr_zero_returns_the_weights(method, ranks):
    for found in results(ranks, f"FSDP2 {method} lr=0"):
        assert_same_tensors(found, weights(make_model()))


@pytest.mark.parametrize("whole", [False, True], ids=["sharded checkpoint", "one file"])
@pytest.mark.parametrize("method", RESUMED)
def test_fsdp2_resume_is_bit_identical(method, whole, ranks):
    """And checkpoints hold clean weights."""
    for straight, other, first, saved in results(ranks, f"FSDP2 {method} resumed {whole}"):
        assert_same_tensors(straight, other)
        assert_same_tensors(first, saved)
        assert_other_tensors(straight, first)
