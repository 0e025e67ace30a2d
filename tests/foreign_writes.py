"""What others write to perturbed weights: a run of every method on tensors of every kind, and the writes."""

import torch
from compare import copies
from steps import perturb, step

import flatkern
from flatkern import ASAM, GSAM, RWP, SAM, MomentumSAM

DRAWS = {
    "RWP": RWP(0.05),
    "ARWP": RWP(0.05, eta=3.0),
    "m-RWP": RWP(0.05, lam=0.5),
    "rolling": RWP(0.05, rolling=True),
    "rolling ARWP": RWP(0.05, eta=3.0, rolling=True),
    "rolling absolute": RWP(0.05, scale="absolute", rolling=True),
    "RWP rms": RWP(0.1, scale="rms"),
}
ASCENTS = {"SAM": SAM(0.05), "ASAM": ASAM(0.5), "GSAM": GSAM(0.05), "MomentumSAM": MomentumSAM(0.05)}
METHODS = DRAWS | ASCENTS
PRECISIONS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "masters": (torch.bfloat16, True)}


def shapes(dtype):
    """Rows of every kind of length, a matrix in channels_last, vectors, a number, and a tensor without elements."""
    dice = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=dice) for shape in [(3, 4), (7, 5, 3, 3), (40, 33), (5,), (1, 9), (), (0, 4)]]
    made[1] = made[1].to(memory_format=torch.channels_last)
    made.append(torch.zeros(3, 2))
    return [torch.nn.Parameter(t.to(dtype)) for t in made]


class Run:
    """A sum of squares as the loss; the optimizer is perturbed after `into_perturbed()`."""

    def __init__(self, method, precision="float32", backend=None, lr=0.1, base="SGD", **own):
        dtype, masters = PRECISIONS[precision]
        self.params = shapes(dtype)
        if base == "Wrap":
            base_optimizer = torch.optim.SGD(self.params, lr=lr, momentum=0.9)
            self.opt = flatkern.Wrap(base_optimizer, perturb=METHODS[method], backend=backend)
        else:
            self.opt = flatkern.SGD(
                [{"params": self.params, **own}], lr=lr, momentum=0.9, perturb=METHODS[method], backend=backend,
                master_weights=masters,
            )  # fmt: skip
        self.rolling = self.opt.rolling

    def backward(self):
        sum((p * p).sum() for p in self.params).backward()

    def into_perturbed(self, steps=1):
        """Some steps, and then perturbed weights; returns the clean ones."""
        for k in range(steps + 1):
            self.opt.zero_grad()
            if k < steps:
                self.opt.train()
                step(self.opt, self.backward)
            elif not self.rolling:
                clean = self.values()
                perturb(self.opt, self.backward)
                return clean
        with self.opt.clean():
            return self.values()

    def way_back(self):
        self.opt.eval()

    def values(self):
        return copies(self.params)


def write(params, data=False):
    """What others do: an element here, a row there, one tensor not at all. Returns what was written, by position."""
    spots = {0: (1, 2), 1: (4, slice(None), 1), 2: (slice(7, 9),), 3: (0,), 5: ()}
    with torch.no_grad():
        for k, at in spots.items():
            (params[k].data if data else params[k])[at] = 7.0 + k
    return spots


def expected(clean, spots):
    result = [t.clone() for t in clean]
    for k, at in spots.items():
        result[k][at] = 7.0 + k
    return result
