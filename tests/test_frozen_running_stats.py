"""Spectral norm and fake quantization inside frozen_running_stats: forwards as ever, and nothing is measured."""

import pytest
import torch
from compare import assert_same
from torch import nn
from torch.ao import quantization

import flatkern


class Quantized(nn.Module):
    """Weights and activations as quantization-aware training sees them."""

    def __init__(self, fake_quantize):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.weights, self.activations = fake_quantize(), fake_quantize()

    def forward(self, x):
        return self.activations(nn.functional.linear(x, self.weights(self.linear.weight), self.linear.bias))


def fake_quantize(kind, observer, **options):
    return lambda: kind.with_args(observer=observer, **options)()


MOVING = quantization.MovingAverageMinMaxObserver
PER_CHANNEL = quantization.MovingAveragePerChannelMinMaxObserver
MEASURING = {
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "spectral norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.utils.spectral_norm(nn.Conv1d(1, 3, 2), n_power_iterations=2)
    ),
    "parametrized spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "fake quantization": lambda: Quantized(fake_quantize(quantization.FakeQuantize, MOVING)),
    "fused fake quantization": lambda: Quantized(fake_quantize(quantization.FusedMovingAvgObsFakeQuantize, MOVING)),
    "fake quantization per channel": lambda: Quantized(
        fake_quantize(quantization.FakeQuantize, PER_CHANNEL, qscheme=torch.per_channel_symmetric, dtype=torch.qint8,
                      quant_min=-128, quant_max=127)
    ),
    "histogram": lambda: nn.Sequential(nn.Linear(4, 3), quantization.HistogramObserver()),
}  # fmt: skip


def after_a_forward(name):
    """A model that has measured one batch; the same every time."""
    torch.manual_seed(0)
    model = MEASURING[name]()
    model(batches()[0])
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=generator) * scale for scale in (1.0, 3.0, 9.0)]


def passes(model):
    """Two forwards and a backward through both: outputs and gradients."""
    outputs = [model(x) for x in batches()[1:]]
    model.zero_grad()
    sum(out.pow(3).mean() for out in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", MEASURING)
def test_what_a_forward_measures_is_forgotten(name):
    """Outputs and gradients inside are those outside; then every buffer is what it was, and the next forward too."""
    model, other = after_a_forward(name), after_a_forward(name)
    buffers = dict(model.named_buffers())
    before = {key: value.clone() for key, value in buffers.items()}
    with flatkern.frozen_running_stats(model):
        inside = passes(model)
    assert_same(inside, passes(other))
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(after[key] is value and torch.equal(value, before[key]) for key, value in buffers.items())
    assert any(not torch.equal(value, before[key]) for key, value in other.named_buffers())
    assert_same([model(batches()[1])], [after_a_forward(name)(batches()[1])])


def test_switches_of_fake_quantization_stay_where_users_put_them():
    model = Quantized(fake_quantize(quantization.FakeQuantize, MOVING))
    model(torch.randn(6, 4))
    with flatkern.frozen_running_stats(model):
        model.apply(quantization.disable_observer)
    assert int(model.weights.observer_enabled) == 0
    assert int(model.weights.fake_quant_enabled) == 1


def test_a_model_that_fails_to_be_copied_is_left_alone(monkeypatch):
    model = nn.Sequential(
        nn.InstanceNorm1d(3, track_running_stats=True), nn.InstanceNorm1d(3, track_running_stats=True)
    )
    buffers = dict(model.named_buffers())
    count = iter(range(100))
    clone = torch.Tensor.clone

    def failing(tensor, *args, **kwargs):
        if next(count) == 4:
            raise RuntimeError("out of memory")
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    with pytest.raises(RuntimeError, match="memory"), flatkern.frozen_running_stats(model):
        pass
    assert all(value is buffers[key] for key, value in model.named_buffers())
