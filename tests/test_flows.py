"""What trainers and torch itself do to weights in the middle of a perturbation: pruning, parametrizations, averages,
checkpoints, conversions, other optimizers. What they write is kept or refused, and no noise stays where nobody wrote.
"""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from patterns import backends, bits, same
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from unchanged import refused

import flatkern
from flatkern import RWP, SAM

METHODS = {
    "RWP": RWP(0.1, eta=1.0),
    "m-RWP": RWP(0.1, lam=0.5),
    "rolling": RWP(0.1, rolling=True),
    "followed": RWP(0.1, eta=1.0, rolling=True),
    "SAM": SAM(0.2),
}
NOISE = [name for name in METHODS if name != "SAM"]
HALF = {"dtype": torch.bfloat16, "master_weights": True}
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """Of rank 4, 2, 1; `unused` never has a gradient."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 2, (1, 2))
            self.body = nn.Linear(8, 8)
            self.unused = nn.Parameter(torch.randn(4))
            self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.conv(x.to(self.unused.dtype).view(-1, 1, 1, 5)).flatten(1)
        return self.head(torch.tanh(self.body(x)))


def rows(*names, among):
    """Every backend runs one method; the code around is the same, and eager noise is slow."""
    return pytest.mark.parametrize(
        ("backend", "method", *names), backends(among, lambda method, *_: method == "followed"),
        indirect=["backend"], ids=str,
    )  # fmt: skip


def weights_of(params):
    return [p.detach().clone() for p in params]


class Run:
    """A network after a few steps with lr > 0, and its optimizer; then lr is 0, so that every clean weight is known."""

    def __init__(self, method, backend, dtype=torch.float32, rule=flatkern.SGD, **own):
        self.net = Network().to(dtype)
        momentum = {"momentum": 0.9} if rule is flatkern.SGD else {}
        self.opt = rule(self.net.named_parameters(), lr=0.1, weight_decay=0.01, perturb=METHODS[method],
                        backend=backend, **momentum, **own)  # fmt: skip
        if method == "followed":
            self.opt.follow(self.net)
        self.params = list(self.net.parameters())  # of the optimizer; the network may get others
        for _ in range(2):
            self.train()
        self.opt.eval()
        self.clean = weights_of(self.params)
        for group in self.opt.param_groups:
            group.update(lr=0.0, weight_decay=0.0)

    def backward(self):
        self.net.train()
        self.net(X).float().square().mean().backward()

    def perturb(self):
        """Noise, or an ascent, and the gradient that a step needs."""
        self.opt.zero_grad()
        if isinstance(self.opt.method, SAM) or self.opt.method.lam is not None:
            self.backward()
        self.opt.train() if self.opt.rolling else self.opt.perturb()
        self.noisy = weights_of(self.params)
        assert self.opt.is_perturbed
        assert not torch.equal(self.noisy[1], self.clean[1])
        self.backward()

    def train(self):
        self.opt.zero_grad()
        if isinstance(self.opt.method, SAM) or self.opt.method.lam is not None:
            self.backward()
        if not self.opt.rolling:
            self.opt.perturb()
        self.backward()
        self.opt.step()

    def now(self):
        return weights_of(self.params)

    def kept(self, found):
        """What a way back must leave of `found`: elements that are as drawn become clean, others stay.

        In half precision all of a tensor stays where fewer than a quarter are: they are so by chance.
        """
        expected = []
        for c, n, f in zip(self.clean, self.noisy, found, strict=True):
            as_drawn = bits(f) == bits(n)
            whole = f.dtype != torch.float32 and as_drawn.float().mean() < 0.25
            expected.append(f if whole else torch.where(as_drawn, c, f))
        return expected

    def stays(self, expected):
        """The weights are these, also for the optimizer: a step with lr = 0 leaves them."""
        assert same(self.now(), expected)
        self.opt.release()  # the round that restore() has counted
        self.train()
        self.opt.eval()
        assert all(torch.equal(a, b) for a, b in zip(self.now(), expected, strict=True))  # -0 may have become 0


def torch_step(run, **how):
    torch.optim.SGD([p for p in run.params if p.grad is not None], lr=0.1, **how).step()


@torch.no_grad()
def clamp(run):
    for p in run.params:
        p.clamp_(-0.1, 0.1)


@torch.no_grad()
def one_element(run):
    run.net.body.weight[1, 2] = 7.0


@torch.no_grad()
def fill(run):
    run.net.body.weight.fill_(0.25)


def parametrized(run, leave=True):
    parametrizations.orthogonal(run.net.body)
    parametrize.remove_parametrizations(run.net.body, "weight", leave_parametrized=leave)


def assigned(run):
    """Through a parametrization, whose inverse writes."""
    parametrizations.spectral_norm(run.net.body)
    run.net.body.weight = torch.ones(8, 8, dtype=run.net.unused.dtype)


# By means that move a version: every way back keeps them.
SEEN = {
    "load_state_dict": lambda run: run.net.load_state_dict(Network().state_dict()),
    "load of one layer": lambda run: run.net.body.load_state_dict(nn.Linear(8, 8).state_dict()),
    "init": lambda run: nn.init.xavier_uniform_(run.net.body.weight),
    "apply(reset)": lambda run: run.net.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None),
    "clamp": clamp,
    "one element": one_element,
    "fill": fill,
    "detach": lambda run: run.net.body.weight.detach().zero_(),
    "foreach": lambda run: torch._foreach_copy_(
        [p.detach() for p in run.params], [torch.ones_like(p) for p in run.params]
    ),
    "parametrization": parametrized,
    "parametrization, original": lambda run: parametrized(run, leave=False),
    "parametrization, assigned": assigned,
    "another optimizer": torch_step,
}

SOME = ("load_state_dict", "one element", "clamp", "another optimizer")
SEEN_ROWS = [(m, f, {}) for m in METHODS for f in SEEN] + [(m, f, HALF) for m in METHODS for f in SOME]


def ended(run, found):
    """What the end of a perturbation must leave of what is found, as far as the optimizer can see it."""
    if isinstance(run.opt.method, SAM):  # a tensor that was written stays as a whole
        return [c if same([f], [n]) else f for c, n, f in zip(run.clean, run.noisy, found, strict=True)]
    return run.kept(found)


@pytest.mark.filterwarnings("ignore:others have written", "ignore:.*ascends on bfloat16")
@rows("flow", "own", among=SEEN_ROWS)
def test_what_moves_a_version_is_refused_by_a_step_and_kept_by_a_way_back(method, flow, own, backend):
    run = Run(method, backend, **own)
    run.perturb()
    SEEN[flow](run)
    found = run.now()
    assert run.opt.is_perturbed != (method == "followed" and flow.startswith("load"))  # following ends it before
    if run.opt.is_perturbed:
        with refused(RuntimeError, "clean", run.params, run.opt):
            run.opt.step()
    run.opt.eval()
    run.stays(ended(run, found))


def pruned(run, remove=True):
    prune.l1_unstructured(run.net.body, "weight", 0.5)
    run.backward()
    if remove:
        prune.remove(run.net.body, "weight")


def averages_put_in(run):
    """As EMA libraries do."""
    for p in run.params:
        p.data.copy_(torch.full_like(p, 0.5))


def adapter_merged(run):
    """As LoRA's `merge`."""
    run.net.body.weight.data += torch.ones(8, 1) @ torch.ones(1, 8)


