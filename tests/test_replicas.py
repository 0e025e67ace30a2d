"""DDP: replicas stay equal bit for bit, whatever the method, and their masks too; with and without bucket views."""

import contextlib
import functools
import gc

import pytest
import torch
import torch.distributed as dist
from compare import copies
from covering import also
from networks import labelled
from parallel_training import equal_replicas, network, on_every_rank
from steps import perturb
from torch.nn.parallel import DistributedDataParallel

import flatkern

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

METHODS = {
    "plain": lambda rank: None,
    "RWP": lambda rank: flatkern.RWP(0.05),
    "RWP, a noise per rank": lambda rank: flatkern.RWP(0.05, stream=rank),
    "m-RWP": lambda rank: flatkern.RWP(0.05, lam=0.5, stream=rank),
    "m-RWP, losses": lambda rank: flatkern.RWP(0.05, lam=0.5, mix="losses", stream=rank),
    "m-ARWP": lambda rank: flatkern.RWP(0.05, lam=0.5, eta=0.1),
    "rolling": lambda rank: flatkern.RWP(0.05, rolling=True, stream=rank),
    "SAM": lambda rank: flatkern.SAM(0.1),
    "ASAM": lambda rank: flatkern.ASAM(0.5),
    "mixed SAM": lambda rank: flatkern.SAM(0.1, lam=0.7),
    "GSAM": lambda rank: flatkern.GSAM(0.1),
    "Friendly-SAM": lambda rank: flatkern.FriendlySAM(0.1),
    "LookSAM": lambda rank: flatkern.LookSAM(0.1, k=2),
    "Momentum-SAM": lambda rank: flatkern.MomentumSAM(0.5),
    "rolling Momentum-SAM": lambda rank: flatkern.MomentumSAM(0.5, rolling=True),
}
USED_FURTHER = ["mixed SAM", "GSAM", "Friendly-SAM", "LookSAM"]  # the gradient that they ascend along
BASES = {
    "SGD": functools.partial(flatkern.SGD, lr=0.1, momentum=0.9),
    "AdamW": functools.partial(flatkern.AdamW, lr=0.01),
    "Wrap": lambda params, **ours: flatkern.Wrap(torch.optim.RMSprop(params, lr=0.01), **ours),
}


def data(step, rank):
    return labelled(2 * step + rank)


def trained(base, method, views, steps=6, rounds=1, backend=None, synchronised=None):
    """`rounds` > 1: accumulation over that many shards, of which the last backward alone is synchronised.

    Arguments:
        synchronised: the backwards at clean weights; None: with one round, and where the method uses them further.
    """
    if synchronised is None:
        synchronised = rounds == 1 or method in USED_FURTHER
    rank = dist.get_rank()
    model = DistributedDataParallel(network(), gradient_as_bucket_view=views)
    start = copies(model.parameters())
    ours = {"backend": backend, "enhance": flatkern.IRE(2.0, interval=2)}
    opt = BASES[base](model.parameters(), perturb=METHODS[method](rank), **ours)
    if opt.rolling:
        opt.follow(model)
    masks = []

    def backward(step, synchronised):
        x, y = data(step, rank)
        with contextlib.nullcontext() if synchronised else model.no_sync():
            (opt.loss_weight * torch.nn.functional.cross_entropy(model(x), y)).backward()

    for step in range(steps):
        opt.zero_grad()
        if opt.mask_due:
            torch.manual_seed(100 * step + rank)  # labels of its own
            model.eval()
            flatkern.sampled_label_loss(model(data(step, rank)[0])).backward()
            opt.update_mask()
            model.train()
            masks += [opt.cycle.state.entry(p)["mask"].clone() for p in model.parameters()]
        for k in range(rounds):
            last = k == rounds - 1
            due = opt.perturb_due
            perturb(opt, lambda index=rounds * step + k: backward(index, synchronised))
            backward(rounds * step + k, synchronised=last)
            if due and not last:
                opt.restore()
        opt.step()
    opt.eval()
    moved = sum((p - s).abs().sum() for p, s in zip(model.parameters(), start, strict=True))
    assert moved > 0.1
    equal_replicas([*masks, *model.parameters()])
    for p in model.parameters():
        equal_replicas([v for v in opt.state[p].values() if v.dim()])


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize("method", METHODS)
def test_replicas_are_equal(two, method, views):
    two.call(trained, "SGD", method, views)


