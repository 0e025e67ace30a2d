"""Long runs and faults: a thousand steps with a checkpoint every ten, hundreds with lr = 0, no memory in either pass,
an optimizer that is made anew in the middle, a rank whose pass fails. Weights clean, state right.
"""

import contextlib
import copy
import io
from functools import partial

import pytest
import steps
import torch
import torch.distributed as dist
from compare import assert_same, assert_same_state, copies, same, same_state
from conftest import live
from covering import also
from patterns import METHODS, Training, backends, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flatkern
from flatkern import ASAM, IRE, RWP, SAM

HALF = {"dtype": torch.bfloat16, "master_weights": True}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ascends on bfloat16", "ignore:.*the names are unknown", "ignore:step. 10 steps of a rolling"
)


def is_two_pass(opt):
    return isinstance(opt.method, SAM) or getattr(opt.method, "lam", None) is not None


class Net(nn.Module):
    """Few elements, of rank 2 and 1. A pass can be told to fail, in its forward or its backward."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.to(dtype)
        self.passes, self.failing, self.error = 0, (), None

    def forward(self, x):
        k, self.passes = self.passes, self.passes + 1
        x = torch.tanh(self.body(x.to(self.body.bias.dtype)))
        if ("forward", k) in self.failing:
            raise self.error
        if ("backward", k) in self.failing:
            x.register_hook(self.fail)
        return self.head(x)

    def fail(self, grad):
        raise self.error


X = torch.randn(16, 4, 3, generator=torch.Generator().manual_seed(1))


# --- checkpoints -----------------------------------------------------------------------------------

SGD = {"rule": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"rule": "AdamW", "lr": 1e-3}
# One base, precision and backend for each method; eager noise is slow.
LONG = {
    "ARWP": ("cpp", SGD, {"perturb": RWP(0.05, eta=1.0), **HALF}),
    "m-RWP": ("cpp", SGD, {"perturb": RWP(0.05, lam=0.5), "max_grad_norm": 1.0}),
    "m-ARWP": ("cpp", ADAMW, {"perturb": RWP(0.05, lam=0.5, eta=1.0, mix="losses")}),
    "rolling ARWP": ("cpp", ADAMW, {"perturb": RWP(0.05, eta=1.0, rolling=True), **HALF}),
    "ASAM": ("eager", {"rule": "Wrap", "lr": 1e-3}, {"perturb": ASAM(0.1)}),
    "IRE, SAM": ("cpp", SGD, {"enhance": IRE(1.0, interval=7), "perturb": SAM(0.05)}),
}


def made(name):
    backend, base, own = LONG[name]
    base, own = dict(base), dict(own)
    net = Net(own.pop("dtype", torch.float32))
    rule = base.pop("rule")
    params = torch.optim.RMSprop(net.parameters(), **base) if rule == "Wrap" else net.named_parameters()
    opt = getattr(flatkern, rule)(params, **({} if rule == "Wrap" else base), backend=live(backend), **own)
    if opt.rolling:
        opt.follow(net)
    return net, opt


def backward(net, opt, t):
    (opt.loss_weight * net(X[t % 16]).float().square().mean()).backward()


def step(net, opt, t):
    """As the user of the method writes it."""
    if opt.mask_due:
        opt.zero_grad()
        backward(net, opt, t + 3)
        opt.update_mask()
    opt.zero_grad()
    steps.step(opt, partial(backward, net, opt, t + 1), clean=partial(backward, net, opt, t))


def saved_and_loaded(name, net, opt, model_first):
    """A new network and a new optimizer, through a file."""
    opt.eval()
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net, opt = made(name)
    pairs = [(net, saved["net"]), (opt, saved["opt"])]
    for owner, state in pairs if model_first else reversed(pairs):
        owner.load_state_dict(state)
    return net, opt


@pytest.mark.parametrize("name", ["rolling ARWP", "IRE, SAM", *also("ARWP", "m-RWP", "m-ARWP", "ASAM")])
def test_a_thousand_steps_with_a_checkpoint_every_ten(name):
    """Bit for bit the run that was never interrupted: weights, state, groups."""
    ends = []
    for interrupted in (False, True):
        net, opt = made(name)
        for t in range(1000):
            step(net, opt, t)
            if interrupted and t % 10 == 9:
                net, opt = saved_and_loaded(name, net, opt, model_first=t % 20 == 9)
        opt.eval()
        ends.append((list(net.parameters()), opt.state_dict()))
    (weights, state), (others, other) = ends
    assert_same(weights, others)
    assert all(w.isfinite().all() for w in weights)
    assert not any(torch.equal(w, s) for w, s in zip(weights, made(name)[0].parameters(), strict=True))
    assert state["param_groups"] == other["param_groups"]
    assert state["state"].keys() == other["state"].keys()
    for k, entry in state["state"].items():
        assert entry.keys() == other["state"][k].keys()
        assert all(torch.equal(v, other["state"][k][key]) for key, v in entry.items() if isinstance(v, torch.Tensor))


# --- lr = 0 ----------------------------------------------------------------------------------------

ZERO_RATE = "RWP", "m-ARWP", "rolling ARWP", "ASAM", "GSAM", "FriendlySAM", "LookSAM", "rolling MomentumSAM"


@pytest.mark.covering(1)
@pytest.mark.parametrize("own", [{}, HALF], ids=str)
@pytest.mark.parametrize("name", [*ZERO_RATE, *also(*(name for name in METHODS if name not in ZERO_RATE))])
def test_two_hundred_steps_with_a_learning_rate_of_zero(name, own):
    """Not one bit of one weight changes; `sometimes` of the network has a gradient in some passes only."""
    run = Training(METHODS[name].make(), lr=0.0, weight_decay=0.0, backend=live("cpp"), **own)
    train(run, METHODS[name].user, 200)
    run.opt.eval()
    assert run.saw_other_weights and same(run.weights(), run.start)


class Large(nn.Module):
    """Of some tensors a look at values takes a sample."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wide, self.conv = nn.Linear(1500, 3), nn.Conv2d(1, 40, (7, 9))
            self.tall, self.vector = nn.Linear(3, 900), nn.Parameter(torch.randn(2000))
            self.empty = nn.Parameter(torch.zeros(0, 3))


