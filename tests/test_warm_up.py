"""warm_up(): nothing is left to compile after it, it changes nothing, and it says what it does."""

import gc
import logging
import sys
import warnings

import pytest
import torch
import warming
from covering import also_of
from torch.optim.optimizer import register_optimizer_step_pre_hook
from warming import FEW, IRE, RWP, SAM, backward, make, parameters, train

import flatkern
from flatkern import dispatch, selection
from flatkern.compilation import jobs_of, recording
from flatkern.optim import external_writes

driver, on_the_cpu, loads = warming.driver, warming.on_the_cpu, warming.loads
job, launch, perturb, triton = warming.job, warming.launch, warming.perturb, warming.triton


def remembered():
    return {name: (dict(cache.last_calls), dict(cache.plans.found)) for name, cache in launch._caches.items()}


COMPILED = {
    "m-RWP": ("SGD, momentum", "m-RWP", dict(clip=True), FEW),
    "rolling ARWP, scaled": ("AdamW", "rolling ARWP", dict(scaled=True), [(7,)]),
    "rolling RWP, long rows": ("SGD", "rolling RWP", dict(capturable=True), [(2, 8200)]),
    "IRE": ("Adam", "IRE", dict(half=(torch.bfloat16,), masters=True), [(24,)]),
    "mSAM around another base": ("Wrap", "ASAM", dict(rounds=2), [(7,)]),
}


@pytest.mark.parametrize(
    "base, method, options, shapes", also_of(COMPILED, {"rolling RWP, long rows", "IRE", "mSAM around another base"})
)
def test_nothing_is_left_to_compile(base, method, options, shapes, driver, loads, monkeypatch):
    """A training after warm_up() launches compiled kernels, and no job is one of another's."""
    # The driver launches nothing, so that eval() would find nothing as it was drawn.
    monkeypatch.setattr(external_writes, "is_as_drawn", lambda *_: True)
    counted = selection._count
    monkeypatch.setattr(selection, "_count", lambda *given: counted(*given).zero_())
    opt = make(base, method, shapes, **options)
    scaled, rounds = options.get("scaled", False), options.get("rounds", 1)
    driver.launches = []
    count = flatkern.warm_up(opt, scaled=scaled, rounds=rounds)
    assert driver.launches == [] and len(loads) == count > 0
    if options.get("capturable"):  # on a GPU the noise's words are there
        monkeypatch.setattr(launch.devices, "on_host", lambda noise: False)
    train(opt, scaled, rounds)
    assert driver.launches and len(loads) == count
    driver.launches = None
    # Once more, it neither compiles nor makes plans, and does not evict those of the training.
    before = remembered()
    assert 0 < flatkern.warm_up(opt, scaled=scaled, rounds=rounds) <= count == len(loads)
    assert remembered() == before


def test_a_kernel_is_compiled_in_the_step_without_it(driver, loads):
    """What the test above would see."""
    train(make("SGD", "plain", [(24,)]))
    assert len(loads) == 1


# What it leaves alone.


