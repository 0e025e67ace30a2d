"""Lightning's averaging callbacks, mixed precision, clipping and BatchNorm with flatkern, and what is refused."""

import subprocess
import sys

import pytest
import torch
from common import (
    TWO_PASS,
    USED_FURTHER,
    assert_same_tensors,
    clean_weights,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    mask_loss,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision
from lightning_common import EXPLICIT, Automatic, Manual, by_hand, fit, loader, make_trainer, windows_of
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import flatkern
from flatkern.integrations.lightning import FlatkernCallback

# --- averages of weights --------------------------------------------------------------------------

AVERAGES = {
    "mean": (WeightAveraging, {}, None),
    "exponential": (EMAWeightAveraging, {"decay": 0.9}, get_ema_avg_fn(0.9)),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "RWP"])
def test_weight_averaging_holds_clean_weights(method, average):
    """Wherever it stands in the list of callbacks; validations see the average, and then training goes on."""
    make, options, avg_fn = AVERAGES[average]
    module, windows = Automatic(method), windows_of(4)
    fit(module, [b for (b,) in windows], [make(**options)], validate=make_batches(1), val_check_interval=2)

    model = make_model()
    expected = AveragedModel(model, avg_fn=avg_fn, use_buffers=True)
    seen = []
    for after in by_hand(method, windows)[2][1:]:
        model.load_state_dict(after)
        expected.update_parameters(model)
        seen.append(weights(expected.module))
    assert_same_tensors(module.evaluated_at[-2], seen[1])
    assert_same_tensors(module.evaluated_at[-1], seen[3])
    assert_same_tensors(weights(module.net), seen[3])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("method", ["rolling RWP", "SAM"])
def test_stochastic_weight_averaging_holds_clean_weights(method, batch_norm):
    """And BatchNorm's statistics, for which Lightning adds an epoch, are measured at the averaged weights."""

    class Records(Automatic):
        def on_train_epoch_start(self):
            self.epochs.append(clean_weights(self.net, self.opt))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.trained_at[-1] = weights(self.net)  # after the forward, which a followed model begins with its noise
            return loss

    module, batches = Records(method, batch_norm=batch_norm), make_batches(3)
    module.epochs = []
    fit(module, batches, [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)], epochs=3)
    mean = None
    for n, found in enumerate(module.epochs[:3]):
        mean = found if n == 0 else {k: mean[k] + (found[k] - mean[k]) / (n + 1) for k in mean}
    assert_same_tensors(weights(module.net), mean)
    if batch_norm:
        for found in module.trained_at[-3:]:
            assert_same_tensors(found, mean)
        assert module.net[1].num_batches_tracked == 3


