"""rounds="sum": losses that a trainer has divided by the number of passes give the step of losses that nobody divided.

The reference has rounds="mean" and every loss divided by the number of passes of its own kind, clean or noisy.
"""

import copy
import gc
import pickle

import pytest
import torch
from compare import assert_same, same
from patterns import Training, backends
from torch import nn
from torch.utils.checkpoint import checkpoint
from unchanged import refused

import flatkern

MRWP = {"sigma": 0.1, "lam": 0.3, "seed": 7}
MARWP = MRWP | {"eta": 2.0, "beta": 0.9}
# What one step does: "c" a clean pass, "n" a noisy one, "p" perturb(), "r" restore().
STEPS = ["cpn", "ccpn", "cpnnn", "cccpnn", "pnrc", "pnnrcc", "pnrpnnrc", "cpnrpnn", "pnrcpn"]


def counted(step):
    return step.count("c"), step.count("n")


def run_step(run, step, t, divisors):
    """One step, its passes on batches of their own; each loss is divided by that of `divisors` for its kind."""
    for k, what in enumerate(step):
        if what == "p":
            run.perturb()
        elif what == "r":
            run.opt.restore()
        else:
            run.backward(len(step) * t + k, 1.0 / divisors[what == "n"])
    run.step()
    run.opt.zero_grad()


def trained(method, step, steps=3, passes=None, **options):
    """`method` with rounds="sum" and divided losses, and with rounds="mean" and losses that make means of passes."""
    runs = []
    n1, n2 = counted(step)
    noisy_rounds = step.count("p")
    for rounds, divisors in (("sum", (n1 + n2, n1 + n2)), ("mean", (n1, n2 / noisy_rounds))):
        run = Training(flatkern.RWP(**method, rounds=rounds), **options)
        for t in range(steps):
            if passes and rounds == "sum":
                run.opt.passes = passes
            run_step(run, step, t, divisors)
        runs.append(run)
    return runs


