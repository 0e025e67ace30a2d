"""make gpu-report: from the folder of a run to the results that are committed and the documents' table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import goals, report, tables

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "kind": "machine", "stage": "build", "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.65", "cuda": "13.0",
    "torch": "2.11.0+cu130", "triton": "3.6.0", "python": "3.12.1", "flatkern": "0.1.0", "commit": "0123456789abcdef",
    "dirty": False, "date": "2026-12-01", "dry": False,
}  # fmt: skip


def race(us, candidate=goals.OURS, model="gpt2", method="m-rwp", base="sgd", stage="keys", **more):
    call = {"us": us / 2, "host_us": 40.0, "floor_bytes": 12, "gbs": 2700.0, "of_copy": 0.93}
    found = {
        "kind": "race", "stage": stage, "model": model, "method": method, "base": base, "dtype": "float32",
        "masters": False, "candidate": candidate, "us": us, "host_us": 80.0, "loop_us": us, "spread": 0.01,
        "turns": 7, "calls": {"perturb": dict(call), "step": dict(call, of_copy=0.95)}, "floor_bytes": 36,
        "gbs": 2600.0, "of_copy": 0.92, "copy_gbs": 2900.0, "tensors": 148,
    }  # fmt: skip
    return {**found, **more}


def ended(stage, status="passed", sentence="right"):
    return {"kind": "stage", "stage": stage, "status": status, "seconds": 5.0, "sentence": sentence}


def folder(path, *findings, machine=MACHINE, tail=""):
    path.mkdir(parents=True)
    (path / report.FINDINGS).write_text("".join(json.dumps(f) + "\n" for f in (machine, *findings)) + tail)
    (path / "summary.txt").write_text("summary")
    return path


KEYS = [
    race(200.0), race(110.0, "torch fused"), race(260.0, method="sam"), race(110.0, "torch fused", method="sam"),
    race(118.0, method="rolling", base="adamw", dtype="bfloat16", masters=True),
    race(100.0, goals.PLAIN_OURS, method="rolling", base="adamw", dtype="bfloat16", masters=True),
    race(90.0, model="resnet50"), race(30.0, "torch fused", model="resnet50"), ended("keys"),
]  # fmt: skip
RIVALS = [
    race(90.0, model="resnet50", stage="rivals"), race(2000.0, "papers", model="resnet50", stage="rivals"),
    race(270.0, "foreach", model="resnet50", stage="rivals"), race(200.0, stage="rivals"),
    race(300.0, "foreach", stage="rivals"), ended("rivals"),
]  # fmt: skip
TESTS = [
    {"kind": "test", "stage": "tests", "name": "test_a", "outcome": "passed", "seconds": 1.0, "detail": ""},
    ended("tests"),
]


def test_a_run_becomes_results(tmp_path):
    """And its raw files are kept as they came; a killed run's half line costs that line."""
    given = folder(tmp_path / "out", *KEYS, *TESTS, tail='{"kind": "race", "stag')
    written = report.take_in(given, tmp_path / "results")
    assert written == tmp_path / "results/h100"
    raw = written / "raw/2026-12-01"
    assert (raw / report.FINDINGS).read_bytes() == (given / report.FINDINGS).read_bytes()
    found = json.loads((written / "results.json").read_text())
    goal = {g["what"]: g for g in found["goals"]}
    against_fused = goal["m-RWP / SAM / ASAM on GPT-2, float32, in steps of torch's fused SGD"]
    assert against_fused["shown"] == ["1.82x", "2.36x", None]
    assert against_fused["reached"] == [True, False, False]
    assert found["correctness"] == {"tests": {"status": "passed", "sentence": "right"}}
    text = (written / "report.md").read_text()
    for part in ("580.65", "2.11.0+cu130", "3.6.0", "0123456789", "2026-12-01", "**flatkern triton**", "**2.36x**"):
        assert part in text, part


def test_a_rival_that_is_faster_is_shown_as_one(tmp_path):
    """In bold, as everywhere; a plain step is no rival of a method's."""
    given = folder(tmp_path / "out", race(200.0), race(110.0, "torch fused"), race(100.0, "compiled"), ended("keys"))
    rows = (report.take_in(given, tmp_path / "results") / "report.md").read_text().splitlines()
    (compiled,) = [row for row in rows if "| compiled |" in row]
    (fused,) = [row for row in rows if "| torch fused |" in row]
    assert "| **0.50x (slower)** |" in compiled and "slower" not in fused


def test_a_second_run_completes_the_first(tmp_path):
    """Of each stage and race the newest findings count; a stage that did not get to run leaves those of before."""
    results = tmp_path / "results"
    report.take_in(folder(tmp_path / "a", *KEYS, *TESTS), results)
    again = [race(150.0), race(100.0, "torch fused"), ended("keys")]
    second = folder(tmp_path / "b", *again, *RIVALS, ended("tests", "NOT RUN", "no time left"))
    for _ in range(2):  # taken in twice it is still one run
        written = report.take_in(second, results)
    assert sorted(p.name for p in (written / "raw").iterdir()) == ["2026-12-01", "2026-12-01-2"]
    found = json.loads((written / "results.json").read_text())
    goal = {g["what"]: g["shown"] for g in found["goals"]}
    assert goal["m-RWP / SAM / ASAM on GPT-2, float32, in steps of torch's fused SGD"] == ["1.50x", "2.36x", None]
    assert goal["m-RWP faster than the papers' loop, ResNet-50"] == ["22.22x"]
    assert goal["m-RWP faster than `_foreach` around torch's fused step, worst list"] == ["1.50x"]
    assert found["correctness"]["tests"]["status"] == "passed"


