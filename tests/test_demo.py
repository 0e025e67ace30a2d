"""`python -m flatkern demo`: what it shows and writes, that it repeats, and that its comparison is a fair one."""

import contextlib
import copy
import io
import json
import re
import signal
from pathlib import Path

import pytest
import torch

import flatkern

for module in ("matplotlib", "rich", "sklearn", "typer"):
    pytest.importorskip(module)

from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from rich.console import Console  # noqa: E402

from flatkern import __main__ as commands  # noqa: E402
from flatkern import dispatch  # noqa: E402
from flatkern.demos.digits import command as demo  # noqa: E402
from flatkern.demos.digits import plot, report  # noqa: E402
from flatkern.demos.digits import search as demo_search  # noqa: E402
from flatkern.demos.digits import training as demo_training  # noqa: E402
from flatkern.demos.digits.methods import EPOCHS, FULL, METHODS, SAMPLE, TUNED, Plan, hyper_parameters  # noqa: E402

pytestmark = pytest.mark.xdist_group("demo")

NAMES = {"SGD", "RWP", "RWP rolling", "ARWP", "m-RWP", "m-ARWP", "SAM", "ASAM", "mSAM", "IRE", "SAM-IRE"}
NAMES |= {"mixed SAM", "GSAM", "Friendly-SAM", "LookSAM", "Momentum-SAM"}


@pytest.fixture(scope="module", autouse=True)
def small():
    """One thread, and little of what a run costs beside its training."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_training, "TEST", 297)
        patch.setattr(demo_training, "PROBE_DRAWS", 2)
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_forced_colors(monkeypatch):
    """Some build machines force them."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "FLATKERN_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, small):
    """The folder that `demo --full` wrote after one seed and two epochs, and what it showed."""
    out, shown = tmp_path_factory.mktemp("demo") / "results", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("NO_COLOR", "1")
        assert demo.main(["--full", "--seeds", "1", "--epochs", "2", "--out", str(out)]) == 0
    return out, shown.getvalue()


