"""load_state_dict() is all or nothing and shares nothing with the checkpoint; of stateless bases ours is kept too."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from compare import same
from two_buckets import KINDS, Run, assert_same_run, values
from unchanged import changed, frozen, picture

import flatkern
from flatkern import IRE

REFUSED = (TypeError, ValueError, RuntimeError, KeyError)
NAN, INF = float("nan"), float("inf")

# --- all or nothing -------------------------------------------------------------------------------

TENSOR = {  # what a state tensor of a parameter's shape may not be
    "string": lambda t: "x",
    "number": lambda t: 0.5,
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "another shape": lambda t: t.new_zeros(t.numel() + 1),
    "no shape": lambda t: t.new_zeros(()),
    "integers": lambda t: t.to(torch.int64),
    "complex": lambda t: t.to(torch.complex64),
    "NaN": lambda t: torch.full_like(t, NAN),
    "one infinity": lambda t: t.clone().flatten().index_fill_(0, torch.tensor([t.numel() - 1]), INF).view_as(t),
}
COUNT = {
    "string": lambda t: "x",
    "list": lambda t: [1.0, 2.0],
    "None": lambda t: None,
    "two": lambda t: torch.ones(2),
    "negative": lambda t: torch.tensor(-1.0),
    "negative number": lambda t: -1,
    "NaN": lambda t: torch.tensor(NAN),
    "infinite": lambda t: torch.tensor(INF),
}
KINDS_OF_STATE = {"plain": "plain", "ARWP": "ARWP", "rolling ARWP": "rolling ARWP", "masters": "RWP", "IRE": "plain"}
NAMED = ("string", "number", "list", "complex", "NaN")
STATE = [  # what the optimizer is, its rule, the key, how it may be damaged
    # (Checkpoints of old torch versions hold None where there was no momentum.)
    ("plain", "SGD", "momentum_buffer", [how for how in TENSOR if how != "None"]),
    *(("plain", "AdamW", key, TENSOR) for key in ("exp_avg", "exp_avg_sq")),
    ("plain", "Adam", "step", COUNT),
    ("rolling ARWP", "SGD", "momentum_buffer", ("string", "another shape", "NaN")),
    *((kind, rule, "history", NAMED)
      for kind, rule in (("ARWP", "SGD"), ("ARWP", "Wrap"), ("rolling ARWP", "AdamW"))),
    *(("IRE", rule, "mask", NAMED[:-1]) for rule in ("SGD", "Wrap")),
    ("masters", "SGD", "master", [how for how in TENSOR if how != "None"]),
]  # fmt: skip
MISSING = [("plain", "AdamW", key) for key in ("exp_avg", "exp_avg_sq", "step")]


def make(what, rule, backend, steps=2):
    """With a last parameter whose state differs from the first one's, and gradients that wait for the next step."""
    own = {"enhance": IRE(1.0, 0.5)} if what == "IRE" else {}
    run = Run(KINDS_OF_STATE[what], rule, backend, masters=what == "masters", **own)
    if what == "IRE":
        run.run("b mask")
    run.train(steps)
    run.opt.eval()
    return run


def saved_by(run):
    return copy.deepcopy(run.opt.state_dict())


def assert_trains_on(run, untroubled):
    for r in (run, untroubled):
        r.train(1)
    assert_same_run(run, untroubled)


