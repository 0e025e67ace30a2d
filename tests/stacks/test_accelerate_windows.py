"""flatkern in Accelerate: what others do between the micro-batches of a window, and beside of it."""

import copy
import gc

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from accelerate_common import Training, fresh_accelerate, start_anew  # noqa: F401  a fixture
from common import (
    CLASSES,
    FEATURES,
    METHODS,
    TWO_PASS,
    assert_other_tensors,
    assert_same_tensors,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    summed,
    weights,
)
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import flatkern
from flatkern.integrations.accelerate import passes

every_method = pytest.mark.parametrize("method", METHODS)


def train(method, between, count=4, steps=2, **keywords):
    """A training, with `between(training, k)` after each micro-batch."""
    training = Training(method, count, batches=count * steps, **keywords)
    for k, (x, y) in enumerate(training.loader):
        with training.accelerator.accumulate(training.model):
            training.micro_batch(x, y)
        between(training, k)
    training.opt.eval()
    return training


def nothing(training, k):
    pass


@every_method
def test_evaluations_within_a_window_see_clean_weights(method, tmp_path):
    """At lr 0 clean weights are those of the beginning."""
    clean, x = make_model(), make_batches(1)[0][0]

    def evaluate(training, k):
        training.model.eval()
        with torch.no_grad():
            assert torch.equal(training.model(x), clean(x))
        training.accelerator.save_model(training.model, tmp_path)
        assert_same_tensors(load_file(tmp_path / "model.safetensors"), weights(clean))
        training.model.train()

    train(method, evaluate, opt={"lr": 0.0})


@every_method
def test_evaluations_and_others_backwards_within_a_window_change_nothing(method):
    def disturb(training, k):
        training.model.eval()
        (10 * loss_of(training.model, make_batches(1, seed=5)[0])).backward()
        training.model.train()

    disturbed, plain = train(method, disturb), train(method, nothing)
    assert_same_tensors(weights(disturbed.plain), weights(plain.plain))
    assert_other_tensors(weights(plain.plain), weights(make_model()))


def widened(classes):
    return nn.functional.pad(classes, (0, FEATURES - CLASSES))


def adversaries(method, count, leaks):
    """Two nets, two optimizers, two steps; the generator's loss leaves gradients in the discriminator, or does not."""
    start_anew()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count)
    nets = make_model(0, batch_norm=True), make_model(1, batch_norm=True)
    own = summed(method)
    generator, discriminator, *opts = accelerator.prepare(
        *nets, *(make_optimizer(method, net, base="SGD", own=own) for net in nets)
    )
    steps = [passes(accelerator, opt, net) for opt, net in zip(opts, (generator, discriminator), strict=True)]
    for opt in opts:
        opt.train()  # rolling: no model is followed
    for x, y in make_batches(8):

        def loss_of_generator(x=x):
            weights = {name: p if leaks else p.detach() for name, p in discriminator.named_parameters()}
            return functional_call(discriminator, weights, widened(generator(x))).square().mean()

        with accelerator.accumulate(generator, discriminator):
            steps[1](lambda x=x, y=y: loss_of(discriminator, (widened(generator(x).detach()), y)))
            steps[0](loss_of_generator)
    for opt in opts:
        opt.eval()
    return {f"{k}.{name}": w for k, net in enumerate(nets) for name, w in net.state_dict().items()}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "IRE"])
def test_gradients_that_others_leave_are_none_of_a_step(method, count):
    """A discriminator's .grad holds what the generator's step has left there."""
    with_leak = adversaries(method, count, True)
    assert_same_tensors(with_leak, adversaries(method, count, False))
    # Statistics of the discriminator: its own first pass, and the generator's first pass.
    passes_of_one = 8 if METHODS[method].loop != "mixed" or count == 1 else 4
    assert with_leak["1.1.num_batches_tracked"] == 2 * passes_of_one


