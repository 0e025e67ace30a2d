"""The oracle against what is known: Philox's answers, Box-Muller, torch.optim in float64, and limits of the methods."""

from fractions import Fraction

import networks
import numpy as np
import oracle
import pytest
import torch

# Salmon et al. 2011, the file of known answers: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox(counter, key, answer):
    assert [int(word) for word in oracle.philox(words(counter), words(key))] == words(answer)


def test_fma_rounds_once():
    """Against exact fractions, on products and sums that straddle float32's rounding points."""
    generator = np.random.default_rng(0)
    a, b = ((1 + generator.integers(0, 2**23, 2000) / 2**23).astype(np.float32) for _ in range(2))
    scales = np.float32(2.0) ** generator.integers(-60, 3, 2000).astype(np.float32)
    c = (-np.float32(a * b) + scales * generator.choice([-1, 0, 1], 2000)).astype(np.float32)
    for x, y, z, got in zip(a, b, c, oracle.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(got)) - exact)
        for side in (-np.inf, np.inf):
            other = abs(Fraction(float(np.nextafter(got, np.float32(side)))) - exact)
            even = got.view(np.int32) % 2 == 0
            assert error < other or (error == other and even)


def test_normals_are_box_muller():
    """All 65536 radii and angles within 1.5e-6 of the ideal transform; mean 0 and variance 1 to 1e-5."""
    half = np.arange(65536)
    radius = np.sqrt(-2 * np.log((half + 0.5) / 65536))
    assert np.abs(oracle.radii() - radius).max() < 1.5e-6
    signed = np.where(half & 0x4000, (half & 0x7FFF) - 0x8000, half & 0x7FFF)
    angle = (signed + 0.5) * np.pi / 2**15
    cos, sin = oracle.angles()
    assert np.abs(cos - np.where(half & 0x8000, -1, 1) * np.cos(angle)).max() < 3e-7
    assert np.abs(sin - np.sin(angle)).max() < 3e-7
    r2 = np.mean(oracle.radii().astype(np.float64) ** 2)
    for side in (cos, sin):
        assert abs(np.mean(side.astype(np.float64))) < 1e-7
        assert abs(r2 * np.mean(side.astype(np.float64) ** 2) - 1) < 1e-5
    assert radius.max() < 4.86


