"""Networks and their data; nothing of flatkern is imported here.

`Network` has every kind of parameter that an optimizer meets, in float32 and float64 from one start, for trajectories
and checkpoints; what the optimizer sees, group by group, is in `GROUPS`. `layers` is for tests that any network would
do for, and for DDP and FSDP2. Laws that run hundreds of times have the one of `patterns.py`, which is several times as
quick as `Network`.
"""

import copy
import itertools
from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional

Batch = namedtuple("Batch", "index image tokens label")

# Optimizer order. The frozen and the unused parameter stand before others, so that a noise index which skips them is
# caught; the second group has its own hyper-parameters, the third is not perturbed.
GROUPS = (
    ("conv.weight", "frozen", "conv.bias", "norm.weight", "norm.bias", "unused", "hidden.weight", "sometimes", "scale"),
    ("depthwise.weight", "embedding.weight", "hidden.bias", "last_norm.weight"),
    ("last_norm.bias", "head.weight"),
)


class Network(nn.Module):
    """conv, norm, tanh, depthwise conv, tanh; mean of embeddings; linear, LayerNorm, GELU, head, times a 0-D scale.

    `sometimes` is used on batches with index % 5 < 2 only: two consecutive batches meet it in both, one or none.
    Embedding rows 8 to 10 never occur in the data. `frozen` does not require a gradient, `unused` never has one.
    """

    def __init__(self, norm="group"):
        super().__init__()
        # A bias in front of BatchNorm has no gradient but rounding, which Adam would blow up.
        self.conv = nn.Conv2d(2, 4, 3, bias=norm == "group")
        self.norm = nn.GroupNorm(2, 4) if norm == "group" else nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.embedding = nn.Embedding(11, 5)
        self.hidden = nn.Linear(21, 6)
        self.last_norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3, bias=False)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.sometimes = nn.Parameter(0.5 * torch.randn(3, 6))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch):
        x = batch.image.to(self.scale.dtype)
        x = torch.tanh(self.norm(self.conv(x)))
        x = torch.tanh(self.depthwise(x))
        x = torch.cat([x.flatten(1), self.embedding(batch.tokens).mean(1)], dim=1)
        x = functional.gelu(self.last_norm(self.hidden(x) + self.frozen))
        weight = self.head.weight + self.sometimes if batch.index % 5 < 2 else self.head.weight
        return functional.cross_entropy(self.scale * functional.linear(x, weight), batch.label)


def layers(*widths, norm=False, seed=0):
    """Linear layers with tanh between, with LayerNorm if wanted; no global random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, *others = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    between = [[*([nn.LayerNorm(layer.in_features)] if norm else []), nn.Tanh(), layer] for layer in others]
    return nn.Sequential(first, *itertools.chain(*between))


def labelled(seed, features=9, classes=3):
    """Six rows for `layers`, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, features, generator=generator), torch.randint(classes, (6,), generator=generator)


def twins(norm="group", seed=0):
    """The same network in float32 and in float64, from the same float32 values; no global random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Network(norm)
        for name, p in net.named_parameters():
            # Norm scales and shifts start at ones and zeros otherwise, which hides mistakes.
            if "norm" in name:
                p.data += 0.2 * torch.randn(p.shape)
    return net, copy.deepcopy(net).double()


def groups(net):
    """Parameter names by group, as `GROUPS` but for what this network does not have."""
    have = dict(net.named_parameters())
    return [[name for name in names if name in have] for names in GROUPS]


def batches(count=30, size=4, seed=1):
    """Deterministic float32 batches; `count` is a multiple of 5 so that use of `sometimes` stays regular."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        label = torch.randint(3, (size,), generator=generator)
        image = torch.randn(size, 2, 6, 6, generator=generator) + 0.5 * label[:, None, None, None]
        made.append(Batch(index, image, torch.randint(8, (size, 3), generator=generator), label))
    return made


def gradients(net, batch):
    """Gradients of one batch by name, as NumPy arrays of the network's own precision; None where there is none."""
    net.zero_grad()
    net(batch).backward()
    return {name: None if p.grad is None else p.grad.numpy().copy() for name, p in net.named_parameters()}


def load(net, weights):
    """Write arrays into the parameters of the same name."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.as_tensor(weights[name]))


def read(net, names=None):
    """Parameters by name as NumPy arrays, in the given order."""
    parameters = dict(net.named_parameters())
    return {name: parameters[name].detach().numpy().copy() for name in names or parameters}
