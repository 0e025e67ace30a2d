"""GradScaler and autocast: the scale cancels exactly, an overflow skips the step, forwards see the present weights.

Scales are powers of two, so a scaled run is bit-identical to the unscaled one.
"""

import copy

import pytest
import torch
from compare import assert_same, assert_same_state, copies, same
from patterns import BASES, METHODS, Training, backends, noise, train
from steps import plain

import flatkern

USERS = {name: method for name, method in METHODS.items() if name not in ("RWP block", "ASAM all")}
MIXING = ("m-RWP", "m-RWP noisy first", "m-ARWP")
HALF = {"dtype": torch.bfloat16, "master_weights": True}


def make_scaler(enabled=True, scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6, enabled=enabled)


def make(name, backend, scaler=None, **options):
    return Training(METHODS[name].make(), backend=backend, scaler=scaler, **options)


# --- the scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends([(name, base) for name in USERS for base in BASES], lambda name, base: base == "SGD"),
    indirect=["backend"],
)
def test_scale_cancels(name, base, backend):
    """Weights, momentum and history of scaled and of unscaled training, and with a scaler that is switched off."""
    runs = [make(name, backend, scaler, base=base) for scaler in (None, make_scaler(), make_scaler(enabled=False))]
    for run in runs:
        train(run, METHODS[name].user)
        run.opt.eval()
    for run in runs[1:]:
        assert_same(run.weights(), runs[0].weights())
        assert_same_state(run.state(), runs[0].state())
    assert runs[1].scaler.get_scale() == 2.0**10


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize("name", USERS)
def test_scale_cancels_with_masters(name, backend):
    runs = [make(name, backend, scaler, **HALF) for scaler in (None, make_scaler())]
    for run in runs:
        train(run, METHODS[name].user)
        run.opt.eval()
    assert_same(runs[1].weights(), runs[0].weights())
    assert_same_state(runs[1].state(), runs[0].state())


@pytest.mark.parametrize("name", ["SAM", "ASAM", "mSAM"])
def test_climb_is_scale_free(name, backend):
    """The perturbed weights, bit for bit, over the whole range of scales."""
    seen = []
    for scale in (2.0**-10, 1.0, 2.0**16):
        run = make(name, backend, make_scaler(scale=scale))
        run.backward(0)
        run.perturb()
        seen.append(run.weights())
    assert_same(seen[0], seen[1])
    assert_same(seen[0], seen[2])


@pytest.mark.parametrize("name", USERS)
def test_unscaled_by_the_user(name, backend):
    """scaler.unscale_(opt) and clip_grad_norm_ before step(), with a bound that does not bite."""
    runs = [make(name, backend, make_scaler()) for _ in range(2)]

    def unscale_and_step():
        run = runs[1]
        run.scaler.unscale_(run.opt)
        torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1e6)
        run.scaler.step(run.opt)
        run.scaler.update()

    runs[1].step = unscale_and_step
    for run in runs:
        train(run, METHODS[name].user)
        run.opt.eval()
    assert_same(runs[1].weights(), runs[0].weights())


