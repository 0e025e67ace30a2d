"""A refused call has changed nothing, whichever call it is and why ever it is refused, and the way out that its message
names works: afterwards the run is the one in which nobody has tried.
"""

from collections import namedtuple

import pytest
import torch
from compare import assert_same
from patterns import backends
from torch.nn import Linear, Parameter
from two_buckets import Run, assert_same_run

from flatkern import IRE

NAN, INF = float("nan"), float("inf")


def add_group(run, **own):
    run.opt.add_param_group({"params": [Parameter(torch.ones(2))], **own})


def enter(run):
    with run.opt.perturbed():
        pytest.fail("the body ran")


def closure(run):
    run.opt.step(lambda: pytest.fail("the closure ran"))


CALLS = {"add_param_group": add_group, "perturbed": enter, "closure": closure}


def call(run, name):
    name(run) if callable(name) else CALLS[name](run) if name in CALLS else run.run(name)


# --- the phase ------------------------------------------------------------------------------------

# What came before in this step, the call, what the message names, how the user goes on. With IRE, so that update_mask()
# is not refused for want of it.
Phase = namedtuple("Phase", "kind before call message rest")
SAVING = ("state_dict", "pickle", "deepcopy", "add_param_group")
TO_PERTURBED = {"RWP": "perturb", "ARWP": "perturb b", "m-RWP": "b perturb", "losses": "b perturb b",
                "SAM": "b perturb", "ASAM": "b perturb b"}  # fmt: skip
PENDING = {"RWP": "perturb b restore", "m-RWP": "perturb b restore", "m-ARWP": "b perturb restore",
           "ARWP losses": "perturb b restore", "SAM": "b perturb b restore"}  # fmt: skip
FINISH = {"RWP": "zero perturb b step", "m-RWP": "b step", "m-ARWP": "perturb b step", "ARWP losses": "b step",
          "SAM": "b perturb b step"}  # fmt: skip
