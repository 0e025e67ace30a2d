"""What a training will launch is foretold: the jobs of an optimizer are what its kernels are compiled for.

Trainings with all their tensors are recorded and compared with what jobs_of() says without them; what Triton then makes
of it is in test_warm_up.py.
"""

import itertools
import os
import random
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import warming
from warming import BASES, FEW, FURTHER, METHODS, RWP, SHAPES, backward, keys, make, train, ways

import flatkern
from flatkern import dispatch, dtensor
from flatkern.compilation import jobs_of, recording
from flatkern.ops import OPS

driver, on_the_cpu = warming.driver, warming.on_the_cpu
plan = flatkern.triton_kernels.plan
MODELS = warming.MODELS


def one_round_only(method):
    """Rolling, and where passes are mixed by losses, there is no restore() between rounds that would count."""
    p = method.get("perturb")
    return p is None or getattr(p, "rolling", False) or getattr(p, "mix", "") == "losses"


def scenarios():
    """Every base with every method; the other choices take turns, and meet each other by and by."""
    dice = random.Random(0)
    every = [
        pair for pair in itertools.product(BASES, METHODS)
        if pair[1] not in FURTHER or pair[0] in ("SGD, momentum", "AdamW")
        or (pair[0] == "Wrap" and pair[1] in ("LookSAM", "FriendlySAM"))
    ]  # fmt: skip
    for number, (base, method) in enumerate(every):
        options = dict(
            scaled=number % 2 == 1,
            rounds=1 if one_round_only(METHODS[method]) or dice.random() < 0.5 else 2,
            clip=dice.random() < 0.4,
            masters=base != "Wrap" and dice.random() < 0.4,
            capturable=base != "Wrap" and dice.random() < 0.4,
            spread=dice.random() < 0.3,
            half=dice.choice([(), (torch.bfloat16,), (torch.bfloat16, torch.float32)]),
        )
        options["capturable"] &= method not in ("LookSAM", "FriendlySAM")  # which no graph repeats
        if options["scaled"] and "m-" in method:
            options["rounds"] = 1  # of several, the clean pass may not be the last
        yield pytest.param(base, method, options, id=f"{base}, {method}, {number}")


@pytest.mark.covering(1)
@pytest.mark.parametrize("base, method, options", list(scenarios()))
def test_a_training_launches_what_was_foreseen(base, method, options):
    """Recorded with all tensors as they are, for every way to a step: nothing but what is warmed up."""
    foreseen = keys(jobs_of(make(base, method, **options), scaled=options["scaled"], rounds=options["rounds"]))
    for way in ways(METHODS[method], options["scaled"]):
        with recording(options["capturable"]) as jobs, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(make(base, method, **options), options["scaled"], options["rounds"], way)
        launched = keys(jobs)
        assert launched or base == "Wrap"
        assert [name for key, name in launched.items() if key not in foreseen] == []


def cuts(t, by_element):
    """What a tensor is compiled for alone, by rows and not."""
    names, types = ("params", "masks"), (1, 1 if by_element else None)
    every = itertools.product((True, False), (True, False), (0, 3))
    plans = [
        (by_rows, plan.build([t], names, [types], [even], by_rows, [0], [shift], torch.from_numpy))
        for by_rows, even, shift in every
    ]
    return {(by_rows, group.config, group.shapes) for by_rows, cut in plans for group in cut.groups}


def test_a_small_tensor_stands_for_a_large_one(monkeypatch):
    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90")
    dice = random.Random(1)
    edges = [0, 1, 7, 8, 9, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 8193, 8200, 20000, 10**6 + 3]
    lengths = edges + [dice.randrange(10**5) for _ in range(200)]
    shapes = [(), *((n,) for n in lengths), *((dice.choice([0, 1, 2, 3, 8, 1000]), n) for n in lengths)]
    shapes += [(dice.randrange(1, 2000), dice.randrange(1, 300), 3, 3) for _ in range(200)]
    for shape in shapes:
        t = torch.empty(shape, device="meta")
        small = torch.empty(plan.smallest_alike(t), device="meta")
        for by_element in (True, False):
            assert cuts(small, by_element) == cuts(t, by_element), shape
        assert small.numel() <= 8 * (plan.RESIDENT + 16) and min(small.dim(), 2) == min(t.dim(), 2), shape


def test_a_full_network_that_nobody_reads():
    """ResNet-50 with m-RWP and momentum: what perturb() and step() launch; tables are small, whatever the network."""
    shapes = MODELS["resnet50"].shapes()
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    opt = flatkern.SGD(params, momentum=0.9, perturb=RWP(lam=0.5), backend="triton")
    names = [j.name for j in jobs_of(opt)]
    assert len(names) == len(set(names))  # a name tells kernels apart
    at_a_step = [
        n for n in names if "restore" not in n and ("update" not in n or ("BACKUP" in n and "grad_scale" not in n))
    ]
    with recording() as jobs:
        train(opt, steps=1, way="step")
    assert {j.name for j in jobs} - {n for n in names if "restore" in n} == set(at_a_step)
    assert len(at_a_step) == 3  # two of perturb(), by whether rows are multiples of eight, and one of step()


