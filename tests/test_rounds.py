"""Several rounds before a step, while others clear the gradients: the mean of all rounds is kept, as if nobody had.

Gradients are small integers, rounds and weights powers of two, so that every order of summation gives the same bits.
"""

from itertools import product

import pytest
import torch
from compare import assert_same, copies, same
from patterns import backends
from torch import nn
from two_buckets import assert_same_run
from unchanged import frozen

import flatkern

RWP, MRWP = flatkern.RWP(sigma=0.1), flatkern.RWP(sigma=0.1, lam=0.5)
METHODS = {
    "RWP": RWP,
    "ARWP": flatkern.RWP(sigma=0.1, eta=1.0, beta=0.5),
    "m-RWP": MRWP,
    "m-ARWP": flatkern.RWP(sigma=0.1, lam=0.5, eta=1.0, beta=0.5),
    "SAM": flatkern.SAM(rho=0.25),
    "ASAM": flatkern.ASAM(rho=0.25),
}
PATTERNS = {  # of K rounds, "." where others clear; of m-RWP the clean gradient first, last, or between two rounds
    "RWP": lambda k: ". perturb . b restore " * (k - 1) + ". perturb . b",
    "m-RWP": lambda k: "b perturb b restore " + ". perturb . b restore " * (k - 2) + ". perturb . b",
    "noisy first": lambda k: "perturb b restore " + ". perturb . b restore " * (k - 1) + ". b",
    "between": lambda k: "perturb b restore . b " + "perturb . b restore " * (k - 2) + "perturb . b",
    "SAM": lambda k: "b perturb b restore " + ". b perturb . b restore " * (k - 2) + ". b perturb . b",
}
USED = [("RWP", "RWP"), ("ARWP", "RWP"), ("SAM", "SAM"), ("ASAM", "SAM")]
USED += [(name, pattern) for name in ("m-RWP", "m-ARWP") for pattern in ("m-RWP", "noisy first", "between")]


def all_to_none(run):
    for p in run.params:
        p.grad = None


def some_to_none(run):
    run.params[1].grad = None


def all_but_one_to_none(run):
    run.params[0].grad = run.params[2].grad = None


def module(run):
    run.net.zero_grad()


def another_optimizer(run):
    torch.optim.SGD(run.params, lr=0.1).zero_grad()


CLEARED_BY = (all_to_none, some_to_none, all_but_one_to_none, module, another_optimizer)


class Run:
    def __init__(self, name, rule, backend):
        self.net = nn.Module()
        self.net.a = nn.Parameter(torch.tensor([[0.5, 2.0], [1.0, -3.0]]))
        self.net.b = nn.Parameter(torch.tensor([1.0, 4.0, -2.0]))
        self.net.c = nn.Parameter(torch.tensor(3.0))
        self.params = list(self.net.parameters())
        groups = [{"params": self.params[:2], "momentum": 0.5}, {"params": self.params[2:]}]
        own = {"perturb": METHODS[name], "backend": backend}
        if rule == "Wrap":
            self.opt = flatkern.Wrap(torch.optim.SGD(groups, lr=0.5), **own)
        else:
            self.opt = flatkern.SGD(groups, lr=0.5, **own)
        self.passes = 0

    def backward(self):
        """A linear loss: its gradient does not depend on where the weights are."""
        self.passes += 1
        sum((p * (torch.arange(p.numel()).reshape(p.shape) + self.passes**2)).sum() for p in self.params).backward()

    def run(self, words, clear=None):
        for word in words.split():
            if word == "b":
                self.backward()
            elif word != ".":
                getattr(self.opt, word)()
            elif clear is not None:
                clear(self)
        return self

    def weights(self):
        return copies(self.params)


def gradient(run):
    """What a step with lr 0.5 has subtracted; the first step has no momentum yet."""
    start = Run("RWP", "SGD", None).weights()
    return [(a - b) / 0.5 for a, b in zip(start, run.weights(), strict=True)]


@pytest.mark.parametrize(
    ("backend", "name", "pattern", "rule", "count", "end"),
    backends([(*used, *row) for used in USED for row in product(("SGD", "Wrap"), (2, 4), ("step", "restore step"))],
             lambda name, pattern, rule, count, end: (rule, count, end) == ("SGD", 2, "step")),
    indirect=["backend"],
)  # fmt: skip
def test_the_mean_of_all_rounds(name, pattern, rule, count, end, backend):
    """Bit for bit, momentum and ARWP's history included, whether the last round ends in step() or before it."""
    words = f"{PATTERNS[pattern](count)} {end}"
    runs = {clear: Run(name, rule, backend) for clear in (None, *CLEARED_BY)}
    for clear, run in runs.items():
        for _ in range(2):
            run.run(words, clear).opt.zero_grad()
    untroubled = frozen([runs[None].weights(), runs[None].opt.state_dict()])
    others = {c.__name__: frozen([runs[c].weights(), runs[c].opt.state_dict()]) for c in CLEARED_BY}
    assert not [name for name, result in others.items() if result != untroubled]


