"""Flags are True or False: strings, numbers and None are refused wherever they come from; one mistake has one text."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from two_buckets import Run, assert_same_run, values
from unchanged import refused

from flatkern import ASAM, IRE, RWP, SAM, SGD, Adam, AdamW, Wrap

NOT_FLAGS = ("no", "yes", "False", "", 0, 1, 1.0, None, [], torch.tensor([True, False]))
TEXT = "{name} is {value!r}, but should be True or False"


def matrix():
    return Parameter(values((3, 2), 0))


def text(name, value):
    return re.escape(TEXT.format(name=name, value=value))


CONSTRUCTORS = [
    *((rule, name) for rule in (SGD, Adam, AdamW) for name in ("maximize", "master_weights", "capturable")),
    (SGD, "nesterov"),
    (Adam, "decoupled_weight_decay"),
]
METHODS = [(RWP, "rolling", {}), (ASAM, "all_tensors", {}), (IRE, "kappa_follows_lr", {"kappa": 1.0})]
GROUPS = [  # rule, method, the key of a group
    *((rule, None, "maximize") for rule in (SGD, Adam, AdamW)),
    (SGD, None, "nesterov"),
    (Adam, None, "decoupled_weight_decay"),
    *((rule, method, "perturb") for rule in (SGD, AdamW, Wrap) for method in (RWP(), SAM(), RWP(rolling=True))),
    *((rule, "IRE", "enhance") for rule in (SGD, AdamW, Wrap)),
]


def make(rule, method, groups):
    own = {"enhance": IRE(1.0)} if method == "IRE" else {"perturb": method}
    return Wrap(torch.optim.SGD(groups, lr=0.1), **own) if rule is Wrap else rule(groups, lr=0.1, **own)


@pytest.mark.parametrize(("rule", "name"), CONSTRUCTORS, ids=str)
def test_constructors(rule, name):
    p = matrix()
    for value in NOT_FLAGS:
        with refused(TypeError, f"{rule.__name__}: {text(name, value)}", [p]):
            rule([p], **{name: value})


@pytest.mark.parametrize("value", ["no", 1], ids=repr)
@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
def test_options_that_no_kernel_has(name, value):
    """Whatever is not False is refused."""
    p = matrix()
    for rule in (Adam, AdamW) if name == "amsgrad" else (SGD, Adam):
        with refused((TypeError, ValueError), name, [p]):
            rule([p], **{name: value})


@pytest.mark.parametrize(("method", "name", "own"), METHODS, ids=str)
def test_methods(method, name, own):
    for value in NOT_FLAGS:
        with pytest.raises(TypeError, match=f"{method.__name__}: {text(name, value)}"):
            method(**own, **{name: value})


@pytest.mark.parametrize(("rule", "method", "name"), GROUPS, ids=str)
def test_groups(rule, method, name):
    """The second group's, in a constructor and in add_param_group()."""
    for value in NOT_FLAGS:
        p, q = matrix(), matrix()
        with refused(TypeError, text(name, value), [p, q]):
            make(rule, method, [{"params": [p]}, {"params": [q], name: value}])
        opt = make(rule, method, [{"params": [p]}])
        with refused(TypeError, text(name, value), [p, q], opt):
            opt.add_param_group({"params": [q], name: value})


CHANGED = [  # method, rule, what came before, the first call that reads the key, the key
    *(("plain", rule, "b", "step", "maximize") for rule in ("SGD", "Adam", "AdamW")),
    ("plain", "SGD", "b", "step", "nesterov"),
    ("plain", "Adam", "b", "step", "decoupled_weight_decay"),
    *((kind, rule, before, "perturb", "perturb") for kind, before in (("RWP", ""), ("m-RWP", "b"), ("SAM", "b"))
      for rule in ("SGD", "AdamW", "Wrap")),
    *(("rolling", rule, "b", "step", "perturb") for rule in ("SGD", "Wrap")),
    *(("IRE", rule, "b", "step", "enhance") for rule in ("SGD", "AdamW", "Wrap")),
    ("IRE", "SGD", "b", "mask", "enhance"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rule", "before", "call", "name"), CHANGED)
def test_groups_changed_in_training(kind, rule, before, call, name, backend):
    """As `opt.param_groups[1]["nesterov"] = "yes"`: refused before the first bucket is served, then put right."""
    own = {"enhance": IRE(1.0, 0.5)} if kind == "IRE" else {}
    runs = [Run("plain" if own else kind, rule, backend, **own) for _ in range(2)]
    for r in runs:
        r.run("b mask" * bool(own)).train(1).run(before)
    run, untroubled = runs
    group = run.opt.param_groups[1]
    good = group[name]
    for value in ("no", "yes", "", 2, None, []):
        group[name] = value
        with run.refused(TypeError, text(name, value)):
            run.run(call)
    group[name] = good
    rest = {"perturb": "perturb b step", "mask": "mask b step"}.get(call, "step")
    for r in runs:
        r.run(rest + " zero").train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_], ids=repr)
