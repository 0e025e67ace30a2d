"""flatkern's trajectories against the float64 oracle, every base rule with every method; and that this has teeth."""

from functools import cache

import networks
import numpy as np
import oracle
import pytest
import torch
from covering import also
from trajectories import BASES, METHODS, STEPS, distance, library_path, oracle_path

import flatkern


@cache
def bound(base, norm="group"):
    """How far a float32 run may be from the float64 one: 4 times what torch's own float32 run of the base rule is, plus
    one rounding of every weight in every step.

    The factor covers the second gradient and the rounding of the perturbed weights, which the plain run does not have:
    the oracle itself, driven by float32 gradients and rounded to float32 after each step, is at 0.2 to 1.8 times
    torch's distance over all bases and methods.
    """
    plain = library_path(torch.optim, base, "plain", norm)
    return 4 * distance(plain, oracle_path(base, "plain", norm)) + STEPS * 2.0**-24


def assert_follows(path, base, method, *norm):
    """It stays within `bound` of the oracle's, tensor by tensor."""
    error, allowed = distance(path, oracle_path(base, method, *norm)), bound(base, *norm)
    assert error < allowed


# Eager runs every method once and every base with three: its noise is slow, and every backend has the same bits of it.
# What differs from another method's row by rounds, or by a scale of the noise, runs with one base.
WITH_ONE_BASE = {
    "RWP rms", "RWP absolute", "rolling RWP rms", "rolling ARWP absolute", "mixed mSAM", "GSAM 3 shards",
    "FriendlySAM 3 shards",
}  # fmt: skip
ALIKE = "plain", "m-ARWP", "SAM"
CASES = [
    (backend, base, method)
    for backend in ("cpp", "eager")
    for base in BASES
    for method in METHODS
    if base == "momentum" or (backend != "eager" and method not in WITH_ONE_BASE) or method in ALIKE
]
# Every method with the rule whose mistakes are caught below, every rule with some methods.
FIRST = [
    case for case in CASES if (case[0] == "cpp" and "momentum" in case) or (case[0] != "eager" and case[2] in ALIKE)
]
FIRST += [("eager", "momentum", "m-ARWP"), ("eager", "adamw", "SAM")]


@pytest.mark.parametrize(
    ("backend", "base", "method"), [*FIRST, *also(*(c for c in CASES if c not in FIRST))], indirect=["backend"]
)
@pytest.mark.filterwarnings("error")
def test_trajectory(base, method, backend):
    """50 steps in three groups."""
    assert_follows(library_path(flatkern, base, method, backend=backend), base, method)


@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["RWP", "m-ARWP", "mSAM 3 shards"])
def test_trajectory_with_batch_norm(method, backend):
    """The same with BatchNorm in training mode: its running statistics play no part in the gradients."""
    path = library_path(flatkern, "momentum", method, "batch", backend=backend)
    assert_follows(path, "momentum", method, "batch")