def key(function):
    with recording() as jobs:
        function()
    return {j.key for j in jobs}


def call(name, shapes, given=(), offset=0, dtype=torch.float32):
    """One op on tensors of some shapes, with the optional lists that are named."""
    values = {}
    for a in OPS[name].arguments:
        if a.type.endswith("?") and a.name not in given:
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name in ("norms", "history"):
            values[a.name] = [torch.zeros(flatkern.checks.LENGTHS[a.name](torch.empty(s))) for s in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.zeros(s, dtype=dtype) for s in shapes]
        elif a.type.startswith("Tensor"):
            values[a.name] = torch.ones(())
        else:
            values[a.name] = [offset if a.name == "offset" else 0] * len(shapes)
    positional = [values.pop(a.name) for a in OPS[name].arguments if not a.keyword_only]
    dispatch.load(OPS[name], "triton")(*positional, **values)


ONE_KERNEL = {
    "perturb: a vector, and a row": ("perturb_gaussian_", [(8192,)], [(4, 8192)], "backups", 0),
    "update, rolling: the same": ("sgd_update_", [(8192,)], [(4, 8192)], "noise", 0),
    "update by rows without noise: a piece of a vector": ("sgd_update_", [(24,)], [(24,)], "history", 3),
}


@pytest.mark.parametrize("name, first, second, given, offset", ONE_KERNEL.values(), ids=ONE_KERNEL)
def test_constants_that_change_nothing_are_one(name, first, second, given, offset):
    one = key(lambda: call(name, first, given.split()))
    assert len(one) == 1
    assert one == key(lambda: call(name, second, given.split(), offset))


def test_constants_that_matter_are_told_apart():
    vector, row = [(8192,)], [(4, 8192)]
    for name, given in (("perturb_gaussian_", ["history"]), ("sgd_update_", ["history"])):
        assert key(lambda: call(name, vector, given)).isdisjoint(key(lambda: call(name, row, given)))  # noqa: B023
    assert key(lambda: call("perturb_gaussian_", [(24,)])).isdisjoint(
        key(lambda: call("perturb_gaussian_", [(24,)], offset=3))
    )


def test_norms_of_long_rows_do_not_depend_on_a_scaler():
    """The kernels that finish long rows take what they need."""

    def settled(*given):
        with recording() as jobs:
            call("sgd_update_", [(2, 8200)], ["noise", *given])
        return {j.key for j in jobs if j.name.startswith("finish_rows")}

    assert len(settled()) == 1 and settled() == settled("found_inf")
    assert settled("history") != settled("history", "found_inf")


def test_keys_say_nothing_of_this_process():
    for j in jobs_of(make("AdamW", "IRE, SAM")):
        assert isinstance(j.key, str) and " at 0x" not in j.key and " at 0x" not in j.name
        assert j == flatkern.compilation.Job(j.key, "", print)


# State, masks, shards.


def test_state_that_was_loaded_has_the_dtype_it_has():
    """Momentum of float32 for weights of bfloat16, as a checkpoint may have it."""
    opt = make("SGD, momentum", "plain", FEW, half=(torch.bfloat16,))
    train(opt, steps=1)
    for state in opt.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    foreseen = keys(jobs_of(opt))
    with recording() as jobs:
        train(opt)
    assert keys(jobs) == foreseen and all("FIRST=float32" in name for name in foreseen.values())


def test_the_first_mask_may_come_late():
    """As after gradients that were not finite."""
    opt = make("SGD", "IRE", FEW)
    foreseen = keys(jobs_of(opt))
    with recording() as jobs:
        backward(opt)
        opt.step()
    assert keys(jobs).items() <= foreseen.items()


def test_it_is_another_thread_that_is_recorded():
    seen = []
    with recording() as jobs:
        thread = threading.Thread(target=lambda: seen.append(flatkern.jobs.current.get()))
        thread.start()
        thread.join()
    assert seen == [None] and jobs == []


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1
    )
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(
    "base, method", [("SGD", "rolling ARWP"), ("AdamW", "m-RWP"), ("SGD", "ASAM"), ("Adam", "IRE")]
)
def test_shards(base, method, first, mesh, monkeypatch):
    """Vectors that are divided among ranks take other kernels, and others again where they are cut inside an eight."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def made():
        whole = [torch.full(shape, 0.5) for shape in SHAPES if shape]
        params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in whole]
        return BASES[base](params, backend="triton", max_grad_norm=1.0, **METHODS[method])

    row = dtensor.first_row
    monkeypatch.setattr(dtensor, "first_row", lambda t: first if dtensor.is_sharded(t) and t.dim() < 2 else row(t))
    sums = []
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: sums.append(1))
    foreseen = keys(jobs_of(made()))
    assert sums == []
    for way in ways(METHODS[method], False):
        with recording() as jobs:
            train(made(), way=way)
        launched = keys(jobs)
        assert [name for k, name in launched.items() if k not in foreseen] == []
        assert any("SHIFTED" in name for name in launched.values()) == (first > 0 and "RWP" in method)