@pytest.mark.parametrize("own", [{}, HALF], ids=str)
def test_no_look_at_values_in_hundreds_raises_an_alarm(own):
    """While lr, sigma and eta are scheduled, masters and history move, and the noise goes and comes between steps."""
    own = dict(own)
    net = Large().to(own.pop("dtype", torch.float32))
    opt = flatkern.AdamW(net.parameters(), lr=1e-2, perturb=RWP(0.1, eta=1.0, rolling=True), backend=live("cpp"), **own)
    generator = torch.Generator().manual_seed(0)
    for t in range(250):
        opt.train()
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p) if p.numel() and (t + p.dim()) % 3 else None
        if t % 4 == 0:
            opt.eval()
        opt.step()
        opt.param_groups[0].update(lr=1e-2 / (1 + t % 5), sigma=0.01 * (1 + t % 9), eta=0.1 * (t % 4))
        opt.eval()  # looks


def test_a_sampled_look_finds_a_write_in_the_end():
    """Rows change from look to look, and the hundredth sees all elements."""
    net = Large()
    opt = flatkern.SGD(net.parameters(), lr=0.0, perturb=RWP(0.1, rolling=True), backend=live("cpp"))
    opt.train()
    opt.eval()  # the first look sees all elements
    with pytest.raises(RuntimeError, match=r"clean\(\)"):
        for _ in range(100):
            opt.train()
            net.tall.weight.data[777, 1] = 7.0
            opt.eval()
            assert net.tall.weight[777, 1] != 7.0  # not seen, and lost, as is documented
    assert net.tall.weight[777, 1] == 7.0