@pytest.mark.parametrize("name", ["m-RWP", "SAM", "mSAM"])
def test_unscaled_too_early(name, backend):
    """unscale_ before perturb() would leave the scale on the gradient of the perturbed weights."""
    run = make(name, backend, make_scaler())
    run.backward(0)
    run.scaler.unscale_(run.opt)
    with pytest.raises(RuntimeError, match="after the last backward"):
        run.opt.perturb(scaler=run.scaler)
    assert not run.opt.is_perturbed
    assert_same(run.weights(), run.start)


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", ["RWP", "SAM", "rolling"])
def test_clipped_by_the_user(name, base, backend):
    """clip_grad_norm_ after unscale_ clips what step() applies."""
    run = make(name, backend, make_scaler(), base=base, lr=1.0, weight_decay=0.0)
    norms = []

    def clip_and_step():
        run.scaler.unscale_(run.opt)
        norms.append(torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.01))
        run.scaler.step(run.opt)
        run.scaler.update()

    run.step = clip_and_step
    METHODS[name].user(run, 0)
    run.opt.eval()
    moved = torch.cat([(a - b).flatten() for a, b in zip(run.weights(), run.start, strict=True)]).norm()
    assert norms[0] > 0.02
    assert torch.allclose(moved, torch.tensor(0.01), rtol=1e-3)


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_needs_the_scaler(name, base, backend):
    """perturb(scaler=scaler) unscales what step() does not see: without it a scaled step is refused, and changes
    nothing, so that the pattern can be run again."""
    runs = [make(name, backend, make_scaler(), base=base) for _ in range(2)]
    for run in runs:
        train(run, METHODS[name].user, 1)
    run, other = runs
    weights, state = run.weights(), run.state()
    run.perturb = run.opt.perturb
    with pytest.raises(RuntimeError, match=r"perturb\(scaler=scaler\)"):
        METHODS[name].user(run, 1)
    run.opt.restore()
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    run.opt.zero_grad()
    run.opt.release()
    run.scaler.update()
    del run.perturb
    other.opt.param_groups[0]["round"] += 1
    for r in runs:
        train(r, METHODS[name].user, 1, start=1)
    assert_same(run.weights(), other.weights())
    assert_same_state(run.state(), other.state())


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
def test_last_round_must_end_in_step(base, backend):
    """Gradients that restore() has set aside are not looked at by the scaler: refused before anything is applied."""
    run = make("RWP", backend, make_scaler(), base=base)
    train(run, METHODS["RWP"].user, 1)
    weights, state = run.weights(), run.state()
    run.perturb()
    run.backward(1)
    run.opt.restore()
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        run.step()
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)


# --- overflow ---------------------------------------------------------------------------------------

