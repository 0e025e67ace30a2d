"""Stage ncu without ncu: what a script in its place writes is read, and what it refuses is named."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from bench.gpu import counters, stage


def findings(text: str) -> list[dict]:
    marked = [line for line in text.splitlines() if line.startswith(stage.MARK)]
    return [json.loads(line.removeprefix(stage.MARK)) for line in marked]


HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
ROW = (
    '"{}","4711","python3.12","127.0.0.1","{}","1","7","(128, 1, 1)","(60,753, 1, 1)","0","9.0",'
    '"Command line profiler metrics","{}","{}","{}"'
)


def table(*rows):
    before = [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        '==PROF== Profiling "a" - 0: 0%....50%....100%',
    ]
    lines = [*before, HEADER, *(ROW.format(*row) for row in rows), "==PROF== Disconnected from process 4711"]
    return "\n".join(lines)


def test_a_table_of_ncu_is_read():
    """Two launches of a kernel, with a kernel of torch's between them, in three units of time."""
    time = "gpu__time_duration.sum"
    text = table(
        ("0", "perturb_gaussian_kernel", time, "us", "1,234.56"),
        ("0", "perturb_gaussian_kernel", counters.METRICS["dram_percent"], "%", "91.25"),
        ("0", "perturb_gaussian_kernel", counters.METRICS["registers"], "register/thread", "40"),
        ("1", "void at::native::vectorized_elementwise_kernel<4, F>(int, F)", time, "ns", "3,328"),
        ("2", "perturb_gaussian_kernel", time, "ms", "1.5"),
        ("2", "perturb_gaussian_kernel", counters.METRICS["sm_percent"], "%", "n/a"),
        ("2", "perturb_gaussian_kernel", "another__metric", "%", "1"),
    )
    first, torchs, last = counters.read_table(text)
    assert (first["us"], first["dram_percent"], first["registers"]) == (1234.56, 91.25, 40.0)
    assert torchs["kernel"] == "at::native::vectorized_elementwise_kernel" and torchs["us"] == 3.328
    assert last["us"] == 1500.0 and last["sm_percent"] is None and set(last) == {"kernel", *counters.METRICS}
    name = "kernel: perturb_gaussian_kernel"
    started = counters.read_started(f"call: perturb\n{name}\nwhatever\ncall: again\n{name}\n")
    counted = [launch["kernel"] for launch in (first, torchs, last)]
    assert list(counters.labels(counted, started)) == ["perturb", "perturb", "again"]
    assert list(counters.read_table("==ERROR== no\n")) == []


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A folder for a script that stands for ncu, and nothing else on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLATKERN_GPU_OUT", str(tmp_path / "out"))
    monkeypatch.setenv(stage.SECONDS, "1e6")  # this process began long ago
    monkeypatch.setattr(sys, "argv", ["stage.py", "counters"])

    def write(text):
        (tmp_path / "ncu").write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "ncu").chmod(0o755)

    return write


def test_counters_that_nobody_may_read_are_named(ncu, capfd):
    ncu('echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters on the device 0"')
    assert counters.main([]) == 1
    said = capfd.readouterr().out.splitlines()
    assert "ERR_NVGPUCTRPERM" in said[-1] and "root" in said[-1] and findings("\n".join(said)) == []


def test_an_ncu_that_is_not_there_is_named(ncu, monkeypatch, capfd):
    monkeypatch.setattr(counters.shutil, "which", lambda name, path=None: None)
    assert counters.main([]) == 1
    assert "ncu is not installed" in capfd.readouterr().out


def test_an_ncu_that_takes_too_long_is_named(ncu, monkeypatch, capfd):
    monkeypatch.setattr(counters, "left", lambda usual: counters.RESERVE + 0.2)
    ncu("echo begun; exec /bin/sleep 60")
    assert counters.main([]) == 1
    assert capfd.readouterr().out.split("\n") == [
        "begun", "", "ncu was not ready in 0 s; it needs more: make gpu STAGES=ncu", "",
    ]  # fmt: skip