def test_bools_of_python_and_numpy(value):
    p = matrix()
    SGD([p], momentum=0.9, nesterov=value, maximize=value, master_weights=value)
    Adam([p], decoupled_weight_decay=value, maximize=value)
    SGD([{"params": [p], "perturb": value}], perturb=RWP(rolling=value))
    assert RWP(rolling=value).rolling is bool(value)
    assert ASAM(all_tensors=value).all_tensors is bool(value)
    assert IRE(1.0, kappa_follows_lr=value).kappa_follows_lr is bool(value)


def test_numpy_bools_do_what_they_say(backend):
    runs = [Run("SAM", "SGD", backend) for _ in range(2)]
    for run, yes in zip(runs, (True, np.True_), strict=True):
        run.opt.param_groups[1] |= {"nesterov": yes, "maximize": yes}
        run.train(2)
        run.opt.param_groups[1] |= {"nesterov": bool(yes), "maximize": bool(yes)}
    assert_same_run(*runs)


@pytest.mark.parametrize("value", ["no", 0, None], ids=repr)
def test_ignored_options_are_as_torch_takes_them(value):
    """`foreach` and `fused` are accepted and ignored."""
    SGD([matrix()], foreach=value, fused=value)
    AdamW([matrix()], foreach=value, fused=value)


# --- one text per mistake -------------------------------------------------------------------------

NUMBERS = [  # rule or method, the argument, a value that is out of range
    *((method, key, bad) for method, keys in ((RWP, ("sigma", "eta")), (SAM, ("rho",)), (ASAM, ("rho", "eta")))
      for key in keys for bad in (-1.0, float("nan"), float("inf"), "x", None)),
    *((RWP, "beta", bad) for bad in (1.0, -0.1, "x")),
    *((RWP, "lam", bad) for bad in (1.5, -0.1, "x")),
    *((RWP, key, bad) for key in ("seed", "stream") for bad in (-1, 2**32, 0.5, "x", True)),
    *((IRE, "kappa", bad) for bad in (-1.0, float("inf"), "x")),
]  # fmt: skip


def said(call):
    """The message without the name of who says it."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return type(caught.value), re.sub(r"^\w+: ", "", str(caught.value)).replace("perturb_", "")


@pytest.mark.parametrize(("method", "key", "bad"), NUMBERS, ids=str)
def test_one_text(method, key, bad):
    """As an argument of the method, in a group, in a new group, in training, in a checkpoint, in any optimizer."""
    good = IRE(1.0) if method is IRE else RWP(lam=0.5) if key == "lam" else method()
    own = {"enhance" if method is IRE else "perturb": good}
    texts = {"method": said(lambda: method(**({"kappa": 1.0} if method is IRE else {}) | {key: bad}))}
    for rule in (SGD, AdamW, Wrap):
        in_base = f"perturb_{key}" if rule is Wrap else key
        build = lambda groups, rule=rule: with_base(rule, groups, own)  # noqa: E731
        for where, text in texts_of(build, key, bad, own, in_base).items():
            texts[f"{rule.__name__}: {where}"] = text
    assert len(set(texts.values())) == 1, texts


def with_base(rule, groups, own):
    return rule(torch.optim.SGD(groups, lr=0.1) if rule is Wrap else groups, **own)


def texts_of(build, key, bad, own, in_base=None):
    """What each call says that meets the value in a group; `in_base` is the key in a group that is wrapped later."""
    texts = {"group": said(lambda: build([{"params": [matrix()]}, {"params": [matrix()], in_base or key: bad}]))}
    opt = build([matrix()])
    texts["new group"] = said(lambda: opt.add_param_group({"params": [matrix()], key: bad}))
    if key != "eta":  # an eta that is not ours makes it another method, whose values are left where they are
        saved = opt.state_dict()
        saved["param_groups"][0][key] = bad
        texts["checkpoint"] = said(lambda: build([matrix()]).load_state_dict(saved))
    opt.param_groups[0][key] = bad
    opt.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    texts["training"] = said(opt.perturb if "perturb" in own and key != "lam" else opt.step)
    return texts


@pytest.mark.parametrize(
    ("rule", "key", "bad"),
    [*((rule, key, bad) for rule in (SGD, AdamW) for key in ("lr", "weight_decay") for bad in (-1.0, "x", None)),
     *((SGD, "momentum", bad) for bad in (-1.0, float("nan"), "x")), (AdamW, "eps", -1.0), (SGD, "dampening", "x"),
     *((AdamW, "betas", bad) for bad in ((1.0, 0.9), (0.9, -1.0), ("x", 0.9), 0.9))],
)  # fmt: skip
def test_one_text_for_the_rules(rule, key, bad):
    """As an argument, in a group, in a new group, in training, in a checkpoint."""
    texts = {"argument": said(lambda: rule([matrix()], **{key: bad}))}
    texts |= texts_of(rule, key, bad, {})
    assert len(set(texts.values())) == 1, texts


def test_every_flag_is_tried():
    """Of every constructor of ours; a new one needs a row above."""
    known = {name for _, name in CONSTRUCTORS} | {name for _, name, _ in METHODS} | {"amsgrad", "differentiable"}
    for made in (SGD, Adam, AdamW, Wrap, RWP, SAM, ASAM, IRE):
        defaults = {name: p.default for name, p in inspect.signature(made).parameters.items()}
        assert {name for name, default in defaults.items() if isinstance(default, bool)} <= known, made