def test_a_repair_reruns_some_tests_and_races(tmp_path):
    """The others count as they were: what failed before and was not run again has not passed."""
    before = [{**TESTS[0], "name": name, "outcome": "failed"} for name in ("test_b", "test_c")]
    races = [race(200.0, race=0), race(110.0, "torch fused", race=0), race(260.0, method="sam", race=1)]
    earlier = folder(tmp_path / "a", *races, ended("keys"), *TESTS[:1], *before, ended("tests", "FAILED"))
    report.take_in(earlier, tmp_path / "results")

    def repaired(name, *names):
        tests = [{**TESTS[0], "name": name} for name in names]
        given = folder(tmp_path / name, race(150.0, race=0), ended("keys"), *tests, ended("tests", sentence=name))
        return json.loads((report.take_in(given, tmp_path / "results") / "results.json").read_text())

    found = repaired("one", "test_b")
    assert found["correctness"]["tests"]["status"] == "FAILED"
    assert [(f["method"], f["us"]) for f in found["findings"] if f["kind"] == "race"] == [("m-rwp", 150), ("sam", 260)]
    assert repaired("both", "test_b", "test_c")["correctness"]["tests"] == {"status": "passed", "sentence": "both"}


def test_the_right_rival_of_masters():
    """Our own plain step of the same layout; float32 numbers are no rivals of bfloat16 ones."""
    (goal,) = [g for g in goals.GOALS if "masters" in g.what]
    assert goal.measure(KEYS) == (pytest.approx(1.18),)
    assert goal.reached(goal.measure(KEYS)) == [False]
    mixed = [race(90.0, dtype="bfloat16"), race(100.0, "torch fused")]
    assert goals.ours_against(mixed, goals.FUSED, model="gpt2") is None


def test_every_goal_is_measured_somewhere():
    """Nothing is asked of a run that finds nothing, and every number of a goal has its bound."""
    for goal in goals.GOALS:
        assert goal.measure([]) == (None,) * len(goal.bounds)
        assert goal.modelled("h100") and goal.modelled("any other")


@pytest.mark.parametrize(
    "machine, text",
    [
        ({**MACHINE, "dry": True}, "dry run"),
        ({**MACHINE, "gpu": None}, "without a GPU"),
        ({"kind": "stage", "stage": "build"}, "summary.txt"),
    ],
)
def test_what_is_no_run_is_refused(machine, text, tmp_path):
    given = folder(tmp_path / "out", *KEYS, machine=machine)
    with pytest.raises(report.Unusable, match=text):
        report.take_in(given, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_command(tmp_path, capsys):
    """A document's table is written, found right, and found wrong after a change by hand."""
    page, results = tmp_path / "README.md", tmp_path / "results"
    page.write_text("before\n<!-- bench: gpu -->\nold\n<!-- /bench -->\nafter\n")
    given = folder(tmp_path / "out", *KEYS, *RIVALS)
    same = ["--results", str(results)]
    assert report.main([str(given), "--document", str(page), *same]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "22.22x" in text and "H200, model" in text
    assert report.main(["--check", str(page), *same]) == 0
    page.write_text(text.replace("22.22x", "99.00x"))
    assert report.main(["--check", str(page), *same]) == 1
    assert report.main([str(tmp_path / "nowhere"), *same]) == 1
    assert "make gpu wrote" in capsys.readouterr().err


def test_two_cards_of_one_name(tmp_path):
    """An H100 PCIe has two thirds of the memory rate of an H100 SXM; neither completes the other's run."""
    results = tmp_path / "results"
    written = report.take_in(folder(tmp_path / "a", *KEYS), results)
    before = (written / "results.json").read_bytes()
    other = folder(tmp_path / "b", *RIVALS, machine={**MACHINE, "gpu": "NVIDIA H100 PCIe"})
    with pytest.raises(report.Unusable, match=r"has runs of NVIDIA H100 80GB HBM3, and .* is of NVIDIA H100 PCIe"):
        report.take_in(other, results)
    assert len(list((written / "raw").iterdir())) == 1 and (written / "results.json").read_bytes() == before


def test_what_a_reader_sees(tmp_path):
    """Numbers without exponents, whole tables, losses marked, and the commits that were measured."""
    results = tmp_path / "results"
    plain = [race(1234.4, method="plain"), race(999.7, "torch fused", method="plain")]
    e2e = {"kind": "e2e", "stage": "e2e", "who": "plain", "step_us": 170063.2, "turns": 9}
    e2e |= dict.fromkeys(("ratio", "q1", "q3"), 1.0)
    report.take_in(folder(tmp_path / "a", *plain, ended("keys")), results)
    changed = {**MACHINE, "commit": "fedcba9876543210", "dirty": True}
    written = report.take_in(folder(tmp_path / "b", e2e, ended("e2e"), machine=changed), results)
    text = (written / "report.md").read_text()
    assert "| 1234 | **1.23x (slower)** |" in text and "| 1000 | 1.00x |" in text and "| 170063 |" in text
    assert "e+0" not in text
    for section in text.split("## ")[1:]:
        assert len({line.count("|") for line in section.splitlines() if line.startswith("|")}) <= 1, section
    assert "commit 0123456789, fedcba9876 with local changes;" in report.goal_table(results)


def test_correctness_names_what_failed_and_what_is_missing():
    findings = [*TESTS[:1], ended("tests", "FAILED"), {"kind": "check", "stage": "smoke", "name": "a", "ok": True}]
    text = tables.said(tables.correctness(findings))
    assert text == "**smoke cut off**, **tests FAILED**, sanitizer not run"
    assert tables.said({}) == tables.NOT_RUN


def test_documents_show_what_is_committed():
    shown = {path: text for path in report.DOCUMENTS if report.BLOCK.search(text := path.read_text())}
    assert shown
    for path, text in shown.items():
        assert report.embed(text, root=report.way_to_root(path)) == text, path
