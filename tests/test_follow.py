"""follow(model): what is saved, loaded and copied is clean in all its parts, and a step tells where it is of no use.

Forwards and the trajectory are in test_rolling.py, compiled models in test_follow_compiled.py.
"""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from compare import assert_same, copies, same
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.swa_utils import AveragedModel
from unchanged import picture, refused

import flatkern

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
NOISE = flatkern.RWP(0.1, rolling=True)


class Net(nn.Module):
    """Has a parameter of its own, which is copied before those of its parts."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.ones(3))
            self.body = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) * self.scale


class Selects(Net):
    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "forgotten"}

    def __setstate__(self, state):
        self.__dict__.update(state)


class Rebuilds(Net):
    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


def make(model=None, rule="AdamW", lr=0.1):
    model = Net() if model is None else model
    if rule == "Wrap":
        return model, flatkern.Wrap(torch.optim.AdamW(model.parameters(), lr=lr), perturb=NOISE)
    return model, getattr(flatkern, rule)(model.parameters(), lr=lr, perturb=NOISE)


def weights(model):
    return copies(model.parameters())


def noisy(model=None, **how):
    """A followed model with the noise on, its optimizer, the clean weights, and the handle."""
    model, opt = make(model, **how)
    clean = weights(model)
    handle = opt.follow(model)
    model(X)
    assert opt.is_perturbed
    assert not same(weights(model), clean)
    return model, opt, clean, handle


def train(model, opt, steps=1):
    for _ in range(steps):
        model.train()
        opt.zero_grad()
        model(X).square().mean().backward()
        opt.step()


def saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "in a list": lambda m: copy.deepcopy([m])[0],
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "saved whole": saved_whole,
    "average": lambda m: AveragedModel(m).module,
    "shallow, then deep": lambda m: copy.deepcopy(copy.copy(m)),
}


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Net, Selects, Rebuilds])
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_clean(way, model):
    model, opt, clean, _ = noisy(model())
    made = COPIES[way](model)
    assert_same(weights(made), clean)
    assert type(made) is type(model)
    # And what has come since, and a part of it.
    model.later, model.body.bias = nn.Linear(2, 2), nn.Parameter(model.body.bias.detach())
    model(X)
    assert opt.is_perturbed
    assert_same(weights(COPIES[way](model.body))[:1], clean[1:2])


def test_copying_changes_no_trajectory():
    ends = []
    for copied in (False, True):
        model, opt = make()
        opt.follow(model)
        for _ in range(4):
            train(model, opt)
            if copied:
                for way in COPIES.values():
                    way(model)
        opt.eval()
        ends.append((weights(model), opt.param_groups[0]["round"]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_model_of_its_own(way):
    """Its forwards, states and copies leave the model alone; it is trained and followed by another optimizer."""
    model, opt, clean, handle = noisy()
    made = COPIES[way](model)
    model(X)
    before = weights(model)
    for training in (True, False):
        made.train(training)(X)
        assert_same(weights(made), clean)
    made.load_state_dict(made.state_dict())
    assert_same(weights(saved_whole(copy.deepcopy(made))), clean)
    assert opt.is_perturbed
    assert_same(weights(model), before)
    dead = weakref.ref(opt)
    opt.eval()
    del opt, handle
    gc.collect()
    assert dead() is None  # neither of the two keeps it
    made, _, _, handle = noisy(made.train())
    assert_same(weights(copy.deepcopy(made)), clean)
    handle.remove()
    assert_same(weights(model), clean)


def test_a_saved_model_does_not_need_flatkern():
    model, *_ = noisy(nn.Sequential(nn.Linear(4, 3)))
    assert b"flatkern." not in pickle.dumps(model)


@pytest.fixture
def process_group(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers(process_group):
    """Whichever is followed, the wrapper and what is inside are clean in copies, checkpoints and evaluations."""
    for choose in (lambda outer: outer, lambda outer: outer.module):
        outer = nn.parallel.DistributedDataParallel(Net())
        opt = make(outer)[1]
        clean = weights(outer)
        opt.follow(choose(outer))
        reads = (copy.deepcopy, lambda m: m.state_dict(), lambda m: m.eval()(X))
        for model in (outer, outer.module):
            for read in reads:
                outer.train()(X)
                assert opt.is_perturbed
                made = read(model)
                assert not opt.is_perturbed
                if isinstance(made, nn.Module):
                    assert_same(weights(made), clean)


def test_a_part_without_hooks():
    """A scripted module has none, and what it is a part of serves it; alone it is refused, and nothing has changed."""
    _, opt = make(Net())
    model = torch.jit.script(nn.Linear(4, 3))
    outer, _, clean, _ = noisy(nn.Sequential(model))
    assert_same(weights(copy.deepcopy(outer)), clean)
    assert_same(outer.state_dict().values(), clean)
    opt = flatkern.AdamW(model.parameters(), perturb=NOISE)
    with pytest.raises(RuntimeError, match="ScriptModule"):
        opt.follow(model)
    opt.train()
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        opt.state_dict()


# --- checkpoints ----------------------------------------------------------------------------------


def test_parts_are_saved_clean():
    model, opt, clean, _ = noisy()
    assert_same(model.body.state_dict().values(), clean[1:])
    model(X)
    assert opt.is_perturbed
    assert_same(nn.ModuleDict({"inner": model}).state_dict().values(), clean)


@pytest.mark.parametrize("read", ["eval", "state_dict", "forward", "collected"])
@pytest.mark.parametrize("part", ["whole", "body"])
def test_loaded_weights_stay(part, read):
    model, opt, clean, _ = noisy()
    target = model if part == "whole" else model.body
    target.load_state_dict({name: torch.ones_like(p) for name, p in target.named_parameters()})
    if read == "collected":
        del opt
        gc.collect()
    else:
        {"eval": lambda: opt.eval(), "state_dict": model.state_dict, "forward": lambda: model.eval()(X)}[read]()
    assert all(bool((p == 1).all()) for p in target.parameters())
    if part == "body":
        assert_same([model.scale], clean[:1])


def test_inside_clean():
    """The noise waits, and nothing there ends it."""
    model, opt, clean, _ = noisy()
    before = weights(model)
    with opt.clean():
        for read in (copy.deepcopy, saved_whole, lambda m: m):
            assert_same(read(model).state_dict().values(), clean)
        model(X)
        assert_same(weights(model), clean)
    assert opt.is_perturbed
    assert_same(weights(model), before)


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Wrap"])
def test_a_checkpoint_may_name_the_optimizer_first(rule):
    model, opt = make(rule=rule)
    handle = opt.follow(model)
    for save in (lambda: opt.state_dict(), lambda: dcp.get_optimizer_state_dict(model, opt)):
        train(model, opt)
        assert opt.is_perturbed
        assert save()["param_groups"]
        assert not opt.is_perturbed
        train(model, opt)
        saved = {"opt": opt.state_dict(), "model": model.state_dict()}
        assert not opt.is_perturbed
        assert_same(saved["model"].values(), weights(model))
    # Copies of the optimizer itself are refused as ever, and so is what nobody follows any more.
    train(model, opt)
    for copied in (pickle.dumps, copy.deepcopy):
        with refused(RuntimeError, r"eval\(\)", model.parameters(), opt):
            copied(opt)
    handle.remove()
    with refused(RuntimeError, r"eval\(\)", model.parameters(), opt):
        opt.state_dict()


# --- which models ---------------------------------------------------------------------------------


def hooks(model):
    """All that following may leave in a model."""
    names = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return [(list(vars(m)), *(list(getattr(m, name)) for name in names)) for m in model.modules()]


def test_the_handle_removes_everything():
    model = Net()
    before = hooks(model)
    model, opt, clean, handle = noisy(model)
    second = opt.follow(model)
    handle.remove()
    model(X)
    assert_same(weights(copy.deepcopy(model)), clean)
    model(X)
    second.remove()
    second.remove()
    assert hooks(model) == before
    assert opt.is_perturbed
    assert not same(weights(copy.deepcopy(model)), clean)


def test_two_optimizers_follow_one_model():
    model = Net()
    clean = weights(model)
    opts = [flatkern.SGD(part, lr=0.1, perturb=NOISE) for part in ([model.scale], model.body.parameters())]
    handles = [opt.follow(model) for opt in opts]
    for read in (copy.deepcopy, lambda m: m.state_dict()):
        model(X)
        assert all(opt.is_perturbed for opt in opts)
        read(model)
        assert_same(weights(model), clean)
    handles[0].remove()
    opts[1].train()
    assert_same(weights(copy.deepcopy(model)), clean)


def test_the_wrong_model_is_refused():
    other = nn.Linear(2, 2)
    before = hooks(other)
    model, opt = make()
    with refused(ValueError, "holds none of the optimizer's parameters", model.parameters(), opt):
        opt.follow(other)
    with refused(ValueError, "holds none", model.parameters(), opt):
        opt.follow(copy.deepcopy(model))
    assert hooks(other) == before
    opt.follow(nn.Sequential(other, model))  # one of its parts is the optimizer's


def test_parameters_that_are_replaced():
    """A step refuses where none is left, whoever has replaced them; where some are it goes on, and so do forwards."""
    model, opt = make()
    opt.follow(model)
    train(model, opt)
    model.scale = nn.Parameter(torch.ones(3))  # the one that was looked at
    train(model, opt)
    torch.func.functional_call(model, {k: torch.zeros_like(p) for k, p in model.named_parameters()}, (X,))
    model.body.load_state_dict(model.body.state_dict(), assign=True)
    params = opt.param_groups[0]["params"]
    with refused(RuntimeError, "Net holds none .*assign=True", params, opt):
        opt.step()
    opt.eval()


def test_parameters_that_the_optimizer_replaces():
    """DeepSpeed's ZeRO puts its own flat ones into the groups."""
    model, opt = make()
    handle = opt.follow(model)
    train(model, opt)
    opt.eval()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    opt.param_groups[0]["params"] = [flat]
    for _ in range(2):
        with refused(RuntimeError, "DeepSpeed", [flat], opt):
            opt.step()
    handle.remove()
    opt.step()