@pytest.mark.parametrize("stop", [1, 3])
@every_method
def test_a_checkpoint_loaded_within_a_window_begins_a_new_one(method, stop, tmp_path):
    def run(back):
        training = Training(method, 4)
        training.run(stop=4)
        training.accelerator.save_state(tmp_path)
        if back:
            training.run(start=4, stop=4 + stop)
            training.accelerator.load_state(tmp_path)
            assert not training.opt.is_perturbed
        training.index = 4
        training.run(start=4)
        training.opt.eval()
        return weights(training.plain)

    assert_same_tensors(run(True), run(False))


@every_method
def test_a_state_loaded_by_hand_within_a_window_begins_a_new_one(method):
    """Where noise waits for the next micro-batch it is refused, with the remedy."""

    def run(back):
        training = Training(method, 4)
        training.run(stop=4)
        training.opt.eval()  # rolling: clean
        state, clean = copy.deepcopy(training.prepared.state_dict()), weights(training.model)
        if back:
            training.run(start=4, stop=7)
            if METHODS[method].loop in ("noisy", "mixed"):
                with pytest.raises(RuntimeError, match=r"load_state_dict: .*step\.drop_window\(\)"):
                    training.prepared.load_state_dict(state)
                training.step.drop_window()
            training.prepared.load_state_dict(state)
            training.model.load_state_dict(clean)
            training.accelerator.step = 4
        training.index = 4
        training.run(start=4)
        training.opt.eval()
        return weights(training.plain)

    assert_same_tensors(run(True), run(False))


def leave_window(training, stop=3):
    training.run(stop=stop)
    assert not training.accelerator.sync_gradients


@pytest.mark.parametrize("method", TWO_PASS)
def test_a_checkpoint_within_a_window_is_refused_before_it_is_written(method, tmp_path):
    training = Training(method, 4, batches=4)
    leave_window(training)
    with pytest.raises(RuntimeError, match=r"save_state: .* is within a window .*sync_gradients.*step\.drop_window"):
        training.accelerator.save_state(tmp_path)
    assert not list(tmp_path.iterdir())
    config = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    vars(training.accelerator.project_configuration).update(vars(config))
    for _ in range(2):  # the folder of the first is not in the way of the second
        with pytest.raises(RuntimeError, match=r"save_state: .* is within a window"):
            training.accelerator.save_state()
    training.step.drop_window()
    training.accelerator.save_state()
    assert_same_tensors(load_file(tmp_path / "checkpoints/checkpoint_0/model.safetensors"), weights(make_model()))


@every_method
def test_a_dropped_window_leaves_nothing(method):
    """By drop_window(), or with the last reference to the step."""
    training = Training(method, 4, batches=4)
    leave_window(training)
    training.step.drop_window()
    assert_same_tensors(weights(training.plain), weights(make_model()))
    training.accelerator.step = 0
    leave_window(training)
    before = len(training.accelerator._load_model_state_pre_hook)
    del training.step
    gc.collect()
    assert len(training.accelerator._load_model_state_pre_hook) == before - 1
    assert_same_tensors(weights(training.plain), weights(make_model()))
    assert all(p.grad is None for p in training.plain.parameters())
    training.opt.state_dict()


def test_one_optimizer_of_two_models_needs_both():
    start_anew()
    accelerator = Accelerator(cpu=True)
    first, second = make_model(0, batch_norm=True), make_model(1, batch_norm=True)
    opt = flatkern.SGD([*first.parameters(), *second.parameters()], lr=0.1, perturb=flatkern.SAM())
    first, second, opt = accelerator.prepare(first, second, opt)
    with pytest.raises(ValueError, match=r"parameters of Sequential, too; pass all of its models"):
        passes(accelerator, opt, first)
    step, batch = passes(accelerator, opt, first, second), make_batches(1)[0]
    with accelerator.accumulate(first, second):
        step(lambda: loss_of(first, batch) + loss_of(second, batch))
    assert first[1].num_batches_tracked == second[1].num_batches_tracked == 1


def test_a_prepared_optimizer_follows_by_the_one_inside():
    """As docs/stacks.md has it."""
    accelerator = Accelerator(cpu=True)
    model = make_model()
    model, opt = accelerator.prepare(model, make_optimizer("rolling RWP", model))
    opt.optimizer.follow(model)
    loss_of(model, make_batches(1)[0])
    assert opt.optimizer.is_perturbed