def assert_same_training(run, other):
    """Sums of the same gradients in the same order, but divided by other numbers: an ulp or two per step."""
    torch.testing.assert_close(run.weights(), other.weights(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.state(), other.state(), rtol=1e-4, atol=1e-6)
    assert not same(run.weights(), run.start)


@pytest.mark.parametrize(
    ("backend", "step", "base"),
    backends([(s, b) for s in STEPS for b in ("SGD", "AdamW", "Wrap")], lambda s, b: s == "cccpnn" and b != "AdamW"),
    indirect=["backend"],
)
def test_m_rwp_of_divided_losses(step, base, backend):
    """Weights, moments, and the history, which sees the mean gradient of the noisy passes."""
    assert_same_training(*trained(MARWP, step, base=base, backend=backend))


@pytest.mark.parametrize("step", ["cpn", "cccpnn", "pnnrc"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_m_rwp_of_divided_losses_under_a_scaler(step, max_grad_norm, backend):
    """The scale cancels, and the norm that is clipped is of the mixed gradient."""
    scaler = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6) for _ in range(2)]
    scaled, plain = (
        trained(MARWP, step, backend=backend, scaler=s, max_grad_norm=max_grad_norm) for s in (scaler[0], None)
    )
    assert_same_training(*plain)
    assert_same_training(scaled[0], plain[0])
    if max_grad_norm:
        torch.testing.assert_close(scaled[0].opt.grad_norm, plain[1].opt.grad_norm, rtol=1e-5, atol=0)
        assert scaled[0].opt.grad_norm > max_grad_norm


def test_maximize_negates_both_means(backend):
    ends = []
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        run = Training(flatkern.RWP(**MRWP, rounds="sum"), backend=backend)
        run.opt.param_groups[0]["maximize"] = maximize
        for k in (0, 1):
            run.backward(k, sign / 3)
        run.perturb()
        run.backward(2, sign / 3)
        run.step()
        ends.append(run.weights())
    assert_same(*ends)


@pytest.mark.parametrize("method", ["SAM", "ASAM", "RWP", "ARWP"])
@pytest.mark.parametrize("end", ["step", "restore"])
def test_rounds_of_divided_losses(method, end, backend):
    """Four rounds of a quarter each are the mean of four, bit for bit: a quarter is exact."""
    methods = {
        "SAM": lambda rounds: flatkern.SAM(0.3, rounds=rounds),
        "ASAM": lambda rounds: flatkern.ASAM(0.6, rounds=rounds),
        "RWP": lambda rounds: flatkern.RWP(0.1, rounds=rounds),
        "ARWP": lambda rounds: flatkern.RWP(0.1, eta=2.0, rounds=rounds),
    }
    runs = [Training(methods[method](rounds), backend=backend) for rounds in ("sum", "mean")]
    for run, weight in zip(runs, (0.25, 1.0), strict=True):
        for t in range(2):
            for k in range(4):
                if "SAM" in method:
                    run.backward(4 * t + k, weight)
                run.perturb()
                run.backward(4 * t + k, weight)
                if k < 3 or end == "restore":
                    run.opt.restore()
            run.step()
            run.opt.zero_grad()
    torch.testing.assert_close(runs[0].weights(), runs[1].weights(), rtol=1e-6, atol=1e-6)
    assert same(runs[0].state().values(), runs[1].state().values()) or "SAM" in method


def test_one_draw_for_accumulated_noisy_passes_is_no_round(backend):
    """RWP: what is accumulated between perturb() and step() is added up, whatever `rounds` is."""
    ends = []
    for rounds in ("mean", "sum"):
        run = Training(flatkern.RWP(0.1, rounds=rounds), backend=backend)
        run.perturb()
        for k in range(2):
            run.backward(k, 0.5)
        run.step()
        ends.append(run.weights())
    assert_same(*ends)


def test_rolling_has_no_rounds(backend):
    ends = []
    for rounds in ("mean", "sum"):
        run = Training(flatkern.RWP(0.1, rolling=True, rounds=rounds), backend=backend)
        for t in range(3):
            run.backward(2 * t, 0.5)
            run.backward(2 * t + 1, 0.5)
            run.step()
            run.opt.zero_grad()
        ends.append(run.weights())
    assert_same(*ends)


def test_closures_have_divided_their_losses(backend):
    """mSAM's list of closures: the loss that is returned is the sum, too."""
    losses, ends = [], []
    for rounds, divisor in (("mean", 1), ("sum", 2)):
        run = Training(flatkern.SAM(0.3, rounds=rounds), backend=backend)

        def closure(index, run=run, divisor=divisor):
            def call():
                run.opt.zero_grad()
                return run.backward(index, 1 / divisor) / divisor

            return call

        losses.append(run.opt.step([closure(0), closure(1)]))
        ends.append(run.weights())
    assert losses[0] == losses[1]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_two_closures_of_m_rwp(backend):
    run, other = (Training(flatkern.RWP(**MRWP, rounds=r), backend=backend) for r in ("sum", "mean"))

    def halved(index):
        def call():
            run.opt.zero_grad()
            return run.backward(index, 0.5)

        return call

    run.opt.step([halved(0), halved(1)])
    other.opt.step([other.closure(0), other.closure(1)])
    assert_same(run.weights(), other.weights())


# --- counting ---------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Parameters that are used as `names` says."""

    def __init__(self):
        super().__init__()
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.tensor([1.0, 2.0])))

    def backward(self, names, divisor=1.0, **options):
        (sum(getattr(self, name).square().sum() for name in names) / divisor).backward(**options)


def parts(**own):
    torch.manual_seed(0)
    net = Parts()
    return net, flatkern.SGD(net.parameters(), lr=1.0, perturb=flatkern.RWP(sigma=0.0, lam=0.5, rounds="sum"), **own)


def moved(net):
    return {name: float(1.0 - p.detach()[0]) for name, p in net.named_parameters()}


