"""ASAM's rule: which parameters it scales, where their names come from, and what keeps them; `adaptive` per group."""

import copy
import pickle
import warnings
from collections import defaultdict

import pytest
import torch
from compare import copies, same
from torch import nn

import flatkern
from flatkern import ASAM, RWP, SAM, SGD, Wrap
from flatkern.rehearsal import StandIns

UNKNOWN = "the names are unknown"


class Net(nn.Module):
    """A weight and a bias, of rank 2 and 1, a norm layer's of rank 1, and a matrix that is called neither."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(2, 2))
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.1, 5.0]))
            self.norm.bias.copy_(torch.tensor([0.3, -2.0]))


BY_NAME = {"table": False, "linear.weight": True, "linear.bias": False, "norm.weight": True, "norm.bias": False}
BY_RANK = {"table": True, "linear.weight": True, "linear.bias": False, "norm.weight": False, "norm.bias": False}
ALL, NONE = dict.fromkeys(BY_NAME, True), dict.fromkeys(BY_NAME, False)


def climb(net, opt):
    """The ascent of gradients of ones, by name."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.perturb()
    found = {name: p.detach() - before[name] for name, p in net.named_parameters()}
    opt.restore()
    opt.release()
    return before, found


def assert_scales(net, opt, adaptive, eta=0.01, rho=0.5):
    """e = rho T^2 a / ||T a||, in float64, with T = |w| + eta where `adaptive` says so."""
    before, found = climb(net, opt)
    t = {
        name: (w.double().abs() + eta) if adaptive[name] else torch.ones_like(w).double() for name, w in before.items()
    }
    norm = torch.cat([v.flatten() for v in t.values()]).norm()
    for name, e in found.items():
        # The difference of two float32 numbers of size |w| + |e|: half an ulp of each, and a few of the climb's own.
        unit = 2.0**-23 * (before[name].abs() + 4 * e.abs())
        assert ((e.double() - rho * t[name] ** 2 / norm).abs() <= unit).all(), name


def named(net, method, backend=None):
    return SGD(net.named_parameters(), lr=0.1, perturb=method, backend=backend)


def unnamed(net, method, backend=None):
    return SGD(net.parameters(), lr=0.1, perturb=method, backend=backend)


def test_the_rule(backend):
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_scales(net, named(net, ASAM(), backend), BY_NAME)
        assert_scales(net, named(net, ASAM(eta=0.0, all_tensors=True), backend), ALL, eta=0.0)
        assert_scales(net, unnamed(net, ASAM(all_tensors=True), backend), ALL)
        assert_scales(net, unnamed(net, SAM(0.5), backend), NONE)


def test_without_names_a_vector_is_warned_of_once(backend):
    net = Net()
    opt = unnamed(net, ASAM(), backend)
    with pytest.warns(
        UserWarning, match=r"names are unknown.*named_parameters\(\).*name_parameters\(model\)"
    ) as caught:
        assert_scales(net, opt, BY_RANK)
        assert_scales(net, opt, BY_RANK)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrices = SGD([net.linear.weight, net.table], lr=0.1, perturb=ASAM(), backend=backend)
        told = SGD([{"params": net.parameters(), "adaptive": False}], lr=0.1, perturb=ASAM(), backend=backend)
        climb(net, matrices)
        climb(net, told)


def test_a_warning_that_is_an_error_leaves_clean_weights(backend):
    net = Net()
    opt = unnamed(net, ASAM(), backend)
    before = copies(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=UNKNOWN):
            climb(net, opt)
    assert not opt.is_perturbed and same(list(net.parameters()), before)
    assert_scales(net, opt, BY_RANK)


