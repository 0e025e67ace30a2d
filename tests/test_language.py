"""`python -m flatkern language`: the model is causal, runs are comparable and repeat, and files say what was shown."""

import json
import signal

import pytest
import torch

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.colors import to_rgb
from matplotlib.image import imread

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


ARGUMENTS = [
    *("--steps", "10", "--width", "16", "--layers", "1", "--heads", "2", "--context", "8", "--batch", "2"),
    *("--text", "100000"),
]


def test_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert language.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "language.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["AdamW", "AdamW-IRE"]
    assert all(run["curve"][-1]["step"] == 10 for run in found["runs"])
    assert found["interrupted"] is None
    shown = capsys.readouterr().out
    assert "AdamW-IRE" in shown
    assert f"{found['runs'][0]['curve'][-1]['validation']:.4f}" in shown
    assert "…" not in shown and "\x1b" not in shown
    check_picture(tmp_path / "language.png", found["runs"])


def check_picture(path, runs):
    """Curves end where the numbers say, in the file that was written."""
    picture, figure = imread(path)[..., :3], language.draw(runs, "")
    figure.draw_without_rendering()  # lays it out
    assert picture.shape[1::-1] == tuple(figure.canvas.get_width_height())
    colors = {"AdamW": "black", "AdamW-IRE": "#1b6ca8"}
    for axis, key in zip(figure.axes, ("validation", "training"), strict=True):
        assert key in axis.get_title() and axis.get_xlabel() == "step"
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(colors)
        lines = {line.get_label(): line for line in axis.lines}
        for run in runs:
            points = [(p["step"], p[key]) for p in run["curve"]]
            assert [tuple(point) for point in lines[run["method"]].get_xydata()] == points
            x, y = axis.transData.transform(points[len(points) // 2])
            around = picture[picture.shape[0] - round(y) - 3 : picture.shape[0] - round(y) + 3, round(x)]
            assert abs(around - to_rgb(colors[run["method"]])).max(1).min() < 0.3, (key, run["method"])


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupt_keeps_what_was_finished(finished, tmp_path, capsys, monkeypatch):
    runs = []

    def train(*args, **others):
        if len(runs) == finished:
            signal.raise_signal(signal.SIGTERM)
        point = {"step": 10, "training": 5.0, "validation": 4.0}
        runs.append({"curve": [point], "seconds": {"optimizer": 0.1, "masks": 0.0, "total": 1.0}})
        return runs[-1]

    monkeypatch.setattr(language, "train", train)
    assert language.main([*ARGUMENTS, "--out", str(tmp_path)]) == 130
    shown = capsys.readouterr().out
    if not finished:
        assert "before the first of 2 runs was finished" in shown
        assert not list(tmp_path.iterdir())
        return
    found = json.loads((tmp_path / "language.json").read_text())
    assert found["interrupted"] == "interrupted: 1 of 2 runs"
    assert len(found["runs"]) == 1 and (tmp_path / "language.png").exists()
    assert "interrupted: 1 of 2 runs" in shown and "4.0000" in shown


BAD = {
    "width": (["--width", "20", "--heads", "4"], "not a multiple"),
    "device": (["--device", "abacus"], "--device"),
    "backend": (["--backend", "abacus"], "should be one of"),
    "sharp fraction": (["--sharp-fraction", "2"], "sharp_fraction is 2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused(name, tmp_path, capsys):
    arguments, text = BAD[name]
    assert language.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(language, "train", lambda *args, **others: pytest.fail("trained"))
    assert language.main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert "nothing can be written to" in " ".join(capsys.readouterr().err.split())