def vector(run):
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(p.numel() for p in run.params)), run.params)


# By means that move no version: a rolling eval() notices them.
UNSEEN = {
    ".data": averages_put_in,
    ".data of one": lambda run: run.net.body.weight.data.clamp_(-0.1, 0.1),
    "adapter": adapter_merged,
    "vector_to_parameters": vector,
    "pruning": pruned,
    "half and back": lambda run: run.net.half().float(),
    "another fused optimizer": lambda run: torch_step(run, fused=True),
    "numpy": lambda run: run.net.body.weight.detach().numpy().fill(0.5),
}


@rows("flow", among=[(m, f) for m in ("rolling", "followed") for f in UNSEEN])
def test_what_moves_no_version_is_noticed_by_a_rolling_eval_and_kept(method, flow, backend):
    run = Run(method, backend)
    run.perturb()
    UNSEEN[flow](run)
    found = run.now()
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        run.opt.eval()
    assert not run.opt.is_perturbed
    run.stays(run.kept(found))


@rows("flow", among=[(m, f) for m in METHODS for f in (*SEEN, *UNSEEN)])
def test_anything_may_be_written_inside_clean(method, flow, backend):
    run = Run(method, backend)
    run.perturb()
    with run.opt.clean():
        assert same(run.now(), run.clean)
        (SEEN | UNSEEN)[flow](run)
        written = run.now()
    assert run.opt.is_perturbed and not same(written, run.clean)
    assert not same(run.now(), written)
    run.opt.eval()
    run.stays(written)