class Wrapped(nn.Module):
    """As DDP and torch.compile do: the model's names behind a prefix."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("outer", [lambda net: net, Wrapped], ids=["itself", "wrapped"])
@pytest.mark.parametrize("wrap", [False, True], ids=["SGD", "Wrap"])
def test_name_parameters(wrap, outer, backend):
    net = Net()
    opt = unnamed(net, ASAM(), backend)
    if wrap:
        opt = Wrap(torch.optim.SGD(net.parameters(), lr=0.1), ASAM(), backend=backend)
    with pytest.warns(UserWarning, match=UNKNOWN):
        assert_scales(net, opt, BY_RANK)
    opt.name_parameters(outer(net))  # at any time
    assert_scales(net, opt, BY_NAME)
    assert [name.removeprefix("module.") for name in opt.param_groups[0]["param_names"]] == list(BY_NAME)


def test_name_parameters_refuses():
    net = Net()
    opt = unnamed(net, ASAM())
    with pytest.raises(
        ValueError, match="name_parameters: Linear has none of the optimizer's parameters; pass the model"
    ):
        opt.name_parameters(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"name_parameters: model is list, but should be a torch\.nn\.Module"):
        opt.name_parameters(list(net.named_parameters()))
    assert "param_names" not in opt.param_groups[0]


def test_two_models_name_their_own():
    one, two = Net(), Net()
    opt = SGD([*one.parameters(), *two.parameters()], lr=0.1, perturb=ASAM())
    opt.name_parameters(one)
    assert opt.param_groups[0]["param_names"] == [*BY_NAME, *[""] * 5]
    opt.name_parameters(two)
    assert opt.param_groups[0]["param_names"] == [*BY_NAME, *BY_NAME]


@pytest.mark.parametrize("wrap", [False, True], ids=["SGD", "Wrap"])
def test_a_group_that_joins_named_ones(wrap):
    """It is named by the model that named them, or has empty names, for which rank decides."""
    net = Net()
    first, rest = [net.linear.weight], [p for p in net.parameters() if p is not net.linear.weight]
    opt = SGD(first, lr=0.1, perturb=ASAM())
    if wrap:
        opt = Wrap(torch.optim.SGD(first, lr=0.1), ASAM())
    opt.name_parameters(net)
    opt.add_param_group({"params": iter(rest)})
    others = [name for name in BY_NAME if name != "linear.weight"]
    assert [g["param_names"] for g in opt.param_groups] == [["linear.weight"], others]
    assert_scales(net, opt, BY_NAME)
    stranger = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": stranger})
    assert opt.param_groups[2]["param_names"] == [""]
    stranger.grad = torch.ones(3)
    with pytest.warns(UserWarning, match=UNKNOWN):
        climb(net, opt)


def test_groups_without_names_join_as_in_torch():
    opt = unnamed(Net(), ASAM())
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert all("param_names" not in group for group in opt.param_groups)
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": [("more.weight", nn.Parameter(torch.ones(2)))]})


@pytest.mark.parametrize("wrap", [False, True], ids=["SGD", "Wrap"])
def test_checkpoints_with_and_without_names(wrap):
    """Names that a checkpoint has are taken, as in torch; those of the optimizer stay where it has none."""

    def make(net):
        return Wrap(torch.optim.SGD(net.parameters(), lr=0.1), ASAM()) if wrap else unnamed(net, ASAM())

    nets = [Net() for _ in range(2)]
    with_names, without = map(make, nets)
    with_names.name_parameters(nets[0])
    saved, bare = with_names.state_dict(), without.state_dict()
    with_names.load_state_dict(bare)
    assert_scales(nets[0], with_names, BY_NAME)
    without.load_state_dict(saved)
    assert_scales(nets[1], without, BY_NAME)
    plain = torch.optim.SGD(Net().parameters(), lr=0.1)
    plain.load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_names(copied):
    net = Net()
    opt = unnamed(net, ASAM())
    opt.name_parameters(net)
    net, opt = copied((net, opt))
    assert_scales(net, opt, BY_NAME)


# --- adaptive and eta are values of groups ----------------------------------------------------------


def in_groups(net, method, **second):
    """The norm layer in a group of its own."""
    norm = [(name, p) for name, p in net.named_parameters() if name.startswith("norm")]
    rest = [(name, p) for name, p in net.named_parameters() if not name.startswith("norm")]
    return SGD([{"params": rest}, {"params": norm} | second], lr=0.1, perturb=method)


def test_adaptive_changes_at_any_step():
    net = Net()
    opt = in_groups(net, SAM(0.5))
    assert [(g["adaptive"], g["eta"]) for g in opt.param_groups] == [(False, 0.0)] * 2
    norm = {name: name.startswith("norm") for name in BY_NAME}
    assert_scales(net, opt, NONE)
    opt.param_groups[1] |= {"adaptive": True, "eta": 0.3}
    assert_scales(net, opt, norm, eta=0.3)
    opt.param_groups[1]["adaptive"] = None
    assert_scales(net, opt, norm | {"norm.bias": False}, eta=0.3)
    opt.param_groups[1]["adaptive"] = False
    assert_scales(net, opt, NONE)
    opt.param_groups[0]["adaptive"] = opt.param_groups[1]["adaptive"] = True
    opt.param_groups[1]["eta"] = 0.0
    assert_scales(net, opt, ALL, eta=0.0)


@pytest.mark.parametrize("wrap", [False, True], ids=["SGD", "Wrap"])
@pytest.mark.parametrize("value", ["yes", 2, "None", []], ids=repr)
def test_adaptive_is_a_flag_or_none(value, wrap):
    text = r"adaptive is .*, but should be True or False, or None for ASAM's rule"
    net = Net()
    with pytest.raises(TypeError, match=text):
        in_groups(net, SAM(), adaptive=value)
    opt = Wrap(torch.optim.SGD(net.parameters(), lr=0.1), SAM()) if wrap else unnamed(net, SAM())
    opt.param_groups[0]["adaptive"] = value
    with pytest.raises(TypeError, match=text):
        climb(net, opt)
    assert not opt.is_perturbed
    SGD([{"params": net.parameters(), "adaptive": value}], lr=0.1, perturb=RWP())  # it is nothing to RWP


def test_what_a_group_was_given_resumes():
    """Also where it is what another method has by default."""
    nets = [Net() for _ in range(2)]
    opt, again = (in_groups(net, SAM(0.5)) for net in nets)
    opt.param_groups[1] |= {"adaptive": None, "eta": 0.3, "rho": 0.7}
    opt.param_groups[0]["adaptive"] = True
    again.load_state_dict(opt.state_dict())
    keys = ("rho", "eta", "adaptive")
    assert [[g[k] for k in keys] for g in again.param_groups] == [[0.5, 0.0, True], [0.7, 0.3, None]]


OLD = {SAM: {"rho": 0.3}, ASAM: {"rho": 0.3, "eta": 0.2}}  # what groups had before they told their method


@pytest.mark.parametrize("wrap", [False, True], ids=["SGD", "Wrap"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("saved_by", [SAM, ASAM])
@pytest.mark.parametrize("read_by", [SAM, ASAM])
def test_checkpoints_of_the_two_methods(saved_by, read_by, old, wrap):
    """Values of the same method are taken, of the other one they are not."""
    net = Net()
    make = lambda method: Wrap(torch.optim.SGD(net.parameters(), lr=0.1), method) if wrap else unnamed(net, method)  # noqa: E731
    values = OLD[saved_by]
    saved = make(saved_by(**values)).state_dict()
    if old:
        saved["param_groups"][0] = {k: v for k, v in saved["param_groups"][0].items() if k in ("lr", "params")} | values
        saved["param_groups"][0] |= {k: v for k, v in torch.optim.SGD(net.parameters()).defaults.items()}
    opt = make(read_by())
    own = dict(opt.param_groups[0])
    opt.load_state_dict(saved)
    taken = opt.param_groups[0]
    expected = {"eta": own["eta"], **values} if saved_by is read_by else {"rho": own["rho"], "eta": own["eta"]}
    assert {key: taken[key] for key in expected} == expected
    assert (taken["adaptive"], taken["ascent"]) == (own["adaptive"], own["ascent"])


def test_cost_and_warm_up_ask_the_same():
    """A norm's weight is read where it is scaled; stand-ins of named parameters are scaled as these are."""
    vector = nn.Parameter(torch.ones(100))
    for name, more in (("norm.weight", 4), ("norm.bias", 0), ("", 0)):
        opt = SGD([(name, vector)], momentum=0.9, perturb=ASAM())
        assert flatkern.cost(opt).bytes_moved == (40 + more) * 100
    stand_ins = object.__new__(StandIns)
    stand_ins.__dict__ |= {"device": None, "shape_of": lambda p: tuple(p.shape), "shards": {}, "gradients": {}}
    net = Net()
    optimizers = named(net, ASAM()), unnamed(net, ASAM())
    groups = [stand_ins._group(opt.param_groups[0], {}, defaultdict(dict)) for opt in optimizers]
    assert "param_names" not in groups[1]
    kinds = {(p.dim(), "weight" in n) for p, n in zip(groups[0]["params"], groups[0]["param_names"], strict=True)}
    assert kinds == {(2, True), (2, False), (1, True), (1, False)}
