"""The cycle CLEAN -> perturb() -> PERTURBED -> restore() or step() -> CLEAN: which call does what, and leaves what."""

import copy
import pickle

import pytest
import torch
from compare import assert_same, assert_same_state, copies, same
from patterns import BASES, METHODS, SEED, STREAM, Training, backends, noise, train, trained
from steps import plain
from torch import nn

import flatkern

RWP, MRWP, SAM = noise(sigma=0.1), noise(sigma=0.1, lam=0.3), flatkern.SAM(rho=0.3)
KINDS = {
    "RWP": RWP,
    "ARWP": noise(sigma=0.1, eta=2.0),
    "m-RWP": MRWP,
    "losses": noise(sigma=0.1, lam=0.3, mix="losses"),
    "SAM": SAM,
    "ASAM": flatkern.ASAM(rho=0.6),
}
NOISY, MIXED, CLIMBING = ("RWP",), ("m-RWP",), ("SAM",)  # what the table tells apart
PRECISIONS = {
    "fp32": (torch.float32, False),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
    "bf16 masters": (torch.bfloat16, True),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")

# --- the table ------------------------------------------------------------------------------------


class Calls(Training):
    """Runs words: calls of the optimizer, and backward passes on one batch after the other."""

    def __init__(self, kind, backend):
        super().__init__(KINDS[kind], backend=backend)
        self.words = {
            "backward": lambda: self.backward(self.passes),
            "perturb": lambda: self.opt.perturb(),
            "restore": lambda: self.opt.restore(),
            "step": lambda: self.opt.step(),
            "zero": lambda: self.opt.zero_grad(),
            "zeros": lambda: self.opt.zero_grad(set_to_none=False),
            "state_dict": lambda: self.opt.state_dict(),
            "pickle": lambda: pickle.dumps(self.opt),
            "deepcopy": lambda: copy.deepcopy(self.opt),
            "add_param_group": lambda: self.opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        }

    def run(self, words):
        for word in words.split():
            self.words[word]()
        return self

    def everything(self):
        """What a refused call may not change; gradients by identity, version and value."""
        grads = [(p.grad, p.grad._version, p.grad.clone()) if p.grad is not None else None for p in self.parameters()]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        sizes = [len(g["params"]) for g in self.opt.param_groups]
        return self.weights(), grads, self.state(), groups, sizes, self.opt.is_perturbed

    def parameters(self):
        return [p for g in self.opt.param_groups for p in g["params"]]

    def assert_is(self, before):
        weights, grads, state, *rest = self.everything()
        assert_same(weights, before[0])
        for now, then in zip(grads, before[1], strict=True):
            assert (now is None) == (then is None)
            assert now is None or (now[0] is then[0] and now[1] == then[1] and same([now[2]], [then[2]]))
        assert_same_state(state, before[2])
        assert rest == list(before[3:])


# What came before in this step, the call, what the message must name, how the user finishes the step.
UNFINISHED = ("state_dict", "pickle", "deepcopy", "add_param_group")
REFUSED = [
    *((k, "perturb", "perturb", "step.*restore", "zero backward step") for k in NOISY),
    *((k, "backward", "perturb", "zero_grad", "zero perturb backward step") for k in NOISY),
    *((k, "perturb backward restore backward", "perturb", "zero_grad", "zero perturb backward step") for k in NOISY),
    *((k, "perturb backward restore backward", "step", r"perturb\(\)|zero_grad", "zero step") for k in NOISY),
    *((k, "", "perturb", "backward", "backward perturb backward step") for k in CLIMBING),
    *((k, "backward step", "perturb", "backward", "zero backward perturb backward step") for k in CLIMBING),
    *((k, "backward perturb backward step", "perturb", "backward", "zero backward perturb backward step")
      for k in CLIMBING),
    *((k, "backward zeros", "perturb", "backward", "backward perturb backward step") for k in CLIMBING),
    *((k, "backward perturb backward restore", "perturb", "backward", "backward perturb backward step")
      for k in CLIMBING),
    *((k, "backward perturb", "perturb", "step.*restore", "backward step") for k in (*CLIMBING, *MIXED, "losses")),
    *((k, "backward perturb backward", "perturb", "step.*restore", "step") for k in (*CLIMBING, *MIXED, "losses")),
    ("m-RWP", "perturb backward", "step", r"restore\(\)", "restore backward step"),
    ("m-RWP", "perturb backward restore", "step", "clean", "backward step"),
    ("m-RWP", "backward perturb restore", "step", "perturb", "perturb backward step"),
    ("m-RWP", "backward perturb backward restore backward", "step", "zero_grad", "zero step"),
    ("m-RWP", "backward perturb backward restore backward", "perturb", "zero_grad", "zero perturb backward step"),
    *((k, "perturb", call, r"restore\(\)", "backward step") for k in NOISY for call in UNFINISHED),
    *((k, "perturb backward", call, r"restore\(\)", "step") for k in NOISY for call in UNFINISHED),
    *((k, "perturb backward restore", call, r"step\(\)", "step") for k in NOISY for call in UNFINISHED),
    *(("SAM", "backward perturb backward", call, r"restore\(\)", "step") for call in UNFINISHED),
    *(("SAM", "backward perturb backward restore", call, r"step\(\)", "step") for call in UNFINISHED),
    *(("m-RWP", "backward perturb", call, r"restore\(\)", "backward step") for call in UNFINISHED),
    *(("m-RWP", "backward perturb restore", call, r"step\(\)", "perturb backward step") for call in UNFINISHED),
    *(("m-RWP", "perturb backward restore", call, r"step\(\)", "backward step") for call in UNFINISHED),
]  # fmt: skip


def same_code(kind, *row):
    """The cycle is the same code for every backend; in eager the calls that touch weights."""
    return row[1] not in UNFINISHED


@pytest.mark.parametrize(
    ("backend", "kind", "before", "call", "remedy", "rest"), backends(REFUSED, same_code), indirect=["backend"]
)
def test_refused(kind, before, call, remedy, rest, backend):
    """The message names the remedy; nothing has changed; the step can be finished as if nothing had been called."""
    run, untroubled = Calls(kind, backend), Calls(kind, backend)
    for r in (run, untroubled):
        METHODS[{"losses": "m-RWP losses"}.get(kind, kind)].user(r, 0)
        r.run("zero " + before)
    everything = run.everything()
    with pytest.raises(RuntimeError, match=remedy):
        run.run(call)
    run.assert_is(everything)
    run.run(rest)
    untroubled.run(rest)
    assert_same(run.weights(), untroubled.weights())
    assert not same(run.weights(), run.start)
    run.opt.state_dict()


CLEAN, PERTURBED, STEPPED = "clean", "perturbed", "stepped"
EVERY = (*NOISY, *MIXED, *CLIMBING, "losses")
ALLOWED = [
    *((k, "", "perturb", PERTURBED) for k in (*NOISY, *MIXED, "losses")),
    *((k, "backward step", "perturb", PERTURBED) for k in (*NOISY, *MIXED, "losses")),
    *((k, "backward zeros", "perturb", PERTURBED) for k in NOISY),
    *((k, "perturb backward restore", "perturb", PERTURBED) for k in (*NOISY, *MIXED)),
    *((k, "backward", "perturb", PERTURBED) for k in (*MIXED, *CLIMBING, "losses")),
    *((k, "backward perturb backward restore backward", "perturb", PERTURBED) for k in CLIMBING),
    *((k, before, "restore", CLEAN) for k in EVERY for before in ("", "backward", "backward step")),
    *((k, "perturb", "restore", CLEAN) for k in (*NOISY, *MIXED, "losses")),
    *((k, "perturb backward", "restore", CLEAN) for k in (*NOISY, *MIXED, "losses")),
    *((k, "backward perturb" + more, "restore", CLEAN) for k in (*CLIMBING, *MIXED) for more in ("", " backward")),
    *((k, "perturb", "step", CLEAN) for k in (*NOISY, *MIXED)),
    *((k, "backward perturb", "step", CLEAN) for k in CLIMBING),
    *((k, "", "step", CLEAN) for k in EVERY),
    *((k, "backward", "step", STEPPED) for k in EVERY),
    *((k, "perturb backward", "step", STEPPED) for k in (*NOISY, "losses")),
    *((k, "backward perturb backward", "step", STEPPED) for k in (*MIXED, *CLIMBING, "losses")),
    *((k, "perturb backward restore", "step", STEPPED) for k in NOISY),
    *((k, "backward perturb backward restore", "step", STEPPED) for k in (*MIXED, *CLIMBING)),
    *((k, "perturb backward restore backward", "step", STEPPED) for k in (*MIXED, "losses")),
    *((k, before, call, CLEAN) for k in EVERY for before in ("", "backward", "backward step") for call in UNFINISHED),
    *((k, "perturb restore", call, CLEAN) for k in (*NOISY, *MIXED) for call in UNFINISHED),
    *((k, "backward perturb restore", call, CLEAN) for k in CLIMBING for call in UNFINISHED),
]


@pytest.mark.parametrize(
    ("backend", "kind", "before", "call", "after"), backends(ALLOWED, same_code), indirect=["backend"]
)
def test_allowed(kind, before, call, after, backend):
    run = Calls(kind, backend).run(before)
    with run.opt.clean():
        clean = run.weights()
    run.run(call)
    assert run.opt.is_perturbed is (after == PERTURBED)
    assert same(run.weights(), clean) is (after == CLEAN)
    if after == STEPPED:
        assert run.opt.state


def test_without_a_method(backend):
    run = Training(None, backend=backend)
    with pytest.raises(RuntimeError, match="perturb="):
        run.opt.perturb()
    run.opt.restore()
    assert (run.opt.is_perturbed, run.opt.loss_weight) == (False, 1.0)
    with run.opt.clean():
        run.backward(0)
    run.opt.step()


@pytest.mark.parametrize("before", ["backward perturb backward", "backward perturb backward restore backward perturb"])
def test_restore_sets_the_gradient_aside(before, backend):
    """A pointer, no arithmetic; zero_grad() between rounds does not lose the sum, and step() takes its mean."""
    run = Calls("SAM", backend).run("backward perturb backward")
    first = run.net.head.grad
    run.run("restore")
    assert all(p.grad is None for p in run.parameters())
    run.run("zero backward perturb")
    assert run.net.head.grad is first
    run.run("backward step")
    other = Calls("SAM", backend).run("backward perturb backward restore backward perturb backward step")
    assert_same(run.weights(), other.weights())


def test_added_group_trains(backend):
    run = Calls("RWP", backend).run("perturb backward step zero")
    late = nn.Parameter(torch.ones(3, 2))
    run.opt.add_param_group({"params": [late], "lr": 0.5})
    expected = late.detach().clone()
    everybody = [*copies(run.net.parameters()), expected]
    flatkern.perturb_(everybody, 0.1, seed=SEED, stream=STREAM, round=1)
    run.opt.perturb()
    assert_same([late], [expected])
    late.sum().backward()
    run.run("step")
    assert not torch.equal(late, torch.ones(3, 2))


# --- G1: exact restore ----------------------------------------------------------------------------


CASES = backends(
    [(b, p) for b in BASES for p in PRECISIONS if (b, p) != ("Wrap", "bf16 masters")],  # Wrap has no masters of its own
    lambda base, precision: base == "SGD",
)


@pytest.mark.parametrize(("backend", "base", "precision"), CASES, indirect=["backend"])
@pytest.mark.parametrize("name", METHODS)
def test_learning_rate_zero_leaves_every_weight(name, base, precision, backend):
    """Bit for bit, and no parameter's memory is exchanged."""
    dtype, masters = PRECISIONS[precision]
    method = METHODS[name]
    for user in filter(None, (method.user, method.closure)):
        options = {"master_weights": True} if masters else {}
        run = Training(method.make(), base, dtype, lr=0.0, weight_decay=0.0, backend=backend, **options)
        memory = [p.data_ptr() for p in run.net.parameters()]
        train(run, user)
        run.opt.eval()
        assert run.saw_other_weights
        assert_same(run.weights(), run.start)
        assert [p.data_ptr() for p in run.net.parameters()] == memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_restore_is_exact_for_any_bits(kind, dtype, backend):
    """Negative zeros, subnormals, infinities and NaNs come back as they were."""
    odd = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, float("inf"), -float("inf"), float("nan"), 1.0])
    p, q = (nn.Parameter(t.to(dtype)) for t in (odd, torch.ones(2, 3)))
    before = [p.detach().clone(), q.detach().clone()]
    opt = flatkern.SGD([p, q], perturb=KINDS[kind], backend=backend)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    if kind in ("RWP", "ARWP"):
        opt.zero_grad()
    opt.perturb()
    opt.restore()
    assert_same([p, q], before)


