"""`make gpu` with stages that are broken on purpose: what is left in its folder, and its exit status."""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import out, run, stages, suite
from bench.gpu.process import GIVE_UP, GRACE, Child, group_members

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "bench" / "gpu" / "run.py"
BUDGET = 120
SCALE = stages.USUAL / BUDGET  # seconds of a table that are one second with this budget
FOUND = 'print(\'@ \' + \'{"kind": "check", "name": "a", "ok": true}\', flush=True); '
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


def table(folder, *rows):
    """A file with the stages `rows`: name, Python code or a command, seconds, then arguments of Stage."""
    text = ["import sys", "from bench.gpu.stages import Stage", "STAGES = ("]
    for name, code, _, more in rows:
        command = (sys.executable, "-S", "-c", code) if isinstance(code, str) else code
        text.append(f"    Stage({name!r}, 'a stand-in', command={command!r}, **{ {'needs': ()} | more!r}),")
    text += [")", f"LISTS = {{'first': { ({row[0]: SCALE * row[2] for row in rows})!r}}}"]
    path = folder / "table.py"
    path.write_text("\n".join(text) + "\n")
    return path


def arguments(folder, *rows, stage_names="", target=None):
    path = table(folder, *rows)
    words = ["--table", path, "--budget", BUDGET, "--stages", stage_names, "--out", target or folder / "out"]
    return [sys.executable, str(RUN), *map(str, words)]


def gpu(folder, *rows, **options):
    """Run it: exit status, summary lines by stage, findings by stage, and what the terminal showed."""
    done = subprocess.run(arguments(folder, *rows, **options), capture_output=True, timeout=60, check=False)
    return (done.returncode, *read(folder / "out"), done.stdout.decode() + done.stderr.decode())


def read(folder):
    lines = (folder / "summary.txt").read_text().splitlines()
    results = folder / "results.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    by_stage = {}
    for one in found:
        if one["kind"] != "stage":
            by_stage.setdefault(one["stage"], []).append(one)
    return {line.split()[0]: line for line in lines[5:] if line.strip()}, by_stage


# ---- one stage does not stop another

HANG = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# One in the group, and one that has left it and holds the pipe.
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 100"])
away = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"], start_new_session=True)
print("pid", away.pid, os.getpgrp(), flush=True)
"""
ORPHAN = """
import os, subprocess
subprocess.Popen(["sleep", "100"])
print(os.getpgrp())
print("left a child")
"""
FLOOD = """
import sys
for k in range(300000):
    sys.stdout.write(f"line {k}\\n")
