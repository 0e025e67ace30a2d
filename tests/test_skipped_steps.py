"""A scaler hears of an ascent that is not finite, and steps that change nothing are counted, on the device."""

import copy

import pytest
import torch
from compare import assert_same, same
from patterns import BASES, METHODS, Training, backends, train
from steps import plain
from unchanged import refused

import flatkern
from flatkern.optim import amp


def make_scaler(enabled=True, scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, enabled=enabled)


@pytest.mark.parametrize(("rounds", "bad"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", ["SAM", "ASAM"])
def test_the_scale_falls_after_an_ascent_that_overflowed(name, base, rounds, bad, backend):
    """In any round; once, and it grows again later; a gradient of the perturbed weights is finite all the time."""
    run = Training(METHODS[name].make(), base=base, backend=backend, scaler=make_scaler())
    for step in range(3):
        before = run.weights()
        run.overflow = {run.passes + 2 * bad} if step == 0 else set()
        for k in range(rounds):
            run.backward(k)
            run.perturb()
            run.backward(k)
            if k < rounds - 1:
                run.opt.restore()
        run.step()
        run.opt.zero_grad()
        assert same(run.weights(), before) is (step == 0)
        assert run.scaler.get_scale() == (2.0**10 if step == 2 else 2.0**9)
        assert int(run.opt.skipped_steps) == 1


@pytest.mark.parametrize("kind", ["none", "off"])
def test_without_a_scaler_the_step_is_skipped_only(kind, backend):
    scaler = None if kind == "none" else make_scaler(enabled=False)
    run = Training(flatkern.SAM(0.1), backend=backend, scaler=scaler)
    run.overflow = {0}
    METHODS["SAM"].user(run, 0)
    assert_same(run.weights(), run.start)
    assert int(run.opt.skipped_steps) == 1


def test_a_scaled_step_without_the_scaler_in_perturb_keeps_the_scale(backend):
    run = Training(flatkern.SAM(0.1), backend=backend, scaler=make_scaler())
    run.perturb = run.opt.perturb
    run.overflow = {0}
    METHODS["SAM"].user(run, 0)
    assert_same(run.weights(), run.start)
    assert run.scaler.get_scale() == 2.0**10
    assert int(run.opt.skipped_steps) == 1


def test_unscale_and_clip_after_an_ascent_that_overflowed(backend):
    run = Training(flatkern.SAM(0.1), backend=backend, scaler=make_scaler())
    run.overflow = {0}
    run.backward(0)
    run.perturb()
    run.backward(0)
    run.scaler.unscale_(run.opt)
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    run.step()
    assert_same(run.weights(), run.start)
    assert run.scaler.get_scale() == 2.0**9


def test_passes_of_one_scaler_are_kept_apart():
    """A scaler knows passes by id, so that none may be freed, and its id go to another one, before update()."""
    scaler = make_scaler()
    scaler.scale(torch.ones(()))
    p = torch.nn.Parameter(torch.ones(2))
    for k in range(50):
        p.grad = torch.ones(2)
        unscaled = amp.Unscaled()
        unscaled.scaler = scaler
        unscaled.unscale([{"params": [p]}])
        amp.record(scaler, torch.tensor(float(k == 7)))
    assert len(scaler._per_optimizer_states) == 100
    scaler.update()
    assert not scaler._per_optimizer_states
    assert scaler.get_scale() == 2.0**9


def test_the_overflow_of_another_optimizer_skips_no_step(backend):
    """The scaler is updated between perturb() and step(), by another optimizer of it, whose step overflows."""
    scaler = make_scaler()
    run, other = (Training(m, backend=backend, scaler=scaler) for m in (flatkern.SAM(0.1), None))
    run.backward(0)
    run.perturb()
    other.overflow = {0}
    plain(other, 0)
    assert scaler.get_scale() == 2.0**9
    run.backward(0)
    run.step()
    assert not same(run.weights(), run.start)
    assert [int(r.opt.skipped_steps) for r in (run, other)] == [0, 1]


def test_a_refused_perturb_tells_the_scaler_nothing(backend):
    run = Training(flatkern.SAM(0.1), backend=backend, scaler=make_scaler())
    run.backward(0)
    run.perturb()
    known = dict(run.scaler._per_optimizer_states)
    with refused(RuntimeError, "already perturbed", run.net.parameters(), run.opt, run.scaler):
        run.perturb()
    assert run.scaler._per_optimizer_states == known


# --- the count --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "name", "base"),
    backends(
        [(n, b) for n in (None, "RWP", "m-RWP", "m-RWP noisy first", "rolling", "SAM", "mSAM") for b in BASES],
        lambda name, base: base == "Wrap",
    ),
    indirect=["backend"],
)
def test_skipped_steps_are_counted(name, base, backend):
    run = Training(METHODS[name].make() if name else None, base=base, backend=backend, scaler=make_scaler())
    user = METHODS[name].user if name else plain
    counts = []
    for step in range(5):
        run.overflow = {run.passes, run.passes + 1} if step in (0, 3) else set()
        train(run, user, 1, start=step)
        counts.append(run.opt.skipped_steps)
    assert [int(c) for c in counts] == [1, 1, 1, 2, 2]  # each is a tensor of its own
    assert all((c.dim(), c.dtype, c.device.type) == (0, torch.int64, "cpu") for c in counts)


def test_nothing_is_counted_where_nothing_can_be_skipped(backend):
    """No tensor of the count is there, and nothing of it in a checkpoint or a copy."""
    run = Training(flatkern.RWP(0.1), backend=backend)
    train(run, METHODS["RWP"].user, 2)
    assert run.opt.cycle.skipped_steps is None
    assert int(run.opt.skipped_steps) == 0
    run = Training(flatkern.SAM(0.1), backend=backend)
    run.overflow = {0}
    METHODS["SAM"].user(run, 0)
    saved = run.opt.state_dict()
    assert "skipped_steps" not in str(saved)
    assert int(copy.deepcopy(run.opt).skipped_steps) == 0
    run.opt.load_state_dict(saved)
    assert int(run.opt.skipped_steps) == 1


def test_steps_that_only_restore_are_not_counted(backend):
    run = Training(flatkern.SAM(0.1), backend=backend)
    run.overflow = {0}
    run.backward(0)
    run.perturb()
    run.step()
    assert int(run.opt.skipped_steps) == 0


# --- large gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e30, 2e19, 1.8e19])
@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("name", ["SAM", "ASAM"])
def test_an_ascent_does_not_depend_on_the_size_of_gradients(name, base, size, backend):
    """A gradient whose square is beyond float32 is a direction as good as any."""
    moved = []
    for factor in (1.0, size):
        run = Training(METHODS[name].make(), base=base, backend=backend)
        run.backward(0)
        for p in run.net.parameters():
            if p.grad is not None:
                p.grad *= factor
        run.perturb()
        moved.append([p - s for p, s in zip(run.weights(), run.start, strict=True)])
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
    assert any(m.any() for m in moved[0])


@pytest.mark.parametrize("size", [1e30, 2e19])
def test_clipping_of_large_gradients(size, backend):
    run = Training(None, backend=backend, max_grad_norm=1.0, lr=1.0, weight_decay=0.0)
    run.backward(0)
    for p in run.net.parameters():
        if p.grad is not None:
            p.grad *= size
    grads = [p.grad.double() for p in run.net.parameters() if p.grad is not None]
    want = torch.cat([g.flatten() for g in grads]).norm()
    run.step()
    assert float(run.opt.grad_norm) == pytest.approx(float(want), rel=1e-5)
    step = torch.cat([(a - b).flatten() for a, b in zip(run.weights(), run.start, strict=True)]).norm()
    assert float(step) == pytest.approx(1.0, rel=1e-4)