@pytest.mark.parametrize("method", ["m-RWP", "rolling", "SAM"])
@pytest.mark.parametrize("base", ["AdamW", "Wrap"])
def test_replicas_are_equal_with_other_bases(two, base, method):
    two.call(trained, base, method, True)


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
def test_shards_of_msam_are_reduced_once(two, views):
    two.call(trained, "SGD", "SAM", views, 6, 3)


@pytest.mark.parametrize("method", USED_FURTHER)
def test_replicas_are_equal_after_several_ascents_a_step(two, method):
    two.call(trained, "SGD", method, True, 6, 3)


@pytest.mark.parametrize("method", USED_FURTHER)
def test_replicas_part_where_an_ascent_that_is_used_further_is_not_synchronized(two, method):
    """What docs/methods.md warns of: such a gradient is of this rank alone, and enters its update or its state."""
    with pytest.raises(AssertionError, match=r"AssertionError: tensor \d"):
        two.call(trained, "SGD", method, False, 6, 1, None, False)


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = network(), torch.nn.ModuleList(torch.nn.Linear(3, n) for n in (3, 4))

    def forward(self, x, head):
        return self.heads[head](self.body(x))


def overflow_on_one_rank(base, method, scaled, rounds, views, heads=None, abandoned=False):
    """In the second of four steps the first ascent of rank 1, along a gradient of its own, is not finite.

    Arguments:
        heads: None, or which of two heads takes a pass: that of the "rank" or that of the "round".
        abandoned: that ascent is no round, since no backward follows it.
    """
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = network() if heads is None else TwoHeads()
    model = DistributedDataParallel(net, gradient_as_bucket_view=views, find_unused_parameters=heads is not None)
    opt = BASES[base](model.parameters(), perturb=method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)

    def backward(step, k, factor=1.0):
        x, y = data(step, rank)
        out = model(x) if heads is None else model(x, {"rank": rank, "round": k % 2}[heads])
        scaler.scale(factor * torch.nn.functional.cross_entropy(out, y)).backward()

    moved = []
    for step in range(4):
        before = copies(model.parameters())
        opt.zero_grad()
        for k in range(rounds):
            last = k == rounds - 1
            with model.no_sync():
                backward(step, k, float("inf") if (step, k, rank) == (1, 0, 1) else 1.0)
            opt.perturb(scaler=scaler)
            if not (abandoned and (step, k) == (1, 0)):
                with contextlib.nullcontext() if last else model.no_sync():
                    backward(step, k)
            if not last:
                opt.restore()
        scaler.step(opt)
        scaler.update()
        moved.append(not all(map(torch.equal, model.parameters(), before)))
        equal_replicas(model.parameters())
    assert moved == [True, abandoned, True, True]
    assert int(opt.skipped_steps) == (not abandoned)
    assert scaler.get_scale() == (2.0 ** (8 if abandoned else 7) if scaled else 1.0)
    assert opt.param_groups[0]["perturb_count"] == 3 + abandoned
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("base", "method", "case"),
    [
        ("SGD", flatkern.SAM(0.1), (False, 1, False)),
        ("SGD", flatkern.SAM(0.1), (True, 1, True)),
        ("AdamW", flatkern.ASAM(0.5), (False, 3, True)),
        ("AdamW", flatkern.SAM(0.1, rounds="sum"), (True, 3, False)),
        ("Wrap", flatkern.SAM(0.1), (False, 1, True)),
        ("SGD", flatkern.SAM(0.1), (False, 1, False, "rank")),
        ("SGD", flatkern.SAM(0.1), (False, 2, True, "round")),
        ("SGD", flatkern.SAM(0.1), (True, 2, False, None, True)),
        ("AdamW", flatkern.SAM(0.1), (False, 2, False, None, True)),
    ],
    ids=str,
)
def test_all_ranks_skip_a_step_whose_ascent_overflows_on_one(two, base, method, case):
    """Replicas would part, and take different gradients in the steps to come where there is an interval."""
    two.call(overflow_on_one_rank, base, method, *case)


