"""with opt.clean(): clean weights, for others to read and to write; the perturbation then goes on around them."""

import copy

import pytest
import torch
from compare import assert_same, copies
from foreign_writes import ASCENTS, METHODS, PRECISIONS, Run, expected, write

import flatkern


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_clean_is_the_place_to_write(method, precision, backend):
    """By `.data`, too: the perturbation is put on what is there then."""
    run = Run(method, precision, backend)
    clean = run.into_perturbed()
    noisy = run.values()
    with run.opt.clean():
        assert_same(run.values(), clean)
    assert_same(run.values(), noisy)
    assert run.opt.is_perturbed
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
        if not group["eta"] and group["scale"] == "norm":
            flatkern.perturb_(fresh, group["sigma"], seed=0, round=round_, backend=backend)
            assert_same(fresh, again)
        assert all("momentum_buffer" in state[p] for p in run.params)
    run.way_back()
    assert_same(run.values(), expected(clean, spots))


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
    assert_same(run.values(), inside)
    assert spots


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
        opt.train()
        opt.eval()
        assert_same(run.values(), inside)
        if not opt.rolling:
            calls |= {"perturb": opt.perturb, "restore": opt.restore}
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name}: inside clean\(\)"):
                call()
        opt.state_dict()
        with opt.clean():
            assert_same(run.values(), inside)
    assert_same(run.values(), noisy)
    assert opt.is_perturbed


def test_clean_on_clean_weights_tells_masters():
    run = Run("RWP", "masters")
    run.into_perturbed()
    run.way_back()
    with run.opt.clean():
        write(run.params, data=True)
    written = run.values()
    run.opt.perturb()
    run.opt.restore()
    assert_same(run.values(), written)


def test_clean_on_clean_weights_keeps_training_forwards_clean():
    """torch's update_bn() calls model.train(): a followed model's noise would go on inside, and into statistics."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8))
    opt = flatkern.SGD(net.parameters(), lr=0.1, perturb=flatkern.RWP(sigma=0.3, rolling=True))
    opt.follow(net)
    x = torch.randn(16, 6)
    net(x).square().sum().backward()
    opt.step()
    opt.eval()
    alone = copy.deepcopy(net)
    torch.optim.swa_utils.update_bn([x], alone)
    with opt.clean():
        torch.optim.swa_utils.update_bn([x], net)
        assert_same(list(net.parameters()), list(alone.parameters()))
        assert torch.equal(net[1].running_mean, alone[1].running_mean)
        with pytest.raises(RuntimeError, match=r"step: inside clean\(\)"):
            opt.step()
        net[0].weight.data.fill_(0.5)
    assert not opt.is_perturbed
    net(x)
    opt.eval()
    assert bool((net[0].weight == 0.5).all())


@pytest.mark.parametrize("method", [flatkern.RWP(0.3, rolling=True), flatkern.SAM(0.3)], ids=["rolling", "SAM"])
def test_a_mask_from_clean_weights_while_they_are_perturbed(method):
    """The mask that the clean weights give, and the step is that of a mask which came before."""

    def trained(inside):
        torch.manual_seed(0)
        net, x = torch.nn.Linear(6, 4), torch.randn(8, 6)
        opt = flatkern.SGD(net.parameters(), lr=0.1, perturb=method, enhance=flatkern.IRE(2.0, interval=2))

        def update_mask():
            net(x).square().sum().backward()
            opt.update_mask()

        for _ in range(4):
            opt.zero_grad()
            due = opt.mask_due
            if due and not inside:
                opt.eval()
                update_mask()
            if opt.rolling:
                opt.train()
            else:
                net(x).exp().sum().backward()
                opt.perturb()
            if due and inside:
                with opt.clean():
                    update_mask()
            net(x).exp().mean().backward()
            opt.step()
        opt.eval()
        return copies(net.parameters())

    assert_same(trained(inside=True), trained(inside=False))


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
    assert_same(run.values(), [2 * c for c in clean])