# Methods and which of their passes can overflow; where both are of one batch, both do.
OVERFLOWS = [
    ("RWP", (0,)), ("ARWP", (0,)), ("RWP rounds", (0,)), ("RWP rounds", (1,)), ("rolling", (0,)),
    ("rolling ARWP", (0,)), ("m-RWP", (0,)), ("m-RWP", (1,)), ("m-RWP noisy first", (0,)), ("m-RWP noisy first", (1,)),
    ("m-ARWP", (0,)), ("m-ARWP", (1,)), ("m-RWP losses", (0,)), ("m-RWP losses", (1,)), ("m-ARWP losses", (0,)),
    ("m-ARWP losses", (1,)), ("SAM", (0, 1)), ("SAM", (1,)), ("ASAM", (0, 1)), ("mSAM", (0, 1)), ("mSAM", (1,)),
    ("mSAM", (2, 3)), ("mSAM", (3,)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@pytest.mark.parametrize(
    ("backend", "name", "passes", "options"),
    backends(
        [(*row, options) for row in OVERFLOWS for options in ({}, {"base": "AdamW"}, {"base": "Wrap"}, HALF)],
        lambda name, passes, options: not options,
    ),
    indirect=["backend"],
    ids=str,
)
def test_overflow(name, passes, options, backend):
    """The step changes no weight, momentum, history, master and count; update() lowers the scale; training goes on."""
    run = make(name, backend, make_scaler(), **options)
    train(run, METHODS[name].user, 2)
    weights, state, before = run.clean_weights(), run.state(), run.passes
    run.overflow = {before + k for k in passes}
    METHODS[name].user(run, 2)
    assert_same(run.clean_weights(), weights)
    if not run.opt.rolling:
        assert not run.opt.is_perturbed
    assert_same_state(run.state(), state)
    assert run.scaler.get_scale() == 2.0**9
    run.opt.zero_grad()
    train(run, METHODS[name].user, 1, start=3)
    run.opt.eval()
    assert not same(run.weights(), weights)
    assert all(w.isfinite().all() for w in run.weights())
    assert run.scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends([(n, b) for n in ("SAM", "mSAM", "RWP", "m-RWP") for b in BASES], lambda name, base: base != "Wrap"),
    indirect=["backend"],
)
def test_overflow_in_the_first_step(name, base, backend):
    """As if it had not been: the next step is the first one (Adam's step count, SGD's first momentum)."""
    run, other = make(name, backend, make_scaler(), base=base), make(name, backend, make_scaler(), base=base)
    run.overflow = {0, 1}
    METHODS[name].user(run, 0)
    run.opt.zero_grad()
    for group in other.opt.param_groups:
        if "round" in group:
            group["round"] = run.opt.param_groups[0]["round"]
    for r in (run, other):
        r.overflow = set()
        train(r, METHODS[name].user, 2, start=3)
    assert_same(run.weights(), other.weights())
    assert_same_state(run.state(), other.state())


@pytest.mark.parametrize("name", ["SAM", "ASAM", "mSAM"])
@pytest.mark.parametrize("scaled", [True, False])
def test_overflow_of_the_climb_alone(name, scaled, backend):
    """No direction to climb along: the weights stay, and so the step is skipped; with a scaler or without."""
    run = make(name, backend, make_scaler() if scaled else None)
    train(run, METHODS[name].user, 2)
    weights, state = run.weights(), run.state()
    run.overflow = {run.passes}
    run.backward(2)
    run.perturb()
    assert_same(run.weights(), weights)
    run.backward(2)
    run.step()
    assert_same(run.weights(), weights)
    assert_same_state(run.state(), state)
    run.opt.zero_grad()
    train(run, METHODS[name].user, 1, start=3)
    assert not same(run.weights(), weights)


# --- max_grad_norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "name", "base", "scaled"),
    backends(
        [  # without momentum, which Momentum-SAM needs
            (name, base, scaled)
            for name in (None, *USERS) if "MomentumSAM" not in str(name)
            for base in ("SGD", "Wrap") for scaled in (False, True)
        ],
        lambda name, base, scaled: base == "SGD" and not scaled,
    ),
    indirect=["backend"],
)  # fmt: skip
def test_max_grad_norm(name, base, scaled, backend):
    """The final gradient (mixed, averaged, unscaled) clipped by its norm, which `grad_norm` is before clipping."""
    runs = []
    for bound in (None, 0.01, 1e6):
        run = Training(METHODS[name].make() if name else None, scaler=make_scaler() if scaled else None)
        params, own = run.net.parameters(), {"perturb": run.opt.method, "backend": backend, "max_grad_norm": bound}
        sgd = torch.optim.SGD(params, lr=1.0) if base == "Wrap" else flatkern.SGD(params, lr=1.0, **own)
        run.opt = flatkern.Wrap(sgd, **own) if base == "Wrap" else sgd
        (METHODS[name].user if name else plain)(run, 0)
        run.opt.eval()
        runs.append(run)
    free, clipped, loose = ([a - b for a, b in zip(run.start, run.weights(), strict=True)] for run in runs)
    norm = torch.cat([g.flatten() for g in free]).norm()
    assert norm > 0.02
    assert runs[0].opt.grad_norm is None
    for run in runs[1:]:
        assert (run.opt.grad_norm.dtype, run.opt.grad_norm.dim()) == (torch.float32, 0)
        assert torch.allclose(run.opt.grad_norm, norm, rtol=1e-5)
    for f, c, big in zip(free, clipped, loose, strict=True):
        assert torch.allclose(c, f * (0.01 / norm), rtol=1e-3, atol=1e-6)
        assert torch.equal(big, f)


