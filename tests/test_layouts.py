"""Every shape, memory format and dtype that models have, and parameters that change under a running optimizer."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from compare import assert_same, copies
from steps import perturb
from torch import nn

import flatkern
from flatkern import ASAM, RWP, SAM, SGD, AdamW, Wrap

METHODS = {
    "plain": None,
    "RWP": RWP(sigma=0.1),
    "m-RWP": RWP(sigma=0.1, lam=0.4),
    "SAM": SAM(),
    "rolling": RWP(sigma=0.1, rolling=True),
}
OWN = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*ascends on")


def sgd(params, method=None, **own):
    return SGD(params, **OWN, perturb=METHODS.get(method), **own)


def wrapped(params, method=None, backend=None):
    return Wrap(torch.optim.SGD(params, **OWN, foreach=False), METHODS.get(method), backend=backend)


def values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes):
    return [nn.Parameter(values(shape, k)) for k, shape in enumerate(shapes)]


def give(params, seed):
    """Gradients that depend on the seed and the position alone, in the parameters' dtype and PyTorch's format."""
    for k, p in enumerate(params):
        if p.requires_grad:
            p.grad = values(p.shape, 100 * seed + k + 10).to(p.dtype)


def nothing(params, where):
    """What happens to the parameters during training; `where` is "between" steps or "midway"."""


def only(place, event):
    return lambda params, where: event(params, where) if where == place else None


def train(opt, params, event=nothing, at=2, give=give, steps=STEPS):
    """The method's pattern; since gradients are given, a method with one gradient moves like the plain base."""
    opt.train()
    for step in range(steps):
        if step == at:
            event(params, "between")
        perturb(opt, lambda step=step: give(params, step + 50))
        if step == at:
            event(params, "midway")
        give(params, step)
        opt.step()
        opt.zero_grad()
    opt.eval()


SHAPES = [(), (0,), (0, 4), (5, 0), (1,), (7,), (1, 1), (3, 4), (2, 3, 2, 2), (2, 1, 2, 3, 2)]


@pytest.mark.parametrize("method", [*METHODS, "ARWP", "ASAM", "rolling ARWP"])
@pytest.mark.parametrize("make", [sgd, wrapped])
def test_shapes(method, make, backend):
    """0-D and empty tensors train, climb, scatter and are restored like any other; the values are the plain base's."""
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    extra = {"ARWP": RWP(eta=1.0), "rolling ARWP": RWP(eta=1.0, rolling=True), "ASAM": ASAM(all_tensors=True)}
    base = sgd(theirs, "m-RWP" if method == "m-RWP" else None, backend=backend)
    if make is wrapped:
        opt = Wrap(torch.optim.SGD(ours, **OWN), METHODS.get(method) or extra.get(method), backend=backend)
        base = wrapped(theirs, "m-RWP" if method == "m-RWP" else None, backend)
    else:
        opt = SGD(ours, **OWN, perturb=METHODS.get(method) or extra.get(method), backend=backend)
    train(opt, ours)
    train(base, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_only_empty_parameters(method, backend):
    params = parameters((0,), (0, 3))
    train(sgd(params, method, backend=backend), params)
    assert all(p.isfinite().all() for p in params)


# --- memory formats ------------------------------------------------------------------------------

IMAGES = [(4, 3, 3, 2), (4, 1, 3, 3), (4, 3, 1, 1), (2, 3, 2, 2, 2), (6, 5), (5,)]


def channels_last(p):
    return p.contiguous(
        memory_format={4: torch.channels_last, 5: torch.channels_last_3d}.get(p.dim(), torch.contiguous_format)
    )


def switch(params, where):
    for p in params:
        p.data = channels_last(p.data)


def give_like_parameters(params, seed):
    give(params, seed)
    for p in params:
        p.grad = torch.empty_like(p).copy_(p.grad)


@pytest.mark.parametrize("gradients", [give, give_like_parameters])
@pytest.mark.parametrize("when", ["start", "between", "midway"])
@pytest.mark.parametrize("make", [sgd, wrapped])
@pytest.mark.parametrize("method", METHODS)
def test_channels_last(method, make, when, gradients, backend):
    """From the start, after the state exists, or between perturb() and step(): the same values."""
    ours, theirs = parameters(*IMAGES), parameters(*IMAGES)
    if when == "start":
        switch(ours, when)
    opt = make(ours, method, backend=backend)
    train(opt, ours, only(when, switch), give=gradients)
    train(make(theirs, "m-RWP" if method == "m-RWP" else None, backend=backend), theirs)
    assert_same(ours, theirs)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in ours if p.dim() == 4)


