"""What others write to a perturbed weight is kept or refused, and never lost in silence.

Whoever writes moves the version of a tensor, unless it is by `.data`. Noise can be drawn again, so that elements that
nobody wrote are told from the others; an ascent cannot.
"""

import copy
import gc
import warnings

import pytest
import torch
from compare import assert_same, same
from foreign_writes import ASCENTS, DRAWS, METHODS, PRECISIONS, Run, expected, write
from networks import twins

import flatkern
from flatkern import RWP, SAM
from flatkern.optim import external_writes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", DRAWS)
def test_elements_that_others_wrote_stay(method, precision, backend):
    """All others become clean, and the next steps go on from there."""
    run = Run(method, precision, backend)
    clean = run.into_perturbed()
    noisy = run.values()
    spots = write(run.params)
    run.way_back()
    assert_same(run.values(), expected(clean, spots))
    assert not same(clean, noisy)
    assert not run.opt.is_perturbed
    if precision == "masters":
        for p, master in ((p, run.opt.state[p]["master"]) for p in run.params):
            assert torch.equal(master.to(p.dtype), p.detach())
    run.opt.release()
    run.into_perturbed()
    run.way_back()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ASCENTS)
def test_an_ascent_leaves_a_written_tensor_as_it_is(method, precision):
    """With one warning that names it; the others become clean."""
    run = Run(method, precision)
    clean = run.into_perturbed()
    with torch.no_grad():
        run.params[2][0, 0] = 9.0
    written = run.values()
    with pytest.warns(UserWarning, match=r"others have written to params\[2\] since") as seen:
        run.opt.restore()
    assert len(seen) == 1
    assert_same(run.values(), [w if k == 2 else c for k, (c, w) in enumerate(zip(clean, written, strict=True))])
    if precision == "masters":  # the parameter counts, from the next call on
        run.opt.zero_grad()
        run.into_perturbed()
        run.opt.restore()
        assert float(run.params[2][0, 0]) > 5


WAYS = {
    "restore": lambda run: run.opt.restore(),
    "eval": lambda run: run.opt.eval(),
    "load_state_dict": lambda run: run.opt.load_state_dict(run.saved),
    "collection": lambda run: (run.__dict__.pop("opt"), gc.collect()),
}


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize(
    ("way", "method"), [(way, "ARWP") for way in WAYS] + [(way, "rolling ARWP") for way in WAYS if way != "restore"]
)
def test_every_way_back(way, method, base):
    run = Run(method, base=base)
    run.saved = copy.deepcopy(run.opt.state_dict())
    clean = run.into_perturbed(steps=2)
    spots = write(run.params)
    WAYS[way](run)
    assert_same(run.values(), expected(clean, spots))


def test_the_ways_out_of_perturbed():
    for fails in (False, True):
        run = Run("RWP")
        clean = run.values()
        try:
            with run.opt.perturbed():
                spots = write(run.params)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert_same(run.values(), expected(clean, spots))
        assert not run.opt.is_perturbed


@pytest.mark.parametrize("schedule", ["sigma", "eta"])
@pytest.mark.parametrize("method", DRAWS)
def test_a_value_that_has_been_set_since_does_not_matter(method, schedule):
    """The noise that is on was drawn with the old one."""
    run = Run(method)
    clean = run.into_perturbed(steps=2)
    run.opt.param_groups[0][schedule] = 0.5
    spots = write(run.params)
    run.way_back()
    assert_same(run.values(), expected(clean, spots))


def test_a_group_that_is_switched_off_since_is_told_too():
    run = Run("rolling")
    clean = run.into_perturbed()
    run.opt.param_groups[0]["perturb"] = False
    spots = write(run.params)
    run.way_back()
    assert_same(run.values(), expected(clean, spots))


def test_half_precision_written_as_a_whole():
    """Few numbers are in float16, and some elements of a loaded tensor are by chance what was drawn."""
    dice = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64, generator=dice).bfloat16())
    loaded = torch.nn.Parameter((p.detach() + 0.1 * torch.randn(64, 64, generator=dice)).bfloat16())
    opt = flatkern.SGD([p], lr=0.1, perturb=RWP(0.01))
    opt.perturb()
    with torch.no_grad():
        assert 0 < int((p == loaded).sum()) < 1000
        p.copy_(loaded)
    opt.restore()
    assert torch.equal(p, loaded)


