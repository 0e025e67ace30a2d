"""mix="ranks": clean and noisy ranks train together as one process in float64 would with all their batches."""

import contextlib
import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from compare import copies
from conftest import live
from covering import also
from parallel_training import (
    ETA,
    LAM,
    batch,
    by_parity,
    compare_with,
    equal_replicas,
    fsdp,
    histories,
    mesh,
    method,
    network,
    on_the_first,
    one_step,
    oracle,
    parallel,
    sent,
    sgd,
    train,
    whole,
)  # fmt: skip
from torch.nn.functional import cross_entropy
from unchanged import refused

import flatkern

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)


@pytest.fixture
def worlds(four):
    """`worlds(n, function, ...)` runs it on n of four ranks, which are all of the world or a group of their own."""
    return lambda world, *args: four.call(on_the_first, world, *args)[:world]


def trained(group, options):
    """Five steps, compared with the oracle, and with the other ranks bit for bit."""
    eta, parts, own_streams = options.get("eta", 0.0), options.get("parts", 1), options.get("streams", False)
    world, rank = dist.get_world_size(group), dist.get_rank()
    streams = range(world) if own_streams else [0] * world
    model = parallel(group, gradient_as_bucket_view=options.get("views", False))
    opt = sgd(model, method(group=group, eta=eta, stream=streams[rank]), backend=options["backend"])
    assert opt.loss_weight == pytest.approx(
        world * LAM / (world // 2) if rank % 2 else world * (1 - LAM) / (world - world // 2)
    )
    rounds = options.get("rounds", False)
    train(model, opt, 5, parts=parts, set_to_none=options.get("set_to_none", True), rounds=rounds)
    weights, history = oracle(by_parity(world), streams, eta, parts, 5, rounds)
    compare_with(model.parameters(), weights)
    if eta:
        compare_with(histories(opt), history)
        equal_replicas(histories(opt), group)
    equal_replicas(model.parameters(), group)


CASES = {
    "m-RWP": {},
    "m-RWP, a noise per rank": {"streams": True},
    "m-RWP, accumulation": {"parts": 3, "views": True},
    "m-ARWP": {"eta": ETA},
    "m-ARWP, bucket views": {"eta": ETA, "views": True},
    "m-ARWP, accumulation": {"eta": ETA, "parts": 3},
    "m-ARWP, rounds": {"eta": ETA, "parts": 2, "rounds": True},
    "m-ARWP, rounds, bucket views": {"eta": ETA, "parts": 3, "rounds": True, "views": True},
    "m-ARWP, gradients zeroed in place": {"eta": ETA, "parts": 2, "views": True, "set_to_none": False},
    "m-ARWP, accumulation and bucket views, a noise per rank": {"eta": ETA, "parts": 2, "views": True, "streams": True},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_do_what_one_process_does(worlds, world, case):
    worlds(world, trained, {**CASES[case], "backend": live("cpp")})


def test_ranks_do_what_one_process_does_in_eager(worlds):
    worlds(3, trained, {"eta": ETA, "parts": 2, "streams": True, "backend": "eager"})


# Replicas.


def many_steps(group, base, backend, options):
    rank = dist.get_rank()
    dtype = options.pop("dtype", torch.float32)
    model = parallel(group, dtype=dtype, gradient_as_bucket_view=options.pop("views", False))
    perturb = method(group=group, eta=options.pop("eta", 0.0), stream=options.pop("stream", 0) * rank)
    if base == "Wrap":
        opt = flatkern.Wrap(torch.optim.RMSprop(model.parameters(), lr=0.001), perturb, backend=backend, **options)
    else:
        opt = getattr(flatkern, base)(model.parameters(), lr=0.01, perturb=perturb, backend=backend, **options)
    start = copies(model.parameters())
    for step in range(200):
        opt.zero_grad()
        if opt.mask_due:
            torch.manual_seed(1000 * step + rank)
            flatkern.sampled_label_loss(model(batch(step, rank)[0].to(dtype))).backward()
            opt.update_mask()
        x, y = batch(step, rank)
        opt.perturb()
        (opt.loss_weight * cross_entropy(model(x.to(dtype)), y)).backward()
        opt.step()
        if step % 50 == 0:
            with torch.no_grad():
                opt.eval()  # of clean weights already
                model(x.to(dtype))
    assert sum((p - s).abs().sum() for p, s in zip(model.parameters(), start, strict=True)) > 0.1
    equal_replicas(model.parameters(), group)
    for p in model.parameters():
        state = [opt.state[p][key] for key in sorted(opt.state[p])]
        equal_replicas([v for v in state if isinstance(v, torch.Tensor) and v.dim()], group)


@pytest.mark.parametrize(
    "base, options",
    [
        ("SGD", {"eta": ETA, "stream": 1, "enhance": flatkern.IRE(0.5, interval=20)}),
        ("AdamW", {"views": True, "stream": 1, "max_grad_norm": 0.5}),
        *also(
            ("AdamW", {"eta": ETA, "views": True, "dtype": torch.bfloat16, "master_weights": True}),
            ("Wrap", {"eta": ETA, "enhance": flatkern.IRE(0.5, interval=20)}),
        ),
    ],
    ids=["SGD, IRE", "AdamW, clipping", "AdamW, masters", "Wrap, IRE"],
)
def test_replicas_are_equal_after_200_steps(worlds, base, options):
    worlds(2, many_steps, base, live("cpp"), options)


def kept(group, backend):
    """Perturbed weights come back bit for bit, and clean ranks' do not move at all."""
    is_noisy = dist.get_rank() % 2 == 1
    model = parallel(group)
    opt = flatkern.SGD(model.parameters(), lr=0.0, perturb=method(group=group, eta=ETA), backend=backend)
    before = copies(model.parameters())

    def unmoved():
        return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    for step in range(5):
        opt.perturb()
        assert opt.is_perturbed and unmoved() is not is_noisy
        with opt.clean():
            assert unmoved()
        assert unmoved() is not is_noisy
        x, y = batch(step, dist.get_rank())
        (opt.loss_weight * cross_entropy(model(x), y)).backward()
        opt.step()
        assert not opt.is_perturbed and unmoved() and opt.param_groups[0]["round"] == step + 1
        opt.zero_grad()
    opt.perturb()
    opt.restore()
    assert unmoved()
    opt.perturb()
    opt.step()  # of no gradient
    assert unmoved() and opt.param_groups[0]["round"] == 7
    opt.state_dict()
    assert flatkern.cost(opt).launches == (2 if is_noisy else 1)


def test_weights_come_back_bit_for_bit(worlds, backend):
    worlds(2, kept, backend)


def closure_and_block(group):
    """The same step in torch's closure convention, in a `with` block, and with the last round restored."""
    runs = {}
    for way in ("calls", "closure", "block", "restored"):
        model = parallel(group)
        opt = sgd(model, method(group=group, eta=ETA))
        for step in range(3):
            opt.zero_grad()
            x, y = batch(step, dist.get_rank())

            def closure(model=model, opt=opt, x=x, y=y):
                opt.zero_grad()
                loss = opt.loss_weight * cross_entropy(model(x), y)
                loss.backward()
                return loss

            if way == "closure":
                assert opt.step(closure).item() > 0
                continue
            with opt.perturbed() if way == "block" else contextlib.nullcontext():
                if way != "block":
                    opt.perturb()
                closure()
            if way == "restored":
                opt.restore()
            opt.step()
        runs[way] = [*map(whole, model.parameters()), *map(whole, histories(opt))]
    for way, found in runs.items():
        assert all(torch.equal(a, b) for a, b in zip(found, runs["calls"], strict=True)), way


def test_every_way_to_a_step_is_the_same(worlds):
    worlds(2, closure_and_block)


# Communication.


def test_nothing_more_is_sent_than_by_plain_ddp(worlds):
    """m-ARWP: 13 + 13 + 13 + 13 + 3 + 3 numbers, a filter of a matrix each or an element of a vector."""
    plain = worlds(2, sent, None)
    assert plain[0][1] == [] and sum(plain[0][0]) == 4 * sum(p.numel() for p in network().parameters())
    assert worlds(2, sent, 0.0) == plain
    for (buckets, others), (same, _) in zip(worlds(2, sent, ETA), plain, strict=True):
        assert buckets == same and others == [4 * 58]


# Checkpoints, copies.


def stopped(group, source):
    """Three steps, the checkpoint of rank `source` in every rank's new optimizer, three more."""
    straight = parallel(group)
    opt = sgd(straight, method(group=group, eta=ETA))
    train(straight, opt, 3)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "opt": opt.state_dict()}, file)
    files = [None] * dist.get_world_size(group)
    dist.all_gather_object(files, file.getvalue(), group=group)
    train(straight, opt, 3, start=3)

    again = parallel(group, seed=5)
    new = sgd(again, method(group=group, eta=ETA))
    state = torch.load(io.BytesIO(files[source]))
    again.load_state_dict(state["model"])
    new.load_state_dict(state["opt"])
    train(again, new, 3, start=3)
    for a, b in zip((*again.parameters(), *histories(new)), (*straight.parameters(), *histories(opt)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("source", [0, 1], ids=["of a clean rank", "of a noisy rank"])
def test_a_checkpoint_of_any_rank_resumes_all(worlds, source):
    worlds(2, stopped, source)


def copied(group):
    """An optimizer with a group: a copy has the same one, a pickle none."""
    opt = sgd(network(), method(group=group))
    weight = opt.loss_weight
    twin = copy.deepcopy(opt)
    assert twin.method.group is group and twin.loss_weight == weight
    loaded = pickle.loads(pickle.dumps(opt))
    assert (
        loaded.method == method(group=None) and loaded.loss_weight == 4 * LAM / 2
        if weight == 2 * LAM
        else 2 * (1 - LAM)
    )
    assert "group" not in opt.state_dict()["param_groups"][0]


def test_a_group_is_kept_by_copies_and_left_out_of_pickles(worlds):
    worlds(2, copied)


# GradScaler, clipping.


def scaled(group, overflow):
    """With a scale the same steps; a gradient of one noisy rank that is not finite skips the step on all."""
    runs = {}
    for way in ("plain", "scaled", "looked at"):
        model = parallel(group)
        opt = sgd(model, method(group=group, eta=ETA))
        scaler = None if way == "plain" else torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for step in range(4):
            if overflow and step == 2:
                if scaler is None:
                    opt.perturb()
                    opt.restore()  # a round that has no effect
                    continue
                before = [*map(whole, model.parameters()), *map(whole, histories(opt))]
                opt.zero_grad()
                opt.perturb(scaler=scaler)
                bad = float("inf") if dist.get_rank() == 1 else 1.0
                x, y = batch(step, dist.get_rank())
                scaler.scale(opt.loss_weight * cross_entropy(model(x), y) * bad).backward()
                scaler.step(opt)
                scaler.update()
                assert all(
                    torch.equal(a, b) for a, b in zip((*model.parameters(), *histories(opt)), before, strict=True)
                )
                assert scaler.get_scale() == 2.0**9
            elif way == "looked at":
                opt.zero_grad()
                opt.perturb(scaler=scaler)
                x, y = batch(step, dist.get_rank())
                scaler.scale(opt.loss_weight * cross_entropy(model(x), y)).backward()
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            else:
                one_step(model, opt, step, scaler=scaler)
        runs[way] = [*model.parameters(), *histories(opt)]
        equal_replicas(runs[way], group)
    for way in ("scaled", "looked at"):
        # Scales are powers of two: what is rounded is the same.
        for a, b in zip(runs[way], runs["plain"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "an overflow"])
def test_a_scaler_changes_nothing_and_skips_on_all_ranks(worlds, overflow):
    worlds(2, scaled, overflow)


def looked_at_without_its_scale(group):
    model = parallel(group)
    opt = sgd(model, method(group=group, eta=ETA))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.perturb()
    x, y = batch(0, dist.get_rank())
    scaler.scale(opt.loss_weight * cross_entropy(model(x), y)).backward()
    scaler.unscale_(opt)
    with refused(RuntimeError, r"needs perturb\(scaler=scaler\)", model.parameters(), opt):
        scaler.step(opt)


def test_unscaled_gradients_need_their_scale_for_the_history(worlds):
    worlds(2, looked_at_without_its_scale)


# Groups of ranks, hybrid sharding.


def halves(_):
    """Two trainings of two ranks: parity counts within the group."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    model = parallel(group)
    opt = sgd(model, method(group=group, eta=ETA))
    for step in range(3):
        one_step(model, opt, step, rank=rank % 2)
    weights, history = oracle([False, True], [0, 0], ETA, 1, 3)
    compare_with(model.parameters(), weights)
    compare_with(histories(opt), history)
    equal_replicas(model.parameters())


def test_parity_counts_within_the_group(worlds):
    worlds(4, halves)


def hybrid(_, backend, give_group):
    """Ranks 0 and 1 have one replica, 2 and 3 the noisy one."""
    model = fsdp(2, 2)
    group = mesh(2, 2).get_group(0) if give_group else None
    opt = sgd(model, method(group=group), backend=backend)
    train(model, opt, 5)
    weights, _ = oracle([False, False, True, True], [0] * 4, 0.0, 1, 5)
    compare_with(model.parameters(), weights)
    trained = [whole(p) for p in model.parameters()]
    equal_replicas(trained)
    opt.perturb()
    moved = any(not torch.equal(whole(p), t) for p, t in zip(model.parameters(), trained, strict=True))
    assert moved is (dist.get_rank() >= 2)
    opt.restore()
    assert all(torch.equal(whole(p), t) for p, t in zip(model.parameters(), trained, strict=True))


def test_hybrid_sharding_goes_by_the_replica(worlds, backend):
    worlds(4, hybrid, backend, backend == "cpp")


def refused_shards(_):
    for model, perturb, message in [
        (fsdp(4), method(), 'use mix="gradients"'),
        (fsdp(2, 2), method(eta=ETA), "only the mean over all ranks; pass eta=0"),
        (fsdp(2, 2), method(group=dist.group.WORLD), "which must share the work; pass group=None"),
    ]:
        with refused(ValueError, message):
            sgd(model, perturb)
    model = fsdp(2, 2)
    opt = sgd(model, method())
    opt.param_groups[0]["eta"] = 1.0
    with refused(ValueError, "pass eta=0", opt=opt):
        opt.perturb()


def test_sharding_that_cannot_work_is_refused(worlds):
    worlds(4, refused_shards)


# Refusals and warnings.


def refused_groups(_):
    groups = [dist.new_group([rank]) for rank in range(4)]
    mine, foreign = groups[dist.get_rank()], groups[dist.get_rank() - 1]
    for group, error, message in [
        (mine, ValueError, "needs at least two ranks.*but the group has one; start more"),
        (foreign, ValueError, "this rank is not in the group"),
        ("dp", TypeError, "is 'dp', but should be a torch.distributed.ProcessGroup"),
    ]:
        with refused(error, message):
            sgd(network(), method(group=group))
    opt = flatkern.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))], "lam": lam} for lam in (0.5, 0.25)], perturb=method()
    )
    with refused(RuntimeError, "groups have different lam", opt=opt):
        print(opt.loss_weight)
    opt = sgd(network(), method())
    opt.param_groups[0]["params"][0].grad = torch.ones(13, 9)
    with refused(RuntimeError, r"would be lost.*\(opt.loss_weight \* loss\).backward\(\)", opt=opt):
        opt.perturb()


def test_groups_that_cannot_work_are_refused(worlds):
    worlds(4, refused_groups)


def test_one_process_is_refused():
    with refused(RuntimeError, r"init_process_group\(\) first.*mix=\"gradients\""):
        sgd(network(), method())


@pytest.mark.parametrize(
    "arguments, message",
    [({"mix": "ranks"}, "give lam"), ({"lam": 0.5, "group": 1}, 'mix="gradients" has none; pass group=None')],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flatkern.RWP(**arguments)


def warned(group):
    """Losses that were not weighted, and a mean that was taken too early, are told once."""
    model = parallel(group)
    opt = sgd(model, method(group=group, eta=ETA))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(model, opt, 3, weigh=False)
        assert [str(w.message) for w in seen if "loss_weight was not read" in str(w.message)], seen
        assert len(seen) == 1 and seen[0].filename.endswith("parallel_training.py")
    for views in (False, True):
        model = parallel(group, gradient_as_bucket_view=views)
        opt = sgd(model, method(group=group, eta=ETA))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train(model, opt, 2, parts=3)
            assert not seen
            for _ in range(2):
                opt.zero_grad()
                opt.perturb()
                for part in range(2):
                    x, y = batch(0, dist.get_rank(), part)
                    (opt.loss_weight * cross_entropy(model(x), y)).backward()
                opt.step()
        expected = ["no_sync"] if dist.get_rank() % 2 else []
        assert len(seen) == len(expected) and all("no_sync" in str(w.message) for w in seen), (views, seen)


def test_what_can_be_told_of_wrong_use_is_told_once(worlds):
    worlds(2, warned)


def replaced(group):
    """The hooks of an optimizer that is gone are gone, and cost nothing."""
    model = parallel(group)
    opt = sgd(model, method(group=group, eta=ETA))
    train(model, opt, 2)
    p = next(model.parameters())
    hooks = p._post_accumulate_grad_hooks or {}
    assert len(hooks) == dist.get_rank() % 2
    twin = copy.deepcopy(model.module)
    assert not next(twin.parameters())._post_accumulate_grad_hooks
    del opt
    gc.collect()
    assert not hooks


def test_hooks_go_with_their_optimizer(worlds):
    worlds(2, replaced)
