"""Gradients with torch's negative bit, as the imaginary part of a conjugate has it: memory holds their opposite.

Every call that reads a gradient does what it does for the same numbers without the bit, bit for bit.
"""

import pytest
import torch
from compare import assert_same
from patterns import BASES, backends
from torch.nn import Parameter
from two_buckets import KINDS, Run, assert_same_run, values
from unchanged import changed, frozen, picture

import flatkern
from flatkern import IRE

NEGATIVE = torch._neg_view  # a view with the bit: its values are the opposite of what is in memory


class Negated(Run):
    """Every backward leaves new gradients with the bit; what is there already is added to, as autograd does."""

    which = (0, 1, 2)

    def backward(self):
        new = [p for k, p in enumerate(self.params) if k in self.which and p.grad is None]
        super().backward()
        for p in new:
            p.grad = NEGATIVE(-p.grad)
            assert p.grad.is_neg()


ROUNDS = {
    "RWP rounds": ("RWP", "perturb b restore perturb b step zero"),
    "finished rounds": ("RWP", "perturb b restore perturb b restore step zero"),
    "m-RWP noisy first": ("m-RWP", "perturb b restore b step zero"),
    "mSAM": ("SAM", "b perturb b restore b perturb b step zero"),
}
CASES = backends(
    [*((kind, base) for kind in (*KINDS, *ROUNDS) for base in BASES)],
    lambda kind, base: base == "SGD",
)


@pytest.mark.parametrize(("backend", "kind", "base"), CASES, indirect=["backend"])
def test_steps(kind, base, backend):
    """Every method and base; all gradients, or one among others."""
    kind, words = ROUNDS.get(kind, (kind, None))
    other, everywhere, last = Run(kind, base, backend), Negated(kind, base, backend), Negated(kind, base, backend)
    last.which = (2,)
    for r in (other, everywhere, last):
        for _ in range(2):
            r.run(words or r.pattern)
    assert_same_run(everywhere, other)
    assert_same_run(last, other)


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize("own", [{"masters": True}, {"max_grad_norm": 0.1}, {"enhance": IRE(1.0, 0.5)}], ids=str)
@pytest.mark.parametrize("kind", ["plain", "ARWP", "m-RWP", "SAM", "rolling"])
def test_options(kind, own, backend):
    run, other = Negated(kind, "SGD", backend, **own), Run(kind, "SGD", backend, **own)
    for r in (run, other):
        r.run("b mask" if "enhance" in own else "").train(2)
    assert_same_run(run, other)
    if "max_grad_norm" in own:
        assert_same([run.opt.grad_norm], [other.opt.grad_norm])


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
def test_scaler(base, backend):
    """torch's scaler refuses such gradients; if perturb() does too, it has changed nothing."""
    run = Negated("m-RWP", base, backend, scaler=torch.amp.GradScaler("cpu", init_scale=8.0)).run("b")
    seen = picture(run.params, run.opt, run.scaler)
    try:
        run.perturb()
    except RuntimeError:
        assert not changed(seen, picture(run.params, run.opt, run.scaler))
    else:
        run.opt.restore()
    run.opt.release()
    run.opt.zero_grad()
    run.scaler = None
    run.train(1)


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
def test_masks(base, backend):
    """Magnitudes have no sign, and the gradients that made them are dropped."""
    runs = [make("plain", base, backend, enhance=IRE(1.0, 0.5)).run("b mask") for make in (Negated, Run)]
    assert all(p.grad is None for p in runs[0].params)
    masks = [[r.run("b step").opt.state[p]["mask"] for p in r.params] for r in runs]
    assert frozen(masks[0]) == frozen(masks[1])


@pytest.mark.parametrize("kind", ["SAM", "ASAM"])
def test_perturbed_weights(kind, backend):
    """Up the gradient, not down."""
    runs = [make(kind, "SGD", backend).run("b perturb") for make in (Negated, Run)]
    assert_same(runs[0].weights(), runs[1].weights())
    assert_same([runs[0].opt.ascent_norm], [runs[1].opt.ascent_norm])


@pytest.mark.parametrize("kind", ["RWP", "m-RWP", "SAM"])
def test_closures(kind, backend):
    runs = [make(kind, "SGD", backend) for make in (Negated, Run)]
    for r in runs:

        def closure(r=r):
            r.opt.zero_grad()
            r.backward()

        for _ in range(2):
            r.opt.step(closure)
    assert_same_run(*runs)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "Wrap"])
def test_by_autograd(base, backend):
    """Where users meet it: the real loss of a complex number that parameters make up."""
    results = []
    for conjugate in (True, False):
        a, b = (Parameter(values((4,), k)) for k in (0, 1))
        torch_base = torch.optim.SGD([a, b], lr=0.1) if base == "Wrap" else None
        opt = flatkern.Wrap(torch_base, flatkern.SAM()) if torch_base else getattr(flatkern, base)([a, b], lr=0.1)
        x, y = values((4,), 2), values((4,), 3)
        for _ in range(2):
            opt.zero_grad()
            for perturb in (True, False):
                if conjugate:
                    (torch.complex(a, b).conj() * torch.complex(x, y)).real.sum().backward()
                    assert b.grad.is_neg() or b.grad._version
                else:
                    (a * x + b * y).sum().backward()
                if perturb and base == "Wrap":
                    opt.perturb()
                elif perturb:
                    opt.zero_grad()
            opt.step()
        results.append([a.detach().clone(), b.detach().clone()])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
def test_gradients_keep_their_values(base, backend):
    """What users see in `.grad` after a plain step is what was there, whatever was made of the bit."""
    run = Negated("plain", base, backend).run("b")
    before = [p.grad.clone() for p in run.params]
    run.run("step")
    assert_same([p.grad.resolve_neg() for p in run.params], before)
