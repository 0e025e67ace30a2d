"""step(closure): torch's convention, as many calls as the method needs, clean weights however a closure ends."""

import warnings

import pytest
import torch
from compare import assert_same, assert_same_state, same
from patterns import BASES, METHODS, Training, backends, noise, train
from torch.optim.lr_scheduler import StepLR

import flatkern

WITH_CLOSURE = ("RWP", "ARWP", "m-RWP", "m-ARWP", "rolling", "rolling ARWP", "SAM", "ASAM", "mSAM")
CALLS = {"SAM": 2, "ASAM": 2}  # of one closure; the others call it once
PASSES = {"m-RWP": [0, 1], "m-ARWP": [0, 1], "mSAM": [0, 0, 1, 1]}


def batches(name):
    """What the closures of step 0 are called on."""
    return PASSES.get(name, [0] * CALLS.get(name, 1))


class Closures(Training):
    """Records the batches that closures met, whether at clean weights, and what they returned."""

    def __init__(self, name, backend, **options):
        super().__init__(METHODS[name].make() if name else None, backend=backend, **options)
        self.calls = []
        self.failing = None  # number of the call that raises, after its backward
        self.error = ZeroDivisionError

    def closure(self, index):
        call = super().closure(index)

        def recorded():
            loss = call()
            self.calls.append((index, self.opt.is_perturbed, loss))
            if len(self.calls) - 1 == self.failing:
                raise self.error
            return loss

        return recorded


@pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends([(name, base) for name in WITH_CLOSURE for base in BASES], lambda name, base: base == "SGD"),
    indirect=["backend"],
)
def test_closure_is_the_pattern(name, base, backend):
    """Bit for bit the explicit calls."""
    explicit, closures = (Training(METHODS[name].make(), base, backend=backend) for _ in range(2))
    train(explicit, METHODS[name].user)
    for t in range(3):
        METHODS[name].closure(closures, t)  # the optimizer clears gradients itself, also those of the last step
    assert_same(explicit.weights(), closures.weights())
    assert_same_state(explicit.state(), closures.state())
    assert explicit.opt.param_groups[0].get("round") == closures.opt.param_groups[0].get("round")