def average(run):
    mean = AveragedModel(run.net)
    mean.update_parameters(run.net)
    mean.update_parameters(run.net)


def switched(run):
    run.net.requires_grad_(False)
    run.net.requires_grad_(True)


def called(run):
    torch.func.functional_call(run.net, dict(run.net.named_parameters()), X).sum().backward()
    torch.func.functional_call(run.net, {k: v.detach() for k, v in run.net.named_parameters()}, X)


# Nothing is written: no step is refused, and every way back finds the clean weights.
NOTHING = {
    "pruned": lambda run: pruned(run, remove=False),
    "parametrized": lambda run: parametrizations.spectral_norm(run.net.body),
    "average": average,
    "deepcopy": lambda run: copy.deepcopy(run.net),
    "to cpu": lambda run: run.net.to("cpu"),
    "double and back": lambda run: run.net.double().float(),
    "channels last": lambda run: run.net.to(memory_format=torch.channels_last),
    "shared memory": lambda run: run.net.share_memory(),
    "train and eval": lambda run: run.net.eval().train(),
    "switched": switched,
    "clipped": lambda run: nn.utils.clip_grad_norm_(run.params, 0.1),
    "as a vector": lambda run: nn.utils.parameters_to_vector(run.params).mul_(2),
    "functional_call": called,
    "no_grad forward": lambda run: torch.no_grad()(run.net)(X),
    "inference": lambda run: torch.inference_mode()(run.net)(X),
    "own value": lambda run: [torch.no_grad()(p.copy_)(p.detach().clone()) for p in run.params],
}


# Their versions move, and an ascent cannot be drawn again to see that nothing has changed.
TOLD_BY_VALUES = ("parametrized", "own value")


@rows("flow", among=[(m, f) for m in METHODS for f in NOTHING if m != "SAM" or f not in TOLD_BY_VALUES])
def test_what_writes_nothing_raises_no_alarm(method, flow, backend):
    run = Run(method, backend)
    for end in ("eval", "step", "clean"):
        run.perturb()
        NOTHING[flow](run)
        if end == "clean":
            with run.opt.clean():
                assert same(run.now(), run.clean)
        if end == "step":
            run.opt.step()
        run.opt.eval()
        assert same(run.now(), run.clean)
        run.opt.release()


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
        assert same(run.now(), expected)


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
        before = weights_of(run.params)
        for p, a in zip(run.params, average, strict=True):
            p.data.copy_(a)
        assert same(run.now(), average)
        run.net.eval()
        with torch.no_grad():
            run.net(X)
        assert same(run.now(), average)
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
    assert same(trained(Run(method, backend, **own), 3, swaps=True), trained(Run(method, backend, **own), 3))


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
    assert same([p.detach() for p in average.module.parameters()], run.clean)


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
    assert same(trained(run, 3), trained(fresh, 3))


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
    assert same(run.now(), found) and not same(found, run.clean)
    del run.opt
    assert same(run.now(), found)


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
    clean = weights_of(net.parameters())
    groups = [{"params": net.words.parameters(), "writes": "drop"}, {"params": net.head.parameters()}]
    opt = flatkern.SGD(groups, lr=0.0, perturb=METHODS[method], backend=backend)
    for _ in range(3):
        opt.zero_grad()
        if method in ("m-RWP", "SAM"):
            net().square().sum().backward()
        opt.train() if opt.rolling else opt.perturb()
        noisy = weights_of(net.parameters())
        net().square().sum().backward()
        assert not same(weights_of(net.parameters()), noisy)
        opt.step()
        opt.eval()
        assert same(weights_of(net.parameters()), clean)
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
        assert same([net.words.weight[4:]], [clean[0][4:]])
    assert bool((net.words.weight[:4].norm(dim=1) <= 1.0001).all())