def test_a_model_that_is_gone():
    model, opt = make()
    body = model.body
    opt.follow(model)
    train(model, opt)
    del model
    gc.collect()
    body(X).sum().backward()
    opt.step()
    assert opt.is_perturbed
    with pytest.raises(RuntimeError, match=r"eval\(\)"):  # nobody follows it any more
        opt.state_dict()


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Embedding(5, 2)
        self.rows = nn.Embedding(5, 2, max_norm=0.5)
        self.bags = nn.ModuleList([nn.EmbeddingBag(5, 2, max_norm=0.5)])
        self.frozen = nn.Embedding(5, 2, max_norm=0.5)


def test_weights_that_a_forward_writes_are_marked(monkeypatch):
    """Those of the optimizer alone, one by one; no group is changed."""
    marked = []
    monkeypatch.setattr("flatkern.optim.weights.Weights.drop_writes", lambda self, params: marked.extend(params))
    model = Tables()
    ours = [p for name, p in model.named_parameters() if "frozen" not in name]
    opt = flatkern.SGD(ours, lr=0.1, perturb=NOISE)
    before = picture(ours, opt)
    opt.follow(model)
    assert [id(p) for p in marked] == [id(model.rows.weight), id(model.bags[0].weight)]
    assert picture(ours, opt) == before
