"""A training by several ranks with mix="ranks", as its user writes it, and the same by one process in float64."""

import contextlib
import functools

import torch
import torch.distributed as dist
from compare import copies
from networks import labelled, layers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import flatkern

SIGMA, LAM, ETA, BETA, SEED = 0.1, 0.3, 2.0, 0.9, 7
LR, MOMENTUM = 0.1, 0.9
method = functools.partial(flatkern.RWP, SIGMA, lam=LAM, beta=BETA, seed=SEED, mix="ranks")


def network(seed=0):
    return layers(9, 13, 3, norm=True, seed=seed)


def batch(step, rank, part=0):
    return labelled(1000 * step + 10 * rank + part)


def parallel(group, seed=0, dtype=torch.float32, **options):
    return DistributedDataParallel(network(seed).to(dtype), process_group=group, **options)


def sgd(model, perturb, **options):
    return flatkern.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, perturb=perturb, **options)


def one_step(model, opt, step, parts=1, weigh=True, scaler=None, rank=None, set_to_none=True, rounds=False):
    """What a user writes; `parts` micro-batches, of which the last alone is synchronised, which no step of `steps.py`
    has. With `rounds` each has noise of its own."""
    rank = dist.get_rank() if rank is None else rank
    opt.zero_grad(set_to_none)
    opt.perturb()
    for part in range(parts):
        x, y = batch(step, rank, part)
        last = part == parts - 1
        if rounds and part:
            opt.restore()
            opt.perturb()
        with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            loss = cross_entropy(model(x), y) * (opt.loss_weight if weigh else 1.0) / (1 if rounds else parts)
            (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()


def train(model, opt, steps, start=0, **options):
    for step in range(start, start + steps):
        one_step(model, opt, step, **options)


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def histories(opt):
    return [opt.state[p]["history"] for p in opt.param_groups[0]["params"]]


def on_every_rank(t, group=None):
    """What all ranks have, to be compared bit for bit."""
    t = t.detach().contiguous()
    found = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, t, group=group)
    return found


def equal_replicas(tensors, group=None):
    for k, t in enumerate(tensors):
        first, *others = on_every_rank(t, group)
        for rank, other in enumerate(others, 1):
            assert torch.equal(first, other), f"tensor {k} of rank {rank} is not that of rank 0"


def on_the_first(world, function, *args):
    """Run it on the first ranks of the world with their group, None for the whole world; all ranks call this."""
    group = group_of(world)
    return function(group, *args) if dist.get_rank() < world else None


@functools.cache
def group_of(world):
    return dist.new_group(range(world)) if world < 4 else None


@functools.cache
def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def fsdp(*shape):
    model = network()
    fully_shard(model[0], mesh=mesh(*shape))
    return fully_shard(model, mesh=mesh(*shape))


def sent(group, eta):
    """Bytes of DDP's buckets, and of every other all-reduce, in a third step."""
    buckets, others, reduce = [], [], dist.all_reduce
    model = parallel(group)

    def hook(state, bucket):
        buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = reduce(bucket.buffer().div_(dist.get_world_size(group)), group=group, async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    def counted(t, *args, **kwargs):
        others.append(t.numel() * t.element_size())
        return reduce(t, *args, **kwargs)

    model.register_comm_hook(None, hook)
    opt = sgd(model, None if eta is None else method(group=group, eta=eta))
    dist.all_reduce = counted
    try:
        for step in range(3):
            buckets.clear()
            others.clear()
            opt.zero_grad()
            if eta is not None:
                opt.perturb()
            x, y = batch(step, dist.get_rank())
            (opt.loss_weight * cross_entropy(model(x), y)).backward()
            opt.step()
    finally:
        dist.all_reduce = reduce
    return buckets, others


# What all ranks together do, in one process and in float64.


def rows_of(t):
    return t.reshape(t.shape[0], -1) if t.dim() >= 2 else t.reshape(-1, 1)


def oracle(roles, streams, eta, parts, steps, rounds=False):
    """Weights and histories; `roles[r]` is True where rank r is noisy. With `rounds` each part has its own noise."""
    model = network().double()
    params = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    history = [torch.zeros(len(rows_of(p)), dtype=torch.float64) for p in params]

    def noisy(step, part, stream, clean):
        narrow = [w.float() for w in clean]
        drawn, moved = [w.clone() for w in narrow], []
        count = parts * step + part if rounds else step
        flatkern.perturb_(drawn, SIGMA, seed=SEED, round=count, stream=stream, backend="eager")
        for w, n, d, h in zip(clean, narrow, drawn, history, strict=True):
            e = rows_of(d.double() - n.double()) / (1 + eta * h[:, None]).sqrt()
            moved.append(w + e.view_as(w))
        return moved

    def gradient(step, rank, clean):
        total = [torch.zeros_like(p) for p in params]
        for part in range(parts):
            weights = noisy(step, part, streams[rank], clean) if roles[rank] else clean
            with torch.no_grad():
                for p, w in zip(params, weights, strict=True):
                    p.copy_(w)
            x, y = batch(step, rank, part)
            for t, g in zip(total, torch.autograd.grad(cross_entropy(model(x.double()), y), params), strict=True):
                t += g / parts
        return total

    for step in range(steps):
        clean = copies(params)
        final = [torch.zeros_like(p) for p in params]
        squares = [torch.zeros_like(h) for h in history]
        for rank, is_noisy in enumerate(roles):
            share = LAM / sum(roles) if is_noisy else (1 - LAM) / (len(roles) - sum(roles))
            for k, g in enumerate(gradient(step, rank, clean)):
                final[k] += share * g
                if is_noisy:
                    squares[k] += rows_of(g).square().sum(1) / sum(roles)
        with torch.no_grad():
            for k, p in enumerate(params):
                velocity[k] = MOMENTUM * velocity[k] + final[k]
                p.copy_(clean[k] - LR * velocity[k])
                if eta:
                    history[k] = BETA * history[k] + squares[k]
    return [p.detach() for p in params], history


def by_parity(world):
    return [rank % 2 == 1 for rank in range(world)]


def compare_with(got, want):
    """A float32 run of a few steps: every weight is rounded some ten times, to 6e-8 of values up to 1."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(whole(a).double(), b, rtol=1e-5, atol=1e-6)