# --- G8: neutral ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "base", "precision"), [case for case in CASES if case[2] != "fp16"], indirect=["backend"]
)
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.base])
def test_neutral(name, base, precision, backend):
    """sigma = 0 and rho = 0 are the plain base optimizer, bit for bit; `Wrap` is torch's."""
    dtype, masters = PRECISIONS[precision]
    method = METHODS[name]
    options = {"master_weights": True} if masters else {}
    strength = "rho" if "rho" in method.make().defaults else "sigma"
    run = Training(method.make(**{strength: 0.0}), base, dtype, backend=backend, **options)
    train(run, method.user)
    run.opt.eval()
    reference = Training(None, base, dtype, backend=backend, **options)
    if base == "Wrap":
        reference.opt = reference.opt.base
    for t in range(3):
        for index in (t,) if method.base == "one" else (2 * t, 2 * t + 1):
            reference.backward(index)
        for p in reference.net.parameters():
            if p.grad is not None and method.base == "mean":
                p.grad /= 2
        reference.opt.step()
        reference.opt.zero_grad()
    assert_same(run.weights(), reference.weights())
    assert not same(run.weights(), run.start)


@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW"])
def test_plain_is_torchs_within_rounding(base, backend):
    """A step's update is at most lr x 10; each of the six rounds a few dozen times in either library."""
    run = Training(None, base, backend=backend)
    train(run, plain, 6)
    other = Training(None, base)
    options = {"lr": 0.05, "weight_decay": 0.01} | ({"momentum": 0.9} if base == "SGD" else {})
    other.opt = getattr(torch.optim, base)(other.net.parameters(), **options)
    train(other, plain, 6)
    for a, b in zip(run.weights(), other.weights(), strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)


