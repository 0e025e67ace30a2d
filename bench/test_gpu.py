"""The GPU's benchmarks without a GPU: every race of the plan on small tensors, with a stand-in for the device.

The first real run may be one that nobody watches, so whatever can go wrong in it is tried here: clocks, races, lost
workers, the budget, packages that are not installed. No test looks at a clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import flatkern
from bench import gpu, races, render, results, stand_in, workers
from bench.candidates import Candidate
from bench.goals import goals
from bench.harness import HOST, LOOP, Gradients
from bench.methods import METHODS
from bench.models import MODELS
from bench.races import Entry, Race
from bench.report import tables
from bench.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = [torch.ones(3, 8), torch.ones(3)]
BACKEND = "cpp" if flatkern.backends()["cpp"]["live"] else "eager"
OURS = f"flatkern {BACKEND}"


def arguments(**given):
    defaults = dict(
        selected=False, quick=False, device="cuda", backends=[BACKEND], masters=False, compile=False, dry_run=True,
        rounds=1, seconds=0.0, minutes=5.0, workers=1, threads=1,
    )  # fmt: skip
    return argparse.Namespace(**{**defaults, **given})


@pytest.fixture
def small(monkeypatch):
    """Models with a few small tensors, short turns, and nothing compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(gpu, "STEPS_IN_LOOP", 1)
    monkeypatch.setattr(gpu.Gpu, "burst", 1)
    for name, model in MODELS.items():
        shapes = [stand_in.small(shape) for shape in model.shapes()[:4]]
        cut = replace(model, rule=lambda shapes=shapes: shapes, tensors=4, numel=sum(map(prod, shapes)))
        monkeypatch.setitem(MODELS, name, cut)
    # Every race collects, and would look through torch each time; threads would wait for one another.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Races.


def test_every_race_of_the_plan_runs_and_is_shown(small):
    """From the plan to tables, goals and Markdown: nothing fails, nothing that ran is missing."""
    runner = Runner(rounds=1, seconds=0.0, machine=stand_in.StandIn())
    launches = {}
    plan = races.plan(arguments())
    for race in plan:
        runner.run(race)
        launches |= runner.survey(race)

    assert runner.failures == []
    ran = {(b["extra_info"]["table"], b["params"]["model"], b["params"]["method"]) for b in runner.benchmarks}
    assert ran == {(race.table, race.model, race.method) for race in plan}
    for b in runner.benchmarks:
        b["extra_info"]["launches"] = launches.get(results.key(b["params"]))
    found = results.document(runner.benchmarks, [], 1, 1.0, gpu=stand_in.StandIn().info())
    found = json.loads(json.dumps(found))
    assert [goal.what for goal in goals(found) if goal.value is None] == []
    names = {table.name.removeprefix("dry-run-") for table in tables(found)}
    assert {"goals", "perturb", "copy", "calls", "compiled", "gpt2-dtypes", "llama_1b-dtypes"} <= names
    for model in ("resnet50", "llama_1b", "many_small", "gpt2"):
        assert {f"{model}-sgd-{BACKEND}", f"{model}-sgd-{BACKEND}-loop"} <= names
    assert "vs papers' loop" in render.markdown(found) and "dry run" in render.markdown(found)


def test_every_race_has_its_rivals():
    """What the plan is for: each list against the fused optimizer and `_foreach`, ResNet-50 against the papers."""
    plan = races.plan(arguments(backends=["triton"]))
    for model in ("resnet50", "vit_b16", "gpt2", "llama_1b", "many_small"):
        who = {e.label for r in plan if (r.model, r.method, r.table) == (model, "m-rwp", "methods") for e in r.entries}
        assert {"flatkern triton", "torch fused", "foreach"} <= who
    assert all("papers" in str(race.entries) for race in plan if race.model == "resnet50" and race.table == "methods"
               and race.method != "plain")  # fmt: skip
    assert {r.model for r in plan if r.table == "compiled"} == {"resnet50", "gpt2"}


def test_those_who_do_not_fit_are_named(small, monkeypatch):
    machine = stand_in.StandIn()
    needed = 6 * 4 * MODELS["gpt2"].numel
    monkeypatch.setattr(machine, "free_bytes", lambda: int(4.5 * needed))
    runner = Runner(rounds=1, seconds=0.0, machine=machine)
    who = tuple(map(Entry, (OURS, "torch fused", "foreach", "loop")))
    runner.run(Race("methods", "gpt2", "m-rwp", "sgd", who))
    assert [b["params"]["candidate"] for b in runner.benchmarks] == [OURS, "torch fused", "foreach"]
    (failure,) = runner.failures
    assert failure["candidate"] == "loop" and "GB" in failure["reason"]


# Clocks.


class Recorder(stand_in.StandIn):
    """Writes down what reaches the device, and says that every pair of events is 2 ms apart."""

    def __init__(self):
        self.log = []
        super().__init__()
        self.log.clear()

    def event(self):
        machine = self

        class Event:
            def record(self):
                machine.log.append("event")

            def elapsed_time(self, end):
                return 2.0

        return Event()

    def spin(self, cycles):
        super().spin(cycles)
        self.log.append(("spin", cycles))

    def flush(self):
        self.log.append("flush")

    def synchronize(self):
        self.log.append("wait")


