"""What the tests of all stacks share: the methods, a tiny model and its data, loops written by hand, comparisons.

`EVERY` is also the list of columns of the matrix in docs/stacks.md: a test that concerns a method takes it as the
argument `method`, with these names as ids.
"""

import io
from collections import namedtuple

import torch
from compare import assert_same_state as assert_same_tensors
from torch import nn
from torch.nn import functional

import flatkern

# How an optimizer is made (keyword arguments of every flatkern optimizer), and which loop a user writes for it: "plain"
# or "noisy" or "mixed" or "ascent"; "sometimes" is "ascent" where perturb_due, and else "plain". Words, not the
# functions of tests/steps.py, because a step here has as many micro-batches as a library makes of a batch.
Method = namedtuple("Method", "make loop")


def _rwp(**values):
    def make(**more):
        return {"perturb": flatkern.RWP(**{"sigma": 0.05, "seed": 7, **values, **more})}

    return make


def _ascent(cls, **values):
    def make(**more):
        return {"perturb": cls(**{**values, **more})}

    return make


def _ire():
    return {"enhance": flatkern.IRE(kappa=1.0, interval=2)}


METHODS = {
    "RWP": Method(_rwp(), "noisy"),
    "rolling RWP": Method(_rwp(rolling=True), "plain"),
    "m-RWP": Method(_rwp(lam=0.4), "mixed"),
    "ARWP": Method(_rwp(eta=2.0, beta=0.9), "noisy"),
    "SAM": Method(_ascent(flatkern.SAM, rho=0.1), "ascent"),
    "ASAM": Method(_ascent(flatkern.ASAM, rho=0.5), "ascent"),
    "mSAM": Method(_ascent(flatkern.SAM, rho=0.1), "ascent"),  # several rounds a step
    "IRE": Method(_ire, "plain"),
    "m-ARWP": Method(_rwp(lam=0.4, eta=2.0, beta=0.9), "mixed"),
    "GSAM": Method(_ascent(flatkern.GSAM, rho=0.1), "ascent"),
    "LookSAM": Method(_ascent(flatkern.LookSAM, rho=0.1, k=2), "sometimes"),
    "rolling Momentum-SAM": Method(_ascent(flatkern.MomentumSAM, rho=0.5, rolling=True), "plain"),
}
# What these ask of a stack others have asked already; they are compared with loops by hand alone.
SIMILAR = {
    "mixed SAM": Method(_ascent(flatkern.SAM, rho=0.1, lam=0.7), "ascent"),
    "SAM at intervals": Method(_ascent(flatkern.SAM, rho=0.1, interval=2), "sometimes"),
    "Friendly-SAM": Method(_ascent(flatkern.FriendlySAM, rho=0.1), "ascent"),
    "Momentum-SAM": Method(_ascent(flatkern.MomentumSAM, rho=0.5), "noisy"),
}
EVERY = METHODS | SIMILAR
USED_FURTHER = ["GSAM", "LookSAM", "mixed SAM", "Friendly-SAM"]  # the gradient that they ascend along
TWO_PASS = [name for name, method in METHODS.items() if method.loop in ("mixed", "ascent")]

FEATURES, CLASSES, ROWS = 6, 3, 4


def make_model(seed=0, batch_norm=False):
    """Linear, a norm, tanh, linear: matrices, vectors, and running statistics if wanted. Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8)
        return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))


def make_batches(count, rows=ROWS, seed=100):
    """`count` pairs (x, y), always the same."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, FEATURES, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator))
        for _ in range(count)
    ]


def make_optimizer(method, model, base="AdamW", lr=0.05, own=None, **more):
    """An optimizer of flatkern's for a name of EVERY.

    Arguments:
        base: SGD, Adam or AdamW.
        own: further arguments of the method (rounds="sum", mix="losses", ...).
        more: further arguments of the optimizer (max_grad_norm, ...).
    """
    momentum = {"momentum": 0.9} if base == "SGD" else {}
    keywords = {**EVERY[method].make(**(own or {})), **momentum, **more}
    # Names, since ASAM's rule goes by them.
    return getattr(flatkern, base)(model.named_parameters(), lr=lr, **keywords)