@pytest.mark.parametrize("name", [None, *WITH_CLOSURE])
def test_calls(name, backend):
    """How often, on which batch, at which weights, with gradients enabled; the loss returned is the clean one."""
    run = Closures(name, backend)
    closure = METHODS[name].closure if name else METHODS["SAM"].closure
    with torch.no_grad():
        loss = closure(run, 0)
    assert [index for index, *_ in run.calls] == batches(name)
    clean = [loss for _, perturbed, loss in run.calls if not perturbed]
    if name in ("RWP", "ARWP"):
        assert not clean
        assert loss == run.calls[0][2]
    else:
        assert len(clean) == max(1, len(run.calls) // 2)
        assert torch.equal(torch.as_tensor(loss), sum(clean) / len(clean))
    assert not run.opt.is_perturbed or run.opt.rolling
    assert run.opt.step(closure=None) is None


@pytest.mark.parametrize("name", ["m-RWP", "m-ARWP", "SAM", "mSAM"])
def test_one_closure_for_all_passes(name, backend):
    """m-RWP with one closure takes both gradients on its batch; a list of one shard is SAM."""
    run, other = Closures(name, backend), Closures(name, backend)
    loss = run.opt.step(run.closure(4))
    assert loss == run.calls[0][2]
    assert [perturbed for _, perturbed, _ in run.calls] == [False, True]
    shards = [other.closure(4)] * (2 if "RWP" in name else 1)
    assert other.opt.step(shards) == loss
    assert_same(run.weights(), other.weights())


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("name", ["SAM", "ASAM"])
def test_shards(name, shards, backend):
    """Each closure twice; the mean of the losses at clean weights; the same as the explicit rounds."""
    run, explicit = Closures(name, backend), Training(METHODS[name].make(), backend=backend)
    losses = []
    for k in range(shards):
        if k:
            explicit.opt.restore()
        losses.append(explicit.backward(k))
        explicit.opt.perturb()
        explicit.backward(k)
    explicit.opt.step()
    loss = run.opt.step([run.closure(k) for k in range(shards)])
    assert torch.allclose(torch.as_tensor(loss), sum(losses) / shards)
    assert [index for index, *_ in run.calls] == [k for k in range(shards) for _ in (0, 1)]
    assert_same(run.weights(), explicit.weights())


def test_shards_that_lose_the_sum(backend):
    """model.zero_grad() in a later shard's closure throws the gradients of the earlier ones away: refused."""
    run = Closures("SAM", backend)

    def shard(index):
        def call():
            run.net.zero_grad()
            return run.backward(index)

        return call

    with pytest.raises(RuntimeError, match=r"opt\.zero_grad\(\)"):
        run.opt.step([shard(0), shard(1)])
    assert_same(run.weights(), run.start)
    assert not run.opt.state
    run.opt.zero_grad()
    run.opt.step([run.closure(0), run.closure(1)])
    assert not same(run.weights(), run.start)


@pytest.mark.parametrize("name", [None, "RWP", "SAM", "m-RWP", "rolling"])
def test_one_batch_with_model_zero_grad(name, backend):
    """Where nothing is summed up between calls it does not matter who clears the gradients, or that nobody does."""
    runs = [Training(METHODS[name].make() if name else None, backend=backend) for _ in range(3)]
    clears = [runs[0].opt.zero_grad, runs[1].net.zero_grad, lambda: None]
    for run, clear in zip(runs, clears, strict=True):

        def call(run=run, clear=clear):
            clear()
            return run.backward(run.passes)

        for _ in range(2):
            run.opt.step(call)
            run.opt.zero_grad() if name is None else None
        run.opt.eval()
    assert_same(runs[0].weights(), runs[1].weights())
    assert_same(runs[0].weights(), runs[2].weights())


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", [None, "RWP", "m-RWP", "SAM", "rolling"])
def test_gradients_on_entry(name, base, backend):
    """A closure that adds nothing is step(). One that adds is refused, but where all gradients of a step are taken at
    the same weights: there the earlier ones count, as under trainers that accumulate."""
    user = METHODS[name].user if name else METHODS["rolling"].user
    run, other = Closures(name, backend, base=base), Closures(name, backend, base=base)
    other.step = lambda: other.opt.step(lambda: 3.5)
    for r in (run, other):
        train(r, user)
    assert_same(run.weights(), other.weights())
    assert_same_state(run.state(), other.state())

    clean = run.clean_weights()
    for r in (run, other):
        r.step = lambda: None
        user(r, 5)
    if name in (None, "rolling"):
        loss = run.opt.step(lambda: run.backward(6))
        assert loss == other.backward(6)
        other.opt.step()
        assert_same(run.weights(), other.weights())
        return
    with pytest.raises(RuntimeError, match="zero_grad"):
        run.opt.step(lambda: run.backward(6))
    run.opt.eval()
    assert_same(run.weights(), clean)


@pytest.mark.parametrize("name", [None, "RWP", "m-RWP", "SAM", "rolling"])
def test_closure_raises_with_gradients_on_entry(name, backend):
    run = Closures(name, backend)
    user = METHODS[name].user if name else METHODS["rolling"].user
    train(run, user, 2)
    clean = run.clean_weights()
    run.step = lambda: None
    user(run, 2)
    with pytest.raises(ZeroDivisionError):
        run.opt.step(lambda: 1 / 0)
    assert_same(run.weights(), clean)
    assert not run.opt.is_perturbed


@pytest.mark.parametrize("name", ["SAM", "m-RWP", "RWP"])
def test_perturbed_on_entry(name, backend):
    """From PERTURBED a closure is the perturbed pass, called once."""
    run, explicit = Closures(name, backend), Training(METHODS[name].make(), backend=backend)
    for r in (run, explicit):
        if name != "RWP":
            r.backward(0)
        r.opt.perturb()
    loss = run.opt.step(run.closure(1))
    assert explicit.backward(1) == loss
    explicit.opt.step()
    assert [(index, perturbed) for index, perturbed, _ in run.calls] == [(1, True)]
    assert_same(run.weights(), explicit.weights())


HOW = [({}, KeyboardInterrupt), ({"dtype": torch.bfloat16, "master_weights": True}, ZeroDivisionError),
       ({"base": "Wrap"}, KeyboardInterrupt)]  # fmt: skip
FAILURES = backends(
    [(name, k, *how) for name in WITH_CLOSURE for k in range(len(batches(name))) for how in HOW],
    lambda name, failing, options, error: not options,
)


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(("backend", "name", "failing", "options", "error"), FAILURES, indirect=["backend"], ids=str)
def test_closure_raises(name, failing, options, error, backend):
    """At any call: clean weights, nothing pending, and the step can be done again as if the failed one had not been."""
    run, untroubled = Closures(name, backend, **options), Closures(name, backend, **options)
    for r in (run, untroubled):
        train(r, METHODS[name].closure, 2)
        r.calls.clear()
    clean, state = run.clean_weights(), run.state()
    run.failing, run.error = failing, error
    with pytest.raises(error):
        METHODS[name].closure(run, 2)
    assert len(run.calls) == failing + 1
    assert not run.opt.is_perturbed
    assert_same(run.weights(), clean)
    assert_same_state(run.state(), state)
    run.opt.state_dict()
    run.failing = None
    for r in (run, untroubled):
        r.opt.train()
        for group in r.opt.param_groups:
            if "round" in group and not r.opt.rolling:
                group["round"] = 9
        train(r, METHODS[name].closure, 2, start=3)
        r.opt.eval()
    assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("name", [None, *WITH_CLOSURE])
def test_closure_with_a_scaler(name, backend):
    """The gradients would be scaled after the scaler has looked for infinities: refused, and training goes on."""
    run, untroubled = (Closures(name, backend, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)) for _ in range(2))
    run.backward(0)
    with pytest.raises(RuntimeError, match=r"scaler\.step\(opt\) without closure"):
        run.scaler.step(run.opt, run.closure(1))
    assert not run.calls
    assert_same(run.weights(), run.start)
    run.opt.zero_grad()
    run.scaler.update()
    for r in (run, untroubled):
        train(r, METHODS[name or "rolling"].user)
    assert_same(run.weights(), untroubled.weights())