# --- the gradient of a step -----------------------------------------------------------------------


every_base = pytest.mark.parametrize(
    ("backend", "base"), backends(BASES, lambda base: base == "SGD"), indirect=["backend"]
)


@every_base
@pytest.mark.parametrize("name", ["m-RWP", "m-ARWP"])
def test_order_of_passes(name, base, backend):
    """Clean first and noisy first are the same step, bit for bit."""
    first = trained(name, backend, base=base)
    second = trained(METHODS[name].make(), backend, "m-RWP noisy first", base=base)
    assert_same(first.weights(), second.weights())
    assert_same_state(first.state(), second.state())


@pytest.mark.parametrize("precision", ["fp32", "bf16 masters"])
def test_lam_at_its_ends(precision, backend):
    """lam = 1 is RWP on the noisy batches, lam = 0 the plain optimizer on the clean ones."""
    dtype, masters = PRECISIONS[precision]
    options = {"dtype": dtype, "master_weights": masters, "backend": backend}
    for lam, method, passes in ((1.0, RWP, "odd"), (0.0, None, "even")):
        mixed = Training(noise(sigma=0.1, lam=lam), **options)
        mixed.net.explicit_zeros = True  # a gradient missing in one pass counts as zero, missing in the only one not
        train(mixed, METHODS["m-RWP"].user)
        one = Training(method, **options)
        one.net.explicit_zeros = True
        for t in range(3):
            if method:
                one.opt.perturb()
            one.backward(2 * t + (passes == "odd"))
            one.opt.step()
            one.opt.zero_grad()
        assert_same(mixed.weights(), one.weights())


