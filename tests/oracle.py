"""The methods in float64 NumPy, written from the papers' equations: one parameter at a time, one line a term.

Nothing of flatkern and nothing of torch is used here; gradients come from a callback. `test_oracle.py` checks this
file against known answers, `test_paper.py` checks flatkern against this file.
"""

from functools import cache

import numpy as np

# The noise: Philox4x32-10 and "flatkern normal, version 1".


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four uint32 counter words (arrays) and two key words to four uint32 words."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & low, first & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def fma(a, b, c):
    """a b + c of float32 numbers, rounded once: exact product, sum rounded to odd in float64, then to float32."""
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = np.atleast_1d(total).view(np.int64).reshape(np.shape(total)) % 2 == 0
    odd = np.where(even & (error != 0), np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(np.float32)


def horner(x, first, *rest):
    """The polynomial in x with one fma a coefficient, highest power first, all float32."""
    total = np.full_like(x, first)
    for coefficient in rest:
        total = fma(total, x, np.float32(coefficient))
    return total


def coefficients(text):
    return [float.fromhex(number) for number in text.split()]


LOG = coefficients(
    "-0x1.e743bep-3 0x1.7e515ap-2 -0x1.a3c3cep-2 0x1.fe26ccp-2 -0x1.5523fcp-1 0x1.000176p+0 -0x1.00001p+1"
)
SIN = coefficients("0x1.5bb08p-19 -0x1.9f4142p-13 0x1.110d6ep-7 -0x1.55553cp-3")
COS = coefficients("0x1.847576p-16 -0x1.6b2aa4p-10 0x1.554edep-5 -0x1.ffffcp-2 0x1.fffffep-1")


@cache
def radii():
    """The radius of every low half word k: sqrt(-2 log((k + 1/2) / 65536))."""
    k = np.arange(65536, dtype=np.int32)
    u = fma((0x4B000000 | k).view(np.float32), np.float32(2.0**-16), np.float32(-(128 - 2.0**-17)))
    bits = u.view(np.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(np.float32) - np.float32(1)
    log = horner(f, *LOG)
    return np.sqrt(fma(e.astype(np.float32), np.float32(float.fromhex("-0x1.62e43p+0")), log * f))


@cache
def angles():
    """Cosine and sine of every high half word: 15 bits of angle in (-pi/2, pi/2), one for the sign of the cosine."""
    high = np.arange(65536, dtype=np.int64)
    h = np.where(high & 0x4000, (high & 0x7FFF) - 0x8000, high & 0x7FFF).astype(np.float32)
    x = fma(h, np.float32(float.fromhex("0x1.921fb6p-14")), np.float32(float.fromhex("0x1.921fb6p-15")))
    q = x * x
    sin = x * horner(q, *SIN, 1.0)
    cos = horner(q, *COS)
    return np.where(high & 0x8000, -cos, cos), sin


def box_muller(word):
    """The two normals of one uint32 word."""
    cos, sin = angles()
    radius = radii()[word & np.uint32(0xFFFF)]
    return radius * cos[word >> np.uint32(16)], radius * sin[word >> np.uint32(16)]


@cache
def layout(shapes):
    """Counter words (column // 8, row, parameter) of every block of 8 columns, and where each tensor's elements lie."""
    blocks, places, first = [], [], 0
    for index, shape in enumerate(shapes):
        rows = shape[0] if len(shape) > 1 else 1
        columns = int(np.prod(shape)) // max(rows, 1)
        width = -(-columns // 8)
        row, block = np.divmod(np.arange(rows * width), max(width, 1))
        blocks.append(np.stack([block, row, np.full_like(row, index)]))
        places.append((8 * first + np.arange(rows)[:, None] * 8 * width + np.arange(columns)).reshape(shape))
        first += rows * width
    return np.concatenate(blocks, axis=1), places


def normals(shapes, seed, round, stream=0):
    """The float32 normals of a list of tensors, given by shape; the position in the list is the parameter index."""
    counters, places = layout(tuple(map(tuple, shapes)))
    words = philox([*counters, np.full_like(counters[0], round)], (seed, stream))
    flat = np.stack([z for word in words for z in box_muller(word)], axis=1).reshape(-1)
    return [flat[place] for place in places]


# The base rules: p and g to the new p, with the state of one parameter in a dict.


def sgd(p, g, state, lr, weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False, **_):
    """d = g + wd p; v = mu v + (1 - dampening) d, the first v is d; p - lr v (Nesterov: p - lr (d + mu v))."""
    d = (-g if maximize else g) + weight_decay * p
    if momentum:
        old = state.get("momentum_buffer")
        v = state["momentum_buffer"] = d if old is None else momentum * old + (1 - dampening) * d
        d = d + momentum * v if nesterov else v
    return p - lr * d


def adam(p, g, state, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, maximize=False, **_):
    """Adam with the decay in the gradient (Kingma and Ba 2015, as torch computes it)."""
    g = (-g if maximize else g) + weight_decay * p
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * g
    v = state["exp_avg_sq"] = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g**2
    return p - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adamw(p, g, state, lr, weight_decay=1e-2, **rest):
    """Adam with the decay on the weights (Loshchilov and Hutter 2019)."""
    return adam(p * (1 - lr * weight_decay), g, state, lr, **rest)


# The methods.


def mean(passes):
    """Mean over passes, by name: a gradient missing in some passes is zero there, one missing in all stays missing."""
    found = {name: [g[name] for g in passes if g[name] is not None] for name in passes[0]}
    return {name: sum(gs) / len(passes) if gs else None for name, gs in found.items()}


def by_filter(w):
    """The tensor as (filters, elements): dim-0 slices, or the whole tensor below rank 2."""
    return w.reshape(w.shape[0], np.prod(w.shape[1:], dtype=int)) if w.ndim > 1 else w.reshape(1, w.size)


class Oracle:
    """One training run: `weights` by name in optimizer order, `options` by name (the merged groups), `grads(w, batch)`.

    Each method is one call per optimizer step. Options: those of `rule`, the method's `sigma lam eta beta rho`,
    and `trainable`, `perturb` (both default True).
    """

    def __init__(self, rule, weights, options, grads, seed=0, stream=0):
        self.rule, self.grads, self.seed, self.stream = rule, grads, seed, stream
        self.weights = {name: np.array(w, dtype=np.float64) for name, w in weights.items()}
        self.options, self.round = options, 0
        self.state, self.history = {name: {} for name in weights}, {}
        self.noise, self.means = None, {}

    def is_perturbed(self, name):
        return self.options[name].get("trainable", True) and self.options[name].get("perturb", True)

    def moved(self, e):
        """w + e, for the parameters that e names."""
        return {name: w + e[name] if name in e else w for name, w in self.weights.items()}

    def update(self, g):
        """The base rule at the clean weights; a parameter without gradient is left alone with its state."""
        for name, w in self.weights.items():
            if g[name] is not None:
                self.weights[name] = self.rule(w, g[name], self.state[name], **self.options[name])

    def plain(self, batch):
        self.update(self.grads(self.weights, batch))

    mean = staticmethod(mean)

    # RWP, ARWP: g = mean over rounds of grad L(w + e).

    def norms(self, w):
        """||w_f|| of every filter, as a column."""
        return np.sqrt((by_filter(w) ** 2).sum(axis=1, keepdims=True))

    def size(self, w, scale):
        """What sigma is relative to: ||w_f||, its root mean square, or 1."""
        length = max(by_filter(w).shape[1], 1)
        return {"norm": self.norms(w), "rms": self.norms(w) / np.sqrt(length), "absolute": 1.0}[scale]

    def normals(self, names, round):
        """z by name; the position in `names` is the parameter index."""
        shapes = [self.weights[name].shape for name in names]
        return dict(zip(names, normals(shapes, self.seed, round, self.stream), strict=True))

    def draw(self, round):
        """e = sigma ||w_f|| z / sqrt(1 + eta F), with F the history up to the last step."""
        z, e = self.normals(list(self.weights), round), {}
        for name, w in self.weights.items():
            if self.is_perturbed(name):
                sigma, eta = self.options[name]["sigma"], self.options[name].get("eta", 0.0)
                size = self.size(w, self.options[name].get("scale", "norm"))
                scale = sigma * size / np.sqrt(1 + eta * self.history.get(name, 0.0))
                e[name] = (scale * by_filter(z[name]).astype(np.float64)).reshape(w.shape)
        return e

    def next_draw(self):
        self.round += 1
        return self.draw(self.round - 1)

    def remember(self, g, seen=None):
        """F <- beta F + sum over the filter of g^2, per element below rank 2; g is the perturbed gradient.

        `seen` are the gradients of the whole step: no gradient in any pass leaves F alone.
        """
        for name in self.weights:
            if (seen or g)[name] is not None:
                square = np.zeros_like(self.weights[name]) if g[name] is None else g[name] ** 2
                f = by_filter(square)
                f = f.sum(axis=1, keepdims=True) if square.ndim > 1 else f
                self.history[name] = self.options[name].get("beta", 0.99) * self.history.get(name, 0.0) + f

    def rwp(self, batches):
        g = self.mean([self.grads(self.moved(self.next_draw()), batch) for batch in batches])
        self.remember(g)
        self.update(g)

    # m-RWP, m-ARWP: g = (1 - lam) grad L_A(w) + lam grad L_B(w + e); the order of the two passes does not matter.

    def mixed(self, clean, noisy):
        g0, g = self.grads(self.weights, clean), {}
        g1 = self.mean([self.grads(self.moved(self.next_draw()), batch) for batch in noisy])
        for name in self.weights:
            lam, missing = self.options[name]["lam"], g0[name] is None and g1[name] is None
            first, second = (0.0 if part is None else part for part in (g0[name], g1[name]))
            g[name] = None if missing else (1 - lam) * first + lam * second
        self.remember(g1, seen=g)
        self.update(g)

    # Rolling: the noise of `round` is on between steps; before the first train() the weights are clean.

    def train(self):
        self.noise = self.draw(self.round)

    def rolling(self, batch):
        """One step at the weights as they are; it leaves the noise of the next round on."""
        noisy, self.noise = self.noise is not None, self.noise or {}
        g = self.grads(self.moved(self.noise), batch)
        if noisy:
            self.remember(g)
            self.round += 1
        self.update(g)
        self.train()

    # SAM, ASAM, mSAM: g = mean over shards of grad L(w + e), e = rho T^2 a / ||T a||, a = grad L(w) of that shard.

    def metric(self, name, w):
        """T: the identity (SAM); ASAM: |w| + t_eta where the name contains "weight", or everywhere with all_tensors."""
        options = self.options[name]
        adaptive = "t_eta" in options and ("weight" in name or options.get("all_tensors"))
        return np.abs(w) + options["t_eta"] if adaptive else np.ones_like(w)

    def ascent(self, a):
        a = {name: a[name] for name in a if a[name] is not None and self.is_perturbed(name)}
        t = {name: self.metric(name, self.weights[name]) for name in a}
        norm = np.sqrt(sum(((t[name] * a[name]) ** 2).sum() for name in a))
        e = {}
        for name in a:
            sign = -1 if self.options[name].get("maximize") else 1
            e[name] = sign * self.options[name]["rho"] * t[name] ** 2 * a[name] / (norm + 1e-12)
        return e

    def sam(self, shards):
        passes = [self.grads(self.moved(self.ascent(self.grads(self.weights, s))), s) for s in shards]
        self.update(self.mean(passes))

    # What SAM's further kin share: sums over the perturbed parameters.

    def dot(self, a, b):
        return sum((a[n] * b[n]).sum() for n in a if a[n] is not None and b[n] is not None and self.is_perturbed(n))

    def combined(self, a, b, of_a, of_b):
        """of_a a + of_b b by parameter (numbers, or functions of a name); one gradient that is missing is zero."""
        out = {}
        for name in a:
            if a[name] is None and b[name] is None:
                out[name] = None
                continue
            first, second = (0.0 if part is None else part for part in (a[name], b[name]))
            out[name] = of_a(name) * first + of_b(name) * second
        return out

    def ascended(self, shards):
        """The means of a and of g_p over shards."""
        clean = [self.grads(self.weights, s) for s in shards]
        climbed = [self.grads(self.moved(self.ascent(a)), s) for a, s in zip(clean, shards, strict=True)]
        return self.mean(clean), self.mean(climbed)

    # Mixed SAM: g = (1 - lam) a + lam g_p. Intervals: every k-th step is one, the others are plain.

    def mixed_sam(self, shards):
        a, g = self.ascended(shards)
        lam = lambda name: self.options[name]["lam"]  # noqa: E731
        self.update(self.combined(a, g, lambda name: 1 - lam(name), lam))

    def sam_at_intervals(self, t, batch):
        every = next(iter(self.options.values()))["perturb_interval"]
        self.sam([batch]) if t % every == 0 else self.plain(batch)

    # GSAM: g = g_p - alpha a_v, a_v = a - cos(a, g_p) ||a|| g_p / ||g_p||.

    def gsam(self, shards):
        a, g = self.ascended(shards)
        aa, ag, gg = self.dot(a, a), self.dot(a, g), self.dot(g, g)
        share = ag / (np.sqrt(aa * gg) + 1e-12) * np.sqrt(aa) / (np.sqrt(gg) + 1e-12)
        vertical = self.combined(a, g, lambda _: 1.0, lambda _: -share)
        alpha = lambda name: -self.options[name]["alpha"] if self.is_perturbed(name) else 0.0  # noqa: E731
        self.update(self.combined(vertical, g, alpha, lambda _: 1.0))

    # Friendly-SAM: d = a - sigma m, the first d is a; m <- momentum m + (1 - momentum) a, the first m is a.

    def friendly_sam(self, shards):
        passes = []
        for s in shards:
            a, d = self.grads(self.weights, s), {}
            for name, g in a.items():
                m, sigma, momentum = (
                    self.means.get(name),
                    self.options[name]["sigma"],
                    self.options[name]["perturb_momentum"],
                )
                if g is None or m is None:
                    d[name] = g
                else:
                    d[name] = g - sigma * m
                if g is not None:
                    self.means[name] = g if m is None else momentum * m + (1 - momentum) * g
            passes.append(self.grads(self.moved(self.ascent(d)), s))
        self.update(self.mean(passes))

    # Momentum-SAM: e = -rho v / ||v||, v the rule's momentum.

    def against_momentum(self):
        v = {n: s.get("momentum_buffer", s.get("exp_avg")) for n, s in self.state.items() if self.is_perturbed(n)}
        v = {name: each for name, each in v.items() if each is not None}
        norm = np.sqrt(sum((each**2).sum() for each in v.values()))
        return {name: -self.options[name]["rho"] * each / (norm + 1e-12) for name, each in v.items()}

    def momentum_sam(self, batch):
        self.update(self.grads(self.moved(self.against_momentum()), batch))

    # LookSAM: every k-th step is SAM's, and keeps g_v = g_p - <a, g_p> / ||a||^2 a; then a + alpha ||a|| g_v / ||g_v||.

    def looksam(self, t, batch):
        every = next(iter(self.options.values()))["perturb_interval"]
        if t % every == 0:
            a, g = self.ascended([batch])
            share = self.dot(a, g) / self.dot(a, a)
            self.kept = self.combined(g, a, lambda _: 1.0, lambda _: -share)
            self.update(g)
            return
        a = self.grads(self.weights, batch)
        factor = np.sqrt(self.dot(a, a) / self.dot(self.kept, self.kept))
        reused = {name: v if self.is_perturbed(name) and a[name] is not None else None for name, v in self.kept.items()}
        self.update(self.combined(a, reused, lambda _: 1.0, lambda name: self.options[name]["alpha"] * factor))