def divided_losses(name, views, synchronised, base="SGD"):
    """Micro-batches whose losses are divided by their number: two ranks do what one process does with both batches."""
    rank = dist.get_rank()
    method = {
        "m-ARWP": flatkern.RWP(0.05, lam=0.3, eta=2.0, rounds="sum"),
        "SAM": flatkern.SAM(0.1, rounds="sum"),
    }[name]
    ends = []
    for parallel in (True, False):
        model = network()
        if parallel:
            model = DistributedDataParallel(model, gradient_as_bucket_view=views)
        opt = BASES[base](model.parameters(), perturb=method)

        def backward(k, last=False, model=model, parallel=parallel):
            lone = parallel and not (synchronised or last)
            with model.no_sync() if lone else contextlib.nullcontext():
                for r in [rank] if parallel else [0, 1]:
                    x, y = data(k, r)
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                    (loss / 3 if parallel else loss / 6).backward()

        for step in range(2):
            if name == "SAM":  # the ascent of every rank is its own, so that one process cannot follow
                for k in range(3):
                    backward(4 * step + k)
                    opt.perturb()
                    backward(4 * step + k, last=k == 2)
                    if k < 2:
                        opt.restore()
            else:
                if not parallel:  # a pass is one backward for each rank here
                    opt.passes = (2, 1)
                backward(4 * step)
                backward(4 * step + 1, last=True)
                opt.perturb()
                backward(4 * step + 2, last=True)
            opt.step()
            opt.zero_grad()
        if parallel:
            equal_replicas(model.parameters())
        ends.append(copies(model.parameters()))
    if name != "SAM":
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize(("name", "synchronised"), [("m-ARWP", False), ("m-ARWP", True), ("SAM", False)])
def test_divided_losses(two, name, synchronised, views):
    """rounds="sum": passes are counted under DDP, whether each is synchronized or the last of its kind only."""
    two.call(divided_losses, name, views, synchronised)


def gradients_of_both_passes(views, backend=None):
    """m-RWP keeps the clean gradient while the second backward fills the same bucket."""
    rank = dist.get_rank()
    step_of = {}
    for parallel in (True, False):
        model = network()
        if parallel:
            model = DistributedDataParallel(model, gradient_as_bucket_view=views)
        opt = flatkern.SGD(model.parameters(), lr=1.0, perturb=flatkern.RWP(0.05, lam=0.25), backend=backend)

        def backward(step, model=model, parallel=parallel):
            for r in [rank] if parallel else [0, 1]:
                x, y = data(step, r)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                (loss if parallel else loss / 2).backward()

        for step in range(3):
            opt.zero_grad()
            backward(2 * step)
            opt.perturb()
            backward(2 * step + 1)
            opt.step()
        step_of[parallel] = copies(model.parameters())
    for a, b in zip(step_of[True], step_of[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
def test_two_ranks_do_what_one_process_does_with_both_batches(two, views):
    two.call(gradients_of_both_passes, views)


@pytest.mark.parametrize(
    "method", ["m-ARWP", "SAM", *also("rolling", "RWP, a noise per rank", "m-RWP", "ASAM", "LookSAM")]
)
def test_replicas_are_equal_after_many_steps(two, method):
    two.call(trained, "SGD", method, True, 200)


def resumed_from_rank_0(base):
    """Every rank draws its own noise; what rank 0 has saved is loaded on all of them."""
    rank = dist.get_rank()
    params = [torch.nn.Parameter(torch.ones(3, 4))]
    opt = BASES[base](params, perturb=flatkern.RWP(0.05, stream=rank, rolling=True))
    for _ in range(2):
        params[0].grad = torch.ones(3, 4)
        opt.step()
    opt.eval()
    saved = [opt.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved)
    opt.load_state_dict(saved[0])
    opt.train()
    first, second = on_every_rank(params[0].detach())
    assert not torch.equal(first, second)
    assert opt.param_groups[0]["stream"] == rank


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
def test_a_checkpoint_of_rank_0_leaves_each_rank_its_stream(two, base):
    two.call(resumed_from_rank_0, base)
