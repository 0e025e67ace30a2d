"""capturable=True on the CPU: nothing that changes is baked into a captured graph, and no host waits.

A tensor on the CPU stands for one on the device, and nobody may look at it. A graph is a tape: every operator of torch
and every kernel of one step, forward and backward included, run again on the same memory. What only a GPU can show is
in test_gpu.py. Runs with the Triton kernels in Triton's interpreter (`make test-triton`), and with the CUDA kernels
emulated (`make test-cuda`).
"""

import contextlib
import copy
import functools
import gc
import pickle
import types
import weakref

import captures
import compare
import pytest
import torch
from captures import LONG, say_that_it_is_captured
from capturing import METHODS, Tape, Watch, assert_same
from compare import copies
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import _disable_current_modes

import flatkern
from flatkern.optim.groups import Groups, Setup
from flatkern.optim.scalars import OnDevice
from flatkern.schedules import PerturbationScheduler

backend, training = captures.backend, captures.training
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture
def launch_count(backend, request):
    """Counts the kernels that are launched."""
    if backend == "cuda":
        return request.getfixturevalue("emulated").launch_count
    launches = request.getfixturevalue("launches")
    return lambda: len(launches)


# Adam differs from AdamW in the decay alone, which no method touches; and with another rule only those methods differ
# that ask something else of the update.
WITH_ADAMW = "plain", "m-RWP", "rolling ARWP", "GSAM", "rolling MomentumSAM", "IRE, RWP"
CASES = [*(("SGD", m) for m in METHODS), ("Adam", "RWP"), *(("AdamW", m) for m in WITH_ADAMW)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("rule, method", CASES)
def test_a_replayed_step_moves_on(rule, method, monkeypatch, training, backend):
    """To where an optimizer of the host gets: fresh noise, the present learning rate and sigma, counted steps. A step
    outside, with gradients that are elsewhere, disturbs no later replay."""
    columns = LONG[backend] if rule == "SGD" else 64  # long rows know no rule
    graph, python = (training(rule, method, capturable, columns=columns) for capturable in (True, False))
    tape = Tape(monkeypatch)
    for recording in (False, True):
        with tape if recording else contextlib.nullcontext():
            graph.step()
        graph.schedule()
        python.train(1)
        assert_same(graph, python)
    for step in range(3):
        if step == 1:
            graph.train(1)
        else:
            tape.replay()
            graph.schedule()
        python.train(1)
        assert_same(graph, python)
    if graph.opt.rolling:
        before = graph.tensors()
        for run in (graph, python):
            run.opt.eval()
        assert_same(graph, python)
        graph.opt.train()
        compare.assert_same(graph.tensors(), before)  # with the sigma that the replay drew with


@pytest.mark.parametrize("method", ["RWP", "rolling ARWP"])
def test_noise_is_told_from_what_others_write(method, monkeypatch, training):
    """By the key and the sigmas of the last draw, whether a replay made it or a call, and not by those of the next."""
    run = training("SGD", method, True, schedule=False, columns=64)
    params, tape = list(run.net.parameters()), Tape(monkeypatch)
    run.step()
    with tape:
        run.step()
    run.step()
    tape.replay()
    if run.opt.rolling:
        for group in run.opt.param_groups:
            group["sigma"].fill_(0.5)
    else:
        run.opt.zero_grad()
        run.opt.perturb()
    noisy = copies(params)
    with run.opt.clean():
        clean = copies(params)
    compare.assert_same(params, noisy)
    assert not torch.equal(noisy[0], clean[0])
    with torch.no_grad():
        params[0][0, 2] = clean[0][0, 2] = 7.0
    run.opt.eval()
    compare.assert_same(params, clean)


def test_a_tape_repeats_what_is_baked(monkeypatch, training):
    """The test above has teeth: without capturable a replay draws the same noise, at the old learning rate."""
    graph, python = training("SGD", "RWP", False), training("SGD", "RWP", False)
    tape = Tape(monkeypatch)
    graph.train(1)
    with tape:
        graph.step()
    graph.schedule()
    python.train(3)
    tape.replay()
    assert not torch.equal(graph.net.long, python.net.long)


def let_the_interpreter_look(monkeypatch, capturable):
    """At tensors inside of its kernels, and outside in the checks of a new plan, which on a device do not."""
    from flatkern.triton_kernels import launch

    start, tolist = launch.Call.start, torch.Tensor.tolist

    def unwatched(*args, **kwargs):
        with _disable_current_modes(), monkeypatch.context() as undone:
            undone.setattr(torch.Tensor, "tolist", tolist)
            start(*args, **kwargs)

    monkeypatch.setattr(launch.Call, "start", unwatched)
    if capturable:
        monkeypatch.setattr(launch, "check", lambda op, values: None)


@pytest.mark.covering(1)
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("rule, method", [("SGD", name) for name in METHODS] + [("Adam", "m-RWP"), ("AdamW", "plain")])
def test_nobody_waits(rule, method, capturable, monkeypatch, training, backend):
    """In perturb(), restore() and step(), the first one included; numbers of the host move in meanwhile."""
    run = training(rule, method, capturable, schedule=False, columns=64)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False))  # the CPU stands for a GPU here
    if backend == "triton":
        let_the_interpreter_look(monkeypatch, capturable)
    if capturable:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: pytest.fail("tolist() makes the host wait"))
    with Watch():
        run.train(2)
        for group in run.opt.param_groups:
            group["lr"] = 0.02
            if "sigma" in group:
                group["sigma"] = 0.01
        run.train(1)


