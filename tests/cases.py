"""How to call each operation: one function per op, which makes its arguments by name, in the schema's order.

Imports nothing of flatkern, so that tests and benchmarks get inputs that the package had no part in. The same call
makes the same values: two of them are one input for two backends. A *variant* is a string of words: names of optional
arguments that shall be present, and the words explained at `Draw`.
"""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# "mixed" cycles through a list, every list from another start, so that dtypes differ inside each list and between them.
DTYPES = {"float32": FLOATS[:1], "bfloat16": FLOATS[1:2], "float16": FLOATS[2:], "mixed": FLOATS}

# Sizes at which a walk over memory can go wrong: nothing, ends of vectors, of chunks of a sum, of a thread's share.
SHAPES = {
    "empty": [(0,), (0, 4), (5, 0), ()],
    "vector ends": [(1,), (15,), (16,), (17,), (7, 1), (3, 5), (3, 16), (2, 17)],
    "chunk ends": [(1023,), (1024,), (1025,), (8191,), (8193,), (2, 1025), (3, 2048)],
    "short rows": [(600, 1), (300, 3), (70, 9), (513, 2), (64, 3, 3, 3)],
    "mixed ranks": [(3, 5), (0,), (64, 3, 3, 3), (), (33,), (4, 0), (5, 4, 3)],
    # More than fits a core's cache, and in all more than one thread's share.
    "long rows": [(3, 70001), (257,), (300000,)],
}

NOISE = (0xA4093822, 3, 0xFFFFFFFE)  # seed, stream, round: any words, two of them beyond 31 bits


