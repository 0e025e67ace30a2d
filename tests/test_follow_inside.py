"""follow(model): modules in a wrapper that hold all of its parameters and run alone, too, as PEFT's and Lightning's."""

import pytest
import torch
from compare import bits
from torch import nn

import flatkern

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Wrapper(nn.Module):
    """Twice around a network; beside it is what the optimizer does not have."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.network(x))


def make():
    torch.manual_seed(3)
    model = Wrapper()
    opt = flatkern.SGD(model.network.parameters(), lr=0.1, perturb=flatkern.RWP(0.1, rolling=True), backend="eager")
    clean = [bits(p).clone() for p in model.network.parameters()]
    opt.follow(model)
    model(X)
    assert not is_clean(model, clean)
    return model, opt, clean


def is_clean(model, clean):
    return all(torch.equal(bits(p), c) for p, c in zip(model.network.parameters(), clean, strict=True))


@pytest.mark.parametrize("part", [lambda m: m.network, lambda m: m.network[0]], ids=["network", "deeper"])
def test_an_evaluation_of_a_part_is_clean(part):
    """The mode of the whole does not matter: a network is sampled from while its module trains."""
    model, _, clean = make()
    part(model).eval()
    with torch.no_grad():
        part(model)(X)
    assert is_clean(model, clean)
    part(model).train()
    part(model)(X)
    assert not is_clean(model, clean)


def test_a_training_of_a_part_is_that_of_the_whole():
    """Whoever evaluates the whole and then trains the network inside, takes the noise of the round."""
    trained = []
    for inside in (False, True):
        model, opt, _ = make()
        for _ in range(3):
            if inside:
                model.eval()
                model(X)
                model.train()
            out = model.frozen(model.network(X)) if inside else model(X)
            opt.zero_grad()
            out.square().mean().backward()
            opt.step()
        opt.eval()
        trained.append([bits(p) for p in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_inside_of_a_whole_forward_its_mode_counts():
    """A network in eval mode that trains all the same (dropout off), and one in train mode that is evaluated."""
    model, _, clean = make()
    model.network.eval()
    model(X)
    assert not is_clean(model, clean)
    model.eval()
    model.network.train()
    with torch.no_grad():
        model(X)
    assert is_clean(model, clean)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_whole_is_switched_as_a_whole(fullgraph):
    model, opt, clean = make()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    opt.follow(compiled)
    compiled(X).square().mean().backward()
    assert not is_clean(model, clean)
    compiled.eval()
    with torch.no_grad():
        compiled(X)
    assert is_clean(model, clean)


def test_the_handle_removes_the_inner_hooks():
    torch.manual_seed(3)
    model = Wrapper()
    opt = flatkern.SGD(model.network.parameters(), lr=0.1, perturb=flatkern.RWP(0.1, rolling=True), backend="eager")
    opt.follow(model).remove()
    assert not any(m._forward_pre_hooks for m in model.modules())