print("x" * 3000000)
"""
BYTES = (
    r"import os; os.write(1, b'\xff\xfe bad \x1b[31mred\x1b[0m\n@ {\xff\n@ [1]\n@ {\"kind\": 3}\n"
    r"@ {\"kind\": \"a\", \"text\": \"\xc3\xa9\"}\nno newline')"
)
BESIDE = {"beside": True}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    rows = [
        ("crash", FOUND + "import no_such_module", 20),
        ("killed", FOUND + "import os; os.kill(os.getpid(), 11)", 20),
        ("hang", FOUND + HANG + "time.sleep(100)", 1.5),
        ("orphan", FOUND + ORPHAN, 20),
        ("silent", "print('nothing')", 20),
        ("wrong", FOUND + "print('3 of 4'); raise SystemExit(1)", 20),
        ("flood", FLOOD + FOUND + "print('the end')", 20),
        ("findings", 'print((\'@ {"kind": "a", "b": "\' + \'c\' * 100000 + \'"}\\n\') * 20)', 20),
        ("bytes", BYTES, 20),
        ("absent", ("/no/such/program",), 20),
        ("fine", FOUND + "print('all well')", 20),
    ]
    found = gpu(folder, *((*row, BESIDE) for row in rows), ("last", FOUND + "print('at last')", 20, {}))
    return folder / "out", *found


@pytest.mark.parametrize(
    "stage, status, sentence, findings",
    [
        ("crash", "FAILED", "No module named 'no_such_module'", 1),
        ("killed", "FAILED", "ended by SIGSEGV", 1),
        ("hang", "OUT OF TIME", r"stopped after [12] s with 1 findings; last: pid", 1),
        ("orphan", "passed", "left a child", 1),
        ("silent", "FAILED", "found nothing, though its exit status is 0; last: nothing", 0),
        ("wrong", "FAILED", "3 of 4", 1),
        ("flood", "passed", "the end", 1),
        ("findings", "FAILED", r"\d findings are not in results.jsonl", 13),
        ("bytes", "passed", "no newline", 1),
        ("absent", "FAILED", "cannot be started: .*No such file", 0),
        ("fine", "passed", "all well", 1),
        ("last", "passed", "at last", 1),
    ],
)
def test_each_ends_by_itself(broken, stage, status, sentence, findings):
    _, code, lines, found, terminal = broken
    assert re.match(rf"{stage} +{status} +\d+\.\d s  .*{sentence}", lines[stage]), lines[stage]
    assert len(found.get(stage, [])) == findings
    assert re.search(rf"{stage}: {status}( after|:)", terminal)
    assert code == 3


def test_what_is_found_says_when_and_where(broken):
    folder, _, _, found, _ = broken
    (one,) = found["fine"]
    assert one.pop("at") >= 0
    assert one == {"kind": "check", "name": "a", "ok": True, "stage": "fine"}
    assert found["bytes"][0]["text"] == "é"
    ends = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    ends = {one["stage"]: one for one in ends if one["kind"] == "stage"}
    assert ends["hang"]["status"] == "OUT OF TIME" and ends["last"]["sentence"] == "at last"
    assert len(ends) == 12


def test_the_log_is_cut_but_has_both_ends(broken):
    log = (broken[0] / "log.txt").read_bytes()
    assert b"[flood] line 0\n" in log and b"[flood] line 299999\n" in log and b"[flood] the end\n" in log
    assert re.search(rb"\.\.\. \d+ lines are left out here", log)
    assert len(log) < 4 * 2**20
    assert rb"[bytes] \xff\xfe bad red" in log and b'[bytes] @ {"kind": 3}' in log
    assert sorted(p.name for p in broken[0].iterdir()) == ["log.txt", "results.jsonl", "summary.txt"]


@LINUX
def test_a_hung_stage_leaves_nobody_in_its_group(broken):
    away, group = map(int, re.search(rb"\[hang\] pid (\d+) (\d+)", (broken[0] / "log.txt").read_bytes()).groups())
    orphans = int(re.search(rb"\[orphan\] (\d+)", (broken[0] / "log.txt").read_bytes())[1])
    assert group_members(group) == group_members(orphans) == []
    os.kill(away, signal.SIGKILL)  # it has left, and is nobody's


@LINUX
def test_what_survives_sigkill_is_left_behind(monkeypatch):
    """With a clock that is turned by hand."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(100)"
    child = Child([sys.executable, "-S", "-c", code], os.environ, ROOT, 0.0, 10.0)
    try:
        while not child.out.read():
            time.sleep(0.01)
        kill = os.killpg
        monkeypatch.setattr(os, "killpg", lambda group, number: number == signal.SIGKILL or kill(group, number))
        assert not child.tend(9.9) and child.asked is None
        assert not child.tend(10.0) and child.asked == 10.0
        assert not child.tend(10.0 + GRACE - 0.1) and child.forced is None
        assert not child.tend(10.0 + GRACE) and child.forced == 10.0 + GRACE
        assert child.tend(10.0 + GRACE + GIVE_UP)
        assert child.left_behind == [child.pid] and child.status is None
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.process.wait()


# ---- what a stage needs

NEEDS = {"needs": ("build", "warm")}
LATE = FOUND + "import os, time; time.sleep(0.5); print(os.environ['FLATKERN_STAGE_SECONDS'])"


