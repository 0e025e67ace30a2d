"""flatkern in Accelerate on two ranks: DDP and FSDP2, compared with loops by hand on the same ranks."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from accelerate_common import Training, shard, start_anew
from common import (
    EVERY,
    USED_FURTHER,
    assert_same_tensors,
    clean_weights,
    loop_of,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    mask_loss,
    summed,
    train_by_hand,
    weights,
)
from torch.nn.parallel import DistributedDataParallel

from flatkern.integrations.accelerate import passes

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def two():
    """Two ranks that stay for all tests of this file: each has to import torch and Accelerate."""
    from ranks import Ranks

    ranks = Ranks(2)
    ranks.call(_join)
    yield ranks
    ranks.close()


def _join():
    """Accelerate reads these; the process group is there already."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29511", ACCELERATE_USE_CPU="true")


def _mine(batches):
    return batches[dist.get_rank() :: 2]


def _same_on_all_ranks(tensors):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(flat, other) for other in every)


# --- DDP ------------------------------------------------------------------------------------------


def _train(method, count, batches, **keywords):
    """Eight micro-batches of each rank, which Accelerate's loader deals out one by one."""
    training = Training(method, count, batches=batches, **keywords)
    assert training.accelerator.num_processes == 2
    training.run()
    training.opt.eval()
    return training