def summed(method):
    """The argument of the method for losses that a trainer has divided."""
    return {"rounds": "sum"} if hasattr(EVERY[method].make().get("perturb"), "rounds") else {}


def loop_of(method, opt):
    """The loop of the coming step."""
    loop = EVERY[method].loop
    return loop if loop != "sometimes" else "ascent" if opt.perturb_due else "plain"


def passes_of(method, step):
    """How often a step's batch is run."""
    loop = EVERY[method].loop
    return 2 if loop in ("mixed", "ascent") or (loop == "sometimes" and step % 2 == 0) else 1


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def mask_loss(model, batch, seed):
    """IRE's loss with labels drawn from the model; the same labels for the same seed."""
    logits = model(batch[0])
    generator = torch.Generator(logits.device).manual_seed(seed)
    return flatkern.sampled_label_loss(logits, generator=generator)


def step_by_hand(method, model, opt, window, index=0, clean=None):
    """One step on the micro-batches of `window`, by flatkern's public calls alone, every loss divided by their number.

    Arguments:
        index: of the step; seeds IRE's labels.
        clean: how many of the micro-batches are m-RWP's clean ones; by default the first half, rounded up. Where it is
            the whole window, which has one micro-batch then, the same micro-batch is the noisy one as well.

    Returns:
        The mean loss: at clean weights where the method has a clean pass.
    """
    opt.zero_grad()
    if opt.enhancement is not None and opt.mask_due:
        mask_loss(model, window[0], index).backward()
        opt.update_mask()
    n, losses = len(window), []

    def backward(batch, count=n):
        loss = loss_of(model, batch) / count
        loss.backward()
        return loss.detach()

    loop = loop_of(method, opt)
    if loop == "noisy":
        opt.perturb()
    if loop in ("plain", "noisy"):
        losses = [backward(batch) for batch in window]
    elif loop == "ascent":
        for k, batch in enumerate(window):
            losses.append(backward(batch))
            opt.perturb()
            backward(batch)
            if k < n - 1:
                opt.restore()
    else:
        first = (n + 1) // 2 if clean is None else clean
        halves = window[:first], window[first:] or window
        # Under rounds="sum" losses are divided by the number of passes, of which a single micro-batch has two.
        count = sum(map(len, halves)) if opt.method.rounds == "sum" else 1
        losses = [backward(batch, count) * count / first for batch in halves[0]]
        opt.perturb()
        for batch in halves[1]:
            backward(batch, count)
    opt.step()
    return sum(losses)


def train_by_hand(method, model, opt, windows, start=0):
    """`step_by_hand` over windows of micro-batches; ends with clean weights. Returns the losses."""
    if opt.rolling:
        opt.train()
    losses = [step_by_hand(method, model, opt, window, start + k) for k, window in enumerate(windows)]
    opt.zero_grad()
    opt.eval()
    return torch.stack(losses)


# --- comparisons ----------------------------------------------------------------------------------


def weights(model):
    """Copies of the parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def clean_weights(model, opt):
    """Copies of the clean parameters, by name, whatever the phase."""
    with opt.clean():
        return weights(model)


def assert_other_tensors(left, right):
    """Some tensor differs: the training has done something."""
    assert any(not torch.equal(a, right[name]) for name, a in left.items())


def assert_same_state(left, right):
    """Two optimizer state_dicts, bit for bit."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for k, entry in left["state"].items():
        tensors = {key: v for key, v in entry.items() if isinstance(v, torch.Tensor)}
        others = {key: v for key, v in right["state"][k].items() if isinstance(v, torch.Tensor)}
        assert_same_tensors(tensors, others)
        numbers = {key: v for key, v in entry.items() if not isinstance(v, torch.Tensor)}
        assert numbers == {key: v for key, v in right["state"][k].items() if not isinstance(v, torch.Tensor)}


def through_a_file(value):
    """What torch.load(weights_only=True) makes of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