PHASES = [
    *(Phase(kind, before, name, r"step\(\) or restore\(\)", "b step")
      for kind, before in TO_PERTURBED.items() for name in ("perturb", "perturbed")),
    *(Phase(kind, before, name, r"restore\(\)", "b step")
      for kind, before in TO_PERTURBED.items() for name in (*SAVING, "mask", "release")),
    *(Phase(kind, "train", name, r"eval\(\)", "b step")
      for kind in ("rolling", "rolling ARWP") for name in (*SAVING, "mask", "release", "perturb", "restore")),
    *(Phase("rolling", "eval", name, r"train\(\)|eval\(\)", "b step") for name in ("perturb", "restore", "perturbed")),
    *(Phase(kind, before, name, r"step\(\).* release\(\)", FINISH[kind])
      for kind, before in PENDING.items() for name in (*SAVING, "mask")),
    *(Phase(kind, PENDING[kind], "closure", "rounds|release", FINISH[kind]) for kind in ("RWP", "SAM")),
    Phase("m-RWP", "perturb b restore", "step", "clean", "b step"),
    Phase("m-RWP", "perturb b", "step", r"restore\(\)", "restore b step"),
    Phase("m-ARWP", "b perturb restore", "step", "perturb", "perturb b step"),
    Phase("m-RWP", "b perturb b restore b", "step", "zero_grad", "zero step"),
    Phase("m-RWP", "b perturb b restore b", "perturb", "zero_grad", "zero step"),
    Phase("RWP", "b", "perturb", "zero_grad", "zero perturb b step"),
    Phase("RWP", "b", "perturbed", "zero_grad", "zero perturb b step"),
    Phase("RWP", "perturb b restore b", "perturb", "zero_grad", "zero perturb b step"),
    Phase("RWP", "perturb b restore b", "step", "zero_grad", "zero step"),
    Phase("ARWP losses", "b", "perturb", "noisy pass first", "zero perturb b restore b step"),
    Phase("SAM", "", "perturb", "backward", "b perturb b step"),
    Phase("SAM", "b zeros", "perturb", "backward", "b perturb b step"),
    Phase("SAM", "b step", "perturb", "backward", "zero b perturb b step"),
    Phase("ASAM", "b perturb b restore", "perturb", "backward", "b perturb b step"),
    Phase("SAM", "b perturb b restore b perturb b", "zero", r"step\(\)", "step"),
    Phase("RWP", "perturb b restore perturb b", "zeros", r"step\(\)", "step"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", *Phase._fields),
    backends([tuple(row) for row in PHASES], lambda kind, before, call, *_: call in ("perturb", "step", "restore")),
    indirect=["backend"],
)
def test_phase(kind, before, call, message, rest, backend):
    run, untroubled = (Run(kind, backend=backend, enhance=IRE(1.0, 0.5)).train(1).run(before) for _ in range(2))
    with run.refused(RuntimeError, message):
        globals()["call"](run, call)
    for r in (run, untroubled):
        r.run(rest + " zero").train(1)
    assert_same_run(run, untroubled)


INSIDE = ("restore", "step", "closure", "add_param_group", "release")


@pytest.mark.parametrize("name", ["perturb", "perturbed", *INSIDE])
@pytest.mark.parametrize("kind", ["RWP", "m-RWP", "SAM"])
def test_inside_clean(kind, name, backend):
    """A perturbation waits: nothing may begin or end one, and the perturbed weights come back."""
    run, untroubled = (Run(kind, backend=backend, enhance=IRE(1.0, 0.5)).train(1) for _ in range(2))
    for r in (run, untroubled):
        r.run(TO_PERTURBED[kind])
        with r.opt.clean():
            if r is run:
                with run.refused(RuntimeError, r"clean\(\)|restore\(\)"):
                    call(run, name)
    assert run.opt.is_perturbed
    for r in (run, untroubled):
        r.run("b step zero").train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("name", INSIDE)
def test_inside_clean_rolling(name, backend):
    run, untroubled = (Run("rolling", backend=backend, enhance=IRE(1.0, 0.5)).train(1) for _ in range(2))
    with run.opt.clean(), run.refused(RuntimeError, r"clean\(\)|eval\(\)"):
        call(run, name)
    assert run.opt.is_perturbed
    for r in (run, untroubled):
        r.train(1)
    assert_same_run(run, untroubled)


# --- values ---------------------------------------------------------------------------------------

Reading = namedtuple(
    "Reading", "kind rule before call keys"
)  # the first call that reads a value, and what came before it
READINGS = [
    *(Reading("plain", rule, "b", "step", "lr weight_decay") for rule in ("SGD", "Adam", "AdamW")),
    Reading("plain", "SGD", "b mask b", "step", "kappa"),
    *(Reading("RWP", rule, "", "perturb", "sigma") for rule in ("SGD", "Wrap")),
    *(Reading("ARWP", rule, "", "perturb", "sigma eta") for rule in ("SGD", "Wrap")),
    *(Reading("ARWP", rule, "perturb b", "step", "beta") for rule in ("SGD", "Wrap")),
    *(Reading(kind, "SGD", "perturb b", "step", "lr weight_decay") for kind in ("RWP", "ARWP")),
    *(Reading("m-RWP", rule, "b", "perturb", "sigma") for rule in ("SGD", "Wrap")),
    *(Reading("m-RWP", rule, "b perturb b", "step", "lam") for rule in ("SGD", "Wrap")),
    *(Reading("SAM", rule, "b", "perturb", "rho") for rule in ("SGD", "Wrap")),
    *(Reading("ASAM", rule, "b", "perturb", "rho eta") for rule in ("SGD", "Wrap")),
    *(Reading("SAM", rule, "b perturb b", "step", "lr weight_decay") for rule in ("SGD", "AdamW")),
    Reading("SAM", "SGD", "b perturb b restore", "step", "lr"),
    *(Reading("rolling", rule, "b", "step", "sigma") for rule in ("SGD", "Wrap")),
    *(Reading("rolling ARWP", rule, "b", "step", "sigma eta beta") for rule in ("SGD", "Wrap")),
    *(Reading("rolling", rule, "eval b", "step", "lr") for rule in ("SGD", "AdamW")),
    Reading("rolling", "SGD", "b", "step", "lr weight_decay"),
]
READ = [(*row[:-1], key) for row in READINGS for key in row.keys.split()]
BAD = [
    ("in place", -1.0),
    ("in place", NAN),
    ("assigned", INF),
    ("assigned", -0.5),
    ("assigned", "0.1"),
    ("assigned", None),
]


@pytest.mark.parametrize(
    ("backend", "kind", "rule", "before", "name", "key"),
    backends(READ, lambda kind, rule, before, name, key: rule == "SGD" and kind in ("plain", "RWP", "SAM")),
    indirect=["backend"],
)
def test_value(kind, rule, before, name, key, backend):
    """In the second group, assigned or written into its tensor: refused before the first bucket is served."""
    own = {"tensors": (key,), "backend": backend} | ({"enhance": IRE(1.0, 0.5)} if key == "kappa" else {})
    run, untroubled = (Run(kind, rule, **own).train(1).run(before) for _ in range(2))
    group = run.opt.param_groups[1]
    tensor, good = group[key], group[key].clone()
    for how, bad in BAD:
        if how == "in place":
            tensor.fill_(bad)
        else:
            group[key] = bad
        with run.refused((ValueError, TypeError), key):
            run.run(name)
        group[key] = tensor.copy_(good)
    rest = "perturb b step zero" if name == "perturb" else "step zero"
    for r in (run, untroubled):
        r.run(rest).train(1)
    assert_same_run(run, untroubled)


# --- the noise's key ------------------------------------------------------------------------------

LAST = 2**32 - 1  # the round behind it has no word
KEYS = {"round": (LAST, -1, 2**32, 0.5, "1"), "seed": (-1, 2**32), "stream": (-1, 2**32)}
DRAWS = [
    *(("RWP", "", name, "perturb b step") for name in ("perturb", "perturbed", "closure")),
    ("m-RWP", "b", "perturb", "perturb b step"),
    ("m-RWP", "", "perturb", "perturb b restore b step"),
    ("ARWP losses", "", "perturb", "perturb b restore b step"),
]


@pytest.mark.parametrize(("backend", "rule"), [("eager", "SGD"), ("cpp", "Wrap")], indirect=["backend"])
@pytest.mark.parametrize(("kind", "before", "name", "rest"), DRAWS)
def test_key(kind, before, name, rest, rule, backend):
    """The last round could be drawn, but not followed by another: refused while the weights are clean."""
    run, untroubled = (Run(kind, rule, backend).train(1).run(before) for _ in range(2))
    groups = run.opt.param_groups
    for key, bad in ((key, bad) for key, values in KEYS.items() for bad in values):
        good = groups[0][key]
        for changed in (groups, groups[1:]):  # all of them, or one that differs
            for group in changed:
                group[key] = bad
            with run.refused((ValueError, TypeError), key):
                call(run, name)
            for group in changed:
                group[key] = good
    for r in (run, untroubled):
        r.run(rest + " zero").train(1)
    assert_same_run(run, untroubled)


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Wrap"])
def test_last_round_of_a_rolling_optimizer(rule, backend):
    """Training ends with a refusal on known weights, and another round lets it go on."""
    run = Run("rolling", rule, backend)
    for group in run.opt.param_groups:
        group["round"] = LAST - 2
    run.run("train")
    refusals = 0
    for _ in range(5):
        run.backward()
        with run.opt.clean():
            clean = run.weights()
        if run.opt.param_groups[0]["round"] == LAST:
            with run.refused(ValueError, "round"):
                run.opt.step()
            refusals += 1
            assert_same(run.run("eval").weights(), clean)
            for group in run.opt.param_groups:
                group["round"] = 0
        run.run("step zero")
    assert refusals == 1
    assert run.opt.param_groups[0]["round"] < 5


# --- calls that lack what they need ---------------------------------------------------------------

LACKING = [
    ("plain", {}, "b", "perturb", RuntimeError, "perturb="),
    ("plain", {}, "b", "mask", RuntimeError, "enhance="),
    ("plain", {"enhance": IRE(1.0)}, "", "mask", RuntimeError, "backward"),
    ("RWP", {"enhance": IRE(1.0)}, "", "mask", RuntimeError, "backward"),
    ("plain", {}, "b", lambda run: run.opt.follow(Linear(1, 1)), RuntimeError, "rolling"),
    ("RWP", {}, "b", lambda run: run.opt.follow(Linear(1, 1)), RuntimeError, "rolling"),
    ("rolling", {}, "b", lambda run: run.opt.follow(3), TypeError, "Module"),
    ("RWP", {}, "", lambda run: run.opt.perturb(scaler=3), (TypeError, AttributeError), None),
    ("SAM", {}, "b", lambda run: run.opt.perturb(scaler=3), (TypeError, AttributeError), None),
    *((kind, {}, before, lambda run, bad=bad: run.opt.step(bad), TypeError, "closure")
      for kind, before in (("plain", "b"), ("RWP", ""), ("RWP", "perturb"), ("SAM", ""), ("rolling", ""))
      for bad in (3, [], "ab", [len, 3])),
    *((kind, {}, before, lambda run, n=n: run.opt.step([len] * n), ValueError, f"{n} closures")
      for kind, before, n in (("plain", "", 2), ("RWP", "", 2), ("RWP", "perturb", 2), ("m-RWP", "", 3),
                              ("m-RWP", "b perturb", 2), ("SAM", "b perturb", 2), ("SAM", "b", 2), ("rolling", "", 2))),
    ("losses", {}, "", "closure", RuntimeError, "losses"),
]  # fmt: skip


@pytest.mark.parametrize("row", LACKING, ids=lambda row: f"{row[0]}-{row[2]}-{row[5]}")
@pytest.mark.parametrize(("backend", "rule"), [("eager", "SGD"), ("cpp", "Wrap")], indirect=["backend"])
def test_lacking(row, rule, backend):
    kind, own, before, name, error, message = row
    run, untroubled = (Run(kind, rule, backend, **own).train(1).run(before) for _ in range(2))
    with run.refused(error, message):
        call(run, name)
    for r in (run, untroubled):
        r.opt.eval()
        r.opt.release()
        r.run("zero").train(1)
    assert_same_run(run, untroubled)


def test_loss_weight_of_groups_that_differ():
    run = Run("losses")
    run.opt.param_groups[1]["lam"] = 0.5
    with run.refused(RuntimeError, "different lam"):
        run.opt.loss_weight  # noqa: B018
