"""`python -m flatkern landscape`: what it shows and writes, the user's own model, interrupts, bad input."""

import contextlib
import io
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("matplotlib", "rich", "sklearn", "typer"):
    pytest.importorskip(module)

from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.image import imread  # noqa: E402

from flatkern import __main__ as commands  # noqa: E402
from flatkern.demos.digits.plot import LOOKS  # noqa: E402
from flatkern.landscape import command, measures, plot  # noqa: E402

pytestmark = pytest.mark.xdist_group("landscape")

SMALL = ["--points", "5", "--directions", "2", "--draws", "3", "--iterations", "6"]
NAMES = ["SGD", "RWP", "SAM", "m-RWP"]


@pytest.fixture(scope="module", autouse=True)
def small():
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "FULL", command.FULL._replace(epochs=2))
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "FLATKERN_BACKEND"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_COLOR", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, small):
    """The folder that the command wrote, and what it showed."""
    out, shown = tmp_path_factory.mktemp("landscape") / "results", io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert command.main([*SMALL, "--dims", "2", "--out", str(out)]) == 0
    return out, shown.getvalue()


@pytest.fixture(scope="module")
def written(digits):
    text = (digits[0] / "landscape.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


FILE = """
import torch
from torch import nn
from beside import width

def model(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1)).to(device)
    x, y = torch.randn(16, 4, device=device), torch.randn(16, 1, device=device)
    return net, lambda net: nn.functional.mse_loss(net(x), y)

def attention(device):
    def loss(net):
        q = net(torch.ones(1, 2, 8, 4))
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()
    return nn.Linear(4, 4), loss

def far(device):
    net = torch.manual_seed(0) and nn.Linear(2, 2)
    start = net.weight.detach().clone()
    return net, lambda net: net.weight.square().sum() / ((net.weight - start).norm() < 0.4 * start.norm())

def vector(device):
    return nn.Linear(2, 2), lambda net: net(torch.ones(1, 2))

def failing(device):
    return nn.Linear(2, 2), lambda net: net(torch.ones(1, 3)).sum()

def raising(device):
    raise KeyError("no such data")

def single(device):
    return nn.Linear(2, 2)

def reversed(device):
    return lambda net: 1, nn.Linear(2, 2)

def of_two(device, other):
    pass

def nowhere(device):
    net = nn.Linear(2, 2)
    start = net.weight.detach().clone()
    def loss(net):  # NaN off the weights
        return net.weight.square().sum() * (1.0 if torch.equal(net.weight, start) else float("nan"))
    return net, loss

def dropping(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    def loss(net):
        net.train()
        return net(torch.ones(4, 8)).square().mean()
    return net, loss

def drifting(device):
    net = nn.Linear(2, 2)
    net.register_buffer("calls", torch.zeros(()))
    def loss(net):
        net.calls += 1
        return net.weight.square().sum() * (1 + net.calls)
    return net, loss

def tiny(device):
    return model(device)[0], lambda net: 1e-12 * net[0].weight.square().sum()

def huge(device):
    return model(device)[0], lambda net: 1e20 * net[0].weight.square().sum()

def compiled(device):
    net, loss = model(device)
    return torch.compile(net, backend="aot_eager"), loss

NOTHING = None
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("width = 8")
    yield tmp_path / "mine.py"
    sys.modules.pop("beside", None)


def run(file, function, tmp_path, *arguments):
    where = ["--out", str(tmp_path / "out")]
    return command.main(["--model", f"{file}:{function}", *SMALL, *where, *arguments])


def found(tmp_path):
    return json.loads((tmp_path / "out" / "landscape.json").read_text())


# ---- the digits


def test_every_number_is_written(written):
    assert [r["model"] for r in written["runs"]] == NAMES
    assert written["interrupted"] is None
    for r in written["runs"]:
        assert set(measures.MEASURES) <= r.keys()
        losses = {r[name]["loss"] for name in measures.MEASURES if name != "largest_eigenvalue"}
        assert len(losses) == 1 and r["largest_eigenvalue"]["loss"] == pytest.approx(*losses)
        assert len(r["line"]["losses"]) == 2 and len(r["line"]["losses"][0]) == 5 == len(r["plane"]["losses"])
        assert r["plane"]["losses"][2][2] == r["line"]["losses"][0][2] == r["average_sharpness"]["loss"]
        # The plane's axes are the line's directions.
        assert [row[2] for row in r["plane"]["losses"]] == r["line"]["losses"][0]
        assert r["plane"]["losses"][2] == r["line"]["losses"][1]
        assert r["parameters"] > 20000
    assert len({r["line"]["loss"] for r in written["runs"]}) == len(NAMES), "each is trained by its own method"
    assert written["settings"]["points"] == 5 and written["versions"]["torch"] == torch.__version__


def test_the_table_shows_them(digits, written):
    shown = digits[1]
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    for r in written["runs"]:
        (row,) = re.findall(rf"^{r['model']} +\d.*$", shown, re.MULTILINE)
        average, eigenvalue = r["average_sharpness"], r["largest_eigenvalue"]
        assert f"{r['line']['loss']:.4g}" in row and f"{r['ascent_sharpness']['increase']:.4g}" in row
        assert f"{average['increase']:.4g} ± {average['standard_error']:.4g}" in row
        assert row.rstrip().endswith(f"{eigenvalue['value']:.4g}")
        assert (">=" in row) is not eigenvalue["converged"]
        assert f"{r['model']}: loss along directions: " in shown
    assert "One seed does not show which method is flatter" in " ".join(shown.split())


def test_the_same_seed_gives_the_same_numbers(written, tmp_path):
    assert command.main([*SMALL, "--method", "RWP", "--out", str(tmp_path)]) == 0
    (again,) = json.loads((tmp_path / "landscape.json").read_text())["runs"]
    first = written["runs"][1]
    assert again == {key: value for key, value in first.items() if key != "plane"}


def test_the_picture(digits, written):
    """Curves and contours lie where the numbers say, in the file that was written."""
    settings = measures.Settings(**written["settings"])
    picture, figure = imread(digits[0] / "landscape.png")[..., :3], plot.draw(written["runs"], settings)
    figure.draw_without_rendering()  # lays it out
    height, width, _ = picture.shape
    assert (width, height) == tuple(figure.canvas.get_width_height())
    panel, *planes = (axis for part in figure.subfigs for axis in part.axes)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == NAMES

    def colors(axis, x, y):
        x, y = axis.transData.transform((x, y))
        return picture[height - 1 - round(y), round(x)]

    for k, r in enumerate(written["runs"]):
        points = [colors(panel, a, y) for a, y in zip(r["line"]["alphas"], r["line"]["mean"], strict=True)]
        hits = [abs(c - to_rgb(LOOKS[r["model"]][0])).max() < 0.15 for c in points]
        assert all(hits) if k == len(NAMES) - 1 else any(hits), r["model"]  # the last one lies above the others
        assert planes[k].get_title().startswith(r["model"])
        (drawn,) = (c for c in planes[k].collections if hasattr(c, "levels"))
        rise = np.array(r["plane"]["losses"]).T - r["plane"]["loss"]
        assert np.array_equal(drawn.zmin, rise.min()) and np.array_equal(drawn.zmax, rise.max())
        seen = [colors(planes[k], *v) for path in drawn.get_paths() for v in path.vertices[2:-2]]
        assert seen and np.mean([c.min() < 0.9 for c in seen]) > 0.5, "most of a contour is not white"


def test_alpha_is_to_the_right(written):
    """A loss that depends on the first direction alone has upright contours."""
    settings, alphas = measures.Settings(**written["settings"]), [-1.0, -0.5, 0.0, 0.5, 1.0]
    losses = [[1 + abs(alpha)] * 5 for alpha in alphas]
    drawn = {"model": "mine", "plane": {"alphas": alphas, "losses": losses, "loss": 1.0}}
    (axis,) = plot.draw([drawn], settings).subfigs[1].axes
    (contours,) = (c for c in axis.collections if hasattr(c, "levels"))
    for level, path in zip(contours.levels[:-1], contours.get_paths(), strict=False):
        assert np.abs(path.vertices[:, 0]) == pytest.approx(level)
    assert contours.levels[-1] == 1


ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "bench" / "results" / "landscape.json"


@pytest.mark.skipif(not COMMITTED.exists(), reason="an sdist has no results")
def test_the_table_of_the_page_is_what_is_committed():
    page, runs = (ROOT / "docs" / "landscape.md").read_text(), json.loads(COMMITTED.read_text())["runs"]
    assert [r["model"] for r in runs] == NAMES
    for r in runs:
        average, ascent, eigenvalue = (r[n] for n in ("average_sharpness", "ascent_sharpness", "largest_eigenvalue"))
        cells = [r["model"], f"{average['loss']:.4g}", f"{average['increase']:.4g} ± {average['standard_error']:.4g}",
                 f"{ascent['increase']:.4g}", f"{eigenvalue['value']:.4g}"]  # fmt: skip
        assert f"\n| {' | '.join(cells)} |\n" in page
        assert eigenvalue["converged"] and (average["sigma"], ascent["rho"]) == (0.01, 0.05)


# ---- the user's model


def test_a_users_model(file, tmp_path, capsys):
    before = list(sys.path)
    assert run(file, "model", tmp_path) == 0
    assert sys.path == before
    (r,) = found(tmp_path)["runs"]
    assert r["model"] == "mine" and r["parameters"] == 4 * 8 + 8 + 16 + 9 and "plane" not in r
    shown = capsys.readouterr().out
    assert f"{r['line']['loss']:.4g}" in shown and "Digits" not in shown
    assert imread(tmp_path / "out" / "landscape.png").std() > 0.05


def test_what_cannot_be_measured_loses_nothing_else(file, tmp_path, capsys):
    assert run(file, "attention", tmp_path) == 1
    shown, errors = capsys.readouterr()
    assert "mine: largest eigenvalue: RuntimeError: largest_eigenvalue: loss(model) should be" in errors
    assert "sdpa_kernel(SDPBackend.MATH)" in errors and errors.count("\n") == 1
    (r,) = found(tmp_path)["runs"]
    assert "error" in r["largest_eigenvalue"] and r["average_sharpness"]["draws"] == 3 and r["line"]["mean"]
    assert "failed" in shown


def test_losses_that_are_not_finite(file, tmp_path, capsys):
    """null in the JSON; the picture has what is finite."""
    assert run(file, "far", tmp_path, "--dims", "2") == 0
    (r,) = found(tmp_path)["runs"]
    assert r["line"]["losses"][0][0] is None and r["line"]["losses"][0][2] > 0
    shown = " ".join(capsys.readouterr().out.split())
    text = "mine: loss along directions: not finite at 8 of 10 points, "
    assert shown.count(text) == 2, "as it goes, and in the notes"


def test_a_loss_that_is_finite_at_the_weights_alone(file, tmp_path, capsys):
    """No sharpness is a number then, and none is shown."""
    assert run(file, "nowhere", tmp_path) == 1
    shown, errors = capsys.readouterr()
    assert not re.search(r"\bnan\b", shown)
    assert "mine: average sharpness: ValueError: average_sharpness: loss(model) is nan" in errors
    assert "mine: SAM sharpness: ValueError: ascent_sharpness: " in errors
    assert len(found(tmp_path)["runs"][0]["line"]["losses"]) == 2


def test_a_curve_without_a_finite_point(file, tmp_path, capsys):
    assert run(file, "nowhere", tmp_path, "--points", "4") == 1
    assert "mine: loss along directions: ValueError: line: loss(model) is not finite at any" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["dropping", "drifting"])
def test_a_loss_that_is_not_the_same_at_every_call(function, file, tmp_path, capsys):
    """Said once, with both numbers; what was measured is shown and written."""
    assert run(file, function, tmp_path) == 1
    shown, errors = capsys.readouterr()
    assert re.search(r"^mine: landscape: loss\(model\) is not the same at every call: [\d.]+, then [\d.]+; ", errors)
    assert errors.count("\n") == 1 and "without dropout" in errors
    (r,) = found(tmp_path)["runs"]
    assert r["line"]["mean"] and "not the same" in r["warning"] and f"{r['loss']:.4g}" in shown


@pytest.mark.parametrize("function, power", [("tiny", "e-1"), ("huge", "e+2")])
def test_numbers_of_any_magnitude(function, power, file, tmp_path, capsys):
    assert run(file, function, tmp_path) == 0
    (row,) = re.findall(r"^mine +\d.*$", capsys.readouterr().out, re.MULTILINE)
    assert row.count(power) + row.count("e+1") + row.count("e-0") >= 5 and "…" not in row


def test_a_compiled_model(file, tmp_path, capsys):
    """torch's own text comes with the measure and the remedy."""
    assert run(file, "compiled", tmp_path) == 1
    errors = capsys.readouterr().err
    assert "largest_eigenvalue: loss(model) should be differentiable twice, but torch says: " in errors
    assert "torch.compile: pass the model as it was before" in errors


def test_files_of_an_earlier_run_are_named(file, tmp_path, capsys):
    """Where nothing could be measured, they do not look like this run's."""
    assert run(file, "model", tmp_path) == 0
    before = (tmp_path / "out" / "landscape.json").read_bytes()
    capsys.readouterr()
    assert run(file, "failing", tmp_path) == 1
    shown = capsys.readouterr().out
    assert "nothing could be measured: no file was written; of an earlier run: " in shown
    assert str(tmp_path / "out" / "landscape.json") in shown
    assert (tmp_path / "out" / "landscape.json").read_bytes() == before


BAD = {
    "vector": (1, "mine: ValueError: landscape: loss(model) has shape (1, 2), but should be a scalar; reduce it"),
    "failing": (1, "mine: RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 2x2) (mine.py, line 27)"),
    "raising": (2, "mine.py:raising raised KeyError: 'no such data' (mine.py, line 30)"),
    "single": (2, "mine.py:single returned Linear, but should return (model, loss): a torch.nn.Module, and"),
    "reversed": (2, "mine.py:reversed returned (function, Linear), but should return (model, loss)"),
    "of_two": (2, "mine.py:of_two is called with one argument, the torch.device of --device, but: missing a"),
    "NOTHING": (2, "mine.py has no function NOTHING"),
    "absent": (2, "mine.py has no function absent"),
    "not-a-name": (2, "should be FILE.py:FUNCTION"),
}


@pytest.mark.parametrize("function", BAD)
def test_bad_models(function, file, tmp_path, capsys):
    """One message, which names the option or the loss, and no files."""
    status, text = BAD[function]
    assert run(file, function, tmp_path) == status
    shown, errors = capsys.readouterr()
    assert text in " ".join(errors.split())
    assert "Traceback" not in errors
    assert "--model" in errors if status == 2 else errors.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
    assert status == 2 or "nothing could be measured: no file was written\n" in shown


def test_bad_files(file, tmp_path, capsys):
    for name, text in (("nowhere.py", "there is no file"), ("mine.txt", "should be FILE.py:FUNCTION"),
                       ("broken.py", "broken.py raised SyntaxError"), ("exits.py", "exits.py raised SystemExit: 3"),
                       ("needs.py", "needs.py raised ModuleNotFoundError: No module named 'nowhere'")):  # fmt: skip
        (tmp_path / "broken.py").write_text("def model(:")
        (tmp_path / "exits.py").write_text("raise SystemExit(3)")
        (tmp_path / "needs.py").write_text("import nowhere")
        assert run(tmp_path / name, "model", tmp_path) == 2
        assert text in " ".join(capsys.readouterr().err.split())


# ---- interrupts, options


def interrupting(monkeypatch, after):
    """A signal in the measurement behind `after` of them."""
    made, measured = [], command.measured

    def counting(*args):
        if len(made) == after:
            signal.raise_signal(signal.SIGTERM)
        made.append(args[0])
        return measured(*args)

    monkeypatch.setattr(command, "measured", counting)


def test_an_interrupt_keeps_what_was_finished(file, monkeypatch, tmp_path, capsys):
    interrupting(monkeypatch, 3)
    assert commands.main(["landscape", "--model", f"{file}:model", *SMALL, "--out", str(tmp_path / "out")]) == 130
    (r,) = found(tmp_path)["runs"]
    assert found(tmp_path)["interrupted"] == "interrupted: 3 of 4 measurements"
    assert "line" in r and "largest_eigenvalue" not in r
    assert "interrupted: 3 of 4 measurements" in capsys.readouterr().out
    assert imread(tmp_path / "out" / "landscape.png").std() > 0.05


def test_an_interrupt_before_anything_is_finished(file, monkeypatch, tmp_path, capsys):
    interrupting(monkeypatch, 0)
    assert run(file, "model", tmp_path) == 130
    assert "before the first of 4 measurements was finished: nothing to show" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not list((tmp_path / "out").iterdir())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(file, monkeypatch, tmp_path):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR")
    with contextlib.redirect_stdout(Terminal()) as shown:
        assert run(file, "model", tmp_path) == 0
    text = shown.getvalue()
    assert "\x1b" in text and "elapsed" in text and "%" in text and "mine: largest eigenvalue" in text


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--range", "0"], "--range"),
        (["--range", "nan"], "--range: nan is not a finite number > 0"),
        (["--range", "inf"], "--range: inf is not a finite number > 0"),
        (["--sigma", "inf"], "--sigma: inf is not a finite number >= 0"),
        (["--sigma", "nan"], "--sigma: nan is not a finite number >= 0"),
        (["--rho", "inf"], "--rho: inf is not a finite number >= 0"),
        (["--rho", "-1"], "--rho: -1.0 is not a finite number >= 0"),
        (["--rho", "nan"], "--rho: nan is not a finite number >= 0"),
        (["--dims", "3"], "--dims"),
        (["--points", "1"], "--points"),
        (["--method", "Adam"], "'Adam' is not one of the demo's methods: SGD"),
        (["--device", "abacus"], "--device"),
        (["--backend", "triton"], "--backend"),
    ],
    ids=" ".join,
)
def test_bad_options(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "measured", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(command.subjects, "digits", lambda *args: pytest.fail("trained"))
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_help(capsys):
    assert commands.main(["landscape", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("model", "method", "dims", "points", "range", "directions", "sigma", "rho", "draws", "iterations",
                   "seed", "quick", "device", "backend", "threads", "vectors", "out"):  # fmt: skip
        assert f"--{option}" in shown
    assert "FUNCTION(device) returns (model, loss)" in " ".join(shown.split())


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "scikit-learn"])
def test_a_missing_requirement_is_named(package, monkeypatch, capsys):
    module = {"scikit-learn": "sklearn"}.get(package, package)
    of_ours = ("flatkern.demos", "flatkern.landscape", f"{module}.")
    for name in [m for m in sys.modules if m.startswith(of_ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert commands.main(["landscape", "--help"]) == 1
    assert f"landscape needs {package}, which is not installed: pip install {package}, or" in capsys.readouterr().err
