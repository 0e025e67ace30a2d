"""torch.compile: nothing of the cycle is traced, in whichever order a model is compiled and followed.

"eager" and "aot_eager" compile in milliseconds and trace as "inductor" does.
"""

import copy
import subprocess
import sys

import pytest
import torch
from compare import assert_same, same
from networks import layers
from test_follow import NOISE, Net, X, make, train, weights
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import flatkern


def sequential():
    """Of torch's own classes alone, into whose hooks Dynamo traces."""
    return layers(4, 4, 3)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def follow_first(model, opt, how):
    opt.follow(model)
    return torch.compile(model, **how)


def compile_first(model, opt, how):
    compiled = torch.compile(model, **how)
    opt.follow(model)
    return compiled


def run_first(model, opt, how):
    compiled = torch.compile(model, **how)
    compiled(X)
    opt.follow(model)
    return compiled


def compiled_object(model, opt, how):
    compiled = torch.compile(model, **how)
    compiled(X)
    opt.follow(compiled)
    return compiled


def in_place(model, opt, how):
    opt.follow(model)
    model.compile(**how)
    return model


def eager(model, opt, how):
    opt.follow(model)
    return model


def run(order, network, fullgraph):
    """Losses, final weights, and the graphs that were made by each step."""
    model, opt = make(network())
    compiled = order(model, opt, {"backend": "aot_eager", "fullgraph": fullgraph})
    losses, graphs = [], []
    for k in range(5):
        train(compiled, opt)
        if k == 2:
            losses.append(compiled.eval()(X).sum())
            assert not opt.is_perturbed
            losses.append(compiled.train()(X).sum())
        assert opt.is_perturbed
        graphs.append(counters["stats"]["unique_graphs"])
    compiled.train()(X)
    noisy = weights(model)
    saved = [*model.state_dict().values()]
    assert not same(saved, noisy)
    return [*losses, *saved], graphs


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("order", "network"),
    [(order, Net) for order in (follow_first, compile_first, run_first, compiled_object, in_place)]
    + [(compiled_object, sequential), (in_place, sequential)],
)  # fmt: skip
def test_follow_and_compile(order, network, fullgraph):
    """The trajectory is that of eager mode; one graph for training, one for evaluation, and none after that."""
    expected, _ = run(eager, network, fullgraph)
    got, graphs = run(order, network, fullgraph)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))
    assert graphs[0] == graphs[1]
    assert graphs[2] == graphs[-1] <= 2


def test_hooks_inside_of_a_graph():
    """Dynamo traces into the hooks of torch's own classes, and of parts: there the graph ends."""
    expected, _ = run(eager, sequential, False)
    got, graphs = run(follow_first, sequential, False)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))
    assert graphs[2] == graphs[-1]


def test_hooks_inside_of_a_full_graph():
    """torch refuses; follow(compiled) is what works."""
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(follow_first, sequential, True)


def test_a_graph_from_before():
    """Dynamo does not look for new hooks in a graph that it has: a step says so, and what to call."""
    model, opt = make(sequential())
    compiled = run_first(model, opt, {"backend": "eager"})
    with pytest.warns(UserWarning, match=r"no forward of the followed Sequential .* torch.compiler.reset\(\)"):
        for _ in range(10):
            train(compiled, opt)
    assert opt.is_perturbed
    torch.compiler.reset()
    compiled.eval()(X)
    assert not opt.is_perturbed


def test_copies_of_a_compiled_model():
    """After follow(compiled) the original module is guarded as well, and a copy has nothing that stops a graph."""
    model, opt = make(sequential())
    clean = weights(model)
    compiled = torch.compile(model, backend="eager")
    handle = opt.follow(compiled)
    for read in (copy.deepcopy, lambda m: m.state_dict()):
        for each in (model, compiled, model[0]):
            compiled.train()(X)
            assert opt.is_perturbed
            made = read(each)
            assert_same(weights(model), clean)
            if each is model and isinstance(made, nn.Module):
                torch.compile(made, backend="eager", fullgraph=True)(X)
    handle.remove()
    assert not any("flatkern" in key for m in compiled.modules() for key in vars(m))


# --- compiled steps -------------------------------------------------------------------------------


def rolls(model, opt):
    train(model, opt)


def switches(model, opt):
    opt.train()
    train(model, opt)
    opt.eval()


def perturbs(model, opt):
    opt.zero_grad()
    with opt.perturbed():
        model(X).square().mean().backward()
    opt.step()


def climbs(model, opt):
    opt.zero_grad()
    for k in range(2):
        model(X).square().mean().backward()
        opt.perturb()
        model(X).square().mean().backward()
        if k == 0:
            opt.restore()
    opt.step()


