"""`python -m flatkern bench`: what is refused before anything is measured, what is written, and what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import command, races
from bench.methods import METHODS
from bench.report import quiet, results
from bench.report.tables import tables
from bench.runner import Runner
from bench.timing.harness import Cpu, Timings
from bench.timing.stats import Stats
from flatkern.dispatch import refuse

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "eager" if refuse("sgd_update_", "cpp", "cpu") else "cpp"
OURS = f"flatkern {BACKEND}"
QUICKLY = ["--rounds", "1", "--threads", "1", "--seconds", "0.01", "--backends", BACKEND]
SMALL = ["--models", "many_small", "--methods", "rwp", "--base", "sgd", *QUICKLY]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--models", "alexnet"], "alexnet"),
        (["--device", "tpu"], "should be cpu or cuda"),
        (["--suite", "calls", "--methods", "sam"], "--suite"),
        (["--suite", "methods", "--models", "gpt2"], "no suite that was asked for has gpt2"),
        (["--masters", "--dtype", "float32"], "--masters needs"),
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "x"], "'x' should be a whole number"),
        (["--seconds", "nan"], "'nan' should be a finite number above 0"),
        (["--name", "../x"], "should be a file's name"),
        (["--models", "gpt", "--methods", "sam"], "networks of the suite train have their own"),
        (["--out", "{file}/results"], "name another folder"),
        pytest.param(
            ["--device", "cuda"],
            "doctor",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (["--backends", "triton"], "--backends: "),
    ],
)
def test_refused_before_anything_is_measured(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("measured"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        command.main([word.format(file=tmp_path / "file") for word in arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_what_is_written_and_shown(tmp_path, capsys, monkeypatch):
    """Rows of all candidates, whose results were compared with the reference's; tables in Markdown; a chart."""
    monkeypatch.setattr(Cpu, "burst", 1)
    assert command.main([*SMALL, "--out", str(tmp_path / "new"), "--name", "x"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    rows = {b["params"]["candidate"]: b for b in found["benchmarks"] if b["extra_info"]["table"] == "methods"}
    assert set(rows) == {OURS, "torch fused", "papers", "loop", "foreach"} and found["failures"] == []
    assert all(rows[name]["extra_info"]["differs"] == "" for name in (OURS, "papers", "loop", "foreach"))
    assert set(rows[OURS]["stats"]) >= {"median", "iqr", "ops", "data"}
    assert found["command"].endswith("--name x") and found["machine_info"]["processor"] in said
    text = (tmp_path / "new" / "x.md").read_text()
    assert "RWP" in text and METHODS["rwp"].title in said
    assert {path.suffix for path in (tmp_path / "new").iterdir()} <= {".json", ".md", ".png"}


def test_earlier_results_are_kept(tmp_path, capsys, monkeypatch):
    """Under a name of their own, which may have dots in it."""
    monkeypatch.setattr(Cpu, "burst", 1)
    for methods in ("rwp", "plain"):
        arguments = [methods if word == "rwp" else word for word in SMALL]
        assert command.main([*arguments, "--out", str(tmp_path), "--name", "v1.0"]) == 0
    assert "compare" in capsys.readouterr().out
    methods = {}
    for name in ("v1.0", "v1.0-before"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["benchmarks"]
        methods[name] = {b["params"]["method"] for b in rows if b["extra_info"]["table"] == "methods"}
    assert methods == {"v1.0": {"plain"}, "v1.0-before": {"rwp"}}


def test_a_reader_who_has_seen_enough(tmp_path, monkeypatch):
    """What was over is written, as behind an interrupt."""
    from bench.report.screen import Screen

    def closed(self, text, alarming=False):
        if "rwp" in text.lower():
            raise BrokenPipeError

    monkeypatch.setattr(Screen, "note", closed)
    monkeypatch.setattr(os, "dup2", lambda one, other: None)
    monkeypatch.setattr(Cpu, "burst", 1)
    assert command.main([*SMALL, "--methods", "plain", "rwp", "--out", str(tmp_path)]) == 130
    rows = json.loads((tmp_path / "bench-partial.json").read_text())["benchmarks"]
    assert {b["params"]["method"] for b in rows} == {"plain"}


def test_an_interrupt_keeps_the_races_that_were_over(tmp_path, capsys, monkeypatch):
    run, count = Runner.run, 0

    def interrupted(self, race):
        nonlocal count
        if (count := count + 1) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        run(self, race)

    monkeypatch.setattr(Runner, "run", interrupted)
    monkeypatch.setattr(Cpu, "burst", 1)
    small = [word if word != "rwp" else "plain" for word in SMALL]
    assert command.main([*small, "--base", "sgd", "adamw", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench-partial.json").read_text())
    assert {b["params"]["base"] for b in found["benchmarks"]} == {"sgd"} and not (tmp_path / "bench.json").exists()


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    """Its row says what to install, and the others run."""
    import bench.candidates

    monkeypatch.setattr(bench.candidates, "is_installed", lambda library: False)
    runner = Runner(1, 0.01)
    entries = tuple(map(races.Entry, (OURS, "torch fused", "pytorch_optimizer", "documented pytorch_optimizer")))
    runner.run(races.Race("methods", "tiny_160", "sam", "sgd", entries))
    assert {f["candidate"] for f in runner.failures} == {"pytorch_optimizer", "documented pytorch_optimizer"}
    assert all("pip install 'flatkern[rivals]'" in f["reason"] for f in runner.failures)
    assert {b["params"]["candidate"] for b in runner.benchmarks} == {OURS, "torch fused"}


@pytest.mark.parametrize(
    "arguments, models, networks",
    [
        ([], {"tiny_160", "many_small", "resnet50", "gpt2", "vit_b16"}, ["mlp", "conv", "vit", "gpt"]),
        (["--quick"], {"tiny_160", "resnet50"}, None),
        (["--suite", "calls", "--models", "gpt2"], {"gpt2"}, None),
        (["--suite", "train"], set(), ["mlp", "conv", "vit", "gpt"]),
        (["--models", "gpt"], set(), ["gpt"]),
        (["--models", "vit_b16"], {"vit_b16"}, None),
        (["--models", "vit_b16", "vit"], {"vit_b16"}, ["vit"]),
        (["--methods", "sam"], {"resnet50"}, None),
    ],
)
def test_what_is_selected(arguments, models, networks, tmp_path):
    args = command.parsed([*arguments, "--backends", BACKEND, "--out", str(tmp_path)])
    assert {race.model for race in races.plan(args)} == models
    assert (args.networks if "train" in args.suite else None) == networks


@pytest.mark.skipif(BACKEND == "eager", reason="the C++ kernels are not built")
def test_settings_hold_for_their_candidates_alone(monkeypatch):
    """An older instruction set, one thread: inside of a turn, and nowhere else."""
    from flatkern import _C

    seen, usual = [], (_C.isa(), torch.get_num_threads())
    turn = Cpu.turn

    def recording(self, candidate, count):
        seen.append((_C.isa(), torch.get_num_threads()))
        return turn(self, candidate, count)

    monkeypatch.setattr(Cpu, "turn", recording)
    runner = Runner(1, 0.01)
    entries = [races.Entry(OURS), races.Entry(OURS, setting="baseline"), races.Entry(OURS, setting=races.ONE_THREAD)]
    runner.run(races.Race("settings", "tiny_160", "plain", "sgd", (*entries, races.Entry("torch fused"))))
    assert set(seen) == {usual, ("baseline", usual[1]), (usual[0], 1)} and runner.failures == []
    assert (_C.isa(), torch.get_num_threads()) == usual
    assert {b["params"]["candidate"] for b in runner.benchmarks} >= {"flatkern cpp, baseline", "flatkern cpp, 1 thread"}
    (table,) = tables(results.document(runner.benchmarks, [], 2, 1.0, arguments=[]))
    assert [row[2] for row in table.rows] == [OURS, "flatkern cpp, baseline", "flatkern cpp, 1 thread"]


@pytest.fixture
def found():
    """Results of SAM beside a loop, and beside a library that computes something else."""
    rows = []
    race = {"model": "resnet50", "method": "sam", "base": "sgd", "dtype": "float32", "masters": False}
    differs = {"heavyball": "a gradient at other weights"}
    seconds = {"flatkern cpp": 20, "torch fused": 10, "loop": 40, "heavyball": 100, "documented papers": 60}
    for candidate, ms in seconds.items():
        info = {"floor_bytes": 40, "call_floors": {"perturb": 20, "step": 20}, "held_bytes": 8.0}
        timings = Timings([{"perturb": ms * 500_000, "step": ms * 500_000}] * 3)
        info["differs"] = differs.get(candidate, "")
        rows.append(results.entry("methods", {**race, "candidate": candidate}, timings, 25_557_032, **info))
    results.compare(rows, "torch fused", Stats([0.004, 0.005, 0.006]), 25_557_032)
    return json.loads(json.dumps(results.document(rows, [], threads=2, seconds=1.0, arguments=[])))


def test_no_speed_up_over_what_computes_something_else(found):
    by_name = {table.name: table for table in tables(found)}
    methods = by_name["resnet50-sgd"]
    cells = dict(zip(methods.header, methods.rows[0], strict=True))
    assert cells["vs careful loop"] == "2.0x" and cells["vs heavyball"] == "something else"
    assert cells["time"] == "20.0 ms ±0 %"
    assert [row[3:] for row in by_name["rivals"].rows] == [
        ["heavyball.SAMWrapper", "its own", "100 ms", "20.0 ms", "something else"],
        ["the usual loop (davda54/sam)", "by name", "60.0 ms", "20.0 ms", "3.0x"],
    ]


def test_a_wrong_result_of_ours_is_said_and_fails(found):
    from bench.report.render import differing

    assert differing(found) == []
    found["benchmarks"][0]["extra_info"]["differs"] = "other weights after three steps"
    (said,) = differing(found)
    assert "WRONG: flatkern cpp, SAM, sgd: other weights" in said


def test_a_machine_that_is_not_quiet_is_told_by_its_copies(found):
    (said,) = quiet.remarks(found)
    assert "in 1 of 1 races" in said and "resnet50 sam sgd" in said
    for b in found["benchmarks"]:
        b["extra_info"]["copy_spread"] = 0.01
    assert quiet.remarks(found) == []


@pytest.mark.matrix
def test_nothing_is_needed_that_may_be_missing(tmp_path):
    """Without packages that a machine may lack: results, tables and no chart, which is a remark."""
    for name in ("rich", "pytest_benchmark", "matplotlib", "typer"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})\n")
    paths = [str(tmp_path), *(p for p in sys.path if p and "site-packages" not in p and Path(p).name != "tests")]
    script = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from bench import command\nfrom bench.timing.harness import Cpu; Cpu.burst = 1\n"
        "sys.exit(command.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", script, *SMALL, "--out", str(tmp_path / "new")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no chart: matplotlib is not installed" in done.stdout
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"bench.json", "bench.md"}
