"""Base rules, methods, and how each is run by its user and by the oracle: 50 steps on the network of `networks.py`.

Used by `test_paper.py`. flatkern appears through its public names only.
"""

from collections import namedtuple
from functools import cache, partial

import networks
import numpy as np
import oracle
import torch
from steps import (
    Run,
    clean_between,
    clean_first,
    climbing,
    climbing_shards,
    climbing_when_due,
    noisy,
    noisy_first,
    noisy_rounds,
    plain,
    weighted_clean_first,
    weighted_noisy_first,
)

import flatkern

STEPS, SEED = 50, 7
LOOKS = 5  # a run is looked at after every 5th step
BATCHES = networks.batches()

# The optimizer's name in torch and in flatkern, the oracle's rule, hyper-parameters. The learning rates keep the
# trajectories smooth: an error made in one step is not amplified by the next ones.
BASES = {
    "momentum": ("SGD", oracle.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": ("SGD", oracle.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    "dampening": ("SGD", oracle.sgd, {"lr": 0.04, "momentum": 0.8, "weight_decay": 1e-2, "dampening": 0.3}),
    "adam": ("Adam", oracle.adam, {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2, "eps": 1e-6}),
    "adamw": ("AdamW", oracle.adamw, {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}),
}


# A step of the oracle's, as `steps.py` has the user's.


def batch(index):
    return BATCHES[index % len(BATCHES)]


def shards(t):
    return [batch(3 * t + shard) for shard in range(3)]


def plain_step(o, t):
    o.plain(batch(t))


def noisy_step(o, t):
    o.rwp([batch(t)])


def noisy_rounds_step(o, t):
    o.rwp(shards(t))


def mixed_step(o, t):
    o.mixed(batch(2 * t), [batch(2 * t + 1)])


def clean_between_step(o, t):
    noisy, clean, last = shards(t)
    o.mixed(clean, [noisy, last])


def rolling_step(o, t):
    o.rolling(batch(t))


def climbing_step(o, t):
    o.sam([batch(t)])


def climbing_shards_step(o, t):
    o.sam(shards(t))


def mixed_climbing_step(o, t):
    o.mixed_sam([batch(t)])


def mixed_climbing_shards_step(o, t):
    o.mixed_sam(shards(t))


def at_intervals_step(o, t):
    o.sam_at_intervals(t, batch(t))


def gsam_step(o, t):
    o.gsam([batch(t)])


def gsam_shards_step(o, t):
    o.gsam(shards(t))


def friendly_step(o, t):
    o.friendly_sam([batch(t)])


def friendly_shards_step(o, t):
    o.friendly_sam(shards(t))


def momentum_step(o, t):
    o.momentum_sam(batch(t))


def looksam_step(o, t):
    o.looksam(t, batch(t))


# A step of the user's, a step of the oracle's; the method in flatkern, its values, those of the second group;
# whether train() is called before the first step (rolling). `t_eta` is ASAM's eta.
Method = namedtuple("Method", "user step make values second train", defaults=(None, {}, {}, False))

three_rounds = partial(noisy_rounds, rounds=3, ends=True)
three_shards = partial(climbing_shards, shards=3, ends=True)
make_rwp = partial(flatkern.RWP, seed=SEED)
make_weighted = partial(flatkern.RWP, seed=SEED, mix="losses")
make_rolling = partial(flatkern.RWP, seed=SEED, rolling=True)


make_rolling_momentum = partial(flatkern.MomentumSAM, rolling=True)


def make_at_intervals(perturb_interval, **values):
    return flatkern.SAM(interval=perturb_interval, **values)


def make_friendly(perturb_momentum, **values):
    return flatkern.FriendlySAM(momentum=perturb_momentum, **values)


def make_looksam(perturb_interval, **values):
    return flatkern.LookSAM(k=perturb_interval, **values)


def make_asam(t_eta, **values):
    return flatkern.ASAM(eta=t_eta, **values)


RWP, RWP2 = {"sigma": 0.02}, {"sigma": 0.04}
ARWP, ARWP2 = {"sigma": 0.05, "eta": 2.0, "beta": 0.9}, {"sigma": 0.08, "eta": 0.5, "beta": 0.8}
LAM, LAM2 = {"lam": 0.3}, {"lam": 0.8}
SAM, SAM2 = {"rho": 0.05}, {"rho": 0.1}
ASAM, ASAM2 = {"rho": 0.1, "t_eta": 0.01}, {"rho": 0.2, "t_eta": 0.1}
ADAPTIVE = {"t_eta": 0.1, "all_tensors": True}

RMS, RMS2 = RWP | {"scale": "rms"}, {"sigma": 0.1, "scale": "norm"}
ABSOLUTE = {"sigma": 0.01, "scale": "absolute"}
EVERY = {"perturb_interval": 3}
GSAM, GSAM2 = SAM | {"alpha": 0.4}, SAM2 | {"alpha": 0.9}
FRIENDLY = SAM | {"sigma": 1.0, "perturb_momentum": 0.9}
FRIENDLY2 = SAM2 | {"sigma": 0.6, "perturb_momentum": 0.7}
LOOK = SAM | EVERY | {"alpha": 0.7}

METHODS = {
    "plain": Method(plain, plain_step),
    "RWP": Method(noisy, noisy_step, make_rwp, RWP, RWP2),
    "RWP 3 rounds": Method(three_rounds, noisy_rounds_step, make_rwp, RWP, RWP2),
    "ARWP": Method(noisy, noisy_step, make_rwp, ARWP, ARWP2),
    "ARWP 3 rounds": Method(three_rounds, noisy_rounds_step, make_rwp, ARWP, ARWP2),
    "m-RWP": Method(clean_first, mixed_step, make_rwp, RWP | LAM, RWP2 | LAM2),
    "m-RWP noisy first": Method(noisy_first, mixed_step, make_rwp, RWP | LAM, RWP2 | LAM2),
    "m-RWP by losses": Method(weighted_clean_first, mixed_step, make_weighted, RWP | LAM, RWP2),
    "m-ARWP": Method(clean_first, mixed_step, make_rwp, ARWP | LAM, ARWP2 | LAM2),
    "m-ARWP noisy first": Method(noisy_first, mixed_step, make_rwp, ARWP | LAM, ARWP2 | LAM2),
    "m-ARWP by losses": Method(weighted_noisy_first, mixed_step, make_weighted, ARWP | LAM, ARWP2),
    "m-ARWP 2 noisy rounds": Method(clean_between, clean_between_step, make_rwp, ARWP | LAM, ARWP2 | LAM2),
    "ARWP in one group": Method(noisy, noisy_step, make_rwp, RWP, ARWP2),
    "rolling RWP": Method(plain, rolling_step, make_rolling, RWP, RWP2),
    "rolling RWP train first": Method(plain, rolling_step, make_rolling, RWP, RWP2, train=True),
    "rolling ARWP": Method(plain, rolling_step, make_rolling, ARWP, ARWP2),
    "SAM": Method(climbing, climbing_step, flatkern.SAM, SAM, SAM2),
    "ASAM": Method(climbing, climbing_step, make_asam, ASAM, ASAM2),
    "ASAM all tensors": Method(climbing, climbing_step, make_asam, ASAM | {"all_tensors": True}, ASAM2),
    "SAM adaptive in one group": Method(climbing, climbing_step, flatkern.SAM, SAM, SAM2 | ADAPTIVE),
    "mSAM 3 shards": Method(three_shards, climbing_shards_step, flatkern.SAM, SAM, SAM2),
    "RWP rms": Method(noisy, noisy_step, make_rwp, RMS, RMS2),
    "RWP absolute": Method(noisy, noisy_step, make_rwp, ABSOLUTE, RWP2),
    "rolling RWP rms": Method(plain, rolling_step, make_rolling, RMS, RMS2),
    "rolling ARWP absolute": Method(plain, rolling_step, make_rolling, ABSOLUTE | {"eta": 2.0, "beta": 0.9}, RWP2),
    "mixed SAM": Method(climbing, mixed_climbing_step, flatkern.SAM, SAM | LAM, SAM2 | {"lam": 1.5}),
    "mixed mSAM": Method(three_shards, mixed_climbing_shards_step, flatkern.SAM, SAM | LAM, SAM2 | {"lam": 1.5}),
    "SAM every 3 steps": Method(climbing_when_due, at_intervals_step, make_at_intervals, SAM | EVERY, SAM2),
    "GSAM": Method(climbing, gsam_step, flatkern.GSAM, GSAM, GSAM2),
    "GSAM 3 shards": Method(three_shards, gsam_shards_step, flatkern.GSAM, GSAM, GSAM2),
    "FriendlySAM": Method(climbing, friendly_step, make_friendly, FRIENDLY, FRIENDLY2),
    "FriendlySAM 3 shards": Method(three_shards, friendly_shards_step, make_friendly, FRIENDLY, FRIENDLY2),
    "LookSAM": Method(climbing_when_due, looksam_step, make_looksam, LOOK, {"rho": 0.1, "alpha": 0.3}),
    "MomentumSAM": Method(noisy, momentum_step, flatkern.MomentumSAM, SAM, SAM2),
    "rolling MomentumSAM": Method(plain, momentum_step, make_rolling_momentum, SAM, SAM2),
}


# The oracle's names of group values, and flatkern's.
OUR_KEYS = {"t_eta": "eta", "all_tensors": "adaptive"}


def group_values(base, method, names):
    """Names and own values of the three groups: the second has other values, the third is not perturbed."""
    values, m = BASES[base][2], METHODS[method]
    second = {"lr": values["lr"] / 2, "weight_decay": 3 * values["weight_decay"]}
    third = {} if m.make is None else {"perturb": False}
    return list(zip(names, ({}, second | m.second, second | third), strict=True))


def unchanged(values, t):
    """What the hyper-parameters of a group become before step t, as in the two runs below: nothing new."""


@cache
def oracle_path(base, method, norm="group", kind=oracle.Oracle, change=unchanged):
    """Weights by name after every 5th step, in float64."""
    _, twin = networks.twins(norm)
    _, rule, values = BASES[base]
    m = METHODS[method]
    options = {}
    for names, own in group_values(base, method, networks.groups(twin)):
        options |= {name: values | m.values | own for name in names}
    options["frozen"]["trainable"] = False

    def grads(weights, batch):
        networks.load(twin, weights)
        return networks.gradients(twin, batch)

    o = kind(rule, networks.read(twin, options), options, grads, seed=SEED)
    if m.train:
        o.train()
    path = []
    for t in range(STEPS):
        for own in options.values():
            change(own, t)
        m.step(o, t)
        if (t + 1) % LOOKS == 0:
            path.append(dict(o.weights))
    return path


def library_path(library, base, method, norm="group", change=unchanged, backend=None, maximize=False, wrapped=False):
    """Weights by name after every 5th step of flatkern's optimizer (or torch.optim's, for plain), in float32.

    `maximize` maximizes the negative loss, which is the same trajectory; `wrapped` puts flatkern.Wrap around torch's.
    """
    net, _ = networks.twins(norm)
    parameters = dict(net.named_parameters())
    name, _, values = BASES[base]
    m = METHODS[method]
    groups = []
    for names, own in group_values(base, method, networks.groups(net)):
        own = {OUR_KEYS.get(key, key): value for key, value in own.items()}
        if wrapped:  # in the base's groups our names are the base's, but for `perturb`
            ours = ("sigma", "eta", "beta", "lam", "rho")
            own = {f"perturb_{key}" if key in ours else key: value for key, value in own.items()}
        groups.append({"params": [(name, parameters[name]) for name in names]} | own)
    own = {} if library is torch.optim else {"perturb": m.make and m.make(**m.values), "backend": backend}
    if wrapped:
        opt = flatkern.Wrap(getattr(torch.optim, name)(groups, **values, maximize=maximize), **own)
    else:
        opt = getattr(library, name)(groups, **values, maximize=maximize, **own)

    def backward(index, weight=1.0):
        loss = weight * net(batch(index))
        (-loss if maximize else loss).backward()

    run = Run(opt, backward)
    if m.train:
        opt.train()
    path = []
    for t in range(STEPS):
        for group in opt.param_groups:
            change(group, t)
        m.user(run, t)
        opt.zero_grad()
        if (t + 1) % LOOKS == 0:
            if getattr(opt, "rolling", False):
                opt.eval()
            path.append(networks.read(net))
            if getattr(opt, "rolling", False):
                opt.train()
    return path


def distance(path, other):
    """The largest relative distance (L2) of a tensor, at any look."""
    pairs = [(a[name], b[name]) for a, b in zip(path, other, strict=True) for name in b]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