@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
@pytest.mark.parametrize("clear", CLEARED_BY)
def test_by_hand(clear, rule, backend):
    """1, 4, 9, 16 for the 0-D weight: their mean is subtracted, not the last one."""
    run = Run("RWP", rule, backend).run(PATTERNS["RWP"](4) + " step", clear)
    expected = [(torch.arange(p.numel()).reshape(p.shape) + (1 + 4 + 9 + 16) / 4) for p in run.params]
    assert_same(gradient(run), expected)


@pytest.mark.parametrize("clear", CLEARED_BY)
@pytest.mark.parametrize("name", ["RWP", "SAM"])
def test_a_round_without_a_gradient(name, clear, backend):
    """Cleared, and no backward afterwards: it does not count, and what came before stays."""
    first = "b " * (name == "SAM")
    words = f"{first}perturb b restore {first}perturb . restore {first}perturb . b step"
    run, untroubled = Run(name, "SGD", backend).run(words, clear), Run(name, "SGD", backend).run(words)
    assert_same_run(run, untroubled)
    moved = gradient(run)[2].item()
    assert moved == ((1 + 4) / 2 if name == "RWP" else (2**2 + 5**2) / 2)


@pytest.mark.parametrize("clear", CLEARED_BY)
@pytest.mark.parametrize("name", ["RWP", "m-RWP", "SAM"])
def test_restore_is_the_way_back(name, clear, backend):
    """It never raises, the weights are exact, and release() drops what waits."""
    run = Run(name, "SGD", backend)
    clean = run.weights()
    first = "b " * (name != "RWP")
    again = "b " * (name == "SAM")
    run.run(f"{first}perturb b restore {again}perturb . b . restore", clear)
    assert not run.opt.is_perturbed
    assert_same(run.weights(), clean)
    with pytest.raises(RuntimeError, match=r"release\(\)"):
        run.opt.state_dict()
    run.opt.release()
    run.opt.zero_grad()
    run.opt.state_dict()
    run.run(f"{first}perturb b step")
    assert not same(run.weights(), clean)


@pytest.mark.parametrize("clear", CLEARED_BY)
def test_an_exception_in_a_later_round(clear, backend):
    """The rounds before it still make the step, whoever cleared the gradients since."""
    run, untroubled = (Run("RWP", "SGD", backend).run("perturb b restore") for _ in range(2))
    with pytest.raises(ZeroDivisionError), run.opt.perturbed():
        clear(run)
        raise ZeroDivisionError
    for r in (run, untroubled):
        r.run("step")
    assert_same(run.weights(), untroubled.weights())
    assert not same(run.weights(), Run("RWP", "SGD", backend).weights())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["RWP", "m-RWP", "SAM"])
def test_zeroing_between_rounds(name, set_to_none, backend):
    """While restore() holds the sum there is nothing in `.grad` that could be zeroed."""
    first, again = "b " * (name != "RWP"), "b " * (name == "SAM")
    words = f"{first}perturb b restore . {again}perturb b restore . {again}perturb b step"
    run = Run(name, "SGD", backend).run(words, lambda r: r.net.zero_grad(set_to_none=set_to_none))
    assert_same_run(run, Run(name, "SGD", backend).run(words))


@pytest.mark.parametrize("name", ["RWP", "SAM"])
def test_accumulation_inside_a_round_is_untouched(name, backend):
    """Two backward passes of one round, with nobody who clears: one round, the sum of both."""
    first = "b " * (name == "SAM")
    run = Run(name, "SGD", backend).run(f"{first}perturb b b restore {first}perturb b b step")
    squares = [k**2 for k in range(1, run.passes + 1)]
    expected = sum(squares) / 2 if name == "RWP" else (squares[1] + squares[2] + squares[4] + squares[5]) / 2
    assert gradient(run)[2].item() == expected


def test_gradients_are_where_users_look(backend):
    """After a round that was cleared, `.grad` is what the last backward put there: nothing is added behind its back."""
    run = Run("RWP", "SGD", backend).run("perturb b restore perturb . b", all_to_none)
    assert frozen(run.params[2].grad) == frozen(torch.tensor(4.0))