def test_clean_between_batches_serves_other_readers():
    class Reads(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            found.append(weights(pl_module.net))

    windows = windows_of(3)
    expected = by_hand("rolling RWP", windows)[2][1:]
    for clean in (True, None):
        module, found = Automatic("rolling RWP"), []
        trainer = make_trainer(module)
        trainer.callbacks = [Reads(), FlatkernCallback(clean_between_batches=clean)]
        trainer.fit(module, loader([b for (b,) in windows]))
        assert len(found) == 3
        for here, there in zip(found, expected, strict=True):
            if clean:
                assert_same_tensors(here, there)
            else:
                assert not torch.equal(here["0.weight"], there["0.weight"])
        assert_same_tensors(weights(module.net), expected[-1])


# --- precision ------------------------------------------------------------------------------------


def half_precision():
    """What precision="16-mixed" is on a GPU, with a GradScaler and autocast of the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))


def with_overflow():
    batches = make_batches(5)
    batches[2] = (batches[2][0] * 1e5, batches[2][1])  # infinite in half precision
    return batches


def half_loss(model, batch):
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        return loss_of(model, batch)


@pytest.mark.parametrize("method", ["rolling RWP"])
def test_half_precision_equals_a_loop_by_hand(method):
    """One gradient, scaled, unscaled by the optimizer itself, and a step that overflows."""
    module = Automatic(method, max_grad_norm=0.5)
    precision = half_precision()
    fit(module, with_overflow(), plugins=[precision], validate=make_batches(1), val_check_interval=1)
    scaler = half_precision().scaler
    model = make_model()
    opt = make_optimizer(method, model, max_grad_norm=0.5)
    opt.train()
    for batch in with_overflow():
        opt.zero_grad()
        scaler.scale(half_loss(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
    opt.eval()
    assert opt.skipped_steps == module.opt.skipped_steps == 1
    assert precision.scaler.get_scale() == scaler.get_scale()
    assert_same_tensors(weights(module.net), weights(model))


@pytest.mark.parametrize("method", ["IRE"])
def test_half_precision_takes_masks(method):
    """IRE alone has one gradient a step. That of the mask is scaled, too, or all of it would be zero and flat here."""
    module = Automatic(method)
    trainer = make_trainer(module, plugins=[half_precision()])
    trainer.callbacks = [FlatkernCallback(mask_loss=lambda model, batch: 1e-7 * mask_loss(model, batch, 0))]
    trainer.fit(module, loader(make_batches(3)))
    masks = [module.opt.state[p]["mask"] for p in module.parameters()]
    flat = sum(int(byte).bit_count() for mask in masks for byte in mask.flatten())
    assert 0 < flat < sum(p.numel() for p in module.parameters())
    assert module.global_step == 3


@pytest.mark.parametrize("method", ["IRE"])
def test_a_mask_that_overflows_drops_no_gradient(method):
    """It is due again at the second micro-batch, when the gradient of the first waits in `.grad`."""
    trained = []
    for options in ({}, {"enhance": None}):
        module = Automatic(method, **options)
        trainer = make_trainer(module, plugins=[half_precision()], accumulate_grad_batches=2)
        trainer.callbacks = [FlatkernCallback(mask_loss=lambda model, batch: model(batch[0]).sum() * float("inf"))]
        trainer.fit(module, loader(make_batches(2)))
        assert module.opt.enhancement is None or module.opt.mask_due
        trained.append(weights(module.net))
    assert_same_tensors(*trained)


@pytest.mark.parametrize("method", EXPLICIT)
def test_refuses_half_precision_by_automatic_optimization(method):
    module = Automatic(method)
    before = weights(module.net)
    with pytest.raises(RuntimeError, match=r"16-mixed.*bf16-mixed.*manual optimization.*rolling=True"):
        fit(module, make_batches(2), plugins=[half_precision()])
    assert_same_tensors(weights(module.net), before)
    assert not module.trained_at


@pytest.mark.parametrize("method", EXPLICIT)
def test_refuses_deepspeed_which_hands_no_closure_on(method):
    """Its precision plugin is asked, for DeepSpeed itself needs a GPU."""
    module = Automatic(method)
    with pytest.raises(RuntimeError, match=r"DeepSpeedPrecision.*manual optimization.*rolling=True"):
        fit(module, make_batches(2), plugins=[DeepSpeedPrecision("32-true")])
    assert not module.trained_at


@pytest.mark.parametrize("method", TWO_PASS)
def test_half_precision_by_manual_optimization_equals_a_loop_by_hand(method):
    """As the refusal says: opt.perturb(scaler=self.trainer.precision_plugin.scaler) between two backwards."""

    class Scaled(Manual):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss_of(self, batch))
            opt.perturb(scaler=self.trainer.precision_plugin.scaler)
            self.manual_backward(loss_of(self, batch))
            opt.step()

    module, precision = Scaled(method), half_precision()
    fit(module, with_overflow(), plugins=[precision])
    scaler, model = half_precision().scaler, make_model()
    opt = make_optimizer(method, model)
    for batch in with_overflow():
        opt.zero_grad()
        scaler.scale(half_loss(model, batch)).backward()
        opt.perturb(scaler=scaler)
        scaler.scale(half_loss(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.skipped_steps == module.opt.skipped_steps == 1
    assert_same_tensors(weights(module.net), weights(model))
    assert precision.scaler.get_scale() == scaler.get_scale()


@pytest.mark.parametrize("method", ["SAM", "m-RWP"])
def test_bfloat16_equals_a_loop_by_hand(method):
    """Two passes by automatic optimization: there is no scaler, and Lightning hands its closure on."""
    module = Automatic(method)
    fit(module, make_batches(3), precision="bf16-mixed")
    model = make_model()
    opt = make_optimizer(method, model)
    for batch in make_batches(3):
        opt.zero_grad()
        for between in (opt.perturb, opt.step):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = loss_of(model, batch)
            loss.backward()
            between()
    assert_same_tensors(weights(module.net), weights(model))


# --- BatchNorm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["SAM", "m-RWP", "RWP", "rolling RWP", "IRE"])
def test_running_statistics_are_those_of_one_pass(method):
    """Of the first of two: at clean weights. IRE's mask leaves them alone."""
    batches = make_batches(3)
    module = Automatic(method, batch_norm=True)
    fit(module, batches)
    assert module.net[1].num_batches_tracked == 3
    if method not in TWO_PASS:
        return
    model = make_model(batch_norm=True)
    opt = make_optimizer(method, model)
    for batch in batches:
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.perturb()
        with flatkern.frozen_running_stats(model):
            loss_of(model, batch).backward()
        opt.step()
    assert_same_tensors(module.net.state_dict(), model.state_dict())
    assert module.net[1].track_running_stats


@pytest.mark.parametrize("method", TWO_PASS)
def test_running_statistics_go_on_after_a_skipped_batch(method):
    class Skips(Automatic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips(method, batch_norm=True)
    fit(module, make_batches(3))
    assert module.net[1].num_batches_tracked == 2


# --- clipping -------------------------------------------------------------------------------------


def test_refuses_two_clippings():
    module = Automatic("SAM", max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.5.*max_grad_norm=1.0.*leave gradient_clip_val out"):
        fit(module, make_batches(2), gradient_clip_val=0.5)
    assert not module.trained_at


@pytest.mark.parametrize("method", ["m-RWP", "m-ARWP", *USED_FURTHER])
def test_warns_of_clipping_that_is_not_of_the_step(method):
    with pytest.warns(UserWarning, match=r"gradient_clip_val=0.5 clips the gradient of each pass.*max_grad_norm=0.5"):
        fit(Automatic(method), make_batches(2), gradient_clip_val=0.5)


def test_warns_of_values_that_are_clipped_before_an_ascent():
    with pytest.warns(UserWarning, match=r"each pass of SAM.*max_grad_norm=0.5"):
        fit(Automatic("SAM"), make_batches(2), gradient_clip_val=0.5, gradient_clip_algorithm="value")


class Clips(Automatic):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("method", ["m-RWP", "m-ARWP", "GSAM"])
def test_warns_of_a_hook_that_may_clip_each_pass(method):
    with pytest.warns(UserWarning, match=r"configure_gradient_clipping\(\) of Clips.*each pass.*pass max_grad_norm"):
        fit(Clips(method), make_batches(1))


@pytest.mark.parametrize("method", ["rolling RWP", "SAM", "IRE"])
def test_warns_of_a_hook_that_may_clip_twice(method):
    with pytest.warns(UserWarning, match=r"configure_gradient_clipping\(\) of Clips.*max_grad_norm=5.0.*so twice"):
        fit(Clips(method, max_grad_norm=5.0), make_batches(1))


def test_warns_of_a_hook_that_may_clip_scaled_gradients():
    class Unclipped(Clips):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    with pytest.warns(UserWarning, match=r"of Unclipped, if it clips, finds scaled gradients.*max_grad_norm"):
        fit(Unclipped("rolling RWP"), make_batches(1), plugins=[half_precision()])


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("method", ["rolling RWP", "RWP", "SAM"])
def test_lightnings_clipping_equals_a_loop_by_hand(method, own):
    """One pass, or one whose gradient gives a direction only: that of the last pass is that of the step.

    By `gradient_clip_val` or by a hook of the module's, without a warning.
    """
    module, batches = (Clips if own else Automatic)(method), make_batches(3)
    fit(module, batches, gradient_clip_val=None if own else 0.3)
    model = make_model()
    opt = make_optimizer(method, model)
    opt.train()
    for batch in batches:
        opt.zero_grad()
        passes = {"SAM": [opt.perturb, opt.step], "RWP": [opt.step], "rolling RWP": [opt.step]}[method]
        if method == "RWP":
            opt.perturb()
        for between in passes:
            loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            between()
    opt.eval()
    assert_same_tensors(weights(module.net), weights(model))


def test_refuses_clipping_that_lightning_cannot_do_under_a_scaler():
    module = Automatic("rolling RWP")
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.5.*GradScaler.*max_grad_norm=0.5"):
        fit(module, make_batches(2), gradient_clip_val=0.5, plugins=[half_precision()])
    assert not module.trained_at


# --- bad input ------------------------------------------------------------------------------------


def test_refuses_losses_that_the_loop_would_weigh():
    module = Automatic("m-RWP", own={"mix": "losses"})
    with pytest.raises(RuntimeError, match=r'mix="losses".*mix="gradients".*manual optimization'):
        fit(module, make_batches(2))
    assert not module.trained_at


def test_warns_where_there_is_nothing_to_do():
    class Plain(Automatic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="no optimizer of flatkern's"):
        fit(Plain("SAM"), make_batches(1))


def test_refuses_arguments_of_other_types():
    with pytest.raises(TypeError, match=r"mask_loss is 3.*function of \(model, batch\)"):
        FlatkernCallback(mask_loss=3)
    with pytest.raises(TypeError, match=r"clean_between_batches is 'no'.*True or False"):
        FlatkernCallback(clean_between_batches="no")


def test_says_how_lightning_is_installed():
    code = "import sys; sys.modules['lightning'] = None; import flatkern.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: flatkern.integrations.lightning needs Lightning" in done.stderr
    assert "pip install 'flatkern[lightning]'" in done.stderr
