"""One optimizer for each parameter, stepped by a hook as soon as its gradient is there: rolling RWP needs no more."""

import pytest
import torch
from compare import copies
from networks import layers
from torch.nn.functional import cross_entropy

import flatkern


def make_model():
    return layers(6, 8, 3)


def optimizers(model, lr=0.1):
    made = {
        p: flatkern.SGD([p], lr=lr, momentum=0.9, perturb=flatkern.RWP(sigma=0.05, stream=k, rolling=True))
        for k, p in enumerate(model.parameters())
    }
    for opt in made.values():
        opt.follow(model)
    return made


def step_in_backward(made):
    def hook(p):
        made[p].step()
        made[p].zero_grad()

    for p in made:
        p.register_post_accumulate_grad_hook(hook)


def train(model, made, in_backward, steps=4):
    if in_backward:
        step_in_backward(made)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)
        cross_entropy(model(x), y).backward()
        if not in_backward:
            for opt in made.values():
                opt.step()
                opt.zero_grad()
    noisy = copies(model.parameters())
    model.state_dict()  # ends the noise of all of them
    return noisy, copies(model.parameters())


def test_steps_in_backward_are_steps_after_it():
    trained = []
    for in_backward in (True, False):
        model = make_model()
        made = optimizers(model)
        noisy, clean = train(model, made, in_backward)
        assert all(not torch.equal(a, b) for a, b in zip(noisy, clean, strict=True))
        assert not any(opt.is_perturbed for opt in made.values())
        trained.append(clean)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("in_backward", [True, False])
def test_lr_zero_returns_the_weights(in_backward):
    model = make_model()
    _, clean = train(model, optimizers(model, lr=0.0), in_backward)
    assert all(torch.equal(a, b) for a, b in zip(clean, make_model().parameters(), strict=True))