@pytest.fixture(scope="module")
def written(quick):
    text = (quick[0] / "demo.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def run(name, setting="clean", seed=0, epochs=2, **others):
    data = demo_training.load_data(seed, demo_training.SETTINGS[setting])
    return demo_training.train(name, data, seed, epochs, hyper_parameters(setting, name), **others)


def test_every_method_in_both_settings(written):
    assert set(METHODS) >= NAMES
    assert sorted((r["setting"], r["method"]) for r in written["runs"]) == sorted(
        (s, m) for s in ("clean", "noisy") for m in METHODS
    )
    for setting in ("clean", "noisy"):
        assert set(written["summary"][setting]) == set(METHODS)
    assert written["interrupted"] is None


def test_the_default_is_a_sample_of_the_whole():
    """Its runs are among those of --full, enough of them for a deviation, and none is made twice."""
    assert set(SAMPLE.runs()) < set(FULL.runs())
    assert len(set(FULL.runs())) == len(FULL.runs()) == 170
    assert SAMPLE.seeds >= 3 and SAMPLE.epochs == FULL.epochs == EPOCHS
    assert "RWP" in SAMPLE.methods and "RWP rolling" not in SAMPLE.methods, "bit for bit the same"
    assert SAMPLE.methods[0] == "SGD", "what all are compared with comes first"


def test_numbers_are_plausible(written):
    for r in written["runs"]:
        assert 0 <= r["accuracy"] <= 100
        assert r["accuracy"] == r["curve"][-1]["accuracy"]
        assert 0 < r["optimizer_ms"] < r["step_ms"]
        # Chance is 10 %; even two epochs are far above it where the labels are right.
        assert r["setting"] == "noisy" or r["accuracy"] > 40, (r["method"], r["accuracy"])


def test_what_repeating_needs_is_written(written):
    assert written["versions"]["flatkern"] == flatkern.__version__
    assert written["versions"]["torch"] == torch.__version__
    assert all(re.match(r"\d+\.\d+", version) for version in written["versions"].values()), written["versions"]
    assert written["hyper_parameters"]["clean"] == TUNED["clean"]
    assert written["machine"]["threads"] == 1
    assert written["machine"]["backend"] in ("cpp", "eager")
    assert (written["seeds"], written["epochs"]) == (1, 2)
    assert written["date"]


def test_the_build_of_torch_is_written(monkeypatch):
    """Which its installation does not know."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert demo.about(Plan(seeds=1, epochs=2), "cpp")["versions"]["torch"] == "2.14.1+cu130"


@pytest.mark.parametrize("name", ["SGD", "m-ARWP", "mSAM"])
def test_the_same_seed_gives_the_same_numbers(written, name):
    again = run(name)
    first = next(r for r in written["runs"] if r["method"] == name and r["setting"] == "clean")
    for key in ("accuracy", "curve", "train_loss", "loss_increase"):
        assert again[key] == first[key], key


def test_rolling_has_the_weights_of_rwp(written):
    """Which the text under the table claims."""
    rolling, explicit = (
        next(r for r in written["runs"] if r["method"] == name and r["setting"] == "noisy")
        for name in ("RWP rolling", "RWP")
    )
    assert rolling["curve"] == explicit["curve"]
    assert rolling["loss_increase"] == explicit["loss_increase"]


def test_the_methods_differ(written):
    """Each row is the method it is called: same start and batches, other weights."""
    runs = [r for r in written["runs"] if r["setting"] == "clean" and r["method"] != "RWP rolling"]
    losses = {r["method"]: r["curve"][-1]["loss"] for r in runs}
    assert len(set(losses.values())) == len(losses) == len(METHODS) - 1, losses


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_as_many_as_stated(name, monkeypatch):
    """Over ten steps, which is twice LookSAM's period and once IRE's."""
    counted, backward = [], torch.Tensor.backward

    def counting(loss, *args, **others):
        counted.append(loss)
        backward(loss, *args, **others)

    monkeypatch.setattr(torch.Tensor, "backward", counting)
    monkeypatch.setattr(demo_training, "TRAIN", 10 * demo_training.BATCH)
    run(name, epochs=1)
    shards = demo_training.SHARDS if name == "mSAM" else 1
    assert len(counted) == pytest.approx(10 * METHODS[name].gradients * METHODS[name].length * shards)


def test_passes_over_memory(written):
    passes = {name: row["passes"] for name, row in written["summary"]["clean"].items()}
    want = {"SGD": 5, "RWP": 8, "RWP rolling": 6, "ARWP": 8, "m-RWP": 9, "m-ARWP": 9, "SAM": 10, "mSAM": 28}
    want |= {"mixed SAM": 11, "GSAM": 13, "Friendly-SAM": 13, "LookSAM": pytest.approx(8.6), "Momentum-SAM": 9}
    assert {name: passes[name] for name in want} == want
    assert passes["SAM"] < passes["ASAM"] <= 11  # not every tensor is scaled
    assert passes["IRE"] == pytest.approx(5 + 0.4 + 1 / 32, rel=0.01)  # four reads in ten steps, a bit per weight
    assert passes["SAM-IRE"] - passes["SAM"] == pytest.approx(passes["IRE"] - passes["SGD"])


def test_the_search_never_sees_a_test_image():
    """Images are told apart by their pixels; seeds share the test set, so the search's seeds must spare it as well."""

    def keys(part):
        return {image.numpy().tobytes() for image in part[0]}

    tests = None
    for seed in (0, *demo_search.SEEDS):
        data = demo_training.load_data(seed, 0.4)
        tests = tests or keys(data.test)
        assert keys(data.test) == tests
        assert not tests & (keys(data.train) | keys(data.validation))
        assert not keys(data.train) & keys(data.validation)
    assert not set(range(100)) & set(demo_search.SEEDS)


def test_labels_are_wrong_where_they_should_be():
    clean, noisy = (demo_training.load_data(3, noise) for noise in (0.0, 0.4))
    assert torch.equal(clean.train[0], noisy.train[0])
    wrong = clean.train[1] != noisy.train[1]
    assert int(wrong.sum()) == round(0.4 * demo_training.TRAIN)
    assert torch.equal(clean.test[1], noisy.test[1])
    assert torch.equal(clean.validation[1], noisy.validation[1])


def test_hyper_parameters_are_candidates_of_the_search():
    for setting in demo_training.SETTINGS:
        assert TUNED[setting]["SGD"]["lr"] in demo_search.LR
        for name, strengths in demo_search.STRENGTHS.items():
            hyper = TUNED[setting][name]
            assert hyper["lr"] == TUNED[setting]["SGD"]["lr"]
            assert hyper["weight_decay"] in demo_search.WEIGHT_DECAY
            assert hyper[METHODS[name].strength] in strengths, name
        assert len(demo_search.LR) == len(strengths), "every method has as many candidates as SGD"
        assert set(hyper_parameters(setting, "RWP rolling")) == {"lr", "weight_decay", "sigma"}
        combined = hyper_parameters(setting, "SAM-IRE")
        assert combined == TUNED[setting]["SAM"] | {"kappa": TUNED[setting]["IRE"]["kappa"]}


def test_the_search_takes_the_best():
    scores = {0.1: (90.0, -0.4), 0.2: (92.0, -0.3), 0.3: (92.0, -0.2), 0.4: (91.0, -0.1)}
    search = demo_search._best("clean", "SAM", [{"rho": rho} for rho in scores], lambda _, hyper: scores[hyper["rho"]])
    rows = []
    with pytest.raises(StopIteration) as end:
        while True:
            rows.append(next(search))
    assert end.value.value == {"rho": 0.3}
    assert [row["chosen"] for row in rows] == [True, True, True, False]


def test_differences_within_one_standard_deviation_are_marked():
    def made(name, seed, accuracy):
        cost = {"passes": 5, "multiple_of_sgd": 1.0, "parameters": 9}
        times = {"step_ms": 2.0, "optimizer_ms": 0.5, "loss_increase": 0.0, "train_loss": 0.0}
        return {"setting": "clean", "method": name, "seed": seed, "accuracy": accuracy, "cost": cost} | times

    accuracies = {"SGD": (90, 92, 94), "SAM": (91, 93, 95), "RWP": (93, 95, 97), "ASAM": (90, 98, 99)}
    runs = [made(name, seed, a) for name, values in accuracies.items() for seed, a in enumerate(values)]
    summary = report.summarise(runs)["clean"]
    assert summary["SGD"]["accuracy_std"] == pytest.approx(2.0)
    assert summary["RWP"]["difference_to_sgd"] == pytest.approx(3.0)
    assert {name: row["within_one_std"] for name, row in summary.items() if name != "SGD"} == {
        "SAM": True,
        "RWP": False,
        "ASAM": True,  # its own deviation is the larger one
    }
    assert report.summarise(runs[::3])["clean"]["RWP"]["within_one_std"], "one seed tells nothing apart"


# ---- what is shown


def shown_at(width, *printed):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for each in printed:
        console.print(each)
    return console.file.getvalue()


def test_a_line_for_each_run_in_a_pipe(quick, written):
    lines = [line for line in quick[1].splitlines() if re.match(r" +\d+ of 34, +\d+ s: seed 1 of 1, ", line)]
    assert len(lines) == 34
    for line, made in zip(lines, written["runs"], strict=True):
        assert f"{report.TITLES[made['setting']]}, {made['method']}: {made['accuracy']:.1f} %" in line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_is_cut_off(written, width):
    """In every row all numbers of the summary, and no line is wider than the terminal."""
    summary = copy.deepcopy(written["summary"])
    wide = {"seeds": 5, "accuracy_std": 12.3, "difference_to_sgd": -12.3, "step_ms": 123.45, "optimizer_ms": 23.4}
    for of in summary.values():
        of["mSAM"] |= wide
    text = shown_at(width, *report.accuracy_tables(summary, FULL, width), report.cost_table(summary, "eager", width))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name in METHODS:
        rows = [line for line in text.splitlines() if re.match(rf"{re.escape(name)}( \(base\))?  ", line + "  ")]
        assert len(rows) == (2 if width >= 80 else 3), name
        for setting in summary:
            row = summary[setting][name]
            assert any(f"{row['accuracy']:.1f}" in line and f"{row['loss_increase']:.4f}" in line for line in rows)
        assert f"{summary['clean'][name]['passes']:.0f}" in rows[-1].split()
    assert "123.45" in text and "23.400" in text and "± 12.3" in text and "-12.3" in text


def test_the_table_fills_row_by_row(written):
    """Of runs that are done there are rows; means of several seeds say of how many."""
    first = written["runs"][:2]
    text = shown_at(80, *report.accuracy_tables(report.summarise(first), FULL, 80))
    assert "SGD (base)" in text and "SGD, 2x steps" in text and "RWP" not in text and "one seed" in text
    more = [*first, written["runs"][0] | {"seed": 1}]
    assert "1 to 2 seeds" in shown_at(80, *report.accuracy_tables(report.summarise(more), FULL, 80))
    assert report.accuracy_tables(report.summarise([]), FULL, 80) == []


def test_the_text_says_what_it_cannot_show(quick, written):
    words = " ".join(quick[1].split())
    for text in ("2 epochs: too few to compare anything", "1 seed on one small data set", "not which is best",
                 "within one standard deviation shows nothing", "Equal steps are not equal compute",
                 "mostly the cost of calls"):  # fmt: skip
        assert text in words, text
    assert "sample of --full" not in words
    sample = " ".join(shown_at(60, *report.notes(written["summary"], SAMPLE)).split())
    assert "A sample of --full, which has 17 methods, clean labels and 40% wrong labels, and 5 seeds" in sample
    assert "3 seeds on one small data set" in sample and "too few" not in sample


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def few(monkeypatch):
    """The default, with two methods and two seeds."""
    monkeypatch.setattr(demo, "SAMPLE", Plan(("noisy",), ("SGD", "RWP"), seeds=2, epochs=1))
    return ["--epochs", "1"]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}], ids=str)