def tensors_of(opt):
    yield from (t for group in opt.param_groups for t in group["params"])
    yield from (t for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    yield from (v for group in opt.param_groups for v in group.values() if isinstance(v, torch.Tensor))


def picture(opt):
    """All that a user could see, and could not."""
    groups = [{k: repr(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]
    inside = {
        k: {n: repr(v) for n, v in getattr(part, "__dict__", {"": part}).items()} for k, part in vars(opt.cycle).items()
    }
    tensors = [(id(t), t._version, t.data_ptr(), t.clone()) for t in tensors_of(opt)]
    grads = [(id(p.grad), None if p.grad is None else p.grad._version) for g in opt.param_groups for p in g["params"]]
    return groups, inside, tensors, grads, sorted(vars(opt)), len(opt.state)


PHASES = {
    "before the first step": (lambda opt: None),
    "after steps": train,
    "with a gradient": backward,
    "perturbed": lambda opt: (backward(opt), opt.perturb()),
    "between rounds": lambda opt: (backward(opt), opt.perturb(), backward(opt), opt.restore()),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_changes(phase, capturable, monkeypatch):
    monkeypatch.setattr(job, "_compile", lambda *_: None)
    opt = make("AdamW", "m-ARWP", clip=True, half=(torch.bfloat16, torch.float32), masters=True, capturable=capturable)
    with recording(capturable):  # it is its state that counts, not what is in its tensors
        PHASES[phase](opt)
    steps, rng, live = [], torch.get_rng_state(), flatkern.backends()
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    before = picture(opt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert flatkern.warm_up(opt, rounds=2) > 0
    finally:
        hook.remove()
    after = picture(opt)
    for old, new in zip(before[2], after[2], strict=True):
        assert old[:3] == new[:3] and torch.equal(old[3], new[3])
    opt.cycle.weights.left()  # else the weights are restored when it is collected
    assert before[:2] == after[:2] and before[3:] == after[3:]
    assert steps == [] and torch.equal(rng, torch.get_rng_state()) and live == flatkern.backends()
    with pytest.raises(RuntimeError, match=r"^restore_: no backend for cpu"):
        monkeypatch.undo()
        dispatch.resolve.cache_clear()
        dispatch.resolve("restore_", "cpu", "triton")


def test_the_base_of_a_wrap_does_not_step():
    base = torch.optim.SGD(parameters(FEW), lr=0.1)
    base.step = lambda: pytest.fail("a real step")
    opt = flatkern.Wrap(base, perturb=RWP(), backend="triton")
    assert jobs_of(opt) and not base.state


def test_a_copy_is_left_to_nobody(driver, monkeypatch):
    """The optimizer that is recorded is gone, and restores nothing on its way, not even when something went wrong."""
    opt = make("SGD", "RWP", FEW)
    monkeypatch.setattr(flatkern.rehearsal.Rehearsal, "step", lambda *_: 1 / 0)
    driver.launches = []
    with pytest.raises(ZeroDivisionError):
        jobs_of(opt)
    gc.collect()
    assert driver.launches == [] and not list(flatkern.optim.weights.perturbing)
    driver.launches = None


def test_no_warning_is_anybody_s():
    """SAM ascends on bfloat16 weights, of which it says how many moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jobs_of(make("SGD", "SAM", FEW, half=(torch.bfloat16,)))


# Where there is nothing to do, and what goes wrong.


def test_where_triton_serves_nothing(monkeypatch):
    for backend in ("eager", None):
        assert flatkern.warm_up(flatkern.SGD(parameters(FEW), perturb=RWP(), backend=backend)) == 0
    assert flatkern.warm_up(make("Wrap", "plain")) == 0
    frozen = [torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    assert flatkern.warm_up(flatkern.SGD(frozen, perturb=SAM(), enhance=IRE(1.0), backend="triton")) == 0
    monkeypatch.setattr(flatkern.triton_kernels, "interpreting", lambda: True)
    assert flatkern.warm_up(make("SGD", "RWP", FEW)) == 0


def test_a_parser_that_another_thread_disturbs(loads, monkeypatch):
    """CPython 3.11 raises SystemError where two threads parse; the kernel is as good as ever."""
    parse, disturbed = triton.JITFunction.parse, []

    def parsed(function):
        if len(disturbed) < 2:
            disturbed.append(function)
            raise SystemError("AST constructor recursion depth mismatch (before=96, after=223)")
        return parse(function)

    monkeypatch.setattr(triton.JITFunction, "parse", parsed)
    opt = make("Adam", "plain", [(24,)], half=(torch.float16,))  # which no other test has compiled
    assert flatkern.warm_up(opt, threads=1) == len(loads) > 0
    assert len(disturbed) == 2


def test_a_kernel_that_cannot_be_compiled(loads, monkeypatch):
    """The others are, and the message has its name."""

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(perturb.restore_kernel, "warmup", fail)
    opt = make("SGD", "RWP", [(24,)])
    with pytest.raises(
        RuntimeError, match=r"^warm_up: 1 of \d kernels could not be compiled: restore_kernel .*no space"
    ):
        flatkern.warm_up(opt)
    assert len(loads) == len(jobs_of(opt)) - 1
    monkeypatch.undo()


class Outer:
    def __init__(self, optimizer):
        self.optimizer = optimizer


WRONG = {
    "another optimizer": (
        lambda opt: flatkern.warm_up(torch.optim.SGD(parameters(FEW))),
        "opt is torch.optim.sgd.SGD, which is no",
    ),
    "a wrapper": (lambda opt: flatkern.warm_up(Outer(opt)), "opt is Outer.* pass its attribute optimizer"),
    "rounds": (lambda opt: flatkern.warm_up(opt, rounds=0), "rounds is 0, but should be an integer >= 1"),
    "rounds, a truth": (lambda opt: jobs_of(opt, rounds=True), "jobs_of: rounds is True"),
    "scaled": (lambda opt: flatkern.warm_up(opt, scaled=None), "scaled is None"),
    "threads": (lambda opt: flatkern.warm_up(opt, threads=-1), "threads is -1"),
    "a capture": (lambda opt: flatkern.warm_up(opt), "a CUDA graph is being captured"),
}


@pytest.mark.parametrize("run, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(run, message, monkeypatch):
    opt = make("SGD", "RWP", FEW)
    if "capture" in message:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        run(opt)


def test_what_a_wrapper_hides(monkeypatch):
    """Lightning's optimizer is of a class that inherits from ours, and has attributes of its own."""
    opt = make("SGD", "RWP", FEW)
    proxy = type("LightningSGD", (Outer, type(opt)), {})(opt)
    proxy.__dict__.update(vars(opt))
    assert {j.key for j in jobs_of(proxy)} == {j.key for j in jobs_of(opt)}


# What one sees of it.


def test_the_log_names_every_kernel_once(caplog, capsys):
    caplog.set_level(logging.INFO, logger="flatkern")
    opt = make("SGD", "RWP", [(24,)])
    train(opt)
    first = [r.message for r in caplog.records]
    assert len(first) == len(set(first)) == 2
    assert any(
        "compiling perturb_gaussian_kernel PARAM=float32 BACKUP=float32 CLEAN=float32 SHAPES=64x32 EVEN" in m
        for m in first
    )
    caplog.clear()
    count = flatkern.warm_up(opt)
    again = [r.message for r in caplog.records]
    assert not set(first) & set(again) and f"warm_up: {count} kernels in" in again[-1]
    assert len(first) + len(again) - 1 == count
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("flatkern").handlers == []


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(job, "_compile", lambda *_: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    opt = make("SGD", "RWP", [(24,)])
    count = flatkern.warm_up(opt)
    out, err = capsys.readouterr()
    assert out == "" and "compiling kernels" in err and f"{count}/{count}" in err
    monkeypatch.setenv("RANK", "1")
    flatkern.warm_up(opt)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [0, 1], ids=["a clean rank", "a noisy rank"])
def test_nothing_is_left_to_compile_on_the_ranks_of_a_parallel_training(rank, driver, loads):
    """What a noisy rank measures of its own gradients is launched by a hook, in the backward."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=fake_pg.FakeStore())
    try:
        net = torch.nn.Linear(20, 64)
        opt = flatkern.SGD(net.parameters(), backend="triton", perturb=RWP(0.1, lam=0.5, eta=0.1, mix="ranks"))
        driver.launches = []
        count = flatkern.warm_up(opt)
        assert len(loads) == count > 0
        for _ in range(2):
            opt.perturb()
            (opt.loss_weight * net(torch.ones(4, 20)).square().mean()).backward()
            opt.step()
            opt.zero_grad()
        assert driver.launches and len(loads) == count
    finally:
        driver.launches = None
        torch.distributed.destroy_process_group()
