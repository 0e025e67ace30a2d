"""What others write to a perturbed weight is kept or refused, and never lost in silence.

Whoever writes moves the version of a tensor, unless it is by `.data`. Noise can be drawn again, so that elements that
nobody wrote are told from the others; an ascent cannot.
"""

import copy
import gc
import warnings

import pytest
import torch
from networks import twins

import flatkern
from flatkern import ASAM, RWP, SAM
from flatkern.optim import external_writes

DRAWS = {
    "RWP": RWP(0.05),
    "ARWP": RWP(0.05, eta=3.0),
    "m-RWP": RWP(0.05, lam=0.5),
    "rolling": RWP(0.05, rolling=True),
    "rolling ARWP": RWP(0.05, eta=3.0, rolling=True),
}
ASCENTS = {"SAM": SAM(0.05), "ASAM": ASAM(0.5)}
METHODS = DRAWS | ASCENTS
PRECISIONS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "masters": (torch.bfloat16, True)}
BITS = {4: torch.int32, 2: torch.int16}


def shapes(dtype):
    """Rows of every kind of length, a matrix in channels_last, vectors, a number, and a tensor without elements."""
    dice = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=dice) for shape in [(3, 4), (7, 5, 3, 3), (40, 33), (5,), (1, 9), (), (0, 4)]]
    made[1] = made[1].to(memory_format=torch.channels_last)
    made.append(torch.zeros(3, 2))
    return [torch.nn.Parameter(t.to(dtype)) for t in made]


class Run:
    """A sum of squares as the loss; the optimizer is perturbed after `into_perturbed()`."""

    def __init__(self, method, precision="float32", backend=None, lr=0.1, base="SGD", **own):
        dtype, masters = PRECISIONS[precision]
        self.params = shapes(dtype)
        if base == "Wrap":
            base_optimizer = torch.optim.SGD(self.params, lr=lr, momentum=0.9)
            self.opt = flatkern.Wrap(base_optimizer, perturb=METHODS[method], backend=backend)
        else:
            self.opt = flatkern.SGD(
                [{"params": self.params, **own}], lr=lr, momentum=0.9, perturb=METHODS[method], backend=backend,
                master_weights=masters,
            )  # fmt: skip
        self.rolling = self.opt.rolling

    def backward(self):
        sum((p * p).sum() for p in self.params).backward()

    def into_perturbed(self, steps=1):
        """Some steps, and then perturbed weights; returns the clean ones."""
        for k in range(steps + 1):
            self.opt.zero_grad()
            if self.rolling:
                if k == steps:
                    break
                self.opt.train()
                self.backward()
                self.opt.step()
                continue
            if not isinstance(self.opt.method, RWP) or self.opt.method.lam is not None:
                self.backward()
            if k == steps:
                clean = self.values()
                self.opt.perturb()
                return clean
            self.opt.perturb()
            self.backward()
            self.opt.step()
        with self.opt.clean():
            return self.values()

    def way_back(self):
        self.opt.eval()

    def values(self):
        return [p.detach().clone() for p in self.params]


def same(a, b):
    return all(torch.equal(x.view(BITS[x.element_size()]), y.view(BITS[y.element_size()]))
               for x, y in zip(a, b, strict=True))  # fmt: skip


def write(params, data=False):
    """What others do: an element here, a row there, one tensor not at all. Returns what was written, by position."""
    spots = {0: (1, 2), 1: (4, slice(None), 1), 2: (slice(7, 9),), 3: (0,), 5: ()}
    with torch.no_grad():
        for k, at in spots.items():
            (params[k].data if data else params[k])[at] = 7.0 + k
    return spots


def expected(clean, spots):
    result = [t.clone() for t in clean]
    for k, at in spots.items():
        result[k][at] = 7.0 + k
    return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", DRAWS)
def test_elements_that_others_wrote_stay(method, precision, backend):
    """All others become clean, and the next steps go on from there."""
    run = Run(method, precision, backend)
    clean = run.into_perturbed()
    noisy = run.values()
    spots = write(run.params)
    run.way_back()
    assert same(run.values(), expected(clean, spots)) and not same(clean, noisy)
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
    assert same(run.values(), [w if k == 2 else c for k, (c, w) in enumerate(zip(clean, written, strict=True))])
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
    assert same(run.values(), expected(clean, spots))


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
        assert same(run.values(), expected(clean, spots)) and not run.opt.is_perturbed


@pytest.mark.parametrize("schedule", ["sigma", "eta"])
@pytest.mark.parametrize("method", DRAWS)
def test_a_value_that_has_been_set_since_does_not_matter(method, schedule):
    """The noise that is on was drawn with the old one."""
    run = Run(method)
    clean = run.into_perturbed(steps=2)
    run.opt.param_groups[0][schedule] = 0.5
    spots = write(run.params)
    run.way_back()
    assert same(run.values(), expected(clean, spots))


def test_a_group_that_is_switched_off_since_is_told_too():
    run = Run("rolling")
    clean = run.into_perturbed()
    run.opt.param_groups[0]["perturb"] = False
    spots = write(run.params)
    run.way_back()
    assert same(run.values(), expected(clean, spots))


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
    assert same(after[0], before[0]) and after[1:] == before[1:] and run.opt.is_perturbed
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
        assert same(*ends), method


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
    assert same(*ends)