def _by_hand(method, count, batches):
    """The same with torch's DDP: of the backwards of each kind only the last one synchronizes, and every one whose
    gradient is ascended along and used further."""
    model = make_model()
    ddp = DistributedDataParallel(model)
    opt = make_optimizer(method, model, own=summed(method) if count > 1 else {})
    if opt.rolling:
        opt.train()
    every = _mine(make_batches(batches))

    def backward(batch, sync, divisor=count):
        with contextlib.nullcontext() if sync else ddp.no_sync():
            (loss_of(ddp, batch) / divisor).backward()

    for index in range(len(every) // count):
        window = every[index * count : (index + 1) * count]
        last = count - 1
        if opt.enhancement is not None and opt.mask_due:
            mask_loss(ddp, window[0], index).backward()
            opt.update_mask()
        loop = loop_of(method, opt)
        if loop == "noisy":
            opt.perturb()
        if loop in ("plain", "noisy"):
            for k, batch in enumerate(window):
                backward(batch, k == last)
        elif loop == "ascent":
            for k, batch in enumerate(window):
                backward(batch, method in USED_FURTHER)
                opt.perturb()
                backward(batch, k == last)
                if k < last:
                    opt.restore()
        else:
            half = (count + 1) // 2
            for k, batch in enumerate(window[:half]):
                backward(batch, k == half - 1)
            opt.perturb()
            noisy = window[half:] or window
            for k, batch in enumerate(noisy):
                backward(batch, k == len(noisy) - 1)
        opt.step()
        opt.zero_grad()
    opt.eval()
    return model


def _compare_with_a_loop_by_hand(method, count):
    training = _train(method, count, 8 * count)
    assert isinstance(training.model, DistributedDataParallel)
    assert_same_tensors(weights(training.plain), weights(_by_hand(method, count, 8 * count)))
    assert _same_on_all_ranks(training.plain.parameters())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", EVERY)
def test_ddp_equals_a_loop_by_hand_and_replicas_are_equal(method, count, two):
    two.call(_compare_with_a_loop_by_hand, method, count)


def _count_all_reduces(method, count, sync):
    training = Training(method, count, batches=4 * count, sync=sync)
    seen = []

    def hook(state, bucket):
        seen.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    training.model.register_comm_hook(None, hook)
    training.run()
    return len(seen) / 2  # of two steps


@pytest.mark.parametrize(
    "method, count, sync, expected",
    [
        ("rolling RWP", 2, False, 1),
        ("RWP", 2, False, 1),
        ("SAM", 1, False, 1),
        ("SAM", 1, True, 2),
        ("mSAM", 4, False, 1),
        ("mSAM", 4, True, 5),
        ("GSAM", 1, False, 2),
        ("GSAM", 4, False, 5),
        ("SAM at intervals", 1, False, 1),
        ("LookSAM", 1, False, 1.5),
        ("rolling Momentum-SAM", 2, False, 1),
        ("m-RWP", 1, False, 2),
        ("m-RWP", 4, False, 2),
    ],
)
def test_ddp_sends_no_more_than_it_has_to(method, count, sync, expected, two):
    assert two.call(_count_all_reduces, method, count, sync) == [expected, expected]


def _overflow_on_one_rank(method):
    """The ascent of rank 1 alone is not finite: both skip the step, and both lower the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training = Training(method, batches=4, scaler=scaler)
    training.run(stop=1)
    before, calls = clean_weights(training.plain, training.opt), 0

    def overflowing(model, batch):
        nonlocal calls
        calls += 1
        return loss_of(model, batch) * (float("inf") if calls == 1 and dist.get_rank() == 1 else 1.0)

    training.run(start=1, stop=2, loss_of=overflowing)
    assert_same_tensors(clean_weights(training.plain, training.opt), before)
    assert int(training.opt.skipped_steps) == 1
    return scaler.get_scale()


@pytest.mark.parametrize("method", ["SAM", "ASAM", "m-RWP", "GSAM", "Friendly-SAM"])
def test_ddp_ranks_skip_an_overflow_together(method, two):
    assert two.call(_overflow_on_one_rank, method) == [2.0**9, 2.0**9]


def _end_early(method):
    """Windows of 4 and 1 micro-batches of each rank, and of 4 and 2: the clean passes of the last are synchronized."""
    for batches in (10, 12):
        training = _train(method, 4, batches)
        assert _same_on_all_ranks(training.plain.parameters())


@pytest.mark.parametrize("method", ["m-RWP", "mSAM", "LookSAM"])
def test_ddp_replicas_are_equal_where_the_data_end_within_a_window(method, two):
    two.call(_end_early, method)


def _resume(method, folder):
    whole = _train(method, 2, 16)
    first = Training(method, 2, batches=16)
    first.run(stop=4)
    first.accelerator.save_state(folder)
    second = Training(method, 2, batches=16, opt={"lr": 3.0})
    second.accelerator.load_state(folder)
    second.index = first.index
    second.run(start=4)
    second.opt.eval()
    assert_same_tensors(weights(second.plain), weights(whole.plain))


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "m-ARWP", "IRE", "LookSAM", "Friendly-SAM"])
def test_ddp_resume_is_bit_identical(method, two, tmp_path):
    two.call(_resume, method, str(tmp_path))


def _disturbed(method, disturb):
    """Another backward of the model overwrites the views of DDP's buckets that gradients are here."""
    training = Training(method, 4, 16, handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    for k, (x, y) in enumerate(training.loader):
        with training.accelerator.accumulate(training.model):
            training.micro_batch(x, y)
        if disturb and k % 4 < 3:
            (10 * loss_of(training.model, (x, y))).backward()
    training.opt.eval()
    return weights(training.plain)


def _disturb(method):
    assert_same_tensors(_disturbed(method, True), _disturbed(method, False))


@pytest.mark.parametrize("method", ["RWP", "rolling RWP", "m-RWP", "mSAM", "GSAM"])
def test_ddp_backwards_of_others_within_a_window_change_nothing(method, two):
    two.call(_disturb, method)


def _two_models():
    start_anew()
    accelerator = Accelerator(cpu=True)
    first, second = make_model(0), make_model(1)
    opt = make_optimizer("SAM", torch.nn.ModuleList([first, second]))
    first, second, opt = accelerator.prepare(first, second, opt)
    with pytest.raises(ValueError, match=r"parameters of Sequential, too; pass all of its models"):
        passes(accelerator, opt, first)
    step, batch = passes(accelerator, opt, first, second), make_batches(2)[dist.get_rank()]
    with accelerator.accumulate(first, second):
        step(lambda: loss_of(first, batch) + loss_of(second, batch))
    assert _same_on_all_ranks([*first.parameters(), *second.parameters()])


def test_ddp_replicas_of_two_models_of_one_optimizer_are_equal(two):
    two.call(_two_models)


# --- FSDP2 ----------------------------------------------------------------------------------------


def _fsdp2(method, count):
    training = Training(method, count, 4 * count, fsdp2=True)
    training.run()
    training.opt.eval()
    full = {name: p.full_tensor().detach() for name, p in training.model.named_parameters()}
    start_anew()
    # The same on one process, on the mean of both ranks' losses.
    model = make_model()
    opt = make_optimizer(method, model, own=summed(method) if count > 1 else {})
    batches = make_batches(4 * count)
    pairs = [tuple(torch.cat(parts) for parts in zip(*batches[k : k + 2], strict=True)) for k in range(0, 4 * count, 2)]
    windows = [pairs[k : k + count] for k in range(0, len(pairs), count)]
    train_by_hand(method, model, opt, windows)
    for name, w in weights(model).items():
        torch.testing.assert_close(full[name], w, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["RWP", "rolling RWP", "m-RWP", "SAM", "GSAM", "LookSAM", "rolling Momentum-SAM"])
def test_fsdp2_does_what_one_process_does(method, count, two):
    two.call(_fsdp2, method, count)


def _follow_too_early():
    """Accelerate's prepare() takes the optimizer along when it shards the model."""
    start_anew()
    accelerator = Accelerator(cpu=True)
    shard(accelerator)
    model = make_model()
    opt = make_optimizer("rolling RWP", model)
    opt.follow(model)
    sharded, _ = accelerator.prepare(model, opt)
    batch = make_batches(1)[0]
    with pytest.raises(RuntimeError, match=r"opt\.follow\(model\) behind fully_shard"):
        loss_of(sharded, batch)
    assert not opt.is_perturbed


def test_fsdp2_refuses_a_model_that_was_followed_before_it_was_sharded(two):
    two.call(_follow_too_early)


def _shards_after(method, count, evaluate):
    training = Training(method, count, batches=8, fsdp2=True)
    for stop in range(1, 5):
        training.run(start=stop - 1, stop=stop)
        if evaluate and (count > 1 or stop % 2 == 0):
            training.model.eval()
            with torch.no_grad():
                training.model(make_batches(1)[0][0])
            training.model.train()
    training.opt.eval()
    return {k: p.to_local().detach().clone() for k, p in enumerate(training.opt.param_groups[0]["params"])}


def _evaluate_between(method, count):
    """An evaluation has no backward, after which FSDP2's root would drop the weights that it has gathered."""
    assert_same_tensors(_shards_after(method, count, True), _shards_after(method, count, False))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("method", ["RWP", "rolling RWP", "m-RWP", "SAM", "Momentum-SAM"])
def test_fsdp2_evaluations_change_nothing(method, count, two):
    """Between steps, and between the micro-batches of one."""
    two.call(_evaluate_between, method, count)
