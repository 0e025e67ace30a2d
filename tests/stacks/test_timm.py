"""flatkern in timm: its registry, NativeScaler, CheckpointSaver, averages of weights, schedulers."""

from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
from common import assert_other_tensors, assert_same_state, assert_same_tensors, clean_weights, weights
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEma, ModelEmaV3, NativeScaler
from torch.nn.functional import cross_entropy

import flatkern
from flatkern.integrations.timm import register

METHODS = {
    "rolling RWP": "rwp",
    "m-RWP": "mrwp",
    "m-ARWP": "marwp",
    "SAM": "sam",
    "ASAM": "asam",
    "IRE": "ire",
    "GSAM": "gsam",
    "LookSAM": "looksam",
    "rolling Momentum-SAM": "momentumsam",
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def names():
    return register()


def make_model():
    """A convolutional network with BatchNorm, of timm's own, as small as it goes."""
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=3, in_chans=3, pretrained=False)


def make_batches(count):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(2, 3, 32, 32, generator=generator), torch.randint(0, 3, (2,), generator=generator))
        for _ in range(count)
    ]


def make_optimizer(method, model, base="adamw", **keywords):
    own = {"IRE": {"kappa": 1.0, "interval": 2}, "LookSAM": {"k": 2}}.get(method, {})
    opt = create_optimizer_v2(model, METHODS[method] + base, **{"lr": 0.01, "weight_decay": 0.05, **own, **keywords})
    if opt.rolling:
        opt.follow(model)
    if method == "ASAM":
        opt.name_parameters(model)
    return opt


def train(method, model, opt, batches, start=0, scaler=None, averages=()):
    """timm's train_one_epoch(), with what a method adds between its lines."""
    model.train()
    for index, (x, y) in enumerate(batches, start):
        if method == "IRE" and opt.mask_due:
            generator = torch.Generator().manual_seed(index)
            flatkern.sampled_label_loss(model(x), generator=generator).backward()
            opt.update_mask()
        loss = cross_entropy(model(x), y)
        if method not in ("IRE", "plain") and not opt.rolling and opt.perturb_due:
            backward(loss, opt, scaler, need_update=False)
            opt.perturb(scaler=None if scaler is None else scaler._scaler)
            with flatkern.frozen_running_stats(model):
                loss = cross_entropy(model(x), y)
        backward(loss, opt, scaler, need_update=True)
        opt.zero_grad()
        for average in averages:
            average.update(model)


def backward(loss, opt, scaler, need_update):
    if scaler is not None:
        scaler(loss, opt, need_update=need_update)
    else:
        loss.backward()
        if need_update:
            opt.step()


def test_the_registry_has_every_method_on_every_base(names):
    assert len(names) == 44
    assert set(names) <= set(list_optimizers())
    assert register() == names


def test_values_go_to_the_method_and_to_the_optimizer():
    """As `--opt-kwargs sigma=0.02 eta=0.3 max_grad_norm=1.5` passes them; weight decay leaves vectors out."""
    opt = create_optimizer_v2(
        make_model(), "arwpsgd", lr=0.1, weight_decay=0.05, momentum=0.8, sigma=0.02, seed=4, max_grad_norm=1.5
    )
    assert opt.method == flatkern.RWP(sigma=0.02, eta=0.1, seed=4, rolling=True)
    assert opt.max_grad_norm == 1.5
    assert sorted(group["weight_decay"] for group in opt.param_groups) == [0.0, 0.05]
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in opt.param_groups)
    opt = create_optimizer_v2(make_model(), "samadamw", lr=0.1, rho=0.2, kappa=2.0, betas=(0.8, 0.9))
    assert opt.method == flatkern.SAM(rho=0.2) and opt.enhancement == flatkern.IRE(kappa=2.0)
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)


def test_values_that_two_have_go_to_the_method_by_their_names_in_the_groups():
    opt = create_optimizer_v2(make_model(), "friendlysamsgd", lr=0.1, momentum=0.8, perturb_momentum=0.7, sigma=0.5)
    assert opt.method == flatkern.FriendlySAM(sigma=0.5, momentum=0.7)
    assert opt.param_groups[0]["momentum"] == 0.8
    opt = create_optimizer_v2(make_model(), "samadamw", lr=0.1, kappa=2.0, interval=3, perturb_interval=5)
    assert opt.method == flatkern.SAM(interval=5) and opt.enhancement == flatkern.IRE(kappa=2.0, interval=3)


def test_other_optimizers_of_timm_are_wrapped():
    assert "rwplamb" in register("lamb")
    model = make_model()
    opt = create_optimizer_v2(model, "rwplamb", lr=0.01, weight_decay=0.05, sigma=0.02, max_grad_norm=1.0)
    opt.follow(model)
    assert isinstance(opt.base, timm.optim.Lamb) and opt.rolling and opt.max_grad_norm == 1.0
    before = weights(model)
    train("rolling RWP", model, opt, make_batches(2))
    assert_other_tensors(clean_weights(model, opt), before)


def test_refuses_a_base_that_timm_does_not_have():
    with pytest.raises(ValueError, match="no-such-optimizer"):
        register("no-such-optimizer")


def test_refuses_values_that_nobody_takes():
    with pytest.raises(TypeError, match="rho"):
        create_optimizer_v2(make_model(), "rwpsgd", lr=0.1, rho=0.1)
    with pytest.raises(ValueError, match="sigma"):
        create_optimizer_v2(make_model(), "rwpsgd", lr=0.1, sigma=-1.0)
    with pytest.raises(TypeError, match="kappa"):
        create_optimizer_v2(make_model(), "ireadamw", lr=0.1)