# --- step() ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD", "Wrap"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_refuses_before_it_writes(method, base, backend):
    run = Run(method, backend=backend, base=base)
    run.into_perturbed()
    run.backward()
    spots = write(run.params)
    before = copy.deepcopy((run.values(), run.opt.cycle.phase, dict(run.opt.param_groups[0], params=None)))
    state = copy.deepcopy({k: v for k, v in enumerate(run.opt.state.values())})
    with pytest.raises(RuntimeError, match=r"others have written to params\[0\].*clean\(\).*restore\(\).*drop"):
        run.opt.step()
    after = run.values(), run.opt.cycle.phase, dict(run.opt.param_groups[0], params=None)
    assert_same(after[0], before[0])
    assert after[1:] == before[1:] and run.opt.is_perturbed
    for old, new in zip(state.values(), run.opt.state.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an ascent
        run.way_back()
    assert all(bool((run.params[k].detach()[at] == 7.0 + k).all()) for k, at in spots.items())
    run.opt.release()
    run.into_perturbed()
    run.backward()
    run.opt.step()


def test_a_write_of_the_same_values_is_none():
    """As DistributedDataParallel's constructor sends the values of rank 0, which all ranks have."""
    for method in DRAWS:
        ends = []
        for writes in (False, True):
            run = Run(method)
            run.into_perturbed()
            run.backward()
            if writes:
                with torch.no_grad():
                    for p in run.params:
                        p.copy_(p.clone())
            run.opt.step()
            run.way_back()
            ends.append(run.values())
        assert_same(*ends, method)


def test_names_are_told():
    opt = flatkern.SGD(torch.nn.Linear(2, 2).named_parameters(), lr=0.1, perturb=SAM())
    p = opt.param_groups[0]["params"][1]
    sum(q.sum() for q in opt.param_groups[0]["params"]).backward()
    opt.perturb()
    with torch.no_grad():
        p.zero_()
    with pytest.raises(RuntimeError, match=r"params\[1\] \(bias\)"):
        opt.step()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_writes_that_go_with_the_perturbation(method, precision):
    """writes="drop", for modules whose forward writes: the trajectory is as if nobody had written."""
    ends = []
    for writes in (False, True):
        run = Run(method, precision, writes="drop")
        for step in range(4):
            run.into_perturbed(0) if step < 3 or not run.rolling else run.opt.train()
            if run.rolling:
                run.opt.train()
            run.backward()
            if writes:
                write(run.params)
            if step == 2:
                run.way_back()
                run.opt.release()
            else:
                run.opt.step()
        run.way_back()
        ends.append(run.values())
    assert_same(*ends)


def test_data_writes_that_go_with_the_perturbation():
    """A rolling eval() does not take them for others'."""
    run = Run("rolling", writes="drop")
    clean = run.into_perturbed()
    write(run.params, data=True)
    run.opt.eval()
    assert_same(run.values(), clean)


def test_what_writes_may_be():
    with pytest.raises(ValueError, match='writes is \'no\', but should be "keep" or "drop"'):
        Run("RWP", writes="no")
    run = Run("RWP")
    run.opt.param_groups[0]["writes"] = "dropped"
    with pytest.raises(ValueError, match="writes is 'dropped'"):
        run.opt.perturb()


# --- values, which eval() looks at ----------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["rolling", "rolling ARWP"])
def test_eval_finds_nothing_where_nobody_wrote(method, precision, backend):
    """Whatever rows it looks at, after every kind of step."""
    run = Run(method, precision, backend)
    run.into_perturbed()
    with torch.no_grad(), run.opt.clean():
        run.params[2][3] = float("nan")
        run.params[3][1] = float("inf")
    for k in range(21):
        run.opt.train()
        if k % 3 == 0:
            run.opt.zero_grad()
            run.backward()
            run.params[k % 4].grad = None
            run.opt.step()
        run.opt.eval()


def test_eval_finds_data_writes_at_its_first_look():
    """All elements are seen then; what was written stays, and the noise goes."""
    run = Run("rolling")
    clean = run.into_perturbed()
    spots = write(run.params, data=True)
    with pytest.raises(RuntimeError, match=r"eval: params\[0\], params\[1\], params\[2\] and 2 more .*clean\(\)"):
        run.opt.eval()
    assert_same(run.values(), expected(clean, spots))
    assert not run.opt.is_perturbed
    run.opt.train()
    run.opt.eval()
    assert_same(run.values(), expected(clean, spots))


def test_every_row_is_looked_at_in_time():
    """Later looks see rows of about a thousand elements together, other ones each time."""
    p = torch.nn.Parameter(torch.randn(50, 700))
    opt = flatkern.SGD([p], lr=0.1, perturb=RWP(0.1, rolling=True))
    opt.train()
    opt.eval()
    for k in range(1, 60):
        opt.train()
        p.data[49, 3] += 1.0
        try:
            opt.eval()
        except RuntimeError:
            assert k > 1
            return
    raise AssertionError("it was not found")


def test_a_hundredth_look_sees_everything(monkeypatch):
    seen = []
    looked = external_writes.draw_again
    monkeypatch.setattr(external_writes, "draw_again", lambda *a: seen.append(len(a) == 3) or looked(*a))
    opt = flatkern.SGD([torch.nn.Parameter(torch.randn(50, 700))], lr=0.1, perturb=RWP(0.1, rolling=True))
    for _ in range(101):
        opt.train()
        opt.eval()
    assert [k for k, whole in enumerate(seen) if whole] == [0, 100]


def test_a_whole_model_that_others_have_swapped_in():
    net, _ = twins()
    opt = flatkern.AdamW(net.parameters(), lr=0.1, perturb=RWP(0.05, rolling=True))
    opt.follow(net)
    opt.train()
    average = [torch.full_like(p, 0.25) for p in net.parameters()]
    for p, a in zip(net.parameters(), average, strict=True):
        p.data.copy_(a)
    with pytest.raises(RuntimeError, match="clean"):
        net.state_dict()
    assert_same([p.detach() for p in net.parameters() if p.requires_grad],
                [a for p, a in zip(net.parameters(), average, strict=True) if p.requires_grad])  # fmt: skip


def test_a_model_that_has_moved_is_not_looked_at():
    """`.to()` changes dtype, device or memory format by `.data`."""
    for move in (lambda t: t.double(), lambda t: t.contiguous(), lambda t: t.bfloat16()):
        run = Run("rolling")
        clean = run.into_perturbed()
        for p in run.params:
            p.data = move(p.data)
        run.opt.eval()
        assert all(torch.equal(p.detach(), move(c)) for p, c in zip(run.params, clean, strict=True))


# --- eval() between backward and step -------------------------------------------------------------


@pytest.mark.parametrize("method", ["rolling", "rolling ARWP"])
@pytest.mark.parametrize(("precision", "base"), [("float32", "SGD"), ("masters", "SGD"), ("float32", "Wrap")])
def test_looking_between_backward_and_step(method, precision, base):
    ends = []
    for looks in (False, True):
        run = Run(method, precision, base=base)
        for k in range(5):
            run.opt.train()
            run.opt.zero_grad()
            run.backward()
            if looks and k in (1, 3):
                run.opt.eval()
            torch.nn.utils.clip_grad_norm_(run.params, 3.0)
            run.opt.step()
            assert run.opt.is_perturbed
        run.opt.eval()
        state = [t for p in run.params for t in run.opt.state[p].values()]
        ends.append((run.values() + [t.clone() for t in state], run.opt.param_groups[0]["round"]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] == 5


def test_a_gradient_of_clean_weights_is_a_plain_step():
    """Not one of the round that eval() has ended."""
    for drop in ("zero_grad", "step"):
        run = Run("rolling")
        run.opt.train()
        run.backward()
        run.opt.eval()
        run.opt.zero_grad() if drop == "zero_grad" else run.opt.step()
        run.opt.eval()
        before = run.opt.param_groups[0]["round"]
        run.opt.zero_grad()
        run.backward()
        run.opt.step()
        assert run.opt.param_groups[0]["round"] == before
