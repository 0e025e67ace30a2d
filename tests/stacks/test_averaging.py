"""Averages of weights that others keep: torch's AveragedModel and SWA, diffusers' EMAModel, a push to a server."""

import copy

import pytest
import torch
from common import (
    METHODS,
    assert_other_tensors,
    assert_same_tensors,
    clean_weights,
    make_batches,
    make_model,
    make_optimizer,
    step_by_hand,
    weights,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

every_method = pytest.mark.parametrize("method", METHODS)


def train(method, model, opt, after_step, count=4):
    """A loop by hand; `after_step` reads the weights between steps. Returns the clean weights of every step."""
    if opt.rolling:
        opt.follow(model)
    every = []
    for index, batch in enumerate(make_batches(count)):
        step_by_hand(method, model, opt, [batch], index)
        after_step()
        every.append(clean_weights(model, opt))
    opt.zero_grad()
    return every


def mean(every):
    """As torch's AveragedModel has it: a running mean in float32."""
    result = {name: w.clone() for name, w in every[0].items()}
    for k, now in enumerate(every[1:], 1):
        for name, w in result.items():
            w.add_((now[name] - w) / (k + 1))
    return result


@every_method
def test_averaged_model_is_of_clean_weights(method):
    model = make_model()
    opt = make_optimizer(method, model)
    average = AveragedModel(model)

    def update():
        with opt.clean():
            average.update_parameters(model)

    expected = mean(train(method, model, opt, update))
    for name, value in weights(average.module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)  # torch adds in another order


@every_method
def test_an_average_changes_nothing(method):
    """Bit for bit, whether it is updated between the steps or not."""
    trained = []
    for averaged in (True, False):
        model = make_model()
        opt = make_optimizer(method, model)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

        def update(opt=opt, average=average, model=model):
            with opt.clean():
                average.update_parameters(model)

        train(method, model, opt, update if averaged else lambda: None)
        trained.append(clean_weights(model, opt))
    assert_same_tensors(*trained)


@every_method
def test_an_average_made_between_steps_is_clean(method):
    """AveragedModel(model) and copy.deepcopy(model) copy the model, whose noise is off then."""
    model = make_model()
    opt = make_optimizer(method, model)
    train(method, model, opt, lambda: None)
    clean = clean_weights(model, opt)
    assert_same_tensors(weights(AveragedModel(model).module), clean)
    assert_same_tensors(weights(copy.deepcopy(model)), clean)


@every_method
def test_swa_with_its_schedule_and_batch_norm(method):
    """torch's recipe: SWALR, the average, update_bn() at the end."""
    model = make_model(batch_norm=True)
    opt = make_optimizer(method, model)
    average, schedule = AveragedModel(model), SWALR(opt, swa_lr=0.01, anneal_epochs=2)

    def update():
        with opt.clean():
            average.update_parameters(model)
        schedule.step()

    train(method, model, opt, update)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
    update_bn([batch[0] for batch in make_batches(4)], average)
    assert average.module[1].num_batches_tracked == 4


@every_method
def test_diffusers_ema_is_of_clean_weights(method):
    """EMAModel: step() reads the parameters; store(), copy_to() and restore() write them by `.data`."""
    EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
    model = make_model()
    opt = make_optimizer(method, model)
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    expected, decays = list(weights(model).values()), []

    def update():
        with opt.clean():
            ema.step(model.parameters())
        decays.append(ema.cur_decay_value)

    every = train(method, model, opt, update)
    for now, decay in zip(every, decays, strict=True):
        expected = [torch.lerp(a, b, 1 - decay) for a, b in zip(expected, now.values(), strict=True)]
    assert decays[1:] == [0.5, 0.5, 0.5]
    for value, e in zip(ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(value, e, rtol=1e-6, atol=1e-7)  # two ways of rounding a mean

    clean = clean_weights(model, opt)
    opt.eval()
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert_other_tensors(weights(model), clean)
    ema.restore(model.parameters())
    assert_same_tensors(weights(model), clean)


@every_method
def test_a_push_to_a_server_sends_clean_weights(method):
    """What reinforcement learning does between steps: the weights go to an inference engine."""
    model, served = make_model(), make_model(seed=1)
    opt = make_optimizer(method, model)
    sent = []

    def push():
        with opt.clean():
            served.load_state_dict(model.state_dict())
        sent.append(weights(served))

    for clean, received in zip(train(method, model, opt, push), sent, strict=True):
        assert_same_tensors(received, clean)


def test_an_average_outside_of_clean_holds_noise():
    """What `with opt.clean():` is for: update_parameters() reads the parameters themselves."""
    model = make_model()
    opt = make_optimizer("rolling RWP", model)
    average = AveragedModel(model)
    clean = train("rolling RWP", model, opt, lambda: average.update_parameters(model), count=1)[0]
    assert_other_tensors(weights(average.module), clean)