# --- faults in one process -------------------------------------------------------------------------

FAULTY = {
    "RWP": RWP(0.1, eta=1.0),
    "m-RWP": RWP(0.1, lam=0.5),
    "rolling": RWP(0.1, eta=1.0, rolling=True),
    "SAM": SAM(0.1),
    "ASAM": ASAM(0.5),
}
some = pytest.mark.parametrize(
    ("backend", "name", "own"),
    backends([(name, own) for name in FAULTY for own in ({}, HALF)], lambda name, own: name == "rolling"),
    indirect=["backend"],
    ids=str,
)
ERRORS = [torch.cuda.OutOfMemoryError("out of memory"), KeyboardInterrupt()]


class Faulty:
    """Two steps of training, and both kinds of user: one with a closure, one with a loop."""

    def __init__(self, name, backend, **own):
        self.net = Net(own.pop("dtype", torch.float32))
        self.opt = flatkern.AdamW(self.net.named_parameters(), lr=0.01, perturb=FAULTY[name], backend=backend, **own)
        if self.opt.rolling:
            self.opt.follow(self.net)
        self.params = list(self.net.parameters())
        for t in range(2):
            step(self.net, self.opt, t)
        with self.opt.clean():
            self.before = copies(self.params)
        self.state = self.everything()

    def everything(self):
        return {(k, key): v.clone() for k, p in enumerate(self.params) for key, v in self.opt.state[p].items()}

    def closure(self):
        self.opt.zero_grad()
        loss = self.net(X[2]).float().square().mean()
        loss.backward()
        return loss

    def rounds(self):
        return [group["round"] for group in self.opt.param_groups if "round" in group]

    def is_as_before(self):
        with self.opt.clean():
            return same(self.params, self.before) and same_state(self.everything(), self.state)


def by_closure(run):
    run.opt.step(run.closure)


def by_block(run):
    """With `perturbed()` where there is such a block; rolling: a bare loop."""
    run.opt.zero_grad()
    if is_two_pass(run.opt):
        run.net(X[2]).float().square().mean().backward()
    with contextlib.nullcontext() if run.opt.rolling else run.opt.perturbed():
        run.net(X[2]).float().square().mean().backward()
        run.opt.step()


@pytest.mark.parametrize("user", [by_closure, by_block])
@some
def test_a_pass_fails_and_the_batch_is_tried_again(name, user, own, backend):
    """As after too large a batch: clean weights at once, nothing of the failed try in what the second one does."""
    untroubled = Faulty(name, backend, **own)
    start = untroubled.rounds()
    user(untroubled)
    for error in ERRORS:
        for k in range(1 + is_two_pass(untroubled.opt)):
            for where in ("forward", "backward"):
                run = Faulty(name, backend, **own)
                run.net.passes, run.net.failing, run.net.error = 0, {(where, k)}, error
                with pytest.raises(type(error)):
                    user(run)
                assert run.opt.rolling or not run.opt.is_perturbed
                assert run.is_as_before()
                run.opt.eval()
                assert_same(run.params, run.before)
                run.opt.state_dict()  # a checkpoint can be saved: nothing waits
                run.net.state_dict()
                for group, round_ in zip(run.opt.param_groups, start, strict=False):
                    group["round"] = round_  # a perturbation counts, whatever becomes of it
                user(run)
                run.opt.eval()
                untroubled.opt.eval()
                assert_same(run.params, untroubled.params)
                assert_same_state(run.everything(), untroubled.everything())


