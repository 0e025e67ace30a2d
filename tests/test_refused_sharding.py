"""Sharding that an optimizer cannot serve is refused when it is made; what works under it does what torch's does."""

import warnings

import pytest
import torch
import torch.distributed as dist
from compare import copies
from networks import layers

import flatkern

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

NEEDS_ALL = {
    "perturb": {"perturb": flatkern.SAM()},
    "enhance": {"enhance": flatkern.IRE(1.0)},
    "max_grad_norm": {"max_grad_norm": 1.0},
}


def message_of(make):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as refusal:
        make()
    return str(refusal.value)


def refused_under_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated, and that this is a CPU
            model = FullyShardedDataParallel(layers(5, 7, 3), use_orig_params=original, device_id=torch.device("cpu"))
        params = list(model.parameters())
        for base in (flatkern.SGD, flatkern.AdamW):
            message = message_of(lambda: base(params, lr=0.1, perturb=flatkern.RWP()))  # noqa: B023
            assert "FSDP1" in message
            assert "fully_shard" in message
        sgd = torch.optim.SGD(params, lr=0.1)
        assert "fully_shard" in message_of(lambda: flatkern.Wrap(sgd, perturb=flatkern.SAM()))  # noqa: B023
        assert "sigma" not in sgd.param_groups[0]
        ours = flatkern.SGD(layers(5, 7, 3).parameters(), lr=0.1)
        assert "fully_shard" in message_of(lambda: ours.add_param_group({"params": params}))  # noqa: B023
        assert len(ours.param_groups) == 1


def test_fsdp1_is_refused(two):
    two.call(refused_under_fsdp1)


class Derived(flatkern.SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)


def wrapped(params, lr, **own):
    return flatkern.Wrap(torch.optim.SGD(params, lr=lr), **own)


def inside_zero():
    """Plain rules train as torch's; whatever needs all parameters is refused."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ends = []
    for rule in (torch.optim.AdamW, flatkern.AdamW):
        model = layers(5, 7, 3)
        opt = ZeroRedundancyOptimizer(model.parameters(), rule, lr=0.1)
        for step in range(3):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 5, generator=generator)).square().mean().backward()
            opt.step()
        ends.append(copies(model.parameters()))
    torch.testing.assert_close(*ends)
    params = list(layers(5, 7, 3).parameters())
    for name, options in NEEDS_ALL.items():
        for rule in (flatkern.SGD, flatkern.AdamW, Derived, wrapped):
            message = message_of(lambda: ZeroRedundancyOptimizer(params, rule, lr=0.1, **options))  # noqa: B023
            assert f"{name} inside" in message
            assert "fully_shard" in message
    # Beside one, and around nothing of it, they are as ever.
    flatkern.SGD(params, lr=0.1, perturb=flatkern.SAM())


def test_zero_redundancy_optimizer(two):
    two.call(inside_zero)


@pytest.mark.parametrize("options", NEEDS_ALL.values(), ids=NEEDS_ALL)
def test_what_fsdp1_has_marked_is_refused(options):
    p = torch.nn.Parameter(torch.randn(3))
    p._fsdp_flattened = True
    with pytest.raises(ValueError, match="fully_shard"):
        flatkern.SGD([p], lr=0.1, **options)


def passes_of_fsdp2():
    """Unsynchronized passes are added up where no hook sees them; when they are told, two ranks do what one does."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    ends = []
    for shard in (True, False):
        model = layers(5, 7, 3)
        if shard:
            fully_shard(model)
        opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.RWP(0.05, lam=0.3, rounds="sum"))

        def backward(k, last=True, model=model, shard=shard):
            if shard:
                model.set_requires_gradient_sync(last)
            (model(torch.full((2, 5), 0.1 * k)).square().mean() / 3).backward()

        backward(1, last=False)
        backward(2)
        opt.perturb()
        backward(3)
        if shard:
            assert "opt.passes" in message_of(opt.step)
            opt.passes = (2, 1)
        opt.step()
        params = [p.detach() for p in model.parameters()]
        ends.append([p.full_tensor() if isinstance(p, DTensor) else p for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_passes_of_sharded_parameters_are_told(two):
    two.call(passes_of_fsdp2)