def test_a_skipped_step_moves_nothing_of_the_history(training):
    """mix="losses" folds on the device: an overflow leaves the history as it was, to the bit."""
    run = training("SGD", "m-ARWP, losses", True).train(2)
    before = [run.opt.state[p]["history"].clone() for p in run.net.parameters()]
    run.opt.zero_grad()
    run.opt.perturb()
    run.backward()
    run.opt.restore()
    run.backward()
    run.opt.found_inf, run.opt.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    run.opt.cycle.unscaled.scaler = types.SimpleNamespace(is_enabled=lambda: False)
    with Watch():
        run.opt.step()
    assert all(torch.equal(run.opt.state[p]["history"], h) for p, h in zip(run.net.parameters(), before, strict=True))


# Values.

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=9, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.7)], milestones=[2]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_write_in_place(make, training):
    """And the learning rates are those of an optimizer of the host, to the last bit of float64."""
    runs = [training("AdamW", "RWP", capturable, schedule=False) for capturable in (True, False)]
    ours = [group["lr"] for group in runs[0].opt.param_groups]
    schedulers = [make(run.opt) for run in runs]
    for _ in range(6):
        for scheduler in schedulers:
            scheduler.step()
        found = [group["lr"] for group in runs[0].opt.param_groups]
        assert all(map(torch.Tensor.is_set_to, found, ours))
        assert [t.item() for t in found] == [group["lr"] for group in runs[1].opt.param_groups]


def test_where_the_values_are(training, backend):
    """0-dim tensors: one per group, one round for all of them."""
    run = training("AdamW", "RWP", True)
    first, second = run.opt.param_groups
    for key in ("lr", "sigma"):
        assert first[key].dtype == second[key].dtype == torch.float64
        assert first[key].shape == () and first[key].data_ptr() != second[key].data_ptr()
    assert first["round"] is second["round"] and first["round"].dtype == torch.int64
    run.train(2)
    assert first["round"].item() == 2 and run.opt.cycle.scalars.words.tolist() == [2**32 - 5, 3, 2]
    alone = flatkern.AdamW([torch.nn.Parameter(torch.ones(3))], perturb=flatkern.RWP(), backend=backend)
    alone.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "lr": 0.5})
    assert alone.param_groups[1]["lr"] == 0.5 and alone.param_groups[1]["round"] == 0
    run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "lr": 0.5})
    added = run.opt.param_groups[2]
    assert added["lr"].item() == 0.5 and added["round"] is first["round"] and added["sigma"] is not first["sigma"]