def test_passes_that_reach_some_parameters():
    """Every pass reaches `a`: three clean ones, of which `b` is in one, and one noisy one with `c`."""
    net, opt = parts()
    for names in ("a", "ab", "a"):
        net.backward(names, 4)
    opt.perturb()
    net.backward("ac", 4)
    opt.step()
    assert moved(net) == pytest.approx({"a": 2.0, "b": 0.5 * 2 / 3, "c": 0.5 * 2})


NOT_COUNTED = {
    "assigned": lambda net: [setattr(p, "grad", torch.ones(2)) for p in net.parameters()],
    "no parameter in both": lambda net: (net.backward("a"), net.backward("bc")),
    "written between two": lambda net: (net.backward("abc"), net.a.grad.mul_(2), net.backward("abc")),
    "create_graph": lambda net: [net.backward("abc", create_graph=True) for _ in range(2)],
}


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
@pytest.mark.parametrize("place", ["clean", "noisy"])
@pytest.mark.parametrize("case", NOT_COUNTED)
def test_what_cannot_be_counted_is_refused_and_then_told(case, place):
    net, opt = parts()
    first, second = NOT_COUNTED[case], lambda net: net.backward("abc")
    if place == "noisy":
        first, second = second, first
    first(net)
    opt.perturb()
    second(net)
    with refused(RuntimeError, f"{place}.*opt.passes", net.parameters(), opt):
        opt.step()
    opt.passes = (1, 1)
    opt.step()
    assert opt.passes is None
    assert not any(torch.equal(p, torch.tensor([1.0, 2.0])) for p in net.parameters())


def test_what_is_told_counts():
    net, opt = parts()
    net.backward("abc", 4)
    net.backward("abc", 4)  # a pass of two losses
    opt.passes = (1, 3)
    opt.perturb()
    for _ in range(3):
        net.backward("abc", 4)
    opt.step()
    assert moved(net)["a"] == pytest.approx(0.5 * 4 * (4 / 4) + 0.5 * 2)


CLEARED = {
    "zero_grad": lambda net, opt: opt.zero_grad(),
    "zero_grad in place": lambda net, opt: opt.zero_grad(set_to_none=False),
    "of the model": lambda net, opt: net.zero_grad(),
    "by hand": lambda net, opt: [setattr(p, "grad", None) for p in net.parameters()],
}