def test_layouts_are_changed_once(backend):
    """State follows the parameter's strides with the first step; after that nothing is copied any more."""
    params = parameters(*IMAGES)
    opt = sgd(params, "RWP", backend=backend)
    train(opt, params)
    switch(params, "between")
    train(opt, params, steps=1)
    buffers = [opt.state[p]["momentum_buffer"] for p in params]
    assert all(b.stride() == p.stride() for b, p in zip(buffers, params, strict=True) if 1 not in p.shape)
    train(opt, params, steps=2)
    assert all(opt.state[p]["momentum_buffer"] is b for p, b in zip(params, buffers, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_strange_strides(method, backend):
    """Slices, transposes and broadcasts of other arrays, as custom backwards and NumPy hand them over."""

    def strided(params, seed):
        give(params, seed)
        for k, p in enumerate(params):
            if (k + seed) % 3 == 0:
                wide = np.zeros((*p.shape[:-1], 2 * p.shape[-1]), np.float32)
                wide[..., ::2] = p.grad.numpy()
                p.grad = torch.from_numpy(wide[..., ::2])
            elif (k + seed) % 3 == 1:
                p.grad = p.grad.movedim(0, -1).contiguous().movedim(-1, 0)
            else:
                p.grad = torch.cat([torch.zeros(3), p.grad.flatten()])[3:].view(p.shape)

    shapes = [(4, 3), (6, 5), (3, 2, 2), (5,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    train(sgd(ours, method, backend=backend), ours, give=strided)
    train(sgd(theirs, method, backend=backend), theirs)
    assert_same(ours, theirs)


def test_broadcast_gradients(backend):
    (p, q) = parameters((3, 4), (5,))
    for params, grads in (([p], [torch.ones(1, 1).expand(3, 4)]), ([q], [torch.tensor(2.0).expand(5)])):
        expected = params[0].detach() - 0.5 * grads[0]
        params[0].grad = grads[0]
        SGD(params, lr=0.5, backend=backend).step()
        assert torch.equal(params[0], expected)


# --- parameters that change ----------------------------------------------------------------------


def swap(params, where):
    for p in params:
        p.data = p.data.clone()


@pytest.mark.parametrize("where", ["between", "midway"])
@pytest.mark.parametrize("own", [{}, {"master_weights": True}], ids=["plain", "masters"])
@pytest.mark.parametrize("method", METHODS)
def test_data_is_swapped(method, own, where, backend):
    """Other code gives a parameter new memory, also on perturbed weights: pointers are looked up at every call."""
    results = []
    for event in (nothing, only(where, swap)):
        params = parameters((4, 3), (7,))
        if own:
            params = [nn.Parameter(p.detach().bfloat16()) for p in params]
        train(sgd(params, method, backend=backend, **own), params, event)
        results.append(params)
    assert_same(*results)


@pytest.mark.parametrize("own", [{}, {"master_weights": True}], ids=["without", "masters"])
@pytest.mark.parametrize("method", METHODS)
def test_several_dtypes_in_one_optimizer(method, own, backend):
    """Every parameter ends where an optimizer of its dtype alone takes it."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    shapes = [(4, 3), (4, 3), (5,), (5,), (2, 2)]

    def mixed():
        return [nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(parameters(*shapes), dtypes, strict=True)]

    ours = mixed()
    opt = sgd(ours, method, backend=backend, **own)
    train(opt, ours)
    for dtype in set(dtypes):
        theirs = mixed()
        for p in theirs:
            p.requires_grad_(p.dtype == dtype)
        train(sgd(theirs, "m-RWP" if method == "m-RWP" else None, backend=backend, **own), theirs)
        assert_same([p for p in ours if p.dtype == dtype], [p for p in theirs if p.dtype == dtype])
    masters = ["master" in opt.state[p] for p in ours]
    assert masters == [bool(own) and dtype != torch.float32 for dtype in dtypes]


@pytest.mark.parametrize("own", [{}, {"master_weights": True}], ids=["without", "masters"])
@pytest.mark.parametrize("method", METHODS)
def test_module_changes_its_dtype(method, own, backend):
    """To half and back between steps: training goes on, restoring is exact; float64 is refused and changes nothing."""
    net = nn.Linear(4, 3)
    params = list(net.parameters())
    opt = sgd(params, method, backend=backend, **own)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        net.to(dtype)
        train(opt, params)
        assert all(p.isfinite().all() and p.dtype == dtype for p in params)
        clean = copies(params)
        for group in opt.param_groups:
            group["lr"], kept = 0.0, group["lr"]
        train(opt, params)
        opt.param_groups[0]["lr"] = kept
        assert_same(params, clean)
    net.double()
    clean = copies(params)
    give(params, 0)
    with pytest.raises(TypeError, match=r"\[0\] has dtype torch.float64, but should have one of"):
        opt.perturb() if isinstance(opt.method, SAM) else opt.step()
    assert_same(params, clean)
    net.float()
    opt.zero_grad()
    train(opt, params)


def test_float32_gradients_of_half_parameters(backend):
    """With `grad_dtype`, as FSDP2 accumulates: the update sees every bit of them."""
    fine = torch.tensor([1.0, 1.0 + 2.0**-20])
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    p.grad_dtype = None
    opt = SGD([p], lr=1.0, momentum=0.9, master_weights=True, backend=backend)
    p.grad = fine.clone()
    opt.step()
    assert torch.equal(opt.state[p]["master"], -fine)
    assert opt.state[p]["momentum_buffer"].dtype == torch.float32


# --- who takes part ------------------------------------------------------------------------------


def noise_of(params, opt):
    """The perturbation of every parameter, taken on and off."""
    clean = copies(params)
    opt.zero_grad()
    if isinstance(opt.method, SAM):
        give(params, 0)
    opt.perturb()
    noise = [p.detach() - c for p, c in zip(params, clean, strict=True)]
    opt.restore()
    opt.release()
    assert_same(params, clean)
    return noise


def test_frozen_parameters_count_in_the_noise_index(backend):
    """Not perturbed and not updated, yet the others draw what they would draw beside a trained one."""
    drawn = []
    for frozen in (False, True):
        params = parameters((4, 3), (3, 4), (5,))
        params[1].requires_grad_(not frozen)
        opt = sgd(params, "RWP", backend=backend)
        drawn.append(noise_of(params, opt))
        before = params[1].detach().clone()
        train(opt, params)
        assert torch.equal(params[1], before) is frozen
    assert drawn[0][1].all()
    assert not drawn[1][1].any()
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][2], drawn[1][2])


@pytest.mark.parametrize("method", ["RWP", "SAM", "m-RWP", "rolling"])
@pytest.mark.parametrize("make", [sgd, wrapped])
def test_requires_grad_toggles(method, make, backend):
    """Between steps: in and out of the perturbation with the next call. Midway: restored all the same."""
    params = parameters((4, 3), (5,))
    opt = make(params, method, backend=backend)
    train(opt, params)
    for toggled in ("between", "midway"):
        before = params[0].detach().clone()

        def freeze(params, where, toggled=toggled):
            if where == toggled:
                params[0].requires_grad_(False)

        train(opt, params, freeze, at=0, steps=1)
        if method != "m-RWP" or toggled == "between":  # m-RWP has its clean gradient by then, which is still mixed
            assert torch.equal(params[0], before)
        before = params[0].detach().clone()
        if not opt.rolling:
            assert not noise_of(params, opt)[0].any()
        assert torch.equal(params[0], before)
        params[0].requires_grad_(True)
        train(opt, params, steps=1)
        assert not torch.equal(params[0], before)


@pytest.mark.parametrize("method", ["RWP", "SAM", "m-RWP", "rolling"])
@pytest.mark.parametrize("make", [sgd, wrapped])
def test_gradient_missing(method, make, backend):
    """In every pass: skipped as in torch, without state, and clean afterwards. In one pass only: counts as zero."""
    params, twins = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    before = params[1].detach().clone()

    def first_only(params, seed):
        give(params, seed)
        params[1].grad = None

    opt = make(params, method, backend=backend)
    train(opt, params, give=first_only)
    train(make(twins[:1], "m-RWP" if method == "m-RWP" else None, backend=backend), twins[:1])
    assert torch.equal(params[1], before)
    assert not opt.state.get(params[1])
    assert torch.equal(params[0], twins[0])

    def last_pass_only(params, seed):
        give(params, seed)
        if seed >= 50:
            params[1].grad = None

    def with_zeros(params, seed):
        give(params, seed)
        if seed >= 50:
            params[1].grad = torch.zeros_like(params[1])

    results = []
    for gradients in (last_pass_only, with_zeros):
        params = parameters((4, 3), (5,))
        train(make(params, method, backend=backend), params, give=gradients)
        results.append(params)
    assert_same(*results)


def test_tied_parameters(backend):
    """A module lists a shared weight once; it is perturbed and updated once, and stays shared."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    params = list(net.parameters())
    assert len(params) == 1
    alone = [nn.Parameter(params[0].detach().clone())]
    assert_same(
        noise_of(params, sgd(net.parameters(), "RWP", backend=backend)),
        noise_of(alone, sgd(alone, "RWP", backend=backend)),
    )
    opt = sgd(net.parameters(), "RWP", backend=backend)
    before = params[0].detach().clone()
    opt.perturb()
    net(torch.ones(2, 4)).square().mean().backward()
    grad = params[0].grad + OWN["weight_decay"] * before
    opt.step()
    assert net[2].weight is net[0].weight
    assert (params[0] - (before - OWN["lr"] * grad)).abs().max() < 1e-6


# --- state and groups ----------------------------------------------------------------------------


def clear(opt):
    opt.state.clear()


def replace(opt):
    opt.state = defaultdict(dict)


def with_masters(params, method, backend):
    return sgd(params, method, backend=backend, master_weights=True)


@pytest.mark.parametrize("forget", [clear, replace])
@pytest.mark.parametrize("make", [sgd, wrapped, with_masters])
@pytest.mark.parametrize("method", METHODS)
def test_state_is_cleared(method, make, forget, backend):
    """As with torch's: training goes on from the present weights as if it began there."""
    dtype = torch.bfloat16 if make is with_masters else torch.float32
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters((4, 3), (5,))]
    opt = make(params, method, backend=backend)
    train(opt, params)
    forget(opt)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    train(make(twins, "m-RWP" if method == "m-RWP" else None, backend=backend), twins)
    train(opt, params)
    assert_same(params, twins)


@pytest.mark.parametrize("method", ["RWP", "SAM"])
def test_state_is_cleared_on_perturbed_weights(method, backend):
    """Masters hold the clean weights then, so they must survive, or the noise would be learned."""
    params = [nn.Parameter(values((4, 3), 0).bfloat16())]
    opt = sgd(params, method, backend=backend, master_weights=True)
    opt.param_groups[0] |= {"lr": 0.0, "sigma": 1.0, "rho": 5.0}
    clean = params[0].detach().clone()
    give(params, 0)
    if method == "RWP":
        opt.zero_grad()
    opt.perturb()
    assert not torch.equal(params[0], clean)
    opt.state.clear()
    give(params, 0)
    opt.step()
    assert torch.equal(params[0], clean)


@pytest.mark.parametrize("make", [sgd, wrapped])
@pytest.mark.parametrize("method", METHODS)
def test_add_param_group(method, make, backend):
    """New parameters take part from the next call on, with their own values; the others go on as they were."""
    params, late = parameters((4, 3), (5,)), parameters((3, 3), (2,), (6, 2))[2:]
    twins = parameters((4, 3), (5,))
    opt, base = (
        make(params, method, backend=backend),
        make(twins, "m-RWP" if method == "m-RWP" else None, backend=backend),
    )
    train(opt, params)
    train(base, twins)
    start = late[0].detach().clone()
    opt.add_param_group({"params": late, "lr": 0.0, "weight_decay": 0.0})
    train(opt, params + late)
    train(base, twins)
    assert_same(params, twins)
    assert torch.equal(late[0], start)
    if method in ("RWP", "SAM"):
        assert all(n.any() for n in noise_of(params + late, opt))


@pytest.mark.parametrize("method", ["plain", "RWP", "SAM", "rolling"])
def test_a_thousand_tensors(method, backend):
    shapes = [(3,), (2, 2), (1,), (5, 3)] * (250 if backend == "cpp" or method in ("plain", "SAM") else 10)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    train(sgd(ours, method, backend=backend), ours, steps=2)
    train(sgd(theirs, backend=backend), theirs, steps=2)
    assert_same(ours, theirs)


def test_adamw_in_channels_last(backend):
    """All moments follow, not only a momentum."""
    results = []
    for event in (nothing, switch):
        params = parameters(*IMAGES)
        opt = AdamW(params, perturb=RWP(sigma=0.1), backend=backend)
        train(opt, params, event)
        results.append(params)
        state = opt.state[params[0]]
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == params[0].stride()
    assert_same(*results)
    assert copy.deepcopy(results[1][0]).is_contiguous(memory_format=torch.channels_last)


def test_functions_take_channels_last(backend):
    """The noise of a filter follows memory order, and restoring is exact."""
    p = channels_last(values((4, 3, 3, 2), 0))
    clean, saved = p.clone(), torch.empty_like(p)
    flatkern.perturb_([p], 0.1, seed=1, round=2, backups=[saved], backend=backend)
    rows = clean.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    flatkern.perturb_([rows], 0.1, seed=1, round=2, backend=backend)
    assert torch.equal(p.permute(0, 2, 3, 1), rows)
    flatkern.restore_([p], [saved], backend=backend)
    assert torch.equal(p, clean)