@some
def test_an_optimizer_is_made_anew_in_the_middle(name, own, backend):
    """As trainers do that try again with a smaller batch: not beside the old one, and without it on clean weights."""
    run = Faulty(name, backend, **own)
    run.opt.zero_grad()
    if is_two_pass(run.opt):
        run.net(X[2]).float().square().mean().backward()
    run.opt.train() if run.opt.rolling else run.opt.perturb()
    assert not same(run.params, run.before)

    def anew(net):
        opt = flatkern.SGD(net.named_parameters(), lr=0.05, perturb=FAULTY[name], backend=backend)
        if opt.rolling:
            opt.follow(net)
        return opt

    with pytest.raises(RuntimeError, match=r"restore\(\), eval\(\) or step\(\)"):
        anew(run.net)
    del run.opt
    assert_same(run.params, run.before)
    other = copy.deepcopy(run.net)
    for net in (run.net, other):
        net.zero_grad()
        opt = anew(net)
        for t in range(3):
            step(net, opt, t)
        opt.eval()
    assert_same(run.params, list(other.parameters()))
    assert not same(run.params, run.before)


# --- a fault on one of two ranks -------------------------------------------------------------------


class OtherRankFailed(Exception):
    """What a rank raises that learns of the failure of another."""


def agreed(failed):
    """All ranks give a batch up where one cannot go on, before its gradients are reduced."""
    flag = torch.tensor(float(failed is not None))
    dist.all_reduce(flag)
    if failed is not None:
        raise failed
    if flag:
        raise OtherRankFailed


def one_rank_fails(name, user, bad_pass, views):
    """Both give the step up: clean weights, and replicas that stay equal, as if the step had not been."""
    rank = dist.get_rank()
    ends = []
    for faulty in (False, True):
        net = Net()
        model = DistributedDataParallel(net, gradient_as_bucket_view=views)
        opt = flatkern.SGD(model.parameters(), lr=0.05, momentum=0.9, perturb=FAULTY[name])
        if opt.rolling:
            opt.follow(model)
        for t in range(6):
            before = clean_copy(opt, net)
            net.passes, net.failing, net.error = 0, (), MemoryError()
            if t == 3 and faulty and rank == 1:
                net.failing = {("forward", bad_pass)}

            def a_pass(t=t, model=model):
                failed, loss = None, None
                try:
                    loss = model(X[2 * t + rank]).square().mean()
                except MemoryError as error:
                    failed = error
                agreed(failed)
                loss.backward()
                return loss.detach()

            if t == 3:
                if faulty:
                    opt.zero_grad()
                    with pytest.raises((MemoryError, OtherRankFailed)):
                        user(opt, a_pass)
                    assert_same(clean_copy(opt, net), before)
                    assert opt.rolling or not opt.is_perturbed
                for group in opt.param_groups:
                    if "round" in group and not opt.rolling:
                        group["round"] = 4
                continue
            opt.zero_grad()
            user(opt, a_pass)
        opt.zero_grad()
        opt.eval()
        ends.append([p.detach() for p in net.parameters()])
    for mine, calm in zip(ends[1], ends[0], strict=True):
        assert torch.equal(mine, calm)
        found = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(found, mine)
        assert torch.equal(*found)


def clean_copy(opt, net):
    with opt.clean():
        return copies(net.parameters())


def ranks_by_closure(opt, a_pass):
    def closure():
        opt.zero_grad()
        return a_pass()

    opt.step(closure)


def ranks_by_block(opt, a_pass):
    if is_two_pass(opt):
        a_pass()
    with contextlib.nullcontext() if opt.rolling else opt.perturbed():
        a_pass()
        opt.step()


@pytest.mark.parametrize("user", [ranks_by_closure, ranks_by_block])
@pytest.mark.parametrize(
    ("name", "bad_pass"), [("RWP", 0), ("m-RWP", 0), ("m-RWP", 1), ("rolling", 0), ("SAM", 0), ("SAM", 1)]
)
def test_a_pass_fails_on_one_of_two_ranks(two, name, bad_pass, user):
    two.call(one_rank_fails, name, user, bad_pass, user is ranks_by_block)