def test_places_of_normals():
    """Element by element: word j of counter (column // 8, row, parameter, round) gives columns 2 j and 2 j + 1."""
    shapes, seed, stream, round = [(3,), (2, 3, 7), (), (0, 2), (5, 8)], 5, 6, 4
    for index, z in enumerate(oracle.normals(shapes, seed, round, stream)):
        assert z.shape == shapes[index]
        for (row, column), value in np.ndenumerate(oracle.by_filter(z)):
            word = oracle.philox((column // 8, row, index, round), (seed, stream))[column % 8 // 2]
            assert value == oracle.box_muller(word)[column % 2]


RULES = [
    ("SGD", oracle.sgd, {"lr": 0.05}),
    ("SGD", oracle.sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", oracle.sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", oracle.sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
    ("SGD", oracle.sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("Adam", oracle.adam, {"lr": 0.01}),
    ("Adam", oracle.adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("AdamW", oracle.adamw, {"lr": 0.01}),
    ("AdamW", oracle.adamw, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
]


@pytest.mark.parametrize(("name", "rule", "values"), RULES)
def test_rules_are_torch(name, rule, values):
    """20 steps in float64, with a gradient missing now and then, to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    w, state, opt = p.detach().numpy().copy(), {}, getattr(torch.optim, name)([p], **values)
    for t in range(20):
        p.grad = None if t % 7 == 3 else torch.randn(4, 3, generator=generator, dtype=torch.float64)
        w = w if p.grad is None else rule(w, p.grad.numpy(), state, **values)
        opt.step()
    np.testing.assert_allclose(w, p.detach().numpy(), rtol=1e-12, atol=1e-12)


def run(step, steps=8, **values):
    """Weights after some steps of SGD on the test network."""
    _, twin = networks.twins()
    data = networks.batches()
    names = [name for group in networks.groups(twin) for name in group]
    own = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2, "sigma": 0.05, "lam": 0.3, "rho": 0.1} | values
    options = {name: own | {"trainable": name != "frozen"} for name in names}

    def grads(weights, batch):
        networks.load(twin, weights)
        return networks.gradients(twin, batch)

    o = oracle.Oracle(oracle.sgd, networks.read(twin, names), options, grads, seed=3)
    for t in range(steps):
        step(o, data[t], data[t + 10])
    return np.concatenate([w.ravel() for w in o.weights.values()])


def plain(o, a, b):
    o.plain(a)


def both(o, a, b):
    """The mixed gradient without any noise."""
    o.update({name: None if g is None else 0.7 * g + 0.3 * h for (name, g), h in zip(
        o.grads(o.weights, a).items(), o.grads(o.weights, b).values(), strict=True)})  # fmt: skip


def rolling(o, a, b):
    if o.noise is None:
        o.train()
    o.rolling(a)


SAME = {
    "RWP without noise is the base": (lambda o, a, b: o.rwp([a]), {"sigma": 0.0}, plain, {}),
    "rolling without noise is the base": (lambda o, a, b: o.rolling(a), {"sigma": 0.0}, plain, {}),
    "SAM without radius is the base": (lambda o, a, b: o.sam([a]), {"rho": 0.0}, plain, {}),
    "m-RWP without noise is the mixed gradient": (lambda o, a, b: o.mixed(a, [b]), {"sigma": 0.0}, both, {}),
    "m-RWP with lam=0 is the base": (lambda o, a, b: o.mixed(a, [a]), {"lam": 0.0}, plain, {}),
    "m-RWP with lam=1 is RWP": (lambda o, a, b: o.mixed(a, [a]), {"lam": 1.0}, lambda o, a, b: o.rwp([a]), {}),
    "m-ARWP with lam=1 is ARWP": (
        lambda o, a, b: o.mixed(a, [a]), {"lam": 1.0, "eta": 2.0}, lambda o, a, b: o.rwp([a]), {"eta": 2.0}),
    "rolling after train() is RWP": (rolling, {}, lambda o, a, b: o.rwp([a]), {}),
    "rolling ARWP after train() is ARWP": (rolling, {"eta": 2.0}, lambda o, a, b: o.rwp([a]), {"eta": 2.0}),
    "mSAM of the same shard twice is SAM": (lambda o, a, b: o.sam([a, a]), {}, lambda o, a, b: o.sam([a]), {}),
    "mixed SAM with lam=1 is SAM": (
        lambda o, a, b: o.mixed_sam([a]), {"lam": 1.0}, lambda o, a, b: o.sam([a]), {}),
    "mixed SAM with lam=0 is the base": (lambda o, a, b: o.mixed_sam([a]), {"lam": 0.0}, plain, {}),
    "GSAM with alpha=0 is SAM": (lambda o, a, b: o.gsam([a]), {"alpha": 0.0}, lambda o, a, b: o.sam([a]), {}),
    "Friendly-SAM with sigma=0 is SAM": (
        lambda o, a, b: o.friendly_sam([a]), {"sigma": 0.0, "perturb_momentum": 0.9}, lambda o, a, b: o.sam([a]), {}),
    "Momentum-SAM without radius is the base": (lambda o, a, b: o.momentum_sam(a), {"rho": 0.0}, plain, {}),
    "LookSAM whose every step is due is SAM": (
        lambda o, a, b: o.looksam(0, a), {"perturb_interval": 1, "alpha": 0.7}, lambda o, a, b: o.sam([a]), {}),
    "ASAM with a huge floor is SAM": (
        lambda o, a, b: o.sam([a]), {"t_eta": 1e9, "rho": 1e-10, "all_tensors": True},
        lambda o, a, b: o.sam([a]), {"rho": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("claim", SAME)
def test_limits(claim):
    step, values, other, other_values = SAME[claim]
    np.testing.assert_allclose(run(step, **values), run(other, **other_values), rtol=1e-7, atol=1e-8)


def test_noise_has_the_stated_size():
    """E ||e_f||^2 = sigma^2 n_f ||w_f||^2, divided by 1 + eta F."""
    w = np.random.default_rng(0).normal(size=(3, 4000))
    options = {"w": {"sigma": 0.1, "eta": 2.0, "beta": 0.5}}
    o = oracle.Oracle(oracle.sgd, {"w": w}, options, grads=None)
    sizes = np.linalg.norm(o.draw(0)["w"], axis=1)
    np.testing.assert_allclose(sizes, 0.1 * np.sqrt(4000) * np.linalg.norm(w, axis=1), rtol=0.04)
    o.remember({"w": 0.01 * w})
    o.remember({"w": 0.02 * w})
    history = (0.5 * 1e-4 + 4e-4) * np.linalg.norm(w, axis=1) ** 2
    np.testing.assert_allclose(np.linalg.norm(o.draw(0)["w"], axis=1), sizes / np.sqrt(1 + 2 * history), rtol=1e-12)


def test_network_has_what_it_says():
    """Which gradients are missing when, and which embedding rows are never seen."""
    net, twin = networks.twins()
    for index, batch in enumerate(networks.batches()):
        g = networks.gradients(net, batch)
        missing = {"frozen", "unused"} if index % 5 < 2 else {"frozen", "unused", "sometimes"}
        assert {name for name in g if g[name] is None} == missing
        assert not g["embedding.weight"][8:].any()
    assert sorted(name for group in networks.groups(net) for name in group) == sorted(networks.read(net))
    start = zip(networks.read(net).values(), networks.read(twin).values(), strict=True)
    assert all(np.array_equal(a, b) for a, b in start)