def test_terminals(environment, few, monkeypatch, tmp_path):
    """A bar where there can be one, with percentage and times; elsewhere lines without escape codes."""
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "60"} | environment).items():
        monkeypatch.setenv(name, value)
    with contextlib.redirect_stdout(Terminal()) as shown:
        assert demo.main([*few, "--seeds", "1", "--out", str(tmp_path)]) == 0
    text = shown.getvalue()
    assert ("\x1b" in text) is not bool(environment)
    assert ("elapsed" in text and "left" in text and "%" in text) is not bool(environment) or "2 of 2" in text
    assert ("1 of 2," in text) is bool(environment)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"RWP +\d+\.\d ", plain)


# ---- the picture


def test_the_picture(quick, written):
    """Marks lie where the numbers say, in the colors of the methods, in the file that was written."""
    plan = Plan(seeds=1, epochs=2)
    picture, figure = imread(quick[0] / "demo.png")[..., :3], plot.draw(written["runs"], written["summary"], plan)
    figure.draw_without_rendering()  # lays it out
    height, width, _ = picture.shape
    assert (width, height) == tuple(figure.canvas.get_width_height())
    axes = figure.axes
    for column, setting in enumerate(("clean", "noisy")):
        axis = axes[column]
        assert axis.get_title(loc="left") == f"{report.TITLES[setting]}: test accuracy (%)"
        assert [label.get_text() for label in axis.get_yticklabels()] == list(METHODS)
        for k, name in enumerate(METHODS):
            x, y = axis.transData.transform((written["summary"][setting][name]["accuracy"], k))
            found = picture[height - 1 - round(y), round(x)]
            assert abs(found - to_rgb(plot.LOOKS[name][0])).max() < 0.15, (setting, name, found)
        curves = {line.get_label(): line.get_ydata()[-1] for line in axes[3 + column].lines}
        for name in METHODS.keys() - {"RWP", "RWP rolling"}:
            assert curves[name] == pytest.approx(written["summary"][setting][name]["accuracy"]), name
    bars = [patch for patch in axes[2].patches if patch.get_height() == 0.6]
    ends = {round(bar.get_y() + 0.3): bar.get_x() + bar.get_width() for bar in bars}
    for k, name in enumerate(METHODS):
        want = sum(written["summary"][s][name]["step_ms"] for s in ("clean", "noisy")) / 2
        assert ends[k] == pytest.approx(want), name