@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["m-ARWP", "SAM", "ASAM"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_trajectory_maximizing(base, method, backend):
    """maximize=True on the negative loss is the same run; SAM's ascent is flipped too."""
    assert_follows(library_path(flatkern, base, method, backend=backend, maximize=True), base, method)


@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["m-ARWP", "rolling ARWP", "SAM"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_trajectory_of_wrap(base, method, backend):
    """The same around torch's own optimizer."""
    assert_follows(library_path(flatkern, base, method, backend=backend, wrapped=True), base, method)


def schedule(values, t):
    """Every hyper-parameter changes once, half-way, in its own proportion."""
    if t == STEPS // 2:
        factors = {
            "lr": 0.5,
            "weight_decay": 2,
            "sigma": 1.5,
            "lam": 1.2,
            "eta": 0.5,
            "beta": 0.9,
            "rho": 0.7,
            "t_eta": 0.5,
        }
        values.update({key: values[key] * factor for key, factor in factors.items() if values.get(key)})


@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["m-ARWP", "rolling ARWP", "ASAM"])
def test_values_change_between_steps(method, backend):
    """Group values are read at every step."""
    path = library_path(flatkern, "momentum", method, change=schedule, backend=backend)
    true, allowed = oracle_path("momentum", method, change=schedule), bound("momentum")
    error, effect = distance(path, true), distance(true, oracle_path("momentum", method))
    assert error < allowed
    assert effect > 20 * allowed


def test_normals_bit_for_bit(backend):
    """Zero weights with unit norms at sigma=1 become the normals themselves: every bit as the oracle has it."""
    shapes = [(5, 3, 3, 3), (7,), (), (3, 8), (2, 1), (0, 4), (1, 1000), (257, 9)]
    params = [torch.zeros(shape) for shape in shapes]
    norms = [torch.ones(shape[0] if len(shape) > 1 else 1) for shape in shapes]
    for seed, stream, round in [(0, 0, 0), (7, 3, 11), (2**32 - 1, 2**32 - 1, 2**32 - 1)]:
        for p in params:
            p.zero_()
        flatkern.perturb_(params, 1.0, seed=seed, round=round, stream=stream, norms=norms, backend=backend)
        for p, z in zip(params, oracle.normals(shapes, seed, round, stream), strict=True):
            assert np.array_equal(p.numpy(), z)


def test_empty_filters(backend):
    """Filters without elements are left alone, and later tensors keep their index."""
    params = [torch.zeros(4, 0), torch.zeros(2, 3)]
    norms = [torch.zeros(4), torch.ones(2)]
    flatkern.perturb_(params, 1.0, seed=0, round=0, norms=norms, backend=backend)
    assert np.array_equal(params[1].numpy(), oracle.normals([(4, 0), (2, 3)], 0, 0)[1])


def test_filter_norms():
    """Row norms, and the whole tensor's below rank 2, within float32 rounding of float64."""
    net, twin = networks.twins()
    for norms, w in zip(flatkern.filter_norms(list(net.parameters())), networks.read(twin).values(), strict=True):
        np.testing.assert_allclose(norms.numpy(), np.linalg.norm(oracle.by_filter(w), axis=1), rtol=1e-6)


# Teeth: oracles with one mistake each, far outside the bound.


class LamOnTheCleanGradient(oracle.Oracle):
    def mixed(self, clean, noisy):
        swapped = {name: own | {"lam": 1 - own["lam"]} for name, own in self.options.items()}
        self.options, own = swapped, self.options
        super().mixed(clean, noisy)
        self.options = own


class NoHistory(oracle.Oracle):
    def remember(self, g, seen=None):
        pass


class HistoryOfTheMixedGradient(oracle.Oracle):
    def remember(self, g, seen=None):
        super().remember(seen)


class HistoryKeptBySkippedPasses(oracle.Oracle):
    """A perturbed pass without gradient leaves the history alone instead of decaying it."""

    def remember(self, g, seen=None):
        super().remember(g)


class HistoryBeforeNoise(oracle.Oracle):
    """Noise that already knows this step's gradient."""

    def rwp(self, batches):
        self.remember(self.grads(self.weights, batches[0]))
        super().rwp(batches)


class LastColumnForgotten(oracle.Oracle):
    def norms(self, w):
        filters = oracle.by_filter(w)
        return np.sqrt((filters[:, :-1] ** 2).sum(axis=1, keepdims=True)) if w.ndim > 1 else super().norms(w)


class NextRoundsNoise(oracle.Oracle):
    def draw(self, round):
        return super().draw(round + 1)


class IndexSkipsFrozen(oracle.Oracle):
    def normals(self, names, round):
        return super().normals([name for name in names if self.options[name].get("trainable", True)], round)


class DecayOfPerturbedWeights(oracle.Oracle):
    def draw(self, round):
        self.e = super().draw(round)
        return self.e

    def update(self, g):
        for name, w in self.weights.items():
            if g[name] is not None:
                e = self.e.get(name, 0.0)
                self.weights[name] = self.rule(w + e, g[name], self.state[name], **self.options[name]) - e


class RollingOnOldNorms(oracle.Oracle):
    """The next round's noise from the weights before the update."""

    def rolling(self, batch):
        before = dict(self.weights)
        super().rolling(batch)
        after, self.weights = self.weights, before
        self.train()
        self.weights = after


class RollingFromTheStart(oracle.Oracle):
    def rolling(self, batch):
        if self.noise is None:
            self.train()
        super().rolling(batch)


class NormOfEachTensor(oracle.Oracle):
    def ascent(self, a):
        e = {}
        for name in a:
            e |= super().ascent({other: g if other == name else None for other, g in a.items()})
        return e


class NormOfUnperturbedToo(oracle.Oracle):
    """The third group, which is not climbed, still counts in the ascent norm."""

    def ascent(self, a):
        norm = [np.sqrt(sum((g**2).sum() for name, g in a.items() if g is not None and chosen(name)))
                for chosen in (self.is_perturbed, lambda name: True)]  # fmt: skip
        return {name: e * norm[0] / norm[1] for name, e in super().ascent(a).items()}


class ScaledOnce(oracle.Oracle):
    """ASAM climbing along T a instead of T^2 a."""

    def ascent(self, a):
        return {name: e / self.metric(name, self.weights[name]) for name, e in super().ascent(a).items()}


class ScaledByRank(oracle.Oracle):
    """ASAM that takes norm layers' weights for biases, and every matrix for a weight."""

    def metric(self, name, w):
        return np.abs(w) + self.options[name]["t_eta"] if w.ndim > 1 else np.ones_like(w)


class ShardsSummed(oracle.Oracle):
    @staticmethod
    def mean(passes):
        return {name: None if g is None else len(passes) * g for name, g in oracle.mean(passes).items()}


class MissingLeftOutOfTheMean(oracle.Oracle):
    @staticmethod
    def mean(passes):
        found = {name: [g[name] for g in passes if g[name] is not None] for name in passes[0]}
        return {name: sum(gs) / len(gs) if gs else None for name, gs in found.items()}


class RmsOfTheWholeTensor(oracle.Oracle):
    def size(self, w, scale):
        return self.norms(w) / np.sqrt(w.size) if scale == "rms" else super().size(w, scale)


class LamOnTheAscent(oracle.Oracle):
    def combined(self, a, b, of_a, of_b):
        return super().combined(a, b, of_b, of_a)


class ProductsOfEachTensor(oracle.Oracle):
    """Projections tensor by tensor, as another package has them."""

    def gsam(self, shards):
        a, g = self.ascended(shards)
        whole, own = {name: None for name in a}, dict(self.weights)
        for name in a:
            if a[name] is not None or g[name] is not None:
                self.ascended = lambda _, name=name: ({name: a[name]}, {name: g[name]})
                self.update = lambda new: whole.update(new)
                super().gsam(shards)
        del self.ascended, self.update
        self.weights = own
        self.update(whole)


class MeanRenewedBeforeUse(oracle.Oracle):
    """d = a - sigma m with the mean that has seen a already, as another package has it."""

    def friendly_sam(self, shards):
        for name, g in self.grads(self.weights, shards[0]).items():
            if g is not None and name in self.means:
                momentum = self.options[name]["perturb_momentum"]
                self.means[name] = momentum * self.means[name] + (1 - momentum) * g
        super().friendly_sam(shards)


class AlongTheMomentum(oracle.Oracle):
    def against_momentum(self):
        return {name: -e for name, e in super().against_momentum().items()}


class OfItsOwnLength(oracle.Oracle):
    """LookSAM that adds alpha g_v, whatever the length of a."""

    def dot(self, a, b):
        return 1.0 if a is b else super().dot(a, b)


class DueALater(oracle.Oracle):
    def sam_at_intervals(self, t, batch):
        super().sam_at_intervals(t + 1, batch)


class MissingIsZero(oracle.Oracle):
    """A parameter without any gradient decays and moves on by its momentum."""

    def update(self, g):
        super().update({name: np.zeros_like(w) if g[name] is None else g[name] for name, w in self.weights.items()})


TEETH = [
    (LamOnTheCleanGradient, "m-RWP"),
    (NoHistory, "ARWP"),
    (HistoryOfTheMixedGradient, "m-ARWP"),
    (HistoryKeptBySkippedPasses, "m-ARWP"),
    (HistoryBeforeNoise, "ARWP"),
    (LastColumnForgotten, "RWP"),
    (NextRoundsNoise, "RWP"),
    (IndexSkipsFrozen, "RWP"),
    (DecayOfPerturbedWeights, "RWP"),
    (RollingOnOldNorms, "rolling RWP"),
    (RollingFromTheStart, "rolling RWP"),
    (NormOfEachTensor, "SAM"),
    (NormOfUnperturbedToo, "SAM"),
    (ScaledOnce, "ASAM"),
    (ScaledByRank, "ASAM"),
    (ShardsSummed, "mSAM 3 shards"),
    (MissingLeftOutOfTheMean, "RWP 3 rounds"),
    (RmsOfTheWholeTensor, "RWP rms"),
    (LamOnTheAscent, "mixed SAM"),
    (ProductsOfEachTensor, "GSAM"),
    (MeanRenewedBeforeUse, "FriendlySAM"),
    (AlongTheMomentum, "MomentumSAM"),
    (OfItsOwnLength, "LookSAM"),
    (DueALater, "SAM every 3 steps"),
    (MissingIsZero, "plain"),
]
# One rule with the decay in the gradient, one with the decay on the weights, which does not see its gradient's scale.
BITTEN = [
    *(("momentum", *tooth) for tooth in TEETH),
    *also(*(("adamw", *tooth) for tooth in TEETH if tooth[0] is not ShardsSummed)),
]


@pytest.mark.parametrize(("base", "mistake", "method"), BITTEN, ids=lambda value: getattr(value, "__name__", value))
def test_teeth(base, mistake, method):
    """One mistake in the oracle moves the trajectory by more than 4 times what the tests above allow."""
    effect, allowed = distance(oracle_path(base, method, kind=mistake), oracle_path(base, method)), bound(base)
    assert effect > 4 * allowed