def mixes(model, opt):
    opt.zero_grad()
    (opt.loss_weight * model(X).square().mean()).backward()
    opt.perturb()
    (opt.loss_weight * model(X).square().mean()).backward()
    opt.step()


def closes(model, opt):
    def closure():
        opt.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    opt.step(closure)


def enhances(model, opt):
    opt.zero_grad()
    if opt.mask_due:
        model(X).square().mean().backward()
        opt.update_mask()
    train(model, opt)


STEPS = {
    "rolling": (rolls, {"perturb": NOISE}),
    "modes": (switches, {"perturb": NOISE}),
    "RWP": (perturbs, {"perturb": flatkern.RWP(0.1)}),
    "mSAM": (climbs, {"perturb": flatkern.SAM(0.1)}),
    "m-RWP": (mixes, {"perturb": flatkern.RWP(0.1, lam=0.5, mix="losses")}),
    "closure": (closes, {"perturb": flatkern.SAM(0.1)}),
    "IRE": (enhances, {"enhance": flatkern.IRE(2.0, interval=2)}),
}
MOVES = {"params", "round", "drawn", "mask_age", "perturb_count", "lr"}


def trained(name, rule, scheduled, compiled):
    """The weights after five steps, and the graphs that were made by each; no value of a group changes."""
    user, own = STEPS[name]
    model = Net()
    if rule == "Wrap":
        opt = flatkern.Wrap(torch.optim.AdamW(model.parameters(), lr=0.01), **own)
    else:
        opt = flatkern.AdamW(model.parameters(), lr=0.01, **own)
    if opt.rolling:
        opt.follow(model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2) if scheduled else None  # patches the instance's step()
    before = {key: value for key, value in opt.param_groups[0].items() if key not in MOVES}
    graphs = []

    def step():
        user(model, opt)

    step = torch.compile(step, backend="eager") if compiled else step
    for _ in range(5):
        step()
        if scheduler:
            scheduler.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert {key: opt.param_groups[0][key] for key in before} == before
    opt.eval()
    return weights(model), graphs


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("rule", ["AdamW", "Wrap"])
@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_training_step(name, rule, scheduled):
    """The same as outside, and nothing is compiled from the third step on."""
    expected, _ = trained(name, rule, scheduled, compiled=False)
    got, graphs = trained(name, rule, scheduled, compiled=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))
    assert graphs[-1] == graphs[2]


CALLS = {
    "step": {"perturb": NOISE},
    "train": {"perturb": NOISE},
    "eval": {"perturb": NOISE},
    "perturb": {"perturb": flatkern.RWP(0.1)},
    "restore": {"perturb": flatkern.RWP(0.1)},
    "zero_grad": {},
    "update_mask": {"enhance": flatkern.IRE(2.0)},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_not_traced(call):
    """Dynamo looks at the caller and at torch's wrapper alone; where a whole graph is asked for, torch says so."""
    model = Net()
    opt = flatkern.SGD(model.parameters(), lr=0.1, **CALLS[call])
    if call == "update_mask":
        model(X).sum().backward()
    torch.compile(lambda: getattr(opt, call)(), backend="eager")()
    assert counters["stats"]["unique_graphs"] == 0
    assert counters["frames"]["total"] <= (10 if call == "step" else 1)  # 106 where a step is traced
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: getattr(opt, call)(), backend="eager", fullgraph=True)()


def test_importing_flatkern_does_not_import_dynamo():
    """It takes a second, and is needed by those who construct an optimizer only."""
    code = "import flatkern, sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- other tracers and transforms -----------------------------------------------------------------


def per_sample_gradients(model):
    def loss(values, x):
        return torch.func.functional_call(model, values, (x[None],)).square().sum()

    values = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, X)
    return None


def fake(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(X)


TRACERS = {
    "func": per_sample_gradients,
    "trace": lambda model: torch.jit.trace(model, (X,)),
    "export": lambda model: torch.export.export(model, (X,), strict=False).module(),
    "fake": fake,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("tracer", TRACERS)
def test_the_noise_of_a_traced_forward_is_not_traced(tracer, steps, trains):
    """Each computes with tensors of its own, which have no memory, or records what a forward does."""
    model = sequential()
    opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.RWP(sigma=0.3, rolling=True))
    opt.follow(model)
    for _ in range(steps):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()
    if trains:
        opt.eval()
    clean = weights(copy.deepcopy(model))
    if steps and not trains:
        opt.train()
    traced = TRACERS[tracer](model.train(trains))
    assert opt.is_perturbed is trains
    if traced is not None:
        assert torch.equal(traced(X), model(X))
    opt.eval()
    assert_same(weights(model), clean)
    model.train()(X).square().sum().backward()
    opt.step()
    opt.eval()
