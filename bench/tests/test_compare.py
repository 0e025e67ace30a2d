"""`python -m flatkern bench compare`: verdicts that know the noise, and files that cannot be compared."""

from __future__ import annotations

import copy
import json

import pytest

from bench.report import compare, results
from bench.timing.harness import Timings
from bench.timing.stats import Stats

JITTER = (0.99, 1.0, 1.01, 0.995, 1.005)


def made(ours: float, reference: float = 10.0, others: float = 1.0, jitter=JITTER) -> dict:
    """Results of two methods: ours takes `ours` ms; others' times are multiplied."""
    rows = []
    for method in ("sam", "m-rwp"):
        race = {"model": "resnet50", "method": method, "base": "sgd", "dtype": "float32", "masters": False}
        times = {"flatkern cpp": ours, "torch fused": reference} | {
            f"{name}": others * reference * (3 + k) for k, name in enumerate(("loop", "foreach", "papers"))
        }
        new = []
        for candidate, ms in times.items():
            timings = Timings([{"step": int(ms * 1e6 * factor)} for factor in jitter])
            new.append(results.entry("methods", {**race, "candidate": candidate}, timings, 10**6, floor_bytes=40))
        results.compare(new, "torch fused", Stats([0.001] * 3), 10**6)
        rows += new
    return json.loads(json.dumps(results.document(rows, [], 2, 1.0, arguments=[])))


def verdicts(before: dict, after: dict) -> dict[str, str]:
    rows, noise, _ = compare.compared(before, after)
    return {row.name: row.verdict(noise) for row in rows if row.ours}


@pytest.mark.parametrize(
    "after, verdict",
    [
        (made(20.0), "the same"),
        (made(20.1), "the same"),
        (made(16.0), "faster"),
        (made(26.0), "slower"),
        # Memory at half its speed slows the reference down, too.
        (made(40.0, reference=20.0), "the same"),
        (made(20.0, reference=20.0), "faster"),
        # What is not ours moved by a tenth: that is the noise, and ours by less.
        (made(21.6, others=1.1), "not told apart"),
        (made(20.1, others=1.1), "the same"),
        (made(26.0, others=1.1), "slower"),
        (made(20.0, jitter=(0.5, 0.8, 1.0, 1.4, 1.6)), "not told apart"),
    ],
)
def test_verdicts(after, verdict):
    assert set(verdicts(made(20.0), after).values()) == {verdict}


def test_few_rows_of_others_say_nothing_about_the_noise():
    before, after = made(20.0), made(20.8)
    for found in (before, after):
        found["benchmarks"] = [
            b for b in found["benchmarks"] if b["params"]["candidate"] in ("flatkern cpp", "torch fused")
        ]
    rows, noise, others = compare.compared(before, after)
    assert (noise, others) == (compare.UNKNOWN_NOISE, 0) and {r.verdict(noise) for r in rows} == {"not told apart"}
    assert "assumed" in compare.said(rows, noise, others)


def written(path, found) -> str:
    path.write_text(json.dumps(found))
    return str(path)


def test_the_command(tmp_path, capsys):
    """Slower rows are losses, and --fail makes them an error; another machine is said."""
    foreign = made(26.0)
    foreign["machine_info"]["processor"] = "Another CPU"
    files = written(tmp_path / "a.json", made(20.0)), written(tmp_path / "b.json", foreign)
    assert compare.main([*files, "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    assert "not the same machine: processor" in said and "Another CPU" in said
    assert "1.30x (slower)" in said and "2 slower; noise ±2 %" in said and "loop" not in said
    found = json.loads((tmp_path / "c.json").read_text())
    assert len(found["rows"]) == 8 and found["different_machine"][0].startswith("processor: ")
    assert compare.main([*files, "--fail", "--all"]) == 1
    assert "[resnet50-sam-sgd-float32-loop]" in capsys.readouterr().out
    assert compare.main([files[0], files[0], "--fail"]) == 0
    assert "the two files are of one run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([*files, "--json", str(tmp_path / "nowhere" / "c.json")])
    assert "cannot be written" in capsys.readouterr().err


def test_noise_that_would_hide_a_slower_row_is_no_success(tmp_path, capsys):
    """Others' code moved by half: nothing can be said, and --fail does not pass."""
    files = written(tmp_path / "a.json", made(20.0)), written(tmp_path / "b.json", made(26.0, others=1.5))
    assert compare.main([*files, "--fail"]) == 3
    said = capsys.readouterr().out
    assert "a slower row would not be seen" in said and "2 not told apart" in said


def test_the_reference_has_noise_too():
    """Its few disturbed rounds widen the interval of what is divided by them."""
    before, after = made(20.0), made(20.0, jitter=(1, 1, 1))
    for b in after["benchmarks"]:
        if b["params"]["candidate"] == "torch fused":
            b["stats"]["data"] = [0.005, 0.008, 0.010, 0.016, 0.018]
    assert set(verdicts(before, after).values()) == {"not told apart"}


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "another program's"),
        ('{"benchmarks": []}', "another program's"),
        ('{"benchmarks": [{"name": "x", "stats": {}}]}', "pytest-benchmark compare"),
        ('{"benchmarks": [{"name": "x", "extra_info": null, "stats": {}}]}', "pytest-benchmark compare"),
        ('{"benchmarks": [{"name": "x", "extra_info": {"table": "methods"}}]}', "1 rows are incomplete"),
        (
            '{"benchmarks": [{"name": "x", "params": {}, "extra_info": {"table": "methods"}, "group": ""}]}',
            "1 rows are incomplete",
        ),
        ('{"benchmarks": 3}', "another program's"),
    ],
)
def test_foreign_files(content, said, tmp_path, capsys):
    path = tmp_path / "foreign.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        compare.main([written(tmp_path / "a.json", made(20.0)), str(path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "foreign.json" in error


def test_files_of_different_cases(tmp_path, capsys):
    other = copy.deepcopy(made(20.0))
    for b in other["benchmarks"]:
        b["name"] = "x" + b["name"]
    with pytest.raises(SystemExit):
        compare.main([written(tmp_path / "a.json", made(20.0)), written(tmp_path / "b.json", other)])
    assert "no row in common" in capsys.readouterr().err
