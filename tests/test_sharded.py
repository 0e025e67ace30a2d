"""FSDP2: sharded optimizers do what one process does, with the communication that is promised."""

import copy
import functools

import pytest
import steps
import torch
import torch.distributed as dist
from covering import also
from networks import labelled
from parallel_training import fsdp, mesh, network, whole
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import flatkern

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

# Rows that no number of ranks divides, rows that no eight divides, fewer rows than ranks, a vector shorter than ranks.
SHAPES = [(7, 5), (3, 2, 3, 3), (13,), (1, 9), (2,), (16, 8)]
METHODS = {
    "plain": None,
    "RWP": flatkern.RWP(0.05),
    "m-RWP": flatkern.RWP(0.05, lam=0.3),
    "m-ARWP": flatkern.RWP(0.05, lam=0.3, eta=0.2),
    "m-ARWP, losses": flatkern.RWP(0.05, lam=0.3, eta=0.2, mix="losses"),
    "rolling ARWP": flatkern.RWP(0.05, eta=0.2, rolling=True),
    "SAM": flatkern.SAM(0.1),
    "ASAM": flatkern.ASAM(0.5),
    "mixed SAM": flatkern.SAM(0.1, lam=0.7),
    "GSAM": flatkern.GSAM(0.1),
    "Friendly-SAM": flatkern.FriendlySAM(0.1),
    "LookSAM": flatkern.LookSAM(0.1, k=2),
    "Momentum-SAM": flatkern.MomentumSAM(0.5),
    "rolling Momentum-SAM": flatkern.MomentumSAM(0.5, rolling=True),
    "RWP, rms": flatkern.RWP(0.1, scale="rms"),
    "RWP, absolute": flatkern.RWP(0.02, scale="absolute"),
}
BASES = {
    "SGD": functools.partial(flatkern.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": functools.partial(flatkern.AdamW, lr=0.01),
    "Wrap": lambda params, **ours: flatkern.Wrap(torch.optim.RMSprop(params, lr=0.001, momentum=0.9), **ours),
}
every_method = pytest.mark.parametrize("method", METHODS)


def tensors(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def divided(values, where):
    """As DTensors; two-dimensional meshes replicate along the first, as hybrid sharding does. None: as they are."""
    if where is None:
        return values
    placements = [Replicate()] * (len(where) - 1) + [Shard(0)]
    return [distribute_tensor(v, mesh(*where), placements) for v in values]


def trajectory(where, base, method, dtype, options, count=5, opt=None, start=0):
    """Weights as the backward passes and as evaluation would see them, step by step, with preset gradients."""
    method = METHODS[method] if isinstance(method, str) else method
    params = [torch.nn.Parameter(p) for p in divided([t.to(dtype) for t in tensors(0)], where)]
    opt = BASES[base](params, perturb=method, **options) if opt is None else opt(params)
    params = [p for group in opt.param_groups for p in group["params"]]
    seen = []

    def backward(seed, looks=False):
        if looks:
            seen.extend(whole(p) for p in params)
        for p, g in zip(params, divided([t.to(dtype) for t in tensors(seed, 0.1)], where), strict=True):
            p.grad = g if p.grad is None else p.grad + g

    opt.train()
    for t in range(start, start + count):
        if opt.enhancement and opt.mask_due:
            opt.eval()
            backward(1000 + t)
            opt.update_mask()
            opt.train()
            seen += [whole(opt.state[p]["mask"]) if p in opt.state else None for p in params]
        steps.step(opt, functools.partial(backward, 200 + t, looks=True), clean=functools.partial(backward, 100 + t))
        opt.zero_grad()
    opt.eval()
    seen += [whole(p) for p in params]
    seen += [t for norm in (opt.ascent_norm, opt.grad_norm) if norm is not None for t in [norm.clone()]]
    opt.train()
    return seen


def compare_trajectories(where, base, method, dtype, options):
    """A sharded run and a whole one, on this rank. Vectors are measured in another order where they are divided, and so
    are norms over everything: their rounding may differ, and what depends on it."""
    got, want = (trajectory(w, base, method, dtype, options) for w in (where, None))
    exact = isinstance(METHODS[method], (flatkern.RWP, type(None))) and "max_grad_norm" not in options
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if b is None:
            assert a is None
        elif b.dtype == torch.uint8 or (exact and (b.dim() > 1 or METHODS[method] is None)):
            assert torch.equal(a, b), f"tensor {k}"
        else:
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.covering(1)
@every_method
@pytest.mark.parametrize("base", BASES)
def test_sharded_is_whole(two, base, method):
    two.call(compare_trajectories, (2,), base, method, torch.float32, {})


@pytest.mark.parametrize("method", ["m-ARWP", "rolling ARWP", "ASAM", "LookSAM"])
def test_sharded_is_whole_on_every_backend(two, backend, method):
    two.call(compare_trajectories, (2,), "SGD", method, torch.float32, {"backend": backend})


@pytest.mark.parametrize("method", ["m-RWP", "rolling ARWP", "SAM", "GSAM"])
def test_masters_clipping_and_bfloat16(two, method):
    options = {"master_weights": True, "max_grad_norm": 0.5}
    two.call(compare_trajectories, (2,), "AdamW", method, torch.bfloat16, options)


@pytest.mark.parametrize("method", ["m-ARWP", "rolling ARWP", "SAM", "LookSAM"])
def test_more_ranks_than_rows_and_hybrid_sharding(four, method):
    options = {"enhance": flatkern.IRE(2.0, interval=2), "max_grad_norm": 0.5}
    for where in ((4,), (2, 2)):
        four.call(compare_trajectories, where, "SGD", method, torch.float32, options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["plain", "m-RWP", "rolling ARWP"])
def test_masks_are_those_of_one_process(two, base, method):
    two.call(compare_trajectories, (2,), base, method, torch.float32, {"enhance": flatkern.IRE(2.0, interval=2)})


# Communication.


def all_reduced(method, options):
    """Bytes of every all-reduce, by the optimizer's call that asked for it, in a second step."""
    sizes, reduce = [], dist.all_reduce
    params = [torch.nn.Parameter(p) for p in divided(tensors(0), (2,))]
    grads = divided(tensors(1), (2,))
    opt = flatkern.SGD(params, 0.1, momentum=0.9, perturb=METHODS[method], **options)
    found = {}

    def call(name):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        sizes.clear()
        getattr(opt, name)()
        found[name] = list(sizes)

    def counted(t, *args, **kwargs):
        sizes.append(t.numel() * t.element_size())
        return reduce(t, *args, **kwargs)

    dist.all_reduce = counted
    try:
        opt.train()
        for _ in range(2):
            if options.get("enhance"):
                call("update_mask")
            if opt.perturb_due:
                opt.zero_grad()
                if opt.perturbation.starts_perturbed:
                    sizes.clear()
                    opt.perturb()
                    found["perturb"] = list(sizes)
                else:
                    call("perturb")
            call("step")
    finally:
        dist.all_reduce = reduce
    return found


VECTORS = sum(len(shape) == 1 for shape in SHAPES)


@pytest.mark.parametrize(
    "method, options, expected",
    [
        ("plain", {}, {"step": []}),
        ("RWP", {}, {"perturb": [8 * VECTORS], "step": []}),
        ("m-ARWP", {}, {"perturb": [8 * VECTORS], "step": []}),
        ("rolling ARWP", {}, {"step": [8 * VECTORS]}),
        ("SAM", {}, {"perturb": [8], "step": []}),
        ("GSAM", {}, {"perturb": [8], "step": [24]}),
        ("Friendly-SAM", {}, {"perturb": [8], "step": []}),
        ("Momentum-SAM", {}, {"perturb": [8], "step": []}),
        ("rolling Momentum-SAM", {}, {"step": [8]}),
        ("RWP, absolute", {}, {"perturb": [], "step": []}),
        ("plain", {"max_grad_norm": 1.0}, {"step": [8]}),
        ("plain", {"enhance": flatkern.IRE(1.0)}, {"update_mask": [8 * 2050, 8 * 1026, 8 * 1026], "step": []}),
    ],
)
def test_what_is_sent(two, method, options, expected):
    """A number per vector, one for a norm over everything, 33 KB for a mask; nothing for the rest."""
    for found in two.call(all_reduced, method, options):
        assert found == expected


# FSDP2 itself.


def train(model, opt, count, start=0):
    """With the same batch on every rank, so that the mean over ranks is the gradient of one process."""
    for t in range(start, start + count):
        x, y = labelled(t)

        def backward(x=x, y=y):
            torch.nn.functional.cross_entropy(model(x), y).backward()

        opt.zero_grad()
        if opt.mask_due:
            model.eval()  # a rolling optimizer that follows takes its noise away
            backward()
            opt.update_mask()
            model.train()
        steps.step(opt, backward)


def trained(model, method, base="AdamW", count=6, **options):
    opt = BASES[base](model.parameters(), perturb=METHODS[method], **options)
    if opt.rolling:
        opt.follow(model)
    train(model, opt, count)
    opt.eval()
    return [whole(p) for p in model.parameters()]


def compare_training(method, base, **options):
    if base == "SGD":
        options["enhance"] = flatkern.IRE(1.0, interval=3)
    got, want = (trained(model, method, base, **options) for model in (fsdp(2), network()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("method", [name for name in METHODS if "losses" not in name])
def test_fully_shard_trains_as_one_process(two, base, method):
    two.call(compare_training, method, base)


def rounds(model):
    """mSAM: FSDP2 adds the later gradients of a round to the part, past the DTensor that wraps it."""
    opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.SAM(0.2))
    for step in range(3):
        opt.zero_grad()
        for shard in range(3):
            x, y = labelled(10 * step + shard)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.perturb()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            if shard < 2:
                opt.restore()
        opt.step()
    return [whole(p) for p in model.parameters()]


def compare_rounds():
    for a, b in zip(rounds(fsdp(2)), rounds(network()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rounds_before_a_step(two):
    two.call(compare_rounds)


def restored(method, backend=None):
    model = fsdp(2)
    before = [whole(p) for p in model.parameters()]
    opt = flatkern.SGD(model.parameters(), lr=0.0, momentum=0.9, perturb=METHODS[method], backend=backend)
    if opt.rolling:
        opt.follow(model)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(whole(module.weight)))
    train(model, opt, 4)
    opt.eval()
    assert any(not torch.equal(seen[0], w) for w in seen) or opt.rolling
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(p), b)


@pytest.mark.parametrize(
    "method", ["RWP", "m-RWP", "rolling ARWP", "SAM", "ASAM", "Friendly-SAM", "LookSAM", "rolling Momentum-SAM"]
)
def test_the_weights_come_back_bit_for_bit(two, method):
    two.call(restored, method)


def followed():
    """The first training forward sees the noise, an eval forward and a checkpoint do not."""
    model = fsdp(2)
    clean = [whole(p) for p in model.parameters()]
    opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.RWP(0.3, rolling=True))
    opt.follow(model)
    x, _ = labelled(0)
    plain = network()
    outputs = [model.train(mode)(x).detach() for mode in (False, True, False)]
    torch.testing.assert_close(outputs[0], plain(x).detach())
    assert (outputs[1] - outputs[0]).abs().max() > 0.01
    assert torch.equal(outputs[2], outputs[0])
    model.train()(x)
    for value, c in zip(model.state_dict().values(), clean, strict=True):
        assert torch.equal(whole(value), c)


def test_follow(two):
    two.call(followed)


# Checkpoints.


def made(where, options):
    model = fsdp(*where)
    ours = {"backend": options.get("backend"), "enhance": flatkern.IRE(1.0, interval=4)}
    opt = BASES[options["base"]](model.parameters(), perturb=METHODS[options["method"]], **ours)
    if opt.rolling:
        opt.follow(model)
    return model, opt


def saved(where, options, path):
    """Three steps, a checkpoint, three more; returns what the last three end at."""
    model, opt = made(where, options)
    train(model, opt, 3)
    opt.eval()
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    save(state, storage_writer=FileSystemWriter(path))
    train(model, opt, 3, start=3)
    opt.eval()
    return [whole(p) for p in model.parameters()]


def resumed(where, options, path):
    """In other processes, on another number of ranks: three steps from the checkpoint."""
    model, opt = made(where, options)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    load(state, storage_reader=FileSystemReader(path))
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, opt, state["opt"])
    train(model, opt, 3, start=3)
    opt.eval()
    return [whole(p) for p in model.parameters()]


@pytest.mark.parametrize(
    "base, method",
    [
        ("SGD", "m-ARWP"),
        ("AdamW", "rolling ARWP"),
        *also(("AdamW", "SAM"), ("Wrap", "RWP")),
        ("SGD", "Friendly-SAM"),
        *also(("AdamW", "LookSAM"), ("AdamW", "rolling Momentum-SAM")),
    ],
)
def test_a_checkpoint_of_two_ranks_continues_on_two_and_on_four(two, four, tmp_path, base, method):
    """Rows of 9 and 13 columns, 3 and 13 rows: masks, histories, means of ascents and what LookSAM has kept, which the
    first of the last three steps uses, are cut at other places."""
    options = {"base": base, "method": method}
    want = two.call(saved, (2,), options, tmp_path)[0]
    for got in two.call(resumed, (2,), options, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for got in four.call(resumed, (4,), options, tmp_path):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def states(where, options, path):
    """The optimizer's state right after loading, whole."""
    model, opt = made(where, options)
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    load(state, storage_reader=FileSystemReader(path))
    set_optimizer_state_dict(model, opt, state["opt"])
    found = [{k: whole(v) for k, v in opt.state[p].items()} for p in model.parameters()]
    return found, [(g["mask_age"], g["round"]) for g in opt.param_groups]


def test_masks_and_histories_are_cut_anew_without_a_change(two, four, tmp_path):
    options = {"base": "SGD", "method": "m-ARWP"}
    two.call(saved, (2,), options, tmp_path)
    (want, groups), _ = two.call(states, (2,), options, tmp_path)
    assert groups == [(3, 3)]
    assert all({"mask", "history", "momentum_buffer"} <= set(state) for state in want)
    for found, again in four.call(states, (4,), options, tmp_path):
        assert again == groups
        for a, b in zip(found, want, strict=True):
            assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)


# What is refused.


def refusals():
    weight = distribute_tensor(torch.zeros(4, 4), mesh(2), [Shard(1)])
    with pytest.raises(ValueError, match=r"params\[0\] is a DTensor placed .* place it Shard\(0\)"):
        flatkern.SGD([torch.nn.Parameter(weight)], lr=0.1, perturb=flatkern.RWP())
    plain, other = torch.nn.Parameter(weight), torch.nn.Parameter(torch.zeros(4, 4))
    for p in (plain, other):  # without filters it does not matter how a weight is cut
        p.grad = torch.ones_like(p)
        flatkern.SGD([p], lr=0.1, momentum=0.9).step()
    assert torch.equal(whole(plain), other)
    rows = distribute_tensor(torch.ones(4, 4), mesh(2), [Shard(0)])
    with pytest.raises(TypeError, match=r"perturb_: params\[0\] is a DTensor; .*to_local"):
        flatkern.perturb_([rows], 0.1, seed=0, round=0)
    p = torch.nn.Parameter(rows.clone())
    opt = flatkern.SGD([p], lr=0.1, momentum=0.9)
    p.grad = rows.clone()
    opt.step()
    before, checkpoint = whole(p), copy.deepcopy(opt.state_dict())
    checkpoint["state"][0]["momentum_buffer"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 is one tensor .*set_optimizer_state_dict"):
        opt.load_state_dict(checkpoint)
    assert torch.equal(whole(p), before)
    assert isinstance(opt.state[p]["momentum_buffer"], DTensor)


def test_refusals(two):
    two.call(refusals)


def rounded(where, method):
    """Row norms of 2-D parameters, and the noise, do not depend on how rows are divided."""
    params = divided(tensors(0), where)
    opt = flatkern.SGD([torch.nn.Parameter(p) for p in params], lr=0.1, perturb=METHODS[method])
    opt.perturb()
    return [whole(p) for p in opt.param_groups[0]["params"]]


@pytest.mark.parametrize("method", ["RWP", "RWP, rms", "RWP, absolute"])
def test_noise_of_a_vector_is_within_an_ulp_of_its_scale(two, method):
    """rms: the number of elements is that of the whole vector. Absolute noise has no scale that could be rounded."""
    for got in two.call(rounded, (2,), method):
        for a, b, w in zip(got, rounded(None, method), tensors(0), strict=True):
            if a.dim() > 1 or method == "RWP, absolute":
                assert torch.equal(a, b)
            else:
                # The norm's rounding moves the noise by an ulp of its size, at most.
                bound = (b - w).abs() * 2**-22 + b.abs() * 2**-23
                assert ((a - b).abs() <= bound).all()
