"""`python -m flatkern demo`: what it writes, that it repeats, and that its comparison is a fair one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flatkern

for module in ("matplotlib", "rich", "sklearn", "typer"):
    pytest.importorskip(module)

from matplotlib.image import imread  # noqa: E402

from flatkern.demos.digits import command as demo  # noqa: E402
from flatkern.demos.digits import report as demo_report  # noqa: E402
from flatkern.demos.digits import search as demo_search  # noqa: E402
from flatkern.demos.digits import training as demo_training  # noqa: E402
from flatkern.demos.digits.methods import EPOCHS, METHODS, TUNED, hyper_parameters  # noqa: E402

pytestmark = pytest.mark.xdist_group("demo")

NAMES = {"SGD", "RWP", "RWP rolling", "ARWP", "m-RWP", "m-ARWP", "SAM", "ASAM", "mSAM", "IRE", "SAM-IRE"}
NAMES |= {"mixed SAM", "GSAM", "Friendly-SAM", "LookSAM", "Momentum-SAM"}


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, threads):
    """The folder that `demo --quick` wrote."""
    out = tmp_path_factory.mktemp("demo") / "results"
    assert demo.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def written(quick):
    return json.loads((quick / "demo.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


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
    assert demo.about(1, 2, "cpp")["versions"]["torch"] == "2.14.1+cu130"


def test_the_picture(quick):
    picture = imread(quick / "demo.png")
    height, width, _ = picture.shape
    assert width >= 1000
    assert height >= 600
    assert picture[..., :3].std() > 0.05, "a blank picture"


@pytest.mark.parametrize("name", ["SGD", "m-ARWP", "mSAM"])
def test_the_same_seed_gives_the_same_numbers(written, name):
    again = run(name)
    first = next(r for r in written["runs"] if r["method"] == name and r["setting"] == "clean")
    for key in ("accuracy", "curve", "train_loss", "loss_increase"):
        assert again[key] == first[key], key


def test_rolling_has_the_weights_of_rwp():
    """Which the text under the table claims."""
    rolling, explicit = run("RWP rolling", "noisy"), run("RWP", "noisy")
    assert rolling["curve"] == explicit["curve"]
    assert rolling["loss_increase"] == explicit["loss_increase"]


def test_the_methods_differ():
    """Each row is the method it is called: same start and batches, other weights."""
    losses = {name: run(name, epochs=1)["curve"][-1]["loss"] for name in METHODS if name != "RWP rolling"}
    assert len(set(losses.values())) == len(losses), losses


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
    summary = demo_report.summarise(runs)["clean"]
    assert summary["SGD"]["accuracy_std"] == pytest.approx(2.0)
    assert summary["RWP"]["difference_to_sgd"] == pytest.approx(3.0)
    assert {name: row["within_one_std"] for name, row in summary.items() if name != "SGD"} == {
        "SAM": True,
        "RWP": False,
        "ASAM": True,  # its own deviation is the larger one
    }
    assert demo_report.summarise(runs[::3])["clean"]["RWP"]["within_one_std"], "one seed tells nothing apart"


def plain(text):
    """Without colors, which some build machines force."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help(tmp_path):
    source = str(Path(flatkern.__file__).parents[1])
    code = f"import runpy, sys; sys.path.insert(0, {source!r}); sys.argv[1:] = ['demo', '--help']\n"
    code += "runpy.run_module('flatkern', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--seeds", "--epochs", "--backend", "--out", "--threads", "--quick", "--search"):
        assert option in plain(done.stdout)
    assert str(EPOCHS) in plain(done.stdout)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--backend", "abacus"], ["--colour"]], ids=" ".join)
def test_bad_options(arguments, capsys):
    assert demo.main(arguments) == 2
    assert arguments[0] in plain(capsys.readouterr().err)


def test_a_backend_that_is_not_live_is_refused(monkeypatch, capsys, tmp_path):
    dead = {"cpp": {"live": False, "reason": "cpp is not installed (no compiler)"}}
    monkeypatch.setattr(flatkern, "backends", lambda: dead)
    assert demo.main(["--backend", "cpp", "--out", str(tmp_path / "out")]) == 2
    assert "not installed" in plain(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