def test_the_picture_says_what_it_cannot_show(written):
    of = [r for r in written["runs"] if r["setting"] == "noisy" and r["method"] in SAMPLE.methods]
    figure = plot.draw(of, report.summarise(of), SAMPLE, "interrupted: 9 of 24 runs")
    below = " ".join(figure.get_supxlabel().split())
    for text in report.limits(SAMPLE):
        assert text in below
    assert "A sample of --full" in below
    assert "interrupted: 9 of 24 runs" in figure.get_suptitle()
    assert len(figure.axes) == 4, "no column for a setting that was not trained"


# ---- interrupts, bad input


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupt_keeps_what_was_finished(number, few, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "train", interrupting(number, 3))
    figures, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda *args: figures.append(draw(*args)) or figures[-1])
    # As in a terminal; a job in the background is started with SIGINT ignored, and then Python leaves it so.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    try:
        assert commands.main(["demo", *few, "--out", str(tmp_path)]) == 130
        assert {s: signal.getsignal(s) for s in handlers} == handlers
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["interrupted"] == "interrupted: 3 of 4 runs"
    assert [(r["seed"], r["method"]) for r in found["runs"]] == [(0, "SGD"), (0, "RWP"), (1, "SGD")]
    assert imread(tmp_path / "demo.png").std() > 0.05
    assert "interrupted: 3 of 4 runs" in figures[0].get_suptitle()
    shown = capsys.readouterr().out
    assert "interrupted: 3 of 4 runs" in shown and "SGD (base)" in shown and "Cost of a step" in shown


