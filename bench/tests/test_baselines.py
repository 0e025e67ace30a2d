"""The baselines are checked before they are timed: each computes what flatkern computes.

Where nothing is random the weights must agree after several steps; where noise is drawn, its size per
filter, its mean and the way back must. Run by `pytest bench`; no test here looks at a clock.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace

import pytest
import torch

from bench.baselines.compiled import Compiled
from bench.baselines.libraries import PEERS
from bench.baselines.loops import STYLES, torch_optimizer
from bench.candidates import build, flatkern_optimizer, styles_of
from bench.equal import are_normal, difference, difference_of, moved, normals, renew, silent, trained, weights
from bench.methods import BASES, METHODS
from bench.timing.harness import Gradients, run_cycle
from flatkern.dispatch import refuse

NOISY = [name for name, method in METHODS.items() if method.sigma]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
@pytest.mark.parametrize("style", STYLES)
def test_baseline_takes_flatkerns_step(style, name, base, backend):
    """With the noise at zero: mixing, averaging, history's harmlessness and the base step."""
    if reason := refuse("sgd_update_", backend, "cpu"):
        pytest.skip(reason)
    method = silent(METHODS[name])

    got = trained(styles_of(method)[style], method, base)
    want = trained(lambda *args: flatkern_optimizer(*args, backend=backend), method, base)

    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.rho])
@pytest.mark.parametrize("style", STYLES)
def test_baseline_climbs_to_flatkerns_point(style, name, base):
    """Gradients are preset, so that a step does not show where it was taken."""
    method = METHODS[name]

    got = moved(styles_of(method)[style], method, base)
    want = moved(lambda *args: flatkern_optimizer(*args, backend="eager"), method, base)

    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["m-rwp", "msam", "rolling"])
@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_takes_the_eager_step(name, base):
    method = silent(METHODS[name])

    got, want = trained(Compiled, method, base), trained(STYLES["foreach"], method, base)

    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["rwp", "m-rwp", "msam", "rolling"])
def test_what_is_compiled_for_gpus_takes_the_eager_step(name, base, monkeypatch):
    """The form in lists, before torch.compile; compiling it takes a GPU to be worth while."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    method = silent(METHODS[name])

    got = trained(lambda *args: Compiled(*args, lists=True), method, base)

    torch.testing.assert_close(got, trained(STYLES["foreach"], method, base), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sam", "asam", "ire", "mixed", "gsam", "friendly", "looksam", "momentum"])
def test_foreach_takes_the_same_step_where_the_host_does_not_wait(name):
    """On a GPU the climb scales the gradients on the device, and IRE's threshold comes from a sort."""
    method = METHODS[name]
    style = styles_of(method)["foreach"]

    def on_gpu(*args):
        baseline = style(*args)
        baseline.on_cpu = False
        return baseline

    torch.testing.assert_close(trained(on_gpu, method, "sgd"), trained(style, method, "sgd"), rtol=1e-5, atol=1e-7)


def test_gradients_that_are_handed_over_are_new_to_flatkern():
    """The loop on a GPU does not write gradients anew; an optimizer that told them by address would refuse."""
    params = weights()
    optimizer = flatkern_optimizer(params, METHODS["sam"], "sgd", backend="eager")
    gradients = Gradients(params, sets=1)
    for _ in range(3):
        for kind, call, _ in METHODS["sam"].cycle:
            gradients.deliver(params, kind, 0, fresh=False)
            getattr(optimizer, call)()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("style", STYLES)
def test_plain_torch_is_what_the_baselines_step_with(style):
    """Perturbing and restoring aside, a baseline is the fused torch optimizer."""
    params, expected = weights(), weights()
    baseline = STYLES[style](params, silent(METHODS["rwp"]), "sgd")
    torch_sgd = torch_optimizer(expected, "sgd", fused=True)
    gradients = Gradients(params, sets=1)

    run_cycle(baseline, params, METHODS["rwp"].cycle, gradients)
    for p, q in zip(params, expected, strict=True):
        q.grad = p.grad.clone()
    torch_sgd.step()

    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("style", [*STYLES, "compiled"])
def test_noise_has_the_size_of_the_filter(style, name, monkeypatch):
    """Each filter's displacement is N(0, sigma^2 norm^2 / (1 + eta F)), F from the steps before; or N(0, sigma^2)."""
    torch.manual_seed(1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if style == "compiled" and METHODS[name].absolute:
        pytest.skip("torch.compile is not raced there")
    make = {**STYLES, "compiled": functools.partial(Compiled, lists=True)}[style]
    assert are_normal(normals(make, METHODS[name], "sgd"))


@pytest.mark.parametrize("name, base, library", PEERS)
def test_a_librarys_class_takes_flatkerns_step_unless_it_is_said_to_differ(name, base, library):
    """And if it is said to, it does."""
    pytest.importorskip(library)
    found = difference_of(library, name, base)
    assert bool(found) == bool(PEERS[name, base, library].computes_something_else), found


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"lam": 0.25}, "other weights after three steps"),
        ({"sigma": 0.02}, "noise of another size"),
        ({"rho": 0.06}, "a gradient at other weights"),
    ],
)
def test_a_candidate_that_computes_something_else_is_found(wrong, found):
    """A rival whose result is not the reference's has no speed-up, however fast it is."""
    method = METHODS["sam" if "rho" in wrong else "m-rwp"]

    def other(params, method, base):
        return STYLES["loop"](params, replace(method, **wrong), base)

    assert difference(other, method, "sgd") == found


def test_a_documented_candidate_takes_the_base_by_name():
    """Which on the CPU is torch's loop over tensors; what it computes is the same."""
    assert difference_of("documented papers", "sam", "sgd") == ""
    params = weights()
    optimizer = build("documented papers", params, "sam", METHODS["sam"], "sgd")
    assert not optimizer.base.defaults["fused"] and not optimizer.base.defaults["foreach"]


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if "perturb" in {turn.call for turn in method.cycle}]
)
@pytest.mark.parametrize("style", STYLES)
def test_restore_comes_back(style, name):
    """Exactly, but for the released loops that subtract what they added."""
    method, params = METHODS[name], weights()
    baseline = styles_of(method)[style](params, method, "sgd")
    gradients = Gradients(params, sets=1)
    run_cycle(baseline, params, method.cycle, gradients)  # so that there is a momentum to go along
    before = [p.detach().clone() for p in params]
    renew(gradients, seed=11)

    gradients.deliver(params, method.cycle[0].gradient, 0)
    baseline.perturb()
    assert all(not torch.equal(p, w) for p, w in zip(params, before, strict=True))
    baseline.restore()

    tolerance = 1e-6 if style == "papers" else 0
    torch.testing.assert_close([p.detach() for p in params], before, rtol=tolerance, atol=tolerance)
