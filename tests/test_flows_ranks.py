"""DDP and FSDP2 in the middle of a perturbation: what their construction writes, passes that write nothing, shards that
others write, and a look at values that sends nothing.
"""

import warnings

import pytest
import steps
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from compare import assert_same, same
from parallel_training import network
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import flatkern
from flatkern import dtensor

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

METHODS = {
    "RWP": flatkern.RWP(0.1, eta=1.0),
    "m-RWP": flatkern.RWP(0.1, lam=0.5),
    "rolling": flatkern.RWP(0.1, eta=1.0, rolling=True),
    "SAM": flatkern.SAM(0.2),
    "Friendly-SAM": flatkern.FriendlySAM(0.2),
}


def optimizer(model, method, lr=0.0):
    opt = flatkern.SGD(model.parameters(), lr=lr, perturb=method)
    if opt.rolling:
        opt.follow(model)
    return opt


def backward(model):
    generator = torch.Generator().manual_seed(dist.get_rank())
    model(torch.randn(4, 9, generator=generator)).square().mean().backward()


def perturb(model, opt):
    opt.zero_grad()
    opt.train() if opt.rolling else steps.perturb(opt, lambda: backward(model))
    assert opt.is_perturbed


def parts(model):
    return [dtensor.local(p.detach()).clone() for p in model.parameters()]


# --- DDP -------------------------------------------------------------------------------------------


def wrapped_under_noise():
    """Its construction sends rank 0's weights to all, whose own they are: no step is refused, and the end is clean."""
    for method in ("RWP", "m-RWP", "rolling"):
        model = network()
        clean = parts(model)
        opt = optimizer(model, METHODS[method])
        perturb(model, opt)
        parallel = DistributedDataParallel(model)
        backward(parallel)
        opt.step()
        opt.eval()
        assert_same(parts(model), clean, method)


def wrapped_inside_clean():
    """Each rank with a noise of its own, and weights of its own until then."""
    model = network(seed=dist.get_rank())
    opt = optimizer(model, flatkern.RWP(0.1, rolling=True, stream=dist.get_rank()))
    perturb(model, opt)
    with opt.clean():
        parallel = DistributedDataParallel(model)
    for _ in range(2):
        opt.zero_grad()
        backward(parallel)
        opt.step()
    opt.eval()
    assert_same(parts(model), parts(network(seed=0)))


def wrapped_under_noises_of_their_own():
    """On rank 1 others have written what is not its own: its step says so."""
    model = network()
    opt = optimizer(model, flatkern.RWP(0.1, rolling=True, stream=dist.get_rank()))
    perturb(model, opt)
    parallel = DistributedDataParallel(model)
    written = parts(model)
    backward(parallel)
    if dist.get_rank() == 0:
        opt.step()
        return
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        opt.step()
    assert_same(parts(model), written)


@pytest.mark.parametrize("case", [wrapped_under_noise, wrapped_inside_clean, wrapped_under_noises_of_their_own])
def test_ddp_is_constructed_in_the_middle(two, case):
    two.call(case)


# --- FSDP2 -----------------------------------------------------------------------------------------


def sharded():
    model, mesh = network(), init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def passes_write_nothing(method):
    """No version moves, no value changes: steps, looks at values and clean() find what they expect."""
    model = sharded()
    clean = parts(model)
    opt = optimizer(model, METHODS[method])
    for end in ("step", "eval", "clean", "step", "step"):
        perturb(model, opt)
        before = [dtensor.version(p) for p in model.parameters()]
        backward(model)
        assert [dtensor.version(p) for p in model.parameters()] == before
        if end == "clean":
            with opt.clean():
                assert_same(parts(model), clean)
        if end == "step":
            opt.step()
        with CommDebugMode() as sent:
            opt.eval()
        assert sent.get_total_counts() == 0
        assert_same(parts(model), clean)
        opt.release()


@pytest.mark.parametrize("method", METHODS)
def test_passes_of_fsdp_write_nothing(two, method):
    two.call(passes_write_nothing, method)


def others_write(method, path):
    """To a shard, or all of them; refused by a step, kept at the end, and inside clean() on one rank alone."""
    rank = dist.get_rank()
    model = sharded()
    clean = parts(model)
    opt = optimizer(model, METHODS[method])
    dcp.save({"model": model.state_dict()}, checkpoint_id=path)

    perturb(model, opt)
    backward(model)
    state = {"model": sharded().state_dict()}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    if opt.is_perturbed:
        with pytest.raises(RuntimeError, match=r"clean\(\)"):
            opt.step()
    else:
        assert opt.rolling  # following has ended it before
    end(opt)
    assert_same(parts(model), clean)

    perturb(model, opt)
    whole = {key: torch.full_like(value, 0.5) for key, value in network().state_dict().items()}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    end(opt)
    assert all(bool((part == 0.5).all()) for part in parts(model))

    perturb(model, opt)
    backward(model)
    weight = model[0].weight
    with torch.no_grad():
        whole = weight.full_tensor()
        whole[0, 1] = 7.0  # which rank 0 holds
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
    if opt.perturbation.draws:
        end(opt)
        expected = [torch.full_like(c, 0.5) for c in clean]
        if rank == 0:
            expected[0][0, 1] = 7.0
        assert_same(parts(model), expected)
    else:
        end(opt)

    for last in (opt.step, opt.eval):
        expected = parts(model)
        perturb(model, opt)
        backward(model)
        if rank == 0:  # nothing is sent, so that one rank may
            with opt.clean():
                assert_same(parts(model), expected)
                for p in model.parameters():
                    dtensor.local(p.data).mul_(2.0)
                expected = parts(model)
        last()
        opt.eval()
        assert_same(parts(model), expected)
        opt.release()


def end(opt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAM's, of tensors that stay as written
        opt.eval()
    opt.release()


@pytest.mark.parametrize("method", METHODS)
def test_others_write_to_shards(two, method, tmp_path):
    two.call(others_write, method, str(tmp_path))


def data_writes_are_noticed():
    model = sharded()
    clean = parts(model)
    opt = optimizer(model, METHODS["rolling"])
    perturb(model, opt)
    for part in (dtensor.local(p) for p in model.parameters()):
        part.data.mul_(2.0)
    written = parts(model)
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        opt.eval()
    assert_same(parts(model), written)
    assert not same(written, clean)


def test_data_writes_to_shards_are_noticed(two):
    two.call(data_writes_are_noticed)
