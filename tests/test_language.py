"""`python -m flatkern language`: the model is causal, runs are comparable and repeat, and files say what was shown."""

import json

import pytest
import torch

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from flatkern.demos.language import command as language
from flatkern.demos.language import training as language_training
from flatkern.demos.language.training import Llama, Shape

TINY = Shape(width=16, layers=1, heads=2, context=8)
OPTIONS = dict(
    steps=20, batch=4, lr=1e-2, sharp_fraction=0.4, seed=0, device=torch.device("cpu"), backend=None, points=4
)  # fmt: skip


@pytest.fixture(scope="module")
def text():
    return language_training.read_text(200_000)


def test_the_model_is_causal():
    """A later byte changes no earlier prediction, and does change its own."""
    model = Llama(Shape(width=32, layers=2, heads=2, context=16))
    x = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, 9] = (y[:, 9] + 1) % 256
    a, b = model(x), model(y)
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-6)
    assert not torch.allclose(a[:, 9], b[:, 9], atol=1e-6)


def test_text_is_bytes_and_held_out(text):
    training, validation = text
    assert training.min() >= 0 and training.max() < 256
    assert len(training) > 4 * len(validation) > 0
    assert b"import" in bytes(training.to(torch.uint8).tolist())


def test_kappa_zero_is_adamw(text):
    """The same batches from the same start: with kappa 0 IRE's run is AdamW's, and a run repeats."""
    curves = [language_training.train(k, text, TINY, **OPTIONS)["curve"] for k in (None, 0.0, 2.0, 2.0)]
    assert curves[0] == curves[1]
    assert curves[2] == curves[3] != curves[0]
    assert [p["step"] for p in curves[0]] == [5, 10, 15, 20]
    # IRE begins when the warm-up is over; the first point of the curve is after that.
    assert curves[0][-1]["validation"] < curves[0][0]["validation"]


def test_times_are_the_devices(monkeypatch):
    """A GPU is asked to finish first; otherwise what a step costs would be what it takes to ask for it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    language_training.seconds(torch.device("cpu"))
    assert asked == []
    language_training.seconds(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


def test_files(tmp_path, capsys):
    arguments = ["--steps", "10", "--width", "16", "--layers", "1", "--heads", "2", "--context", "8", "--batch", "2"]
    assert language.main([*arguments, "--text", "100000", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "language.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["AdamW", "AdamW-IRE"]
    assert all(run["curve"][-1]["step"] == 10 for run in found["runs"])
    assert (tmp_path / "language.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "AdamW-IRE" in shown
    assert f"{found['runs'][0]['curve'][-1]['validation']:.4f}" in shown


def test_bad_values_are_refused(tmp_path, capsys):
    assert language.main(["--width", "20", "--heads", "4", "--out", str(tmp_path)]) == 2
    assert "not a multiple" in capsys.readouterr().err