def test_a_tensor_of_the_user_is_used_where_it_is(backend):
    """float32 too; two groups that share it as their default get one each."""
    lr, ps = torch.tensor(0.25), [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = flatkern.SGD([{"params": [p]} for p in ps], lr=lr, backend=backend, capturable=True)
    assert opt.param_groups[0]["lr"] is lr and opt.param_groups[1]["lr"] is not lr
    lr.fill_(0.5)
    for p in ps:
        p.grad = torch.ones(3)
    opt.step()
    assert [p[0].item() for p in ps] == [0.5, 0.75]


@pytest.mark.parametrize("method", ["RWP", "rolling ARWP"])
def test_numbers_are_copied_to_where_graphs_look(method, training):
    """Of lr, sigma, round and seed, at the next call; the trajectory is the one of numbers on the host."""
    runs = [training("SGD", method, capturable, schedule=False).train(2) for capturable in (True, False)]
    ours = [(group["lr"], group["sigma"], group["round"]) for group in runs[0].opt.param_groups]
    for run in runs:
        if run.opt.rolling:
            run.opt.eval()
        for group in run.opt.param_groups:
            group.update(lr=0.125, sigma=0.5, round=77, seed=9)
        run.opt.train()
        run.train(1)
    for group, (lr, sigma, round_) in zip(runs[0].opt.param_groups, ours, strict=True):
        assert group["lr"] is lr and group["sigma"] is sigma and group["round"] is round_
        assert (lr.item(), sigma.item(), round_.item()) == (0.125, 0.5, 78)
    assert runs[0].opt.cycle.scalars.words.tolist()[0] == 9
    assert_same(*runs)


def test_a_bad_number_is_refused_before_it_is_copied(training):
    run = training("SGD", "RWP", True).train(1)
    group, before = run.opt.param_groups[1], run.tensors()
    for key, value, text in (("lr", -1.0, "learning rate"), ("sigma", -0.5, "sigma"), ("round", -1, "round is -1")):
        ours, old = group[key], group[key].item()
        group[key] = value
        with pytest.raises(ValueError, match=text):
            run.opt.perturb()
        assert ours.item() == old
        group[key] = ours
    for key in ("lr", "sigma"):
        ours, old = group[key], group[key].item()
        with pytest.raises(ValueError, match=key if key == "sigma" else "learning rate"):
            PerturbationScheduler(run.opt, key, lambda t: -1.0)
        assert ours.item() == old
    group["round"] = 5
    with pytest.raises(ValueError, match="groups differ in"):
        run.opt.perturb()
    compare.assert_same(run.tensors(), before)


def test_a_learning_rate_that_is_zero_for_one_step(training):
    """As distributed checkpointing makes state: it puts a tensor of the host in, steps, and puts ours back."""
    run = training("AdamW", "rolling ARWP", True)
    run.opt.eval()
    before, ours = copies(run.net.parameters()), [g["lr"] for g in run.opt.param_groups]
    values = [lr.item() for lr in ours]
    for p in run.net.parameters():
        p.grad = torch.zeros_like(p)
    for group in run.opt.param_groups:
        group["lr"] = torch.tensor(0.0)
    run.opt.step()
    for group, lr in zip(run.opt.param_groups, ours, strict=True):
        group["lr"] = lr
    run.opt.eval()
    compare.assert_same(run.net.parameters(), before)
    assert [lr.item() for lr in ours] == values
    # The host looks at a tensor of its own only.
    elsewhere = OnDevice(Groups(Setup("SGD"), lambda: None), draws=False)
    elsewhere.device = torch.device("meta")
    assert elsewhere.host_value({"lr": torch.tensor(0.0)}, "lr") == 0
    assert elsewhere.host_value({"lr": torch.tensor(0.0, device="meta")}, "lr") is None


# Checkpoints.


@pytest.mark.covering(1)
@pytest.mark.parametrize("saved, loading", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rule, method", [("AdamW", "rolling ARWP"), ("SGD", "m-RWP"), ("Adam", "plain")])
def test_resume(rule, method, saved, loading, training):
    """From host to device and back, into the tensors that are there: schedulers and graphs keep theirs."""
    straight = training(rule, method, False, schedule=False, columns=64).train(4)
    first = training(rule, method, saved, schedule=False, columns=64).train(2)
    first.opt.eval()
    other = training(rule, method, loading, schedule=False, columns=64).train(1)
    other.opt.eval()
    groups, state = other.opt.param_groups, other.opt.state
    ours = [t for g in groups for t in (g["lr"], g.get("sigma"), g.get("round")) if isinstance(t, torch.Tensor)]
    ours += [t for p in other.net.parameters() for t in state[p].values()] if loading else []
    assert bool(ours) is loading
    other.opt.load_state_dict(pickle.loads(pickle.dumps(first.opt.state_dict())))
    other.net.load_state_dict(first.net.state_dict())
    now = [t for g in groups for t in (g["lr"], g.get("sigma"), g.get("round")) if isinstance(t, torch.Tensor)]
    now += [t for p in other.net.parameters() for t in state[p].values()] if loading else []
    assert list(map(id, now)) == list(map(id, ours))
    assert "drawn" not in groups[0] or isinstance(groups[0]["drawn"]["sigma"], torch.Tensor) is loading
    assert groups[0].get("capturable", loading) is loading
    other.opt.train()
    other.train(2)
    assert_same(other, straight)


@pytest.mark.covering(1)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
@pytest.mark.parametrize("method", ["RWP", "rolling ARWP"])
def test_copies_go_on_alone(method, copied, training):
    run = training("AdamW", method, True, schedule=False, columns=64).train(2)
    run.opt.eval()
    other = copied(run)
    assert other.opt.capturable
    groups = other.opt.param_groups
    assert groups[0]["round"] is not run.opt.param_groups[0]["round"]
    for r in (run, other):
        r.opt.train()
    assert_same(run, other)
    run.train(1)
    assert groups[0]["round"].item() == 2
    other.train(1)
    assert groups[0]["round"] is groups[1]["round"] and groups[0]["round"].item() == 3
    assert_same(run, other)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_checkpoint_of_torchs_capturable_optimizer(capturable, backend):
    """Its learning rate may be a tensor, and its steps are on the device."""
    ps = [torch.nn.Parameter(torch.ones(3, 2))]
    theirs = torch.optim.AdamW(ps, lr=0.5)
    ps[0].grad = torch.ones(3, 2)
    theirs.step()
    state = theirs.state_dict()
    state["param_groups"][0].update(capturable=True, lr=torch.tensor(0.125))
    ours = flatkern.AdamW(ps, backend=backend, capturable=capturable)
    ours.load_state_dict(state)
    group = ours.param_groups[0]
    assert group["capturable"] is capturable and isinstance(group["lr"], torch.Tensor) is capturable
    assert float(group["lr"]) == 0.125 and ours.state[ps[0]]["step"].item() == 1
    ours.step()
    assert ours.state[ps[0]]["step"].item() == 2


# What is refused.

W = torch.nn.Parameter(torch.ones(3, 2))
REFUSED = {
    "another backend": (lambda backend: flatkern.SGD([W], capturable=True),
        "SGD: capturable is True, but CUDA graphs need the triton or the cuda backend, and cpp serves cpu; move the"),
    "a named one": (lambda backend: flatkern.AdamW([W], capturable=True, backend="eager"),
        "AdamW: capturable is True, but CUDA graphs need the triton or the cuda backend, and eager serves cpu; move"),
    "two devices": (
        lambda backend: flatkern.Adam(
            [W, torch.nn.Parameter(torch.ones(3, device="meta"))], capturable=True, backend=None, perturb=flatkern.RWP()
        ),
        r"Adam: capturable is True, but params\[1\] is on meta and params\[0\] on cpu; a CUDA graph"),
    "kappa that follows": (
        lambda backend: flatkern.SGD(
            [W], capturable=True, backend=backend, enhance=flatkern.IRE(1.0, kappa_follows_lr=True)
        ),
        "SGD: capturable is True, but IRE has kappa_follows_lr=True"),
    "a tensor of another value": (
        lambda backend: flatkern.SGD([W], capturable=True, backend=backend, weight_decay=torch.tensor(0.1)),
        "SGD: weight_decay is a tensor, but with capturable=True only lr and sigma are read on the device; pass a"),
    "betas": (
        lambda backend: flatkern.Adam(
            [W], capturable=True, backend=backend, betas=(torch.tensor(0.9), torch.tensor(0.99))
        ),
        "Adam: betas is a tensor, but with capturable=True"),
    "in one group only": (
        lambda backend: flatkern.Adam([{"params": [W], "capturable": False}], capturable=True, backend=backend),
        "Adam: a group has capturable=False and the optimizer True; it holds for all groups, so pass it"),
}  # fmt: skip


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused(make, text, backend):
    with pytest.raises(ValueError, match=text):
        make(backend)


@pytest.fixture
def under_way(monkeypatch):
    yield functools.partial(say_that_it_is_captured, monkeypatch)
    monkeypatch.undo()


@pytest.mark.parametrize("method", ["plain", "RWP", "rolling ARWP"])
def test_a_capture_of_a_host_optimizer_is_refused(method, under_way, training):
    """It would repeat its learning rate and its noise in silence."""
    run = training("SGD", method, False).train(1)
    run.backward() if method != "RWP" else None
    before = run.tensors()
    under_way()
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, .* capturable=True"):
        run.opt.perturb() if method == "RWP" else run.opt.step()
    compare.assert_same(run.tensors(), before)


def test_what_is_collected_inside_a_capture_launches_nothing(under_way, launch_count, training):
    """The collector runs when it likes. The graph of somebody else would put these weights back at every replay."""
    run = training("SGD", "rolling ARWP", False).train(1)
    gone = weakref.ref(run.opt)
    under_way()
    before = launch_count()
    del run
    gc.collect()
    assert gone() is None and launch_count() == before


@pytest.mark.parametrize("key, value", [("lr", 0.5), ("sigma", 0.5), ("seed", 5), ("round", 5)])
def test_a_number_is_not_captured(key, value, under_way, training):
    """A replay would undo whatever a schedule has filled in since."""
    run = training("SGD", "RWP", True).train(1)
    before, words = run.tensors(), run.opt.cycle.scalars.words.clone()
    for group in run.opt.param_groups:
        group[key] = value
    under_way()
    with pytest.raises(RuntimeError, match=r"a number that was assigned to a group .* or fill_ the tensor"):
        run.opt.perturb()
    compare.assert_same(run.tensors(), before)
    assert torch.equal(run.opt.cycle.scalars.words, words)


def test_a_mask_is_not_captured(under_way, training):
    run = training("SGD", "IRE", True).train(1)
    run.backward()
    under_way()
    run.opt.step()
    with pytest.raises(RuntimeError, match="update_mask: a CUDA graph is being captured"):
        run.opt.update_mask()
