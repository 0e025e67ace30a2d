"""One network in training by every method, with optimizers whose steps a CUDA graph may capture and with others.

Used by test_capturable.py and test_gpu.py.
"""

import functools

import torch
from torch.optim import lr_scheduler

import flatkern
from flatkern.schedules import PerturbationScheduler

RULES = {
    "SGD": functools.partial(flatkern.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": functools.partial(flatkern.Adam, weight_decay=0.1),
    "AdamW": functools.partial(flatkern.AdamW, weight_decay=0.1),
}
METHODS = {
    "plain": {},
    "RWP": dict(perturb=flatkern.RWP(0.02, seed=2**32 - 5, stream=3)),
    "m-RWP": dict(perturb=flatkern.RWP(0.02, lam=0.5)),
    "m-ARWP, losses": dict(perturb=flatkern.RWP(0.02, lam=0.5, eta=0.1, mix="losses")),
    "rolling ARWP": dict(perturb=flatkern.RWP(0.02, eta=0.1, rolling=True)),
    "SAM": dict(perturb=flatkern.SAM(0.05), max_grad_norm=0.1),
    "mSAM": dict(perturb=flatkern.ASAM(0.5)),
    "IRE": dict(enhance=flatkern.IRE(2.0)),
    "IRE, RWP": dict(enhance=flatkern.IRE(2.0), perturb=flatkern.RWP(0.02)),
}


class Net(torch.nn.Module):
    """Matrices, vectors, and as a rule a row that one program cannot hold; the interpreter takes its time for that."""

    def __init__(self, columns):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.long = torch.nn.Parameter(torch.randn(1, columns))
        self.register_buffer("x", torch.randn(4, 8))
        self.register_buffer("y", torch.randn(4, 8))

    def forward(self):
        error = self.last(torch.tanh(self.first(self.x))) - self.y
        return error.square().mean() + 1e-3 * self.long.square().sum()


class Run:
    """One network in training; two groups, whose learning rates and sigmas differ."""

    def __init__(self, rule, method, capturable, schedule=True, device="cpu", columns=8208):
        self.net, self.method, options = Net(columns).to(device), method, METHODS[method]
        layers = [self.net.first, self.net.last]
        groups = [{"params": [p for m in layers for p in m.parameters()]}, {"params": [self.net.long], "lr": 0.03}]
        if isinstance(options.get("perturb"), flatkern.RWP):
            groups[1]["sigma"] = 0.05
        self.opt = RULES[rule](groups, lr=0.01, backend="triton", capturable=capturable, **options)
        self.schedulers = []
        if schedule:
            self.schedulers.append(lr_scheduler.LambdaLR(self.opt, lambda t: 1 / (1 + t)))
            if "sigma" in groups[1]:
                self.schedulers.append(PerturbationScheduler(self.opt, "sigma", lambda t: 0.02 + 0.01 * t))
        self.opt.train()
        if self.opt.enhancement is not None:
            self.net().backward()
            self.opt.update_mask()

    def backward(self):
        (self.net() * self.opt.loss_weight if "losses" in self.method else self.net()).backward()

    def step(self):
        opt, method = self.opt, self.method
        opt.zero_grad()
        for round_ in range(2 if method == "mSAM" else 1):
            if round_:
                opt.restore()
            if method == "m-RWP" or "SAM" in method:
                self.backward()
            if opt.method is not None and not opt.rolling:
                opt.perturb()
            self.backward()
        if "losses" in method:
            opt.restore()
            self.backward()
        opt.step()

    def schedule(self):
        for scheduler in self.schedulers:
            scheduler.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
            self.schedule()
        return self

    def tensors(self):
        """Weights, perturbed ones while rolling, and the state."""
        state = [t for p in self.net.parameters() for t in self.opt.state[p].values()]
        return [t.detach().clone() for t in (*self.net.parameters(), *state)]


def assert_same(a, b):
    for k, (s, t) in enumerate(zip(a.tensors(), b.tensors(), strict=True)):
        assert torch.equal(s, t), k
    for g, h in zip(a.opt.param_groups, b.opt.param_groups, strict=True):
        for key in {"lr", "sigma", "round"} & g.keys():
            assert float(g[key]) == float(h[key]), key
