"""A launch of the CUDA backend that fails in the middle of a call, for every method: clean weights can be had.

Whichever launch it is: of a perturbation, of the norm of an ascent, of a mask, of the way back, of an update.
"""

import copy

import pytest
import torch
from compare import copies
from emulated import needs_emulation
from steps import step
from test_cuda_launches import failing_launch

import flatkern

pytestmark = needs_emulation

RWP, SAM = flatkern.RWP, flatkern.SAM
METHODS = {
    "RWP": dict(perturb=RWP(0.02)),
    "m-ARWP": dict(perturb=RWP(0.05, lam=0.5, eta=0.1)),
    "rolling ARWP": dict(perturb=RWP(0.05, eta=0.1, rolling=True)),
    "SAM": dict(perturb=SAM(0.5), max_grad_norm=1.0),
    "IRE, RWP": dict(perturb=RWP(0.02), enhance=flatkern.IRE(2.0)),
    "Wrap": dict(perturb=RWP(0.02, lam=0.5)),
}
MASTERS = dict(dtype=torch.bfloat16, master_weights=True)
CASES = {name: (name, {}) for name in METHODS}
CASES |= {f"{name}, masters": (name, MASTERS) for name in ("RWP", "rolling ARWP", "SAM")}


class Run:
    """More tensors than a launch of any kernel has room for, and a filter that is cut into segments."""

    def __init__(self, method, dtype=torch.float32, **own):
        torch.manual_seed(0)
        shapes = [*[(2, 3)] * 310, *[(5,)] * 310, (1, 33000)]
        self.params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        options = dict(backend="cuda", **METHODS[method], **own)
        if method == "Wrap":
            self.opt = flatkern.Wrap(torch.optim.SGD(self.params, lr=0.1), **options)
        else:
            self.opt = flatkern.SGD(self.params, lr=0.1, momentum=0.9, **options)
        self.perturbation, self.rolls = options["perturb"], "rolling" in method
        if self.rolls:
            self.opt.train()

    def backward(self):
        for k, p in enumerate(self.params):
            p.grad = (p.detach() * 0.1 + 0.01 * k).to(p.dtype)

    def cycle(self):
        """A step with all that belongs to it."""
        opt = self.opt
        if opt.enhancement is not None:
            self.backward()
            opt.update_mask()
        opt.zero_grad()
        step(opt, self.backward)

    def clean(self):
        """The weights, after what a user does where a call has failed."""
        self.opt.eval() if self.rolls else self.opt.restore()
        return copies(self.params)


def is_one_of(p, *candidates):
    return any(torch.equal(p, candidate) for candidate in candidates)


@pytest.mark.parametrize("method, kind", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16 weights")
def test_every_launch_may_fail(method, kind, emulated):
    untroubled = Run(method, **kind)
    untroubled.cycle()
    before = emulated.launch_count()
    untroubled.cycle()
    launches = emulated.launch_count() - before
    updated = untroubled.clean()
    assert launches > 3
    for which in range(1, launches + 1, 1 if launches < 12 else 2):  # a mask's are many
        run = Run(method, **kind)
        run.cycle()
        clean = copy.deepcopy(run).clean() if not run.rolls else None
        if run.rolls:  # what eval() gives train() takes back, to the bit
            clean = run.clean()
            run.opt.train()
        with failing_launch(emulated, which):
            run.cycle()
        # An update may have served some tensors when it fails, as torch's may.
        for k, p in enumerate(run.clean()):
            assert is_one_of(p, clean[k], updated[k]), (which, k)
        assert not run.opt.is_perturbed