@pytest.mark.parametrize(
    "build, warm, statuses, code",
    [
        ("raise SystemExit(1)", "", ["FAILED", "NOT RUN", "NOT RUN"], 1),
        ("", "import time; time.sleep(100)", ["passed", "OUT OF TIME", "passed"], 3),
        ("", "raise SystemExit(70)", ["passed", "FAILED", "passed"], 3),
        ("", "raise SystemExit(1)", ["passed", "FAILED", "passed"], 3),
        ("", "", ["passed", "passed", "passed"], 0),
    ],
    ids=["build fails", "warm is cut off", "warm crashes", "warm ends with failures", "all well"],
)
def test_needs(tmp_path, build, warm, statuses, code):
    got, lines, _, _ = gpu(
        tmp_path,
        ("build", FOUND + build, 9, {"correct": True}),
        ("warm", FOUND + warm, 1 if "sleep" in warm else 9, {"needs": ("build",), "enough": "ended"}),
        ("keys", FOUND, 9, NEEDS),
        stage_names="keys",
    )
    assert list(lines)[:3] == ["build", "warm", "keys"]
    for line, status in zip(lines.values(), statuses, strict=False):
        assert re.match(rf"\w+ +{status} ", line), line
    assert got == code
    if statuses[2] == "NOT RUN":
        assert lines["keys"].endswith("build failed")
    assert f"exit status {code}" in lines["exit"]


def test_what_others_need_may_be_late(tmp_path):
    code, lines, _, _ = gpu(
        tmp_path,
        ("build", LATE, 0.2, {"patience": 50}),
        ("keys", FOUND, 9, {"needs": ("build",)}),
    )
    assert code == 0
    assert re.match(r"build +passed .* 0\.2$", lines["build"])


def test_the_lists():
    def asked(words, dry=False):
        return run.chosen(stages.STAGES, stages.LISTS, words, dry)

    assert list(asked("")) == ["build", "smoke", "tests", "warm", "keys", "ncu", "parameters"]
    assert list(asked("", dry=True)) == [stage.name for stage in stages.STAGES]
    assert asked("second")["warm"] == 40 and asked("first")["warm"] == 110
    assert list(asked("sweep smoke")) == ["build", "smoke", "warm", "sweep"]
    for seconds in stages.LISTS.values():
        together = [seconds[stage.name] for stage in stages.STAGES if stage.beside and stage.name in seconds]
        assert sum(seconds.values()) - sum(together) + max(together) <= stages.USUAL


def test_the_table():
    for stage in stages.STAGES[1:]:
        assert stage.argv()[1:] == ("bench/gpu/stage.py", stage.module or stage.name)
    assert {name for seconds in stages.LISTS.values() for name in seconds} == {stage.name for stage in stages.STAGES}
    assert all(os.access(tool, os.X_OK) for tool in (ROOT / "bench" / "gpu" / "tools").iterdir())


# ---- files and arguments


def test_a_full_disk_stops_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").symlink_to("/dev/full")
    code, lines, _, terminal = gpu(
        tmp_path, ("one", FOUND + "print('well')", 9, {}), ("two", FOUND + "print('well')", 9, {})
    )
    assert code == 3
    assert re.match(r"one +passed .* well$", lines["one"]) and re.match(r"two +passed", lines["two"])
    assert re.match(r"OUT +FAILED +results.jsonl could not be written \(No space left on device\)", lines["OUT"])
    assert len(re.findall(r'@ {"kind": "check", "name": "a", "ok": true, "stage": "\w+", "at": [\d.]+}', terminal)) == 2


def test_an_earlier_run_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("machine.json", "log.txt", "mine.txt"):
        (tmp_path / "out" / name).write_text("earlier")
    code, _, _, terminal = gpu(tmp_path, ("one", FOUND + "print('well')", 9, {}))
    assert code == 0
    assert "replaced there, of an earlier run: log.txt, machine.json" in terminal
    assert not (tmp_path / "out" / "machine.json").exists()
    assert (tmp_path / "out" / "log.txt").read_text() == "[one] well\n"
    assert (tmp_path / "out" / "mine.txt").read_text() == "earlier"


def test_the_machine_has_a_file_and_heads_the_summary(tmp_path):
    code = 'print(\'@ {"kind": "machine", "gpu": "NVIDIA H9", "torch": "2.99", "commit": "abc"}\')'
    assert gpu(tmp_path, ("build", code, 9, {}))[0] == 0
    assert json.loads((tmp_path / "out" / "machine.json").read_text())["gpu"] == "NVIDIA H9"
    head = (tmp_path / "out" / "summary.txt").read_text()
    assert "NVIDIA H9" in head and "torch 2.99" in head and "commit abc" in head and f"BUDGET={BUDGET}" in head