@pytest.mark.parametrize("options", [{}, {"base": "AdamW"}, HALF], ids=str)
def test_max_grad_norm_is_torchs(options, backend):
    """Without a method: clip_grad_norm_, then the step."""
    run = Training(None, backend=backend, max_grad_norm=0.05, **options)
    other = Training(None, backend=backend, **options)

    def clip_and_step():
        norm = torch.nn.utils.clip_grad_norm_(other.net.parameters(), 0.05)
        assert torch.allclose(run.opt.grad_norm, norm.float(), rtol=1e-2 if options == HALF else 1e-5)
        other.opt.step()

    other.step = clip_and_step
    for t in range(3):
        for r in (run, other):
            plain(r, t)
            r.opt.zero_grad()
    for a, b in zip(run.weights(), other.weights(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2 if options == HALF else 1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_bad_max_grad_norm(bad):
    with pytest.raises(ValueError, match="max_grad_norm"):
        Training(None, max_grad_norm=bad)
    opt = Training(None, max_grad_norm=0.5).opt
    with pytest.raises(ValueError, match=f"max_grad_norm is {bad!r}, but should be a number > 0, or None"):
        opt.max_grad_norm = bad
    assert opt.max_grad_norm == 0.5


def test_max_grad_norm_may_be_set_between_steps(backend):
    """It is then as if the optimizer had been made with it; a copy keeps it."""
    run, limited = (Training(None, backend=backend, max_grad_norm=limit) for limit in (None, 0.05))
    run.opt.max_grad_norm = 0.05
    for r in (run, limited):
        plain(r, 0)
    assert_same(run.weights(), limited.weights())
    assert torch.equal(run.opt.grad_norm, limited.opt.grad_norm)
    assert copy.deepcopy(run.opt).max_grad_norm == 0.05


# --- autocast ---------------------------------------------------------------------------------------

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def layers():
    """Their weights are cast once per autocast block and remembered."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
    return net, lambda: net(X).float().square().mean()


def outside(loss):
    """The loss in an autocast block of its own, at the weights of the moment."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        return loss().detach()


CASTS = {
    "RWP": noise(sigma=0.2),
    "m-RWP": noise(sigma=0.2, lam=0.5),
    "SAM": flatkern.SAM(rho=1.0),
    "rolling": noise(sigma=0.2, rolling=True),
}


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", CASTS)
def test_autocast_sees_every_change(name, base, backend):
    """Forwards before and after each call, in one block: after the call the cast weights are the new ones."""
    net, loss = layers()
    own = {"perturb": CASTS[name], "backend": backend}
    if base == "Wrap":
        opt = flatkern.Wrap(torch.optim.SGD(net.parameters(), lr=0.5), **own)
    else:
        opt = flatkern.SGD(net.parameters(), lr=0.5, **own)
    seen = []

    def look():
        value = loss()
        assert value.detach() == outside(loss)
        assert value.detach() not in seen
        seen.append(value.detach())
        return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = look()
        if name == "rolling":
            opt.train()
        else:
            if name != "RWP":
                first.backward()
            opt.perturb()
        second = look()
        with opt.clean():
            assert loss().detach() == seen[0]
        assert loss().detach() == seen[1]
        opt.eval()
        assert loss().detach() == seen[0]
        opt.zero_grad()
        if name == "rolling":
            opt.train()
        if name in ("RWP", "m-RWP"):
            opt.perturb()
            look()
        del first, second
        loss().backward()
        opt.step() if name in ("RWP", "rolling") else opt.zero_grad()
        if name in ("RWP", "rolling"):
            look()


@pytest.mark.parametrize("name", ["RWP", "m-RWP", "SAM", "rolling"])
def test_one_autocast_block_is_two(name, backend):
    """A step inside one block moves the weights as one whose forwards have blocks of their own."""
    results = []
    for one_block in (True, False):
        net, loss = layers()
        opt = flatkern.SGD(net.parameters(), lr=0.5, perturb=CASTS[name], backend=backend)

        def cast(net=net):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return net(X).float().square().mean()

        calls = {"RWP": "pbs", "m-RWP": "bpbs", "SAM": "bpbs", "rolling": "bsbs"}[name] * 2
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=one_block):
            for call in calls:
                if call == "b":
                    (loss if one_block else cast)().backward()
                elif call == "p":
                    opt.perturb()
                else:
                    opt.step()
                    opt.zero_grad()
        opt.eval()
        results.append(copies(net.parameters()))
    assert_same(*results)


@pytest.mark.parametrize("write", ["perturb_", "restore_"])
def test_autocast_sees_the_functions(write, backend):
    net, loss = layers()
    params = list(net.parameters())
    backups = [torch.zeros_like(p) for p in params]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = loss().detach()
        if write == "perturb_":
            flatkern.perturb_(params, 0.2, seed=0, round=0, backend=backend)
        else:
            flatkern.restore_(params, backups, backend=backend)
        assert loss().detach() == outside(loss) != before
