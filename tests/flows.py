"""A network whose optimizer is in the middle of a perturbation, for tests of what others do then."""

import pytest
import steps
import torch
from compare import assert_same, bits, copies
from patterns import backends
from torch import nn

import flatkern
from flatkern import RWP, SAM

METHODS = {
    "RWP": RWP(0.1, eta=1.0),
    "m-RWP": RWP(0.1, lam=0.5),
    "rolling": RWP(0.1, rolling=True),
    "followed": RWP(0.1, eta=1.0, rolling=True),
    "SAM": SAM(0.2),
}
NOISE = [name for name in METHODS if name != "SAM"]
HALF = {"dtype": torch.bfloat16, "master_weights": True}
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """Of rank 4, 2, 1; `unused` never has a gradient."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 2, (1, 2))
            self.body = nn.Linear(8, 8)
            self.unused = nn.Parameter(torch.randn(4))
            self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv(x.to(self.unused.dtype).view(-1, 1, 1, 5)).flatten(1)
        return self.head(torch.tanh(self.body(x)))


def rows(*names, among):
    """Every backend runs one method; the code around is the same, and eager noise is slow."""
    return pytest.mark.parametrize(
        ("backend", "method", *names), backends(among, lambda method, *_: method == "followed"),
        indirect=["backend"], ids=str,
    )  # fmt: skip


class Run:
    """A network after a few steps with lr > 0, and its optimizer; then lr is 0, so that every clean weight is known."""

    def __init__(self, method, backend, dtype=torch.float32, rule=flatkern.SGD, **own):
        self.net = Network().to(dtype)
        momentum = {"momentum": 0.9} if rule is flatkern.SGD else {}
        self.opt = rule(self.net.named_parameters(), lr=0.1, weight_decay=0.01, perturb=METHODS[method],
                        backend=backend, **momentum, **own)  # fmt: skip
        if method == "followed":
            self.opt.follow(self.net)
        self.params = list(self.net.parameters())  # of the optimizer; the network may get others
        for _ in range(2):
            self.train()
        self.opt.eval()
        self.clean = copies(self.params)
        for group in self.opt.param_groups:
            group.update(lr=0.0, weight_decay=0.0)

    def backward(self):
        self.net.train()
        self.net(X).float().square().mean().backward()

    def perturb(self):
        """Noise, or an ascent, and the gradient that a step needs."""
        self.opt.zero_grad()
        self.opt.train() if self.opt.rolling else steps.perturb(self.opt, self.backward)
        self.noisy = copies(self.params)
        assert self.opt.is_perturbed
        assert not torch.equal(self.noisy[1], self.clean[1])
        self.backward()

    def train(self):
        self.opt.zero_grad()
        steps.step(self.opt, self.backward)

    def now(self):
        return copies(self.params)

    def kept(self, found):
        """What a way back must leave of `found`: elements that are as drawn become clean, others stay.

        In half precision all of a tensor stays where fewer than a quarter are: they are so by chance.
        """
        expected = []
        for c, n, f in zip(self.clean, self.noisy, found, strict=True):
            as_drawn = bits(f) == bits(n)
            whole = f.dtype != torch.float32 and as_drawn.float().mean() < 0.25
            expected.append(f if whole else torch.where(as_drawn, c, f))
        return expected

    def stays(self, expected):
        """The weights are these, also for the optimizer: a step with lr = 0 leaves them."""
        assert_same(self.now(), expected)
        self.opt.release()  # the round that restore() has counted
        self.train()
        self.opt.eval()
        assert all(torch.equal(a, b) for a, b in zip(self.now(), expected, strict=True))  # -0 may have become 0


@torch.no_grad()
def one_element(run):
    run.net.body.weight[1, 2] = 7.0


def torch_step(run, **how):
    torch.optim.SGD([p for p in run.params if p.grad is not None], lr=0.1, **how).step()