@pytest.mark.parametrize(
    "words, text",
    [
        (["--stages", "keys,kays"], r"STAGES: .* stage kays; name lists \(first, second, repaired\) or stages"),
        (["--budget", "10"], "BUDGET: '10' should be a number of seconds, at least 30"),
        (["--budget", "nan"], "BUDGET: 'nan' should be"),
        (["--budget", "soon"], "BUDGET: 'soon' should be"),
        (["--out", "{file}"], r"OUT: .* is a file, but should be a folder; name a folder .*OUT=FOLDER"),
        (["--out", "{file}/x"], r"OUT: .* cannot be made \(Not a directory\); name a folder"),
        (["--out", "/proc/self"], r"OUT: .* cannot be written \(.*\); name a folder"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(tmp_path, capsys, words, text):
    (tmp_path / "file").write_text("kept")
    words = [word.format(file=tmp_path / "file") for word in words]
    try:
        code = run.main(["--out", str(tmp_path / "out"), *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert re.search(text, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_large_file_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(out, "LARGEST", 10000)
    (tmp_path / "ncu.csv").write_bytes(b"a" * 20000 + b"b" * 20000)
    files = out.Out(tmp_path)
    files.end_of("ncu")
    text = (tmp_path / "ncu.csv").read_bytes()
    assert re.fullmatch(rb"a{4000}\n... 32000 bytes are left out here ...\nb{4000}", text)
    assert files.errors() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_stages_and_leaves_a_summary(tmp_path, number):
    rows = [("one", FOUND, 9, {}), ("two", FOUND + "import time; time.sleep(100)", 99, {}), ("three", FOUND, 9, {})]
    process = subprocess.Popen(arguments(tmp_path, *rows), stdout=subprocess.PIPE, text=True)
    seen = ""
    while "two: check" not in seen and "two: a stand-in" not in seen:
        line = process.stdout.readline()
        assert line, "it ended by itself"
        seen += line
    so_far = read(tmp_path / "out")[0]  # all there would be if it were killed now
    assert re.match(r"one +passed", so_far["one"]) and re.match(r"three +NOT RUN .* not yet ended", so_far["three"])
    process.send_signal(number)
    rest = process.communicate(timeout=30)[0]
    lines, _ = read(tmp_path / "out")
    assert process.returncode == 3
    assert re.match(r"one +passed", lines["one"])
    assert re.match(rf"two +FAILED .* ended by {number.name}", lines["two"])
    assert re.match(rf"three +NOT RUN .* ended by {number.name}", lines["three"])
    assert rest.endswith((tmp_path / "out" / "summary.txt").read_text())


# ---- stage tests

RIGHT = """
import os
import pytest

@pytest.mark.parametrize("shape", ["multiples of 16 bytes", "x-1"])
def test_right(shape):
    pass
"""
FATAL = """
def test_dies():
    os._exit(3)
"""
MORE = """
def test_wrong():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not now")
def test_skipped():
    pass

def test_later():
    pass
"""


def outcomes(lines):
    found = [json.loads(line[2:]) for line in lines if line.startswith("@ ")]
    return {one["name"]: one["outcome"] for one in found}


@pytest.mark.matrix
def test_the_suite_names_what_fails(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_small.py").write_text(RIGHT + FATAL + MORE)
    command = (sys.executable, "bench/gpu/stage.py", "suite", str(tmp_path / "test_small.py"))
    words = [*arguments(tmp_path, ("tests", command, 100, {"correct": True})), "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    lines, found = read(tmp_path / "out")
    tests = {one["name"]: one for one in found["tests"]}
    assert done.returncode == 1
    assert {name: one["outcome"] for name, one in tests.items()} == {
        "test_right[multiples of 16 bytes]": "passed", "test_right[x-1]": "passed", "test_wrong": "failed",
        "test_skipped": "skipped", "test_dies": "failed", "test_later": "passed",
    }  # fmt: skip
    assert "one is not two" in tests["test_wrong"]["detail"]
    assert tests["test_skipped"]["detail"] == "Skipped: not now"
    assert re.search("worker 'gw.' crashed", tests["test_dies"]["detail"])
    assert re.match(r"tests +FAILED .* 3 passed, 2 failed, 1 skipped: test_", lines["tests"])


SKIPPED = "import pytest; pytest.skip('not here', allow_module_level=True)"


@pytest.mark.parametrize(
    "text, code, sentence, expected",
    [
        (RIGHT, 0, "2 passed, 0 failed, 0 skipped$", "passed passed"),
        (RIGHT + FATAL, 1, "2 passed, 1 failed, .*: test_dies; pytest ended with exit status 3", "passed passed error"),
        ("import no_such_module", 1, "0 passed, 1 failed, .*: test_small.py", "error"),
        (SKIPPED, 1, "0 passed, 0 failed, 1 skipped: test_small.py", "skipped"),
        ("", 1, "0 passed, 0 failed, 0 skipped; pytest ended with exit status 5", ""),
    ],
    ids=["all well", "crash", "cannot be imported", "skipped as a whole", "no test"],
)
def test_the_suite_without_plugins(tmp_path, monkeypatch, capfd, text, code, sentence, expected):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "pytest" else None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "test_small.py").write_text(text)
    assert suite.main([str(tmp_path / "test_small.py")]) == code
    lines = capfd.readouterr().out.splitlines()
    assert re.match(sentence, lines[-1]), lines[-1]
    assert " ".join(outcomes(lines).values()) == expected


def test_a_worker_that_ends_after_a_failure_adds_nothing(capsys):
    """As tests/conftest.py ends those that have lost the GPU."""
    tests = suite.Tests()
    report = {"event": "report", "name": "a.py::test_b", "outcome": "failed", "seconds": 1.0}
    for told in (
        {"event": "begin", "name": "a.py::test_b"},
        report | {"when": "call", "detail": "CUDA error"},
        {"event": "end", "name": "a.py::test_b"},
        report | {"when": "???", "detail": "worker 'gw0' crashed"},
        {"event": "end", "name": "a.py::test_b"},
    ):
        tests.take(told)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line[2:])["detail"] == "CUDA error"
    assert tests.sentence() == "0 passed, 1 failed, 0 skipped: test_b"


def test_what_is_stopped_has_not_failed(capsys):
    """It was running when the stage's time was over; it counts as an error, but is not said to have failed."""
    tests = suite.Tests()
    for told in (
        {"event": "begin", "name": "a.py::test_b"},
        {"event": "begin", "name": "a.py::test_c"},
        {"event": "report", "name": "a.py::test_c", "when": "call", "outcome": "failed", "seconds": 1, "detail": "no"},
    ):
        tests.take(told)
    tests.stop()
    assert [json.loads(line[2:])["outcome"] for line in capsys.readouterr().out.splitlines()] == ["error", "error"]
    assert tests.sentence() == "0 passed, 1 failed, 0 skipped, 1 stopped: test_b, test_c"


# ---- what a stage sees


def test_a_stage_sees_nothing_that_changes_what_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLATKERN_GPU_DRY", "1")
    monkeypatch.setenv("FLATKERN_CUDA_EMULATION", "of somebody's")
    by_name = {stage.name: stage for stage in stages.STAGES}
    for dry in (False, True):
        given = argparse.Namespace(budget=280.0, dry_run=dry, out=tmp_path / "out", stages="")
        whole = run.Run(stages.STAGES, run.chosen(stages.STAGES, stages.LISTS, "", dry), given)
        for name, interpreted in (("keys", dry), ("warm", False), ("build", False)):
            env = whole.environment(by_name[name], 12.0)
            assert (env.get("TRITON_INTERPRET") == "1") == interpreted
            assert (env.get("FLATKERN_GPU_DRY") == "1") == dry
            assert ("bench/gpu/tools" in env["PATH"]) == dry
            assert ("build/gpu-cuda/tree" in env["PYTHONPATH"]) != dry
            assert env.get("FLATKERN_CUDA_EMULATION") != "of somebody's"
            assert env["FLATKERN_STAGE_SECONDS"] == "12.0" and env["FLATKERN_GPU_OUT"] == str(tmp_path / "out")