@pytest.mark.parametrize("place", ["before", "clean", "noisy"])
@pytest.mark.parametrize("case", CLEARED)
def test_passes_that_were_dropped_do_not_count(case, place):
    """A window that a trainer gives up, and starts again."""
    net, opt = parts()
    for t in range(2):
        if t == 0 and place == "before":
            net.backward("ab", 4)
            CLEARED[case](net, opt)
        net.backward("abc", 4)
        if t == 0 and place == "clean":
            CLEARED[case](net, opt)
            net.backward("abc", 4)
        opt.perturb()
        if t == 0 and place == "noisy":
            net.backward("ac", 4)
            CLEARED[case](net, opt)
        for _ in range(3):
            net.backward("abc", 4)
        opt.step()
        CLEARED[case](net, opt)
        assert moved(net)["a"] == pytest.approx(0.0 if t else 2.0)  # to -1, and back


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models(reentrant):
    """A pass whose segments are backwards of their own is not counted twice: it is told, or the step refuses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    ends = []
    for method in (flatkern.RWP(0.1, lam=0.5), flatkern.RWP(0.1, lam=0.5, rounds="sum")):
        model = copy.deepcopy(net)
        opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=method)
        x = torch.ones(2, 3, requires_grad=True)

        def backward(divisor, model=model, x=x):
            out = x
            for layer in model:
                out = checkpoint(layer, out, use_reentrant=reentrant)
            (out.square().mean() / divisor).backward()

        summed = method.rounds == "sum"
        backward(2 if summed else 1)
        opt.perturb()
        backward(2 if summed else 1)
        if summed and reentrant:
            with pytest.raises(RuntimeError, match=r"opt\.passes"):
                opt.step()
            opt.passes = (1, 1)
        opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert_same(*ends)


def test_parameters_that_were_frozen_count_from_the_next_perturb():
    net = Parts().requires_grad_(False)
    opt = flatkern.SGD(net.parameters(), lr=1.0, perturb=flatkern.RWP(0.0, lam=0.5, rounds="sum"))
    net.requires_grad_(True)
    net.backward("abc", 2)
    opt.perturb()
    net.backward("abc", 2)
    with pytest.raises(RuntimeError, match=r"clean.*opt\.passes"):
        opt.step()
    opt.restore()
    opt.release()
    opt.zero_grad()
    net.backward("abc", 2)
    opt.perturb()
    net.backward("abc", 2)
    opt.step()
    assert moved(net)["a"] == pytest.approx(2.0)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("rule", ["SGD", "Wrap"])
def test_a_copy_counts(how, rule):
    net = Parts()
    method = flatkern.RWP(0.0, lam=0.5, rounds="sum")
    if rule == "Wrap":
        opt = flatkern.Wrap(torch.optim.SGD(net.parameters(), lr=1.0), perturb=method)
    else:
        opt = flatkern.SGD(net.parameters(), lr=1.0, perturb=method)
    net, opt = how((net, opt))
    net.backward("abc", 2)
    opt.perturb()
    net.backward("abc", 2)
    opt.step()
    assert moved(net)["a"] == pytest.approx(2.0)


def test_hooks_go_with_the_optimizer():
    net, opt = parts()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in net.parameters())
    net.backward("abc")
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    plain = flatkern.SGD(net.parameters(), lr=1.0, perturb=flatkern.RWP(0.1, lam=0.5))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    del plain


def test_counting_keeps_no_gradient_alive():
    import weakref

    net, opt = parts()
    net.backward("abc")
    grad = weakref.ref(net.a.grad)
    net.zero_grad()
    assert grad() is None
    assert opt.passes is None


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [flatkern.RWP, flatkern.SAM, flatkern.ASAM])
@pytest.mark.parametrize("value", ["sums", None, 2])
def test_bad_rounds(make, value):
    with pytest.raises(ValueError, match=f"{make.__name__}: rounds is {value!r}.*mean.*sum"):
        make(rounds=value)


def test_rounds_that_loss_weights_take_care_of():
    with pytest.raises(ValueError, match=r"RWP: rounds=.sum. .*'losses'.*loss_weight"):
        flatkern.RWP(lam=0.5, mix="losses", rounds="sum")


def test_other_arguments_keep_their_places():
    assert flatkern.ASAM(0.5, 0.1, True) == flatkern.ASAM(rho=0.5, eta=0.1, all_tensors=True, rounds="mean")


BAD_PASSES = [(3, TypeError), ((1,), TypeError), ((1, 2, 3), TypeError), ((0, 1), ValueError), ((1, -1), ValueError),
              ((1.0, 1), ValueError), ((True, 1), ValueError)]  # fmt: skip


@pytest.mark.parametrize(("value", "error"), BAD_PASSES)
def test_bad_passes(value, error):
    _, opt = parts()
    opt.passes = (2, 3)
    with pytest.raises(error, match="passes"):
        opt.passes = value
    assert opt.passes == (2, 3)
    opt.passes = None
    assert opt.passes is None


@pytest.mark.parametrize(
    "method", [None, flatkern.SAM(rounds="sum"), flatkern.RWP(rounds="sum"), flatkern.RWP(lam=0.5)], ids=str
)
def test_methods_that_do_not_count(method):
    opt = flatkern.SGD(Parts().parameters(), lr=0.1, perturb=method)
    with pytest.raises(RuntimeError, match="rounds="):
        opt.passes = (1, 1)
    assert opt.passes is None