def test_the_device_is_busy_before_a_call_is_timed():
    """Otherwise events measure how slow the host is; and the flush must not be between them."""
    machine = Recorder()
    machine.cycles_per_nanosecond = 2.0
    clock = gpu.DeviceClock(machine, ahead={"step": 1_000_000})
    clock.time("step", lambda: machine.log.append("step"))
    assert machine.log == ["flush", ("spin", 2 * (1_500_000 + gpu.LEAST_AHEAD)), "event", "step", "event"]
    assert clock.read() == {"step": 2_000_000}


def test_a_rare_call_counts_with_its_share():
    machine = Recorder()
    for clock in (gpu.DeviceClock(machine, {}), gpu.HostClock(machine)):
        clock.time("update_mask", lambda: None, 0.1)
        clock.time("update_mask", lambda: None, 0.1)
        spent = clock.read()
    assert spent["update_mask"] < 1_000_000  # the host's
    device = gpu.DeviceClock(machine, {})
    device.time("update_mask", lambda: None, 0.1)
    assert device.read() == {"update_mask": 200_000} and device.read() == {}


def test_the_host_does_not_wait_inside_a_call():
    machine = Recorder()
    clock = gpu.HostClock(machine)
    clock.time("step", lambda: machine.log.append("step"))
    clock.read()
    assert machine.log == ["wait", "step"]


def test_a_turn_has_all_three_times():
    """The loop makes ten whole steps; a call whose share is a tenth comes once in them."""
    machine = Recorder()
    candidate = Candidate(OURS, WEIGHTS, Gradients(WEIGHTS), "ire", "sgd", machine=machine)
    calls = []
    for name in ("update_mask", "step"):
        original = getattr(candidate.optimizer, name)
        setattr(candidate.optimizer, name, lambda name=name, original=original: (calls.append(name), original()))
    spent = candidate(0)
    assert set(spent) == {"update_mask", "step", HOST + "update_mask", HOST + "step", LOOP}
    assert spent["step"] == 2_000_000 and spent["update_mask"] == 200_000
    assert calls[4:] == ["update_mask", *["step"] * 10]


def test_launches_belong_to_the_call_between_two_markers(monkeypatch):
    machine = stand_in.StandIn()
    candidate = Candidate(OURS, WEIGHTS, Gradients(WEIGHTS), "ire", "sgd", machine=machine)
    mark = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    seen = ["copy", mark, "a", "b", mark, "copy", "copy", mark, "update_kernel", "Memcpy HtoD", "fill", mark]

    def trace(run):
        run()
        return seen

    monkeypatch.setattr(machine, "trace", trace)
    assert machine.launches(candidate) == {"update_mask": pytest.approx(0.2), "step": 3}
    seen = seen[:-1]  # a profiler that lost an event
    assert machine.launches(candidate) is None
    monkeypatch.setattr(machine, "trace", lambda run: 1 / 0)  # or that may not run
    assert machine.launches(candidate) is None


def test_a_trace_is_read_in_the_order_of_the_device():
    events = [
        {"cat": "kernel", "ts": 3, "name": "late"},
        {"cat": "cpu_op", "ts": 0, "name": "aten::add"},
        {"cat": "gpu_memcpy", "ts": 1, "name": "Memcpy"},
        {"cat": "gpu_user_annotation", "ts": 1, "name": "Optimizer.step"},
        {"cat": "gpu_memset", "ts": 2, "name": "Memset"},
        {"name": "process_name"},
    ]
    assert gpu.on_device({"traceEvents": events}) == ["Memcpy", "Memset", "late"]


# What the results say about the machine.


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
)
def test_files_are_called_after_the_gpu(name, expected):
    assert gpu.slug(name) == expected


def test_nvidia_smi_may_know_little():
    known = gpu.parse_smi("580.65.06, 700.00 W, [N/A], 1980 MHz, 3201 MHz, 345 MHz, 31\n")
    assert known["driver_version"] == "580.65.06" and "power.draw" not in known
    assert gpu.parse_smi("") == {}


def test_a_commit_can_be_named_where_git_is_not(monkeypatch):
    monkeypatch.setattr(results, "git", lambda *arguments: "")
    assert results.document([], [], 1, 0.0)["commit_info"]["id"] == "unversioned"
    monkeypatch.setenv("FLATKERN_COMMIT", "abc")
    assert results.document([], [], 1, 0.0)["commit_info"]["id"] == "abc"


# Processes.