class Draw:
    """Seeded inputs for a list of shapes. Words of a variant that are not names of arguments:

    offset          draw normals of a shard that begins somewhere inside the unsharded tensor
    unit            gradient weights are 1, so that an update may use the gradient as it is
    specials        some gradients (weights, for filter_norms_) are infinite or NaN
    skip            found_inf is nonzero
    wide            backups are float32
    second, third   which digit of the magnitudes is counted
    zero, infinite  what the given norm is
    channels_last   rank 4 tensors have that memory format
    lrs, sigmas     on the device and of a stride, instead of the host's numbers, which are then wrong ones
    captured        the noise's words are on the device, where a captured graph reads them, instead of the host
    transposed      rank 2 tensors have dim 1 outermost in memory, which ops that walk no filters take
    """

    def __init__(self, shapes, dtype, device, variant):
        self.shapes, self.device, self.words = shapes, device, set(variant.split())
        self.dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        self.generator = torch.Generator().manual_seed(2404)
        self.lists = 0
        self.count = len(shapes)

    def optional(self, name, make, *args, **kwargs):
        return make(*args, **kwargs) if name in self.words else None

    def tensors(self, scale=1.0, dtypes=None, positive=False, specials=False):
        """A list of tensors of the shapes. Among the values are -0.0 and a subnormal number."""
        dtypes = dtypes or self.dtypes
        self.lists += 1
        result = []
        for k, shape in enumerate(self.shapes):
            dtype = dtypes[(k + self.lists) % len(dtypes)]
            flat = torch.randn(shape, generator=self.generator).flatten() * scale
            if positive:
                flat = flat.abs()
            if flat.numel() > 2:
                flat[flat.numel() // 2] = 0.0 if positive else -0.0
                flat[0] = 2.0 ** (-20 if dtype == torch.float16 else -130)
            # Not in every tensor, and near the end, so that filters without them remain.
            if specials and k % 2 == 0 and flat.numel() > 8:
                flat[-1], flat[-3], flat[-6] = float("inf"), float("nan"), -float("inf")
            result.append(self.laid_out(flat.view(shape).to(self.device, dtype)))
        return result

    def grads(self):
        return self.tensors(specials="specials" in self.words)

    def laid_out(self, t):
        if t.dim() == 4 and "channels_last" in self.words:
            return t.contiguous(memory_format=torch.channels_last)
        if t.dim() == 2 and "transposed" in self.words:
            return t.t().contiguous().t()
        return t

    def lengths(self, elementwise=False):
        return [s[0] if len(s) > 1 else (torch.Size(s).numel() if elementwise else 1) for s in self.shapes]

    def vectors(self, low, high, elementwise=False):
        """One float32 per filter; per element of tensors of rank <= 1 where `elementwise`."""
        return [self.uniform(n, low, high) for n in self.lengths(elementwise)]

    def masks(self):
        """A bit per element, eight columns of a row to a byte; a byte per element of tensors of rank <= 1."""
        result = []
        for shape in self.shapes:
            rows, columns = (
                (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, torch.Size(shape).numel())
            )
            bits = torch.rand((rows, columns), generator=self.generator) < 0.6
            if len(shape) > 1:
                bits = torch.nn.functional.pad(bits, (0, -columns % 8)).view(rows, -(-columns // 8), 8)
                bits = (bits * 2 ** torch.arange(8)).sum(dim=-1)
            result.append((bits if len(shape) > 1 else bits.flatten()).to(self.device, torch.uint8))
        return result

    def uniform(self, shape, low, high):
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.device)

    def scalar(self, value):
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def component(self):
        return torch.tensor([0.8, -0.35], dtype=torch.float32, device=self.device)

    def found_inf(self):
        return self.scalar(1.0) if "skip" in self.words else self.optional("found_inf", self.scalar, 0.0)

    def steps(self):
        return [self.scalar(float(3 * (k % 3))) for k in range(self.count)]

    def noise(self):
        return torch.tensor(NOISE, device=self.device if "captured" in self.words else "cpu")

    # Host scalars differ from entry to entry: a kernel that reads its neighbour's is wrong.

    def floats(self, low, high):
        return [low + (high - low) * ((0.37 + 0.61803398875 * k) % 1.0) for k in range(self.count)]

    def given(self, name, host):
        """(the device's numbers or None, the host's)."""
        if name not in self.words:
            return None, host
        room = torch.full((len(host), 2), float("nan"), dtype=torch.float64, device=self.device)
        room[:, 0] = torch.tensor(host, dtype=torch.float64)
        return room[:, 0], [123.0 + k for k in range(len(host))]

    def cycle(self, *values):
        return [values[k % len(values)] for k in range(self.count)]

    def index(self):
        return [(0xFFFFFFFF - k if k % 3 == 2 else 7 * k) for k in range(self.count)]

    def offset(self):
        if "offset" not in self.words:
            return [0] * self.count
        rows, elements = self.cycle(3, 0x85A308D3, 1000), self.cycle(5, 8 * 0x85A308D3 + 3, 1003, 16)
        return [rows[k] if len(shape) > 1 else elements[k] for k, shape in enumerate(self.shapes)]

    def weights(self):
        if "unit" in self.words:
            return dict(grad_weight=[1.0] * self.count, clean_weight=[1.0] * self.count)
        return dict(grad_weight=self.floats(0.3, 0.7), clean_weight=self.floats(0.7, 0.3))


def fill_normal_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(outs=d.tensors(), noise=d.noise(), index=d.index(), offset=d.offset())


def filter_norms_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(norms=d.vectors(-1.0, 0.0), params=d.tensors(0.2, specials="specials" in d.words))


def ascent_norm_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(
        norm=d.scalar(-1.0),
        params=d.optional("params", d.tensors),
        grads=d.grads(),
        means=d.optional("means", d.tensors),
        eta=d.cycle(0.01, -1.0, 0.0, 0.3) if "params" in d.words else d.cycle(-1.0),
        sigma=d.cycle(1.0, 0.7, 0.0),
    )


def gradient_norm_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(
        norm=d.scalar(-1.0),
        grads=d.grads(),
        clean_grads=d.optional("clean_grads", d.tensors),
        component=d.optional("component", d.component),
        grad_scale=d.optional("grad_scale", d.scalar, 0.3),
        **d.weights(),
    )


def gradient_products_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    products = torch.full((3,), -1.0, dtype=torch.float64, device=d.device)
    return dict(products=products, grads=d.grads(), clean_grads=d.tensors())


def enlarge_gradients(values, largest):
    """Of a norm's case: every second tensor, and an element of the longest other one, have squares beyond float32."""
    grads = values["grads"]
    for g in grads[1::2]:
        g *= 2.0**100  # about 1e30
    g = max(grads[::2], key=torch.Tensor.numel)
    g.view(-1)[g.numel() // 2] = largest
    return values


def perturb_gaussian_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    sigmas, sigma = d.given("sigmas", d.cycle(0.01, -0.02, 0.3, 0.0))
    return dict(
        params=d.tensors(0.2),
        backups=d.optional("backups", d.tensors),
        masters=d.optional("masters", d.tensors, 0.2, FLOATS[:1]),
        norms=d.optional("norms", d.vectors, 0.0, 5.0),
        history=d.optional("history", d.vectors, 0.0, 9.0, elementwise=True),
        sigmas=sigmas,
        noise=d.noise(),
        sigma=sigma,
        eta=d.cycle(0.1, 0.0, 2.0),
        index=d.index(),
        offset=d.offset(),
    )


def perturb_ascent_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(
        params=d.tensors(0.2),
        backups=d.optional("backups", d.tensors),
        new_means=d.optional("new_means", d.tensors),
        masters=d.optional("masters", d.tensors, 0.2, FLOATS[:1]),
        grads=d.grads(),
        means=d.optional("means", d.tensors),
        norm=d.scalar(0.0 if "zero" in d.words else float("inf") if "infinite" in d.words else 3.7),
        rho=d.cycle(0.05, -0.5, 0.0, 2.0),
        eta=d.cycle(-1.0, 0.01, 0.0),
        sigma=d.cycle(1.0, 0.7, 0.0),
        momentum=d.cycle(0.9, 0.0, 0.6, 1.0),
    )


def restore_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(params=d.tensors(), backups=d.tensors(dtypes=FLOATS[:1] if "wide" in d.words else None))


def mix_gradients_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(
        grads=d.grads(),
        history=d.optional("history", d.vectors, 0.0, 9.0, elementwise=True),
        outs=d.optional("outs", d.tensors),
        clean_grads=d.optional("clean_grads", d.tensors),
        component=d.optional("component", d.component),
        grad_scale=d.optional("grad_scale", d.scalar, 0.3),
        clip=d.optional("clip", d.scalar, 0.7),
        found_inf=d.found_inf(),
        **d.weights(),
        beta=d.cycle(0.99, 0.0, 0.5),
    )


def count_magnitudes_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    grads = d.grads()
    # The digits of a number that is there, 1.0, so that later digits are counted too.
    bits, known = 0x3F800000, len(d.words & {"second", "third"}) + ("third" in d.words)
    for t in grads:
        t.flatten()[-2:-1] = 1.0
    digits = [bits >> 20, bits >> 10 & 1023][:known]
    counts = torch.full((2050 if known == 0 else 1026,), -1, dtype=torch.int64, device=d.device)
    return dict(counts=counts, grads=grads, prefix=torch.tensor(digits, dtype=torch.int64, device=d.device))


def pack_mask_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(masks=d.masks(), grads=d.grads(), threshold=d.scalar(0.7))


def amplify_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return dict(params=d.tensors(), previous=d.tensors(), masks=d.masks(), kappa=d.floats(0.0, 4.0))


def sgd_update_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return _update(
        d,
        state=dict(momentum_buffers=d.optional("momentum_buffers", d.tensors, 0.1)),
        rule=dict(
            lr=d.floats(0.01, 0.2),
            momentum=d.cycle(0.9, 0.0, 0.5),
            dampening=d.cycle(0.0, 0.1),
            weight_decay=d.cycle(0.01, 0.0),
            nesterov=d.cycle(False, True, True),
        ),
    )


def adam_update_(shapes, dtype, device="cpu", variant=""):
    d = Draw(shapes, dtype, device, variant)
    return _update(
        d,
        state=dict(exp_avgs=d.tensors(0.1), exp_avg_sqs=d.tensors(0.01, positive=True), steps=d.steps()),
        rule=dict(
            lr=d.floats(0.001, 0.1),
            beta1=d.cycle(0.9, 0.8, 0.0),
            beta2=d.cycle(0.999, 0.9),
            eps=d.cycle(1e-8, 1e-3),
            weight_decay=d.cycle(0.01, 0.0, 0.3),
        ),
    )


adamw_update_ = adam_update_


def _update(d, state, rule):
    """What every update takes besides the state and the scalars of its own rule."""
    lrs, rule["lr"] = d.given("lrs", rule["lr"])
    sigmas, sigma = d.given("sigmas", d.cycle(0.01, 0.02, 0.3, 0.0))
    return dict(
        params=d.tensors(0.2),
        **state,
        backups=d.optional("backups", d.tensors, 0.2),
        masters=d.optional("masters", d.tensors, 0.2, FLOATS[:1]),
        history=d.optional("history", d.vectors, 0.0, 9.0, elementwise=True),
        grads=d.grads(),
        clean_grads=d.optional("clean_grads", d.tensors),
        masks=d.optional("masks", d.masks),
        lrs=lrs,
        sigmas=sigmas,
        noise=d.optional("noise", d.noise),
        component=d.optional("component", d.component),
        grad_scale=d.optional("grad_scale", d.scalar, 0.3),
        clip=d.optional("clip", d.scalar, 0.7),
        found_inf=d.found_inf(),
        **rule,
        **d.weights(),
        kappa=d.cycle(3.0, 0.0, 0.7),
        beta=d.cycle(0.99, 0.0, 0.5),
        sigma=sigma,
        eta=d.cycle(0.1, 0.0, 2.0),
        index=d.index(),
        offset=d.offset(),
    )


_UPDATES = [
    "backups",
    "masters history clean_grads grad_scale clip found_inf",
    "backups history grad_scale specials",
    "masters skip history specials",
    # IRE.
    "masks",
    "backups masks clean_grads grad_scale",
    "masters masks noise",
    # GSAM, LookSAM.
    "backups clean_grads component grad_scale clip found_inf",
    # Rolling: the norm of the new weights is measured inside.
    "backups noise",
    "masters noise history grad_scale offset",
    "backups noise skip history specials",
    # On the device, for captured graphs.
    "lrs",
    "backups noise history lrs sigmas captured",
]
# Where a norm is measured inside, backups or masters are there too: `compare` needs the clean weights.
VARIANTS = {
    "fill_normal_": ["", "offset", "captured"],
    "filter_norms_": ["", "specials"],
    "ascent_norm_": ["", "params", "params specials", "means", "params means"],
    "gradient_norm_": [
        "unit",
        "grad_scale",
        "clean_grads",
        "clean_grads grad_scale",
        "clean_grads component grad_scale",
        "grad_scale specials",
    ],
    "gradient_products_": ["", "specials"],
    "perturb_gaussian_": [
        "norms",
        "norms backups history offset",
        "norms backups masters",
        "backups",
        "backups masters history",
        "norms backups sigmas",
        "masters sigmas captured",
    ],
    "perturb_ascent_": [
        "",
        "backups",
        "backups masters specials",
        "backups zero",
        "backups infinite specials",
        "backups new_means means",
        "new_means masters means specials",
        "backups new_means means infinite specials",
    ],
    "restore_": ["", "wide"],
    "count_magnitudes_": ["", "second", "third specials"],
    "pack_mask_": ["", "specials"],
    "amplify_": [""],
    "mix_gradients_": [
        "grad_scale clip",
        "clean_grads",
        "unit history",
        "history clean_grads grad_scale clip",
        "history grad_scale specials",
        "outs clean_grads component grad_scale found_inf",
        "history outs clean_grads component skip",
    ],
    "sgd_update_": ["unit", *_UPDATES, *(f"momentum_buffers {words}" for words in _UPDATES)],
    "adam_update_": ["unit", *_UPDATES],
    "adamw_update_": ["unit", *_UPDATES],
}


def call(function, op, values):
    """Call an op's function as dispatch does: tensors by position, host scalars by keyword."""
    positional = [values[a.name] for a in op.arguments if not a.keyword_only]
    return function(*positional, **{a.name: values[a.name] for a in op.arguments if a.keyword_only})