def interrupting(number, after):
    """Runs that are none; in the one behind `after` of them the signal arrives."""
    made = []

    def train(name, data, seed, *args, **others):
        if len(made) == after:
            signal.raise_signal(number)
        made.append({
            "method": name, "seed": seed, "accuracy": 80.0 + len(made), "curve": [{"step": 1, "accuracy": 80.0}],
            "train_loss": 1.0, "loss_increase": 0.1, "step_ms": 2.0, "optimizer_ms": 1.0,
            "cost": {"parameters": 9, "passes": 5, "multiple_of_sgd": 1.0},
        })  # fmt: skip
        return made[-1]

    return train


def test_an_interrupt_before_the_first_run(few, monkeypatch, capsys, tmp_path):
    (tmp_path / "demo.json").write_text("of an earlier run")
    monkeypatch.setattr(demo, "train", interrupting(signal.SIGTERM, 0))
    assert demo.main([*few, "--out", str(tmp_path)]) == 130
    assert "before the first of 4 runs was finished" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]
    assert (tmp_path / "demo.json").read_text() == "of an earlier run"


def test_an_interrupted_search_keeps_its_candidates(monkeypatch, capsys, tmp_path):
    def two(epochs, backend):
        for rho in (0.1, 0.2):
            yield {"setting": "clean", "method": "SAM", "rho": rho, "accuracy": 90.0, "loss": 0.3, "chosen": True}
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(demo_search, "search", two)
    assert demo.main(["--search", "--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "search.json").read_text())
    assert len(found["candidates"]) == 2
    assert found["interrupted"] == f"interrupted: 2 of {demo_search.candidates()} candidates"
    assert "interrupted" in capsys.readouterr().out


def test_help(capsys):
    assert commands.main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--seeds", "--epochs", "--backend", "--out", "--threads", "--full", "--search"):
        assert option in shown
    assert str(EPOCHS) in shown


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--backend", "abacus"], ["--colour"]], ids=" ".join)
def test_bad_options(arguments, capsys):
    assert demo.main(arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_backend_that_is_not_live_is_refused(monkeypatch, capsys, tmp_path):
    def absent(name):
        raise ModuleNotFoundError("no compiler")

    monkeypatch.setattr(dispatch, "compiled_module", absent)
    assert demo.main(["--backend", "cpp", "--out", str(tmp_path / "out")]) == 2
    assert "not installed" in capsys.readouterr().err
    for name, reason in (("cpp", "not installed"), ("abacus", "should be one of"), ("triton", "runs on cuda only")):
        monkeypatch.setenv("FLATKERN_BACKEND", name)
        assert demo.main(["--out", str(tmp_path / "out")]) == 2
        shown = capsys.readouterr().err
        assert "FLATKERN_BACKEND" in shown and reason in shown
    assert not (tmp_path / "out").exists()


ON_LINUX = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that takes no files")


@pytest.mark.parametrize("name", ["a-file/below", "there", pytest.param("/proc/self", marks=ON_LINUX)])
def test_an_out_that_cannot_be_written_is_refused_before_training(name, monkeypatch, capsys, tmp_path):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "there" / "demo.json").mkdir(parents=True)
    monkeypatch.setattr(demo, "train", lambda *args, **others: pytest.fail("trained"))
    assert demo.main(["--out", str(tmp_path / name)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "--out" in shown and "nothing can be written to" in shown and name in shown