class Script:
    """A worker that answers in this process; `trouble` says what befalls which method."""

    trouble: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def __init__(self, args):
        self.question, self.connection = None, None
        self.runner = Runner(args.rounds, args.seconds, machine=stand_in.StandIn())

    def ask(self, kind, race):
        self.question = race
        self.asked.append((race.method, len(race.entries)))

    def answer(self, seconds):
        if self.question is None:
            return {"name": "NVIDIA Test"}
        befalls = self.trouble.get(self.question.method)
        flatkern = any("flatkern" in entry.label for entry in self.question.entries)
        if befalls == "lost" and flatkern:
            raise workers.Lost("the process of this race ended (signal SIGABRT)")
        self.runner.benchmarks, self.runner.failures = [], []
        if befalls != "broken" or not flatkern:
            self.runner.run(self.question)
        return {
            "broken": befalls == "broken" and flatkern,
            "benchmarks": self.runner.benchmarks,
            "failures": self.runner.failures,
        }

    def stop(self):
        self.asked.append("stopped")


class Silent:
    def __getattr__(self, name):
        return lambda *given: None

    def races(self, total):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture
def measurement(small, monkeypatch):
    """A measurement of three races, whose workers are scripts."""
    monkeypatch.setattr(workers, "Worker", Script)
    monkeypatch.setattr(Script, "asked", [])
    who = tuple(map(Entry, (OURS, "torch fused")))
    plan = [Race("methods", "gpt2", method, "sgd", who) for method in ("rwp", "sam", "rolling")]
    monkeypatch.setattr(workers, "plan", lambda args: plan)
    return workers.Measurement(arguments(workers=0), Silent())


@pytest.mark.parametrize("befalls", ["lost", "broken"])
def test_a_kernel_that_goes_wrong_costs_flatkern_one_race(measurement, monkeypatch, befalls):
    """A new process goes on, and the rivals of the lost race are measured by themselves."""
    monkeypatch.setattr(Script, "trouble", {"sam": befalls})
    for _ in measurement.run():
        pass
    who = [(b["params"]["method"], b["params"]["candidate"]) for b in measurement.results()]
    assert who == [
        ("rwp", OURS), ("rwp", "torch fused"), ("sam", "torch fused"),
        ("rolling", OURS), ("rolling", "torch fused"),
    ]  # fmt: skip
    assert Script.asked.count("stopped") == 2  # the one that went wrong, and the last
    if befalls == "lost":
        assert "SIGABRT" in measurement.failures[0]["reason"]


def test_races_beyond_the_budget_are_named(measurement, monkeypatch):
    left = iter([100, 100, 0, 0])
    monkeypatch.setattr(measurement, "left", lambda: next(left))
    for _ in measurement.run():
        pass
    assert {b["params"]["method"] for b in measurement.results()} == {"rwp"}
    assert [(f["method"], f["reason"]) for f in measurement.failures] == [
        ("sam", "time budget of 5 minutes"), ("rolling", "time budget of 5 minutes")
    ]  # fmt: skip
    found = results.document(measurement.results(), measurement.failures, 1, 1.0, gpu=stand_in.StandIn().info())
    assert "time budget" in render.markdown(json.loads(json.dumps(found)))


def test_without_a_device_no_race_waits_for_another(measurement, monkeypatch):
    def answer(self, seconds):
        raise workers.Lost("RuntimeError: CUDA error: out of memory")

    monkeypatch.setattr(Script, "answer", answer)
    for _ in measurement.run():
        pass
    assert len(measurement.failures) == 3 and Script.asked == ["stopped"]


# The command.


def run(folder, *arguments, **environment):
    """bench/run.py in a process without the packages that a machine with a GPU may lack."""
    hidden = "rich", "pytest_benchmark", "matplotlib", "typer"
    for name in hidden:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})\n")
    paths = [str(folder), *(p for p in sys.path if p and "site-packages" not in p and Path(p).name != "bench")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, str(ROOT / "bench/run.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = run(tmp_path, "--device", "cuda")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "GPU" in done.stderr and "torch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("device", [["--models", "many_small"], ["--models", "gpt2", "--device", "cuda", "--dry-run"]])
def test_nothing_is_needed_that_may_be_missing(tmp_path, device):
    """The whole command, with its processes: results, tables and no chart, which is a remark."""
    files = [tmp_path / f"found.{kind}" for kind in ("json", "md", "png")]
    selection = ["--methods", "rwp", "--base", "sgd", "--backends", BACKEND, "--rounds", "1", "--threads", "1"]
    written = [word for pair in zip(("--json", "--table", "--plot"), map(str, files), strict=True) for word in pair]
    done = run(tmp_path, *selection, *device, *written, "--workers", "1", "--seconds", "0.01")
    assert done.returncode == 0, done.stderr
    assert "no chart: matplotlib is not installed" in done.stdout and not files[2].exists()
    found = json.loads(files[0].read_text())
    assert {b["params"]["candidate"] for b in found["benchmarks"]} >= {OURS, "torch fused", "papers"}
    assert found["failures"] == [] and "RWP" in files[1].read_text()
    assert set(found["benchmarks"][0]["stats"]) >= {"median", "iqr", "ops", "data"}
    assert METHODS["rwp"].title in done.stdout
    assert not list(tmp_path.glob("*-partial*"))