@every_base
@pytest.mark.parametrize(("losses", "gradients"), [("m-RWP losses", "m-RWP"), ("m-RWP losses noisy first", "m-RWP"),
                                                   ("m-ARWP losses", "m-ARWP")])  # fmt: skip
def test_mix(losses, gradients, base, backend):
    """Weighting the losses is weighting the gradients, up to rounding."""
    beta = {"beta": 0.9} if "ARWP" in losses else {}
    by_losses = trained(METHODS[losses].make(**beta), backend, losses, base=base)
    by_gradients = trained(gradients, backend, base=base)
    for a, b in zip(by_losses.weights(), by_gradients.weights(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_loss_weight(backend):
    run = Training(noise(lam=0.3, mix="losses"), backend=backend)
    assert run.opt.loss_weight == 1 - 0.3
    with run.opt.perturbed():
        assert run.opt.loss_weight == 0.3
        with run.opt.clean():
            assert run.opt.loss_weight == 1 - 0.3
    run.opt.param_groups[0]["lam"] = 0.75
    assert run.opt.loss_weight == 0.25
    assert Training(RWP).opt.loss_weight == Training(SAM).opt.loss_weight == 1.0


@pytest.mark.parametrize("count", [2, 4])
def test_equal_shards(count, backend):
    """mSAM of K equal shards is SAM."""
    whole, shards = Training(SAM, backend=backend), Training(SAM, backend=backend)
    train(whole, METHODS["SAM"].user)
    for t in range(3):
        for _ in range(count):
            if shards.opt.is_perturbed:
                shards.opt.restore()
            shards.backward(t)
            shards.opt.perturb()
            shards.backward(t)
        shards.opt.step()
        shards.opt.zero_grad()
    assert_same(whole.weights(), shards.weights())


def final_gradient(kind, words, backend, lr=1.0):
    """What a step of SGD without momentum subtracts, divided by lr."""
    run = Calls(kind, backend)
    params = [p for p in run.net.parameters() if p.requires_grad]
    run.opt = flatkern.SGD(params, lr=lr, perturb=KINDS[kind], backend=backend)
    seen = []
    for word in words.split():
        earlier = [p.grad.clone() if p.grad is not None else 0 for p in params]
        run.run(word)
        if word == "backward":
            now = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
            seen.append([n - e for n, e in zip(now, earlier, strict=True)])
    before = [p for p, q in zip(run.start, run.net.parameters(), strict=True) if q.requires_grad]
    return [(b - p.detach()) / lr for b, p in zip(before, params, strict=True)], seen


@pytest.mark.parametrize("last", ["step", "restore step"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mean_over_rounds(count, last, backend):
    final, seen = final_gradient("RWP", "perturb backward restore " * (count - 1) + "perturb backward " + last, backend)
    for k, total in enumerate(final):
        assert torch.allclose(total, sum(g[k] for g in seen) / count, atol=1e-6)
    words = "backward perturb " + "backward restore perturb " * (count - 1) + "backward " + last
    final, (clean, *perturbed) = final_gradient("m-RWP", words, backend)
    for k, total in enumerate(final):
        mean = sum(g[k] for g in perturbed) / count
        assert torch.allclose(total, 0.3 * mean + 0.7 * clean[k], atol=1e-6)


@every_base
@pytest.mark.parametrize("name", ["RWP rounds", "ARWP rounds", "m-RWP", "m-RWP noisy first", "m-RWP losses", "mSAM"])
def test_missing_gradients(name, base, backend):
    """Missing in one pass is zero; missing in all: no decay, no momentum, no step count, as in torch."""
    # One of the batches 2t, 2t + 1 uses `sometimes` in steps 0 and 1, none uses `unused`.
    implicit = trained(name, backend, base=base, weight_decay=0.5, steps=2)
    explicit = trained(name, backend, base=base, weight_decay=0.5, steps=2, zeros=True)
    assert_same([implicit.net.sometimes, implicit.net.head], [explicit.net.sometimes, explicit.net.head])
    unused = [name for name, _ in implicit.net.named_parameters()].index("unused")
    assert_same([implicit.net.unused], [implicit.start[unused]])
    assert not same([explicit.net.unused], [explicit.start[unused]])
    assert {key for k, key in implicit.state() if k == unused} <= {"history"}


# A momentum of gradients tells a gradient of zeros from a missing one.
@pytest.mark.parametrize("name", [n for n in METHODS if "Momentum" not in n and "Friendly" not in n])
def test_gradients_zeroed_in_place(name, backend):
    """zero_grad(set_to_none=False): a pass that does not reach the first parameter has fresh gradients all the same."""
    runs = [Training(None) for _ in range(2)]
    for run in runs:
        params = sorted(run.net.parameters(), key=lambda p, first=run.net.sometimes: p is not first)
        # Without momentum and decay a gradient of zero does what a missing one does.
        run.opt = flatkern.SGD(params, lr=0.05, perturb=METHODS[name].make(), backend=backend)
        for p in params:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        run.opt.zero_grad(set_to_none=run is runs[0])
    runs[0].net.explicit_zeros = True
    for t in range(3):  # a third of the batches uses `sometimes`
        for run in runs:
            METHODS[name].user(run, t)
            run.opt.zero_grad(set_to_none=run is runs[0])
    for run in runs:
        run.opt.eval()
    assert_same(runs[0].weights(), runs[1].weights())


@pytest.mark.parametrize("kind", KINDS)
def test_missing_in_the_second_pass(kind, backend):
    """A weight that only the pass before perturb() used is clean after step(), and so is one that none used."""
    run = Calls(kind, backend)
    for g in run.opt.param_groups:
        g |= {"lr": 0.0, "weight_decay": 0.0}
    words = "perturb backward" if kind in ("RWP", "ARWP") else "backward perturb backward"
    run.run(words + " step")  # batch 0 uses `sometimes`, batch 1 does not
    assert_same(run.weights(), run.start)
