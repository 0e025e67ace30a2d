"""What values mixed SAM, GSAM, Friendly-SAM, LookSAM, Momentum-SAM and scales of noise take; their checkpoints."""

import copy
import re

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import METHODS, Training, train, trained

from flatkern import ASAM, GSAM, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM, Wrap

bases = pytest.mark.parametrize("base", ["SGD", "AdamW", "Wrap"])


BAD = [
    (lambda: SAM(lam=-0.1), ValueError, "SAM: lam is -0.1, but should be a number >= 0"),
    (lambda: SAM(lam="1"), TypeError, "SAM: lam is '1'"),
    (lambda: SAM(interval=0), ValueError, r"SAM: interval is 0, but should be an integer in \[1, 2\^32\)"),
    (lambda: SAM(interval=1.5), ValueError, "SAM: interval is 1.5, but should be an integer"),
    (lambda: ASAM(interval=-1), ValueError, "ASAM: interval is -1"),
    (lambda: ASAM(lam=float("nan")), ValueError, "ASAM: lam is nan"),
    (lambda: GSAM(alpha=-1), ValueError, "GSAM: alpha is -1, but should be a number >= 0"),
    (lambda: GSAM(rho=float("inf")), ValueError, "GSAM: rho is inf"),
    (lambda: GSAM(rounds="all"), ValueError, 'GSAM: rounds is \'all\', but should be "mean" or "sum"'),
    (lambda: FriendlySAM(momentum=1.0), ValueError, r"FriendlySAM: perturb_momentum is 1.0, but .* in \[0, 1\)"),
    (lambda: FriendlySAM(sigma=-1), ValueError, "FriendlySAM: sigma is -1"),
    (lambda: LookSAM(k=0), ValueError, r"LookSAM: k is 0, but should be an integer in \[1, 2\^32\)"),
    (lambda: LookSAM(alpha=None), TypeError, "LookSAM: alpha is None"),
    (lambda: MomentumSAM(rho=-1), ValueError, "MomentumSAM: rho is -1"),
    (lambda: MomentumSAM(rolling=1), TypeError, "MomentumSAM: rolling is 1, but should be True or False"),
    (lambda: RWP(scale="l2"), ValueError, 'RWP: scale is \'l2\', but should be "norm", "rms" or "absolute"'),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_values_out_of_range(make, error, message):
    with pytest.raises(error, match=message):
        make()


GROUP_VALUES = [
    (SAM(lam=0.5), "lam", -1.0, "SGD: lam is -1.0"),
    (SAM(lam=0.5), "lam", None, "a group has lam=None, but SAM was made with a number"),
    (SAM(), "lam", 0.5, "a group has lam=0.5, but SAM was made without a number"),
    (SAM(interval=2), "perturb_interval", 0, "SGD: perturb_interval is 0, but should be an integer in [1, 2^32)"),
    (GSAM(), "alpha", -1.0, "SGD: alpha is -1.0"),
    (FriendlySAM(), "perturb_momentum", 1.0, "SGD: perturb_momentum is 1.0"),
    (FriendlySAM(), "sigma", float("nan"), "SGD: sigma is nan"),
    (LookSAM(), "perturb_interval", 2.5, "SGD: perturb_interval is 2.5"),
    (MomentumSAM(), "rho", -0.1, "SGD: rho is -0.1"),
    (RWP(), "scale", "max", "SGD: scale is 'max'"),
]


@pytest.mark.parametrize(("method", "key", "value", "message"), GROUP_VALUES, ids=lambda v: str(v)[:24])
def test_a_group_value_is_checked_before_anything_is_written(method, key, value, message, backend):
    run = Training(method, backend=backend)
    run.opt.param_groups[0][key] = value
    if run.opt.perturbation.ascends:
        run.backward(0)
    with pytest.raises(ValueError, match=re.escape(message)):
        run.opt.perturb()
    assert_same(run.weights(), run.start)
    assert not run.opt.is_perturbed
    assert not run.state()


def test_lam_may_be_beyond_one(backend):
    """WSAM's gamma of 0.9 is lam = 9."""
    run = trained(SAM(0.3, lam=9.0), backend)
    assert not same(run.weights(), trained(SAM(0.3, lam=1.0), backend).weights())


RESUMED = {
    "SAM at intervals": SAM(0.3, interval=3),
    "mixed SAM": SAM(0.3, lam=0.4),
    "GSAM": GSAM(0.3),
    "FriendlySAM": FriendlySAM(0.3),
    "LookSAM": LookSAM(0.3, k=3),
    "MomentumSAM": MomentumSAM(0.3),
}


@bases
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_continues(name, base, backend):
    """As if nothing had stopped, in a new optimizer; with SGD as the base in a plain torch format."""
    run, other = (Training(RESUMED[name], base=base, backend=backend) for _ in range(2))
    train(run, METHODS[name].user, 4)
    saved = copy.deepcopy((run.net.state_dict(), run.opt.state_dict()))
    train(run, METHODS[name].user, 4, start=4)
    other.net.load_state_dict(saved[0])
    other.opt.load_state_dict(saved[1])
    train(other, METHODS[name].user, 4, start=4)
    assert_same(run.weights(), other.weights())
    assert_same_state(run.state(), other.state())


def test_a_checkpoint_of_another_method(backend):
    """What only that method keeps is left out, values with the same name are this optimizer's, counting starts anew."""
    look = trained(LookSAM(0.3, k=3), backend, "LookSAM")
    gsam = Training(GSAM(0.1, alpha=0.2), backend=backend)
    gsam.opt.load_state_dict(look.opt.state_dict())
    assert gsam.opt.param_groups[0]["alpha"] == 0.2
    assert not any("orthogonal" in key for key in gsam.state())
    sam = Training(SAM(0.1, interval=2), backend=backend)
    sam.opt.load_state_dict(trained(None, backend, "rolling").opt.state_dict())
    assert sam.opt.perturb_due


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("method", [None, GSAM(), LookSAM(), FriendlySAM(), MomentumSAM(), SAM(), RWP()], ids=str)
def test_values_of_another_method_may_be_anything(method, base):
    """WSAM's lam of 9 is none of theirs."""
    saved = Training(SAM(lam=9.0), base=base).opt.state_dict()
    run = Training(method, base=base)
    run.opt.load_state_dict(saved)
    run.opt.cycle.groups.check_changed()
    assert run.opt.param_groups[0].get("lam") == (None if isinstance(method, (SAM, RWP)) else 9.0)


def test_lam_may_be_beyond_one_where_the_base_has_the_name():
    net = torch.nn.Linear(4, 3)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    base.param_groups[0]["lam"] = 0.1
    with pytest.warns(UserWarning, match="ours are perturb_lam"):
        opt = Wrap(base, perturb=SAM(lam=9.0))
    assert opt.param_groups[0]["perturb_lam"] == 9.0
    opt.param_groups[0]["perturb_lam"] = -1.0
    with pytest.raises(ValueError, match=r"Wrap: perturb_lam is -1\.0, but should be a number >= 0"):
        opt.step()


@pytest.mark.parametrize("count", ["a", None, -1, 1.5, float("nan")])
def test_a_count_that_is_none_is_refused(count, backend):
    run = trained(SAM(0.3, interval=3), backend, "SAM at intervals")
    saved, before = copy.deepcopy(run.opt.state_dict()), run.weights()
    saved["param_groups"][0]["perturb_count"] = count
    with pytest.raises(ValueError, match=r"perturb_count is .*, but should be an integer in \[0, 2\^32\)"):
        run.opt.load_state_dict(saved)
    assert_same(run.weights(), before)
    assert run.opt.param_groups[0]["perturb_count"] == 4


@pytest.mark.parametrize(("method", "key"), [(LookSAM(0.3, k=2), "orthogonal"), (FriendlySAM(0.3), "ascent_mean")])
def test_state_of_another_dtype_continues(method, key, backend):
    """As a training in another precision, or none, has left it: None is what has not been made yet."""
    name = type(method).__name__
    ends = []
    for change in (lambda t: t, torch.Tensor.double, lambda t: None, "left out"):
        run, other = trained(method, backend, name), Training(method, backend=backend)
        saved = copy.deepcopy((run.net.state_dict(), run.opt.state_dict()))
        for entry in saved[1]["state"].values():
            if change == "left out":
                del entry[key]
            else:
                entry[key] = change(entry[key])
        other.net.load_state_dict(saved[0])
        other.opt.load_state_dict(saved[1])
        train(other, METHODS[name].user, 3, start=4)
        ends.append(other.weights())
    assert_same(ends[0], ends[1])
    assert_same(ends[2], ends[3])


def test_state_of_another_shape_is_refused(backend):
    run = trained(LookSAM(0.3), backend, "LookSAM")
    saved = copy.deepcopy(run.opt.state_dict())
    entry = next(e for e in saved["state"].values() if "orthogonal" in e)
    entry["orthogonal"] = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="orthogonal has shape"):
        Training(LookSAM(0.3), backend=backend).opt.load_state_dict(saved)
