"""An optimizer whose parameters no single operation serves, driven by words: "b perturb b step zero"."""

import copy
import pickle

import torch
from compare import assert_same, copies
from steps import Scaled
from torch.nn import Parameter
from unchanged import frozen, refused

import flatkern

KINDS = {  # the method, and a step as its user writes it
    "plain": (None, "b step zero"),
    "RWP": (flatkern.RWP(sigma=0.1), "perturb b step zero"),
    "ARWP": (flatkern.RWP(sigma=0.1, eta=1.0), "perturb b step zero"),
    "m-RWP": (flatkern.RWP(sigma=0.1, lam=0.3), "b perturb b step zero"),
    "m-ARWP": (flatkern.RWP(sigma=0.1, lam=0.3, eta=1.0), "b perturb b step zero"),
    "losses": (flatkern.RWP(sigma=0.1, lam=0.3, mix="losses"), "b perturb b step zero"),
    "ARWP losses": (flatkern.RWP(sigma=0.1, lam=0.3, eta=1.0, mix="losses"), "perturb b restore b step zero"),
    "SAM": (flatkern.SAM(rho=0.3), "b perturb b step zero"),
    "ASAM": (flatkern.ASAM(rho=0.6), "b perturb b step zero"),
    "rolling": (flatkern.RWP(sigma=0.1, rolling=True), "b step zero"),
    "rolling ARWP": (flatkern.RWP(sigma=0.1, eta=1.0, rolling=True), "b step zero"),
}
OTHERWISE = {"SGD": {"momentum": 0.9}, "Adam": {"decoupled_weight_decay": True}, "AdamW": {"weight_decay": 0.1}}


def values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Run(Scaled):
    """Three parameters in two groups, the last two in a bucket of their own: SGD with and without momentum, Adam with
    and without decoupled decay, and for every rule float32 beside bfloat16 with masters.
    """

    def __init__(self, kind="plain", rule="SGD", backend=None, masters=False, tensors=(), scaler=None, **own):
        method, self.pattern = KINDS[kind]
        self.params = [Parameter(values(shape, k)) for k, shape in enumerate([(3, 2), (4,), (2, 2)])]
        if masters:
            self.params[1:] = [Parameter(p.detach().bfloat16()) for p in self.params[1:]]
            own["master_weights"] = True
        groups = [{"params": self.params[:1]}, {"params": self.params[1:]} | OTHERWISE.get(rule, {})]
        numbers = [{key: torch.tensor(0.1) for key in tensors} for _ in groups]
        if rule != "Wrap":
            groups = [group | given for group, given in zip(groups, numbers, strict=True)]
        own |= {"perturb": method, "backend": backend}
        if rule == "Wrap":
            self.opt = flatkern.Wrap(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **own)
            for group, given in zip(self.opt.param_groups, numbers, strict=True):
                group |= given  # in the base's own groups our names would be the base's
        else:
            self.opt = getattr(flatkern, rule)(groups, lr=0.1, **own)
        self.scaler, self.passes = scaler, 0
        self.words = {
            "b": self.backward,
            "perturb": self.perturb,
            "step": self.step,
            "zero": lambda: self.opt.zero_grad(),
            "zeros": lambda: self.opt.zero_grad(set_to_none=False),
            "unscale": lambda: self.scaler.unscale_(self.opt),
            "pickle": lambda: pickle.dumps(self.opt),
            "deepcopy": lambda: copy.deepcopy(self.opt),
            "mask": lambda: self.opt.update_mask(),
        }

    def backward(self):
        """Adds to `.grad`; depends on the weights and on how many passes came before."""
        self.passes += 1
        loss = sum((p.float() * values(p.shape, 10 * self.passes + k)).tanh().sum() for k, p in enumerate(self.params))
        if getattr(self.opt.method, "mix", None) == "losses":
            loss = loss * self.opt.loss_weight
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def run(self, words):
        for word in words.split():
            (self.words.get(word) or getattr(self.opt, word))()
        return self

    def train(self, steps=2):
        for _ in range(steps):
            self.run(self.pattern)
        return self

    def weights(self):
        return copies(self.params)

    def refused(self, error, message):
        """The body is refused and has changed nothing."""
        return refused(error, message, self.params, self.opt, self.scaler)


def assert_same_run(run, other):
    """The same weights and state, bit for bit, and nothing pending."""
    for r in (run, other):
        r.opt.eval()
    assert_same(run.weights(), other.weights())
    assert frozen(run.opt.state_dict()) == frozen(other.opt.state_dict())