@pytest.mark.filterwarnings("ignore:.*starts empty")
@pytest.mark.parametrize(("what", "rule", "key", "damages"), STATE, ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_state(what, rule, key, damages, backend):
    """Of the first or the last parameter that has it: nothing of the checkpoint is taken."""
    run, untroubled = (make(what, rule, backend) for _ in range(2))
    good = saved_by(make(what, rule, backend, steps=3))
    with_it = [k for k, state in good["state"].items() if key in state]
    for k, how in product((with_it[0], with_it[-1]), damages):
        bad = copy.deepcopy(good)
        bad["state"][k][key] = (COUNT if key == "step" else TENSOR)[how](bad["state"][k][key])
        before = frozen(bad)
        with run.refused(REFUSED, None):
            run.opt.load_state_dict(bad)
        assert frozen(bad) == before
    assert_trains_on(run, untroubled)


@pytest.mark.parametrize(("what", "rule", "key"), MISSING)
def test_missing_state(what, rule, key, backend):
    """A parameter that has some of the rule's entries has all of them; one that has none begins anew."""
    run, untroubled = (make(what, rule, backend) for _ in range(2))
    good = saved_by(make(what, rule, backend, steps=3))
    for k in (0, 2):
        bad = copy.deepcopy(good)
        del bad["state"][k][key]
        with run.refused(REFUSED, key):
            run.opt.load_state_dict(bad)
    bad = copy.deepcopy(good)
    del bad["state"][2]
    run.opt.load_state_dict(bad)
    assert run.params[2] not in run.opt.state
    untroubled.opt.load_state_dict(bad)
    assert_trains_on(run, untroubled)


NOT_A_ROUND = (-1, 2**32, 0.5, "1", None)
GROUPS = [  # rule, kind, the key, and what a group may not have
    ("SGD", "plain", "lr", (-1.0, NAN, "0.1", None, torch.tensor(-1.0))),
    ("AdamW", "plain", "betas", (0.9, (0.9,), (0.9, 1.0), ("a", "b"), None)),
    ("SGD", "plain", "nesterov", ("yes", None, 2)),
    ("SGD", "plain", "momentum", (-1.0, "0.9")),
    *((rule, kind, key, bad) for rule in ("SGD", "Wrap")
      for kind, key, bad in (("RWP", "sigma", (-1.0, INF, "0.1")), ("ARWP", "beta", (1.0, None)),
                             ("m-RWP", "lam", (2.0, "0.5")), ("RWP", "round", NOT_A_ROUND),
                             ("RWP", "seed", (-1, "1")), ("SAM", "rho", (-1.0, NAN)))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "kind", "key", "damages"), GROUPS, ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_group(rule, kind, key, damages, backend):
    """In any group; the state, which is all right, is not taken either."""
    run, untroubled = (Run(kind, rule, backend).train(1) for _ in range(2))
    good = saved_by(Run(kind, rule, backend).train(2))
    for k, bad in product((0, 1), damages):
        saved = copy.deepcopy(good)
        saved["param_groups"][k][key] = bad
        with run.refused(REFUSED, key.removesuffix("s")):
            run.opt.load_state_dict(saved)
    assert_trains_on(run, untroubled)


def drop(*path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return damage


def put(value, *path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return damage


WHOLE = {
    "no groups": drop("param_groups"),
    "no state": drop("state"),
    "a group less": drop("param_groups", 1),
    "a parameter less": drop("param_groups", 1, "params", 0),
    "a group without parameters": drop("param_groups", 1, "params"),
    "state is a list": put([], "state"),
    "a parameter's state is a list": put([1], "state", 1),
    "a parameter's state is None": put(None, "state", 2),
    "groups are a dict": put({}, "param_groups"),
    "a group is None": put(None, "param_groups", 1),
}


@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize(
    ("backend", "rule"), [("eager", "SGD"), ("cpp", "AdamW"), ("cpp", "Wrap")], indirect=["backend"]
)
def test_damaged_checkpoint(rule, how, backend):
    run, untroubled = (Run("RWP", rule, backend).train(1) for _ in range(2))
    saved = saved_by(Run("RWP", rule, backend).train(2))
    WHOLE[how](saved)
    with run.refused((*REFUSED, AttributeError, IndexError), None):
        run.opt.load_state_dict(saved)
    for value in (None, [], "checkpoint", {}):
        with run.refused((*REFUSED, AttributeError), None):
            run.opt.load_state_dict(value)
    assert_trains_on(run, untroubled)


@pytest.mark.parametrize(
    ("backend", "rule"), [("eager", "SGD"), ("cpp", "AdamW"), ("cpp", "Wrap")], indirect=["backend"]
)
@pytest.mark.parametrize(
    ("kind", "before", "rest"),
    [("RWP", "perturb", "b step"), ("m-RWP", "b perturb b", "step"), ("SAM", "b perturb b restore", "step"),
     ("RWP", "perturb b restore", "perturb b step"), ("rolling", "train", "b step")],
)  # fmt: skip
def test_what_is_under_way_goes_on(kind, before, rest, rule, backend):
    """Loading ends a perturbation and drops what is pending; refused, it does neither."""
    saved = saved_by(Run(kind, rule, backend).train(1).run("eval"))
    run, untroubled = (Run(kind, rule, backend).train(1).run(before) for _ in range(2))
    bad = copy.deepcopy(saved)
    bad["param_groups"][1]["sigma" if kind != "SAM" else "rho"] = -1.0
    with run.refused(ValueError, "sigma|rho"):
        run.opt.load_state_dict(bad)
    for r in (run, untroubled):
        r.run(rest + " zero").train(1)
    assert_same_run(run, untroubled)


def test_what_a_torch_checkpoint_may_be(backend):
    """Every entry is there and in range, as a number or a tensor, and on other memory formats."""
    run = make("plain", "AdamW", backend)
    saved = saved_by(run)
    for state in saved["state"].values():
        state["step"] = float(state["step"])
        state["exp_avg"] = state["exp_avg"].t().contiguous().t() if state["exp_avg"].dim() == 2 else state["exp_avg"]
    other = make("plain", "AdamW", backend, steps=3)
    for a, b in zip(other.params, run.params, strict=True):
        a.data.copy_(b.data)
    other.passes = run.passes
    other.opt.load_state_dict(saved)
    assert_trains_on(run, other)


class Fails(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        raise KeyError("the base refuses")


@pytest.mark.parametrize(("kind", "before"), [("ARWP", ""), ("RWP", "perturb"), ("rolling", "train")])
def test_a_base_that_refuses(kind, before, backend):
    """Wrap asks it before it ends anything of its own."""
    run = Run(kind, "Wrap", backend).train(1).run(before)
    saved = saved_by(Run(kind, "Wrap", backend).train(2).run("eval"))
    run.opt.base.__class__ = Fails
    with run.refused(KeyError, "the base refuses"):
        run.opt.load_state_dict(saved)


# --- nothing is shared ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Wrap"])
def test_groups_are_copies(rule, backend):
    """Tensors, tuples of tensors, and whatever a user keeps in a group: neither side sees what the other writes."""
    one, two = (Run("rolling", rule, backend, tensors=("sigma", "lr")).train(1).run("eval") for _ in range(2))
    for run in (one, two):
        run.opt.param_groups[0] |= {"mine": {"list": [1, 2]}, "weights": torch.ones(2)}
    saved = one.opt.state_dict()
    two.opt.load_state_dict(saved)
    before, groups = frozen(saved["param_groups"]), [dict(g, params=None) for g in two.opt.param_groups]
    seen = frozen(groups)
    one.opt.param_groups[0]["lr"].fill_(7.0)
    one.opt.param_groups[0]["sigma"].fill_(7.0)
    one.opt.param_groups[0]["mine"]["list"].append(3)
    one.opt.param_groups[0]["weights"].zero_()
    assert frozen(groups) == seen
    assert all(float(g["lr"]) == pytest.approx(0.1) for g in two.opt.param_groups)
    after = frozen(saved["param_groups"])
    two.opt.param_groups[0]["lr"].fill_(3.0)
    two.opt.param_groups[0]["mine"]["list"].append(4)
    two.opt.param_groups[0]["weights"].fill_(4.0)
    two.train(1)
    assert frozen(saved["param_groups"]) == after != before


def test_betas_are_copies(backend):
    betas = torch.tensor(0.9), torch.tensor(0.99)
    one, two = (flatkern.AdamW([torch.nn.Parameter(values((3,), 0))], betas=betas, backend=backend) for _ in range(2))
    two.load_state_dict(one.state_dict())
    betas[0].fill_(0.5)
    assert float(two.param_groups[0]["betas"][0]) == pytest.approx(0.9)


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_state_is_a_copy(rule, backend):
    """Training after loading leaves the checkpoint as it is, and the one that was saved from. (A base of torch's shares
    its own entries with the checkpoint.)
    """
    one, two = (Run("ARWP", rule, backend).train(2) for _ in range(2))
    saved = one.opt.state_dict()
    before, source = frozen(saved), picture(one.params, one.opt)
    two.opt.load_state_dict(saved)
    two.train(2)
    assert frozen(saved) == before
    assert not changed(source, picture(one.params, one.opt))


def test_groups_stay_the_same_objects(backend):
    """Schedulers hold them."""
    run = Run("RWP", "SGD", backend).train(1)
    groups = list(run.opt.param_groups)
    run.opt.load_state_dict(saved_by(run))
    assert all(a is b for a, b in zip(run.opt.param_groups, groups, strict=True))


# --- bases without state --------------------------------------------------------------------------

OURS = {
    "ARWP": ("ARWP", {}),
    "m-ARWP": ("m-ARWP", {}),
    "rolling ARWP": ("rolling ARWP", {}),
    "IRE": ("plain", {"enhance": IRE(1.0, 0.5)}),
    "ARWP and IRE": ("ARWP", {"enhance": IRE(1.0, 0.5)}),
}


class Stateless(Run):
    """Around SGD without momentum, which keeps nothing; or around another base."""

    def __init__(self, name, backend, make_base=lambda params: torch.optim.SGD(params, lr=0.05), seed=0):
        kind, own = OURS[name]
        super().__init__(kind, "Wrap", backend)
        for k, p in enumerate(self.params):
            p.data = values(p.shape, 100 * seed + k)
        self.opt = flatkern.Wrap(make_base(self.params), KINDS[kind][0], backend=backend, **own)
        if own:
            self.run("b mask")

    def copy_from(self, other):
        for p, q in zip(self.params, other.params, strict=True):
            p.data.copy_(q.data)
        self.passes = other.passes
        return self


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("how", ["fresh", "trained otherwise", "twice", "without a step"])
@pytest.mark.parametrize("name", OURS)
def test_histories_and_masks_of_a_stateless_base(name, how, backend):
    """Saved, loaded and reset: what the optimizer had before does not shine through."""
    run = Stateless(name, backend).train(3)
    run.opt.eval()
    saved = through_a_file(run.opt.state_dict())
    keys = {"ARWP": {"history"}, "IRE": {"mask"}, "ARWP and IRE": {"history", "mask"}}.get(name, {"history"})
    assert all(keys <= saved["state"][k].keys() for k in range(3))
    other = Stateless(name, backend, seed=5 if how == "trained otherwise" else 0)
    if how == "trained otherwise":
        other.train(5)
    other.opt.eval()
    other.opt.load_state_dict(saved)
    other.copy_from(run)
    if how == "twice":
        other.opt.load_state_dict(other.opt.state_dict())
    if how == "without a step":
        again = Stateless(name, backend)
        again.opt.eval()
        again.opt.load_state_dict(through_a_file(other.opt.state_dict()))
        other = again.copy_from(run)
    assert frozen(other.opt.state_dict()["state"]) == frozen(saved["state"])
    for r in (run, other):
        r.train(2)
    assert_same_run(run, other)


BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
}


@pytest.mark.parametrize("base", BASES)
def test_a_mask_before_the_first_step(base, backend):
    """The base has no state yet, and makes its own on an empty entry; the mask is saved all the same."""
    run = Stateless("IRE", backend, BASES[base])
    saved = through_a_file(run.opt.state_dict())
    assert all("mask" in saved["state"][k] for k in range(3))
    other = Stateless("IRE", backend, BASES[base], seed=5).train(1)
    other.opt.load_state_dict(saved)
    other.copy_from(run)
    for r in (run, other):
        r.train(2)
    assert_same_run(run, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", OURS)
def test_copies_of_a_stateless_base(name, copied, backend):
    """deepcopy and pickle take histories and masks along."""
    run = Stateless(name, backend).train(2)
    run.opt.eval()
    params, opt = copied((run.params, run.opt))
    other = Stateless(name, backend)
    other.params, other.opt, other.passes = params, opt, run.passes
    for r in (run, other):
        r.train(2)
    assert_same_run(run, other)


@pytest.mark.parametrize("name", ["ARWP", "IRE"])
def test_a_checkpoint_of_the_base_alone(name, backend):
    """torch's own: ours starts empty, with one warning."""
    run = Stateless(name, backend, BASES["SGD"]).train(2)
    base = BASES["SGD"]([torch.nn.Parameter(p.detach().clone()) for p in run.params])
    for p in base.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    base.step()
    with pytest.warns(UserWarning, match="starts empty") as caught:
        run.opt.load_state_dict(base.state_dict())
    assert len(caught) == 1
    assert all(not run.opt.state[p].keys() & {"history", "mask"} for p in run.params)
    weights = run.weights()
    run.run("zero" + " b mask" * (name == "IRE")).train(1)
    assert not same(run.weights(), weights)