def test_an_ncu_that_counts_nothing_is_named(ncu, capfd):
    ncu('echo "kernel: a"; echo "==WARNING== No kernels were profiled."')
    assert counters.main([]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == (
        "ncu counted nothing; it said: ==WARNING== No kernels were profiled."
    )


def test_every_launch_is_a_finding_with_its_call(ncu, tmp_path, capfd):
    time = "gpu__time_duration.sum"
    (tmp_path / "table").write_text(table(("0", "a", time, "us", "1.0"), ("1", "b", time, "us", "2.0")))
    ncu('echo "call: perturb"; echo "kernel: a"; echo "call: step"; echo "kernel: b"\n'
        'while [ "$1" != --log-file ]; do shift; done; /bin/cp "${0%/*}/table" "$2"\n')  # fmt: skip
    assert counters.main([]) == 0
    found = findings(capfd.readouterr().out)
    assert [(f["kind"], f["kernel"], f["label"], f["us"]) for f in found] == [
        ("counter", "a", "perturb", 1.0), ("counter", "b", "step", 2.0)
    ]  # fmt: skip


def test_only_launches_of_ours_are_counted(monkeypatch):
    """What torch launches in between would take ncu longer than all of ours."""
    pytest.importorskip("triton", minversion="3.6")
    from flatkern.triton_kernels import launch

    log = []
    monkeypatch.setattr(launch.Call, "start", lambda call, kernel, *rest: log.append("ours"))
    start = launch.Call.start
    machine = SimpleNamespace(profile=log.append, synchronize=lambda: None)
    kernel = SimpleNamespace(fn=lambda: None)

    def call():
        for what in ("torch", "ours", "torch", "ours"):
            launch.Call.start(None, kernel) if what == "ours" else log.append(what)

    assert counters.profiled(call, machine) == 2 * ["<lambda>"]
    assert log == 2 * ["torch", True, "ours", False] and launch.Call.start is start


def test_cuda_kernels_are_named_by_ncu():
    """What is known of them before is their namespace; a kernel of torch between them belongs to the call before."""
    names = [
        "void flatkern::cuda::(anonymous namespace)::perturb_kernel<float, (int)4096>(Args<(int)4096>)",
        "void at::native::vectorized_elementwise_kernel<4>(int)",
        "flatkern::cuda::<unnamed>::sgd_kernel(Args)",
        "void perturb_kernel(float*)",
    ]
    counted = [counters.kernel_of(name) for name in names]
    assert counted[0] == "flatkern::cuda::perturb_kernel" and counted[2] == "flatkern::cuda::sgd_kernel"
    started = [("perturb", counters.OF_CUDA), ("step", counters.OF_CUDA), ("by Triton", "perturb_kernel")]
    assert list(counters.labels(counted, started)) == ["perturb", "perturb", "step", "by Triton"]


def test_no_subject_is_begun_that_may_be_cut_off(monkeypatch, capfd):
    """As ncu writes its table at the end, what is cut off costs everything: a subject may take as long as another."""
    from bench.gpu import stand_in

    class Candidate:
        def __init__(self, *_, machine, **__):
            self.method = SimpleNamespace(cycle=[("none", "free", 1.0)])
            self.gradients = SimpleNamespace(deliver=lambda *_: None)
            self.optimizer, self.params = SimpleNamespace(free=lambda: None), []

        def steps(self, *_):
            pass

    rest, clock = iter([10.0, 0.5]), iter([0.0, 1.0])
    monkeypatch.setattr(stand_in, "prepare", lambda: None)
    monkeypatch.setattr(counters, "DRY", True)
    monkeypatch.setattr(counters, "left", lambda usual: next(rest))
    monkeypatch.setattr(counters, "monotonic", lambda: next(clock))
    monkeypatch.setattr("bench.runner.Runner.inputs", lambda *_: ())
    monkeypatch.setattr("bench.candidates.Candidate", Candidate)
    assert counters.inside() == 0
    assert capfd.readouterr().out.startswith(counters.LATE)