def test_what_writes_may_be():
    with pytest.raises(ValueError, match='writes is \'no\', but should be "keep" or "drop"'):
        Run("RWP", writes="no")
    run = Run("RWP")
    run.opt.param_groups[0]["writes"] = "dropped"
    with pytest.raises(ValueError, match="writes is 'dropped'"):
        run.opt.perturb()


# --- clean() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_clean_is_the_place_to_write(method, precision, backend):
    """By `.data`, too: the perturbation is put on what is there then."""
    run = Run(method, precision, backend)
    clean = run.into_perturbed()
    noisy = run.values()
    with run.opt.clean():
        assert same(run.values(), clean)
    assert same(run.values(), noisy) and run.opt.is_perturbed
    with run.opt.clean():
        spots = write(run.params, data=True)
    assert run.opt.is_perturbed
    again = run.values()
    if method in ASCENTS:
        now = expected(clean, spots)
        for k, (p, old, was, new) in enumerate(zip(again, clean, noisy, now, strict=True)):
            master = PRECISIONS[precision][1]
            assert torch.equal(p[new == old], was[new == old])
            if k in spots and not master:  # a master knows the clean weight better than we do here
                moved = new.float() + (was.float() - old.float())
                assert torch.equal(p, torch.where(new == old, was, moved.to(p.dtype)))
    elif precision == "float32":
        # Noise of the same round, with the norms of the weights that are there now.
        fresh = expected(clean, spots)
        group, state = run.opt.param_groups[0], run.opt.state
        round_ = group["round"] - (not run.rolling)
        if not group["eta"]:
            flatkern.perturb_(fresh, group["sigma"], seed=0, round=round_, backend=backend)
            assert same(fresh, again)
        assert all("momentum_buffer" in state[p] for p in run.params)
    run.way_back()
    assert same(run.values(), expected(clean, spots))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_goes_on_from_what_was_written_inside_clean(method):
    """As a plain optimizer does from the same weights, with the same gradient."""
    run = Run(method, lr=0.0)
    run.into_perturbed()
    run.backward()
    with run.opt.clean():
        spots = write(run.params)
        inside = run.values()
    run.opt.step()
    run.way_back()
    assert same(run.values(), inside) and spots


@pytest.mark.parametrize("method", ["RWP", "m-RWP", "rolling", "SAM"])
def test_what_is_allowed_inside_clean(method):
    run = Run(method)
    opt, saved = run.opt, run.opt.state_dict()
    run.into_perturbed()
    if method in ("m-RWP", "SAM"):
        opt.cycle.drop_pending()
    noisy = run.values()
    with opt.clean():
        inside = run.values()
        calls = {
            "load_state_dict": lambda: opt.load_state_dict(saved),
            "add_param_group": lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
            "step": opt.step,
        }
        if opt.rolling:
            opt.train()
            opt.eval()
            assert same(run.values(), inside)
        else:
            calls |= {"perturb": opt.perturb, "restore": opt.restore}
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name}: inside clean\(\)"):
                call()
        opt.state_dict()
        with opt.clean():
            assert same(run.values(), inside)
    assert same(run.values(), noisy) and opt.is_perturbed


def test_clean_on_clean_weights_tells_masters():
    run = Run("RWP", "masters")
    run.into_perturbed()
    run.way_back()
    with run.opt.clean():
        write(run.params, data=True)
    written = run.values()
    run.opt.perturb()
    run.opt.restore()
    assert same(run.values(), written)


def test_refresh_masters():
    """`.data` writes to clean half-precision weights; one element, and the others keep what bfloat16 cannot hold."""
    for refresh in (False, True):
        run = Run("RWP", "masters")
        run.into_perturbed()
        run.way_back()
        run.params[2].data[0, 0] = 7.0
        master = run.opt.state[run.params[2]]["master"].clone()
        if refresh:
            run.opt.refresh_masters()
        run.opt.perturb()
        with pytest.raises(RuntimeError, match="refresh_masters: the weights are perturbed"):
            run.opt.refresh_masters()
        run.opt.restore()
        assert (float(run.params[2][0, 0]) == 7.0) is refresh
        master[0, 0] = 7.0 if refresh else master[0, 0]
        assert torch.equal(run.opt.state[run.params[2]]["master"], master)


def test_a_model_that_moves_inside_clean():
    run = Run("rolling")
    clean = run.into_perturbed()
    with run.opt.clean():
        for p in run.params:
            p.data = p.data.double().float() * 2
        run.params[1].data = run.params[1].data.contiguous()
    assert run.opt.is_perturbed
    run.way_back()
    assert same(run.values(), [2 * c for c in clean])


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
    assert same(run.values(), expected(clean, spots)) and not run.opt.is_perturbed
    run.opt.train()
    run.opt.eval()
    assert same(run.values(), expected(clean, spots))


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
    assert same([p.detach() for p in net.parameters() if p.requires_grad],
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
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] == 5


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