@pytest.mark.parametrize("name", [None, *WITH_CLOSURE])
def test_a_closure_that_runs_no_backward_applies_nothing(name, backend):
    """Trainers skip a batch so. As for torch's optimizers nothing happens, weights are clean, and training goes on."""
    run = Closures(name, backend)
    METHODS[name].closure(run, 0) if name else run.opt.step(run.closure(0))
    with run.opt.clean():
        before, state = run.weights(), run.state()
    for answer in (None, 0.5):
        assert run.opt.step(lambda answer=answer: answer) == answer
        with run.opt.clean():
            assert_same(run.weights(), before)
            assert_same_state(run.state(), state)
    METHODS[name].closure(run, 1) if name else run.opt.step(run.closure(1))
    run.opt.eval()
    assert not same(run.weights(), before)


@pytest.mark.parametrize("name", [None, *WITH_CLOSURE])
def test_schedulers_do_not_warn(name, backend):
    """However often a step calls itself, a scheduler counts one."""
    run = Closures(name, backend)
    scheduler = StepLR(run.opt, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "ASAM scales.*names are unknown")
        for t in range(2):
            (METHODS[name].closure if name else METHODS["SAM"].closure)(run, t)
            scheduler.step()
    assert run.opt.param_groups[0]["lr"] == 0.05 / 4


def test_losses_are_weighted_by_the_loop(backend):
    """mix="losses" cannot be run by step(closure), which does not know the loss: refused, as are closures too many."""
    run = Training(noise(lam=0.5, mix="losses"), backend=backend)
    with pytest.raises((RuntimeError, ValueError), match="losses"):
        run.opt.step(run.closure(0))
    for perturb, count in ((noise(), 2), (None, 2), (noise(rolling=True), 2), (noise(lam=0.5), 3), (flatkern.SAM(), 0)):
        run = Training(perturb, backend=backend)
        with pytest.raises((TypeError, ValueError), match="closure"):
            run.opt.step([run.closure(0)] * count)
        assert run.passes == 0
        assert_same(run.weights(), run.start)
    with pytest.raises(TypeError, match="closure"):
        run.opt.step(3)


@pytest.mark.parametrize("closures", [3, [], ["x"], 4])
@pytest.mark.parametrize("before", ["gradients", "perturbed", "perturbed gradients"])
@pytest.mark.parametrize("name", ["RWP", "SAM", "m-RWP"])
def test_wrong_arguments_change_nothing(name, before, closures, backend):
    """Neither the gradients nor the perturbation that are there: the step can be finished."""
    run, untroubled = (Training(METHODS[name].make(), backend=backend) for _ in range(2))
    wrong = [run.closure(0)] * closures if closures == 4 else closures
    for r in (run, untroubled):
        if name != "RWP":
            r.backward(0)
        if "perturbed" in before or name == "RWP":
            r.opt.perturb()
        if "perturbed gradients" in before or name == "RWP":
            r.backward(0)
        if r is run:
            weights = run.weights()
            with pytest.raises((TypeError, ValueError), match="closure"):
                run.opt.step(wrong)
            assert_same(run.weights(), weights)
            assert run.opt.is_perturbed is ("perturbed" in before or name == "RWP")
        if not r.opt.is_perturbed:
            r.opt.perturb()
        r.backward(1)
        r.opt.step()
    assert_same(run.weights(), untroubled.weights())
