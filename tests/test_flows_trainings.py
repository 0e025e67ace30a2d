"""What happens to a model in the middle of a perturbation, and over several steps: conversions, averages, checkpoints,
other optimizers. What is written is kept or refused, and no noise stays where nobody wrote.
"""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from compare import assert_same, copies, same
from flows import HALF, METHODS, Network, Run, X, one_element, rows
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.optim.swa_utils import AveragedModel
from unchanged import refused

import flatkern

CONVERSIONS = {
    "half": lambda net: net.half(),
    "float": lambda net: net.float(),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
}


@pytest.mark.filterwarnings("ignore:others have written", "ignore:.*ascends on bfloat16")
@pytest.mark.parametrize("end", ["eval", "step", "collected", "clean"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@rows("own", among=[(m, own) for m in METHODS for own in ({}, HALF)])
def test_a_model_is_converted_and_perhaps_written(method, own, conversion, end, backend):
    """What comes back is converted from the most exact weights that there are: from masters, where there are some."""
    for writes in (False, True):
        run = Run(method, backend, **own)
        run.perturb()
        exact = [run.opt.state[p].get("master", c).clone() for p, c in zip(run.params, run.clean, strict=True)]
        CONVERSIONS[conversion](run.net)
        if writes:
            one_element(run)
            exact[3][1, 2] = 7.0
        found = run.now()
        if end == "clean":
            with run.opt.clean():
                pass
        elif end == "step" and not writes:
            run.opt.step()
        elif end == "step":
            with refused(RuntimeError, "clean", run.params, run.opt):
                run.opt.step()
        if end == "collected":
            del run.opt
        else:
            run.opt.eval()
        expected = [e.to(f.dtype) for e, f in zip(exact, found, strict=True)]
        if writes and method == "SAM":
            expected[3] = found[3]
        assert_same(run.now(), expected)


def test_a_dtype_that_no_kernel_has(backend):
    """The way back and the end of clean() find it; the weights are clean either way, and the model can go back."""
    for method in METHODS:
        run = Run(method, backend)
        run.perturb()
        run.net.double()
        one_element(run)
        found = run.now()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.opt.eval()
        expected = [c.double() for c in run.clean]
        expected[3][1, 2] = 7.0
        if method == "SAM":
            expected[3] = found[3]
        assert all(torch.equal(a, b) for a, b in zip(run.now(), expected, strict=True))

        run = Run(method, backend)
        run.perturb()
        context = contextlib.nullcontext() if method == "SAM" else pytest.raises(TypeError, match="float64")
        with context, run.opt.clean():
            run.net.double()
            one_element(run)
            written = run.now()
        if method == "SAM":
            assert run.opt.is_perturbed
            run.opt.eval()
        assert not run.opt.is_perturbed
        assert all(torch.equal(a, b) for a, b in zip(run.now(), written, strict=True))
        run.net.float()
        run.stays([w.float() for w in written])


# --- over several steps ----------------------------------------------------------------------------


def swapped(run, average, inside=True):
    """Evaluation of averaged weights, as EMA libraries do: put in, looked at, and the others put back."""
    with run.opt.clean() if inside else contextlib.nullcontext():
        before = copies(run.params)
        for p, a in zip(run.params, average, strict=True):
            p.data.copy_(a)
        assert_same(run.now(), average)
        run.net.eval()
        with torch.no_grad():
            run.net(X)
        assert_same(run.now(), average)
        for p, b in zip(run.params, before, strict=True):
            p.data.copy_(b)
        run.net.train()


def trained(run, steps, swaps=False):
    for group in run.opt.param_groups:
        group.update(lr=0.1)
    average = [torch.full_like(p, 0.5) for p in run.params]
    for _ in range(steps):
        if swaps:
            swapped(run, average)
        run.train()
        if swaps:
            swapped(run, average)
    run.opt.eval()
    return run.now()


@pytest.mark.filterwarnings("ignore:.*ascends on bfloat16")
@rows("own", among=[(m, own) for m in METHODS for own in ({}, HALF)])
def test_averages_are_swapped_in_and_out_inside_clean(method, own, backend):
    """The trajectory is the one without, bit for bit, masters included."""
    assert_same(trained(Run(method, backend, **own), 3, swaps=True), trained(Run(method, backend, **own), 3))


def test_averages_that_are_swapped_in_under_noise_are_noticed(backend):
    run = Run("followed", backend)
    run.perturb()
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        swapped(run, [torch.full_like(p, 0.5) for p in run.params], inside=False)
    run.stays([torch.full_like(p, 0.5) for p in run.params])


@rows(among=METHODS)
def test_an_average_of_what_is_inside_clean_is_one_of_clean_weights(method, backend):
    run = Run(method, backend)
    average = AveragedModel(run.net)
    for _ in range(2):
        run.perturb()
        with run.opt.clean():
            average.update_parameters(run.net)
        run.opt.step()
    # The mean of equal numbers is that number.
    assert_same([p.detach() for p in average.module.parameters()], run.clean)


@pytest.mark.filterwarnings("ignore:others have written", "ignore:.*ascends on bfloat16")
@pytest.mark.parametrize("first", ["model", "optimizer"])
@rows("own", among=[(m, own) for m in METHODS for own in ({}, HALF)])
def test_a_rollback_in_the_middle_is_as_a_new_start(method, own, first, backend):
    """After a loss of NaN: the last good checkpoint, and on."""
    run = Run(method, backend, **own)
    saved = copy.deepcopy((run.net.state_dict(), run.opt.state_dict()))
    trained(run, 1)
    run.perturb()
    for p in run.params:
        p.grad = torch.full_like(p, float("nan"))
    run.opt.step()
    assert run.net.body.weight.isnan().any()
    run.perturb()
    if first == "optimizer":
        run.opt.load_state_dict(saved[1])
    run.net.load_state_dict(saved[0])
    if first == "model":
        run.opt.load_state_dict(saved[1])
    fresh = Run(method, backend, **own)
    fresh.net.load_state_dict(saved[0])
    fresh.opt.load_state_dict(saved[1])
    assert_same(trained(run, 3), trained(fresh, 3))


@rows(among=METHODS)
def test_a_phase_of_another_optimizer(method, backend):
    """eval() or restore() before it; the old optimizer changes nothing any more, not when it is collected either."""
    run = Run(method, backend)
    run.perturb()
    run.opt.eval()
    other = torch.optim.SGD(run.params, lr=0.1, fused=True)
    for _ in range(2):
        other.zero_grad()
        run.net.eval()  # a followed model would put the noise on again
        run.net(X).square().mean().backward()
        other.step()
    found = run.now()
    run.opt.eval()
    assert_same(run.now(), found)
    assert not same(found, run.clean)
    del run.opt
    assert_same(run.now(), found)


@rows(among=METHODS)
def test_freezing_in_the_middle(method, backend):
    """As LoRA does: what is frozen under noise or an ascent is clean, and stays as it is when all others move."""
    run = Run(method, backend)
    run.perturb()
    run.net.body.requires_grad_(False)
    run.net.body.weight.grad = run.net.body.bias.grad = None
    run.opt.param_groups[0]["lr"] = 0.1
    if method == "m-RWP":  # whose clean gradient is there already, and would be applied as torch applies it
        run.opt.eval()
        run.opt.release()
    else:
        run.opt.step()
    run.train()
    run.opt.eval()
    changed = [not same([a], [b]) for a, b in zip(run.now(), run.clean, strict=True)]
    assert changed[3:5] == [False, False] and all(changed[k] for k in (1, 2, 5, 6))
    run.net.body.requires_grad_(True)
    run.opt.release()
    run.train()
    run.opt.eval()
    assert not same(run.now()[3:5], run.clean[3:5])


@rows(among=METHODS)
def test_a_distributed_checkpoint_is_loaded_into_perturbed_weights(method, backend, tmp_path):
    """In place, into the tensors of a state dict, and by set_model_state_dict."""
    run = Run(method, backend)
    dcp.save({"net": run.net.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for how in ("in place", "set"):
        run.perturb()
        state = {"net": run.net.state_dict() if how == "in place" else Network().state_dict()}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        if how == "set":
            set_model_state_dict(run.net, state["net"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SAM's, of tensors that stay as written
            run.opt.eval()
        run.stays(run.clean)
        run.opt.release()


class Words(nn.Module):
    """Its forward writes to the rows it looks up, the first four."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(10, 4, max_norm=1.0)
            self.head = nn.Linear(4, 2)

    def forward(self):
        return self.head(self.words(torch.arange(4)))


@pytest.mark.filterwarnings("ignore:others have written")
@pytest.mark.parametrize("method", ["RWP", "m-RWP", "rolling", "SAM"])
def test_a_forward_that_writes(method, backend):
    net = Words()
    net()  # those rows are within the limit now
    clean = copies(net.parameters())
    groups = [{"params": net.words.parameters(), "writes": "drop"}, {"params": net.head.parameters()}]
    opt = flatkern.SGD(groups, lr=0.0, perturb=METHODS[method], backend=backend)
    for _ in range(3):
        opt.zero_grad()
        if method in ("m-RWP", "SAM"):
            net().square().sum().backward()
        opt.train() if opt.rolling else opt.perturb()
        noisy = copies(net.parameters())
        net().square().sum().backward()
        assert not same(copies(net.parameters()), noisy)
        opt.step()
        opt.eval()
        assert_same(copies(net.parameters()), clean)
    # Without the key: a step says it, and what was not looked up becomes clean.
    opt = flatkern.SGD(net.parameters(), lr=0.0, perturb=METHODS[method], backend=backend)
    opt.zero_grad()
    if method in ("m-RWP", "SAM"):
        net().square().sum().backward()
    opt.train() if opt.rolling else opt.perturb()
    net().square().sum().backward()
    with refused(RuntimeError, "writes=.drop", net.parameters(), opt):
        opt.step()
    opt.eval()
    if method != "SAM":
        assert_same([net.words.weight[4:]], [clean[0][4:]])
    assert bool((net.words.weight[:4].norm(dim=1) <= 1.0001).all())