@every_method
def test_a_native_scaler_changes_nothing(method):
    """Its scale is a power of two: every bit is that of the loop without it."""
    trained = []
    for scaler in (None, NativeScaler(device="cpu")):
        model = make_model()
        opt = make_optimizer(method, model)
        train(method, model, opt, make_batches(3), scaler=scaler)
        trained.append(clean_weights(model, opt))
    assert_same_tensors(*trained)
    assert_other_tensors(trained[0], weights(make_model()))


@every_method
def test_lr_zero_returns_the_weights(method):
    model = make_model()
    opt = make_optimizer(method, model, lr=0.0, weight_decay=0.0)
    train(method, model, opt, make_batches(2))
    opt.eval()
    assert_same_tensors(weights(model), weights(make_model()))


@every_method
def test_resume_is_bit_identical(method, tmp_path):
    """From what CheckpointSaver writes, the optimizer before the model; with a NativeScaler."""
    batches = make_batches(4)
    whole = make_model()
    opt, scaler = make_optimizer(method, whole), NativeScaler(device="cpu")
    train(method, whole, opt, batches, scaler=scaler)

    first = make_model()
    first_opt, scaler = make_optimizer(method, first), NativeScaler(device="cpu")
    train(method, first, first_opt, batches[:2], scaler=scaler)
    clean = clean_weights(first, first_opt)
    saver = CheckpointSaver(first, first_opt, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)

    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert_same_tensors({name: saved["state_dict"][name] for name in clean}, clean)
    second = make_model()
    second.load_state_dict(saved["state_dict"])
    second_opt, scaler = make_optimizer(method, second, lr=3.0), NativeScaler(device="cpu")
    second_opt.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["amp_scaler"])
    train(method, second, second_opt, batches[2:], start=2, scaler=scaler)
    for each in (opt, second_opt):
        each.eval()
    assert_same_tensors(second.state_dict(), whole.state_dict())
    assert_same_state(second_opt.state_dict(), opt.state_dict())


@every_method
def test_checkpoints_hold_clean_weights(method, tmp_path):
    """CheckpointSaver with an average of the weights; saving does not change the training."""
    trained = []
    for save in (True, False):
        model = make_model()
        opt = make_optimizer(method, model)
        saver = CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
        for index, batch in enumerate(make_batches(3)):
            train(method, model, opt, [batch], start=index)
            if save:
                saver.save_recovery(0, index)
                name = f"recovery-0-{index}.pth.tar"
                assert_same_tensors(torch.load(tmp_path / name)["state_dict"], clean_state(model, opt))
        trained.append(clean_weights(model, opt))
    assert_same_tensors(*trained)


def clean_state(model, opt):
    with opt.clean():
        return {name: value.clone() for name, value in model.state_dict().items()}


AVERAGES = {
    "ModelEma": ModelEma,
    "ModelEmaV3": ModelEmaV3,
    "ModelEmaV3 of parameters": partial(ModelEmaV3, exclude_buffers=True),
}


@pytest.mark.parametrize("average", AVERAGES)
@every_method
def test_averages_are_of_clean_weights(method, average):
    """They read state_dict(), which is clean, or the parameters themselves, inside of opt.clean()."""
    model = make_model()
    opt = make_optimizer(method, model)
    ema = AVERAGES[average](model, decay=0.5)
    expected = weights(model)
    for index, batch in enumerate(make_batches(3)):
        train(method, model, opt, [batch], start=index)
        with opt.clean() if average == "ModelEmaV3 of parameters" else nullcontext():
            ema.update(model)
        now = clean_weights(model, opt)
        expected = {name: torch.lerp(value, now[name], 0.5) for name, value in expected.items()}
    for name, value in (ema.ema if average == "ModelEma" else ema.module).named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)  # two ways of rounding a mean


def test_an_average_of_parameters_outside_of_clean_holds_noise():
    """What `with opt.clean():` is for."""
    model = make_model()
    opt = make_optimizer("rolling RWP", model)
    ema = ModelEmaV3(model, decay=0.0, exclude_buffers=True)
    train("rolling RWP", model, opt, make_batches(1), averages=[ema])
    assert opt.is_perturbed
    assert_same_tensors(weights(ema.module), weights(model))
    assert_other_tensors(weights(ema.module), clean_weights(model, opt))


def test_timm_schedulers_change_the_learning_rate():
    model = make_model()
    opt = make_optimizer("rolling RWP", model)
    scheduler = CosineLRScheduler(opt, t_initial=4, lr_min=1e-4)
    for epoch in range(4):
        train("rolling RWP", model, opt, make_batches(1))
        scheduler.step(epoch + 1)
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_loop_without_the_passes_of_its_method_is_told():
    model = make_model()
    opt = make_optimizer("SAM", model)
    with pytest.warns(UserWarning, match="has not perturbed in its first 10 steps"):
        train("plain", model, opt, make_batches(1) * 10)


def test_says_how_timm_is_installed(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "timm.optim", None)
    monkeypatch.delitem(sys.modules, "flatkern.integrations.timm")
    with pytest.raises(ImportError, match=r"pip install 'flatkern\[timm\]'"):
        importlib.import_module("flatkern.integrations.timm")
