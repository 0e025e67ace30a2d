"""The stages of `make gpu` that measure, without a GPU: every race on small tensors, with a stand-in for the device.

The first real run may be one that nobody watches, so whatever can go wrong in it is tried here: clocks, races, a lost
context, the end of the time. No test looks at a clock.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flatkern
from bench import candidates
from bench.baselines.loops import FusedAndCopy
from bench.candidates import COPIED, Candidate, floors
from bench.gpu import beside, goals, names, profiled, racing, stage, stand_in, tables, wanted
from bench.gpu.racing import Racer
from bench.methods import METHODS
from bench.models import MODELS
from bench.races import Entry, Race
from bench.report import results
from bench.runner import Runner
from bench.timing import gpu as machine
from bench.timing.harness import HOST, LOOP, Gradients

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = [torch.ones(3, 8), torch.ones(3)]
BACKEND = "cpp" if flatkern.backends()["cpp"]["live"] else "eager"
OURS, OTHER = f"flatkern {BACKEND}", "flatkern eager"


@pytest.fixture
def small(monkeypatch):
    """Models of two small tensors, nothing compiled, one turn each; backends that run here stand in for the others."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(racing, "DRY", True)
    monkeypatch.setattr(stand_in, "prepare", lambda: None)
    monkeypatch.setattr(wanted, "OURS", OURS)
    monkeypatch.setattr(wanted, "PLAIN_OURS", f"plain {OURS}")
    monkeypatch.setattr(wanted, "CUDA", OTHER)
    monkeypatch.setattr(wanted, "PLAIN_CUDA", f"plain {OTHER}")
    monkeypatch.setattr(sys, "argv", ["stage.py", "keys"])
    monkeypatch.delenv(racing.MISSED, raising=False)
    for name, model in MODELS.items():
        monkeypatch.setitem(MODELS, name, stand_in.shrunk(model))
    # Every race collects, and would look through torch each time; threads would wait for one another.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def findings(text: str) -> list[dict]:
    marked = [line for line in text.splitlines() if line.startswith(stage.MARK)]
    return [json.loads(line.removeprefix(stage.MARK)) for line in marked]


# Races.


def test_every_race_runs_and_every_goal_has_its_race(small, capfd):
    """Nothing fails, nothing that ran is missing, and what is wanted of the kernels is among it."""
    everything = []
    for name in ("keys", "rivals"):
        plan = getattr(wanted, name)()
        assert racing.run(plan, usual=1e9, most=1.0) == 0
        found = findings(capfd.readouterr().out)
        assert [f for f in found if f["kind"] != "race"] == []
        ran = {(f["race"], f["model"], f["method"], f["base"], f["candidate"]) for f in found}
        assert ran == {(k, r.model, r.method, r.base, e.label) for k, r in enumerate(plan) for e in r.entries}
        for f in found:
            assert set(f) >= {
                "model", "method", "base", "dtype", "masters", "candidate", "us", "host_us", "loop_us", "spread",
                "turns", "calls", "floor_bytes", "gbs", "of_copy", "copy_gbs", "tensors",
            }  # fmt: skip
            assert all(set(c) == {"us", "host_us", "floor_bytes", "gbs", "of_copy"} for c in f["calls"].values())
        names = {OURS: goals.OURS, OTHER: goals.CUDA}
        for f in found:
            ours = f["candidate"].removeprefix("plain ")
            everything.append({**f, "stage": name, "candidate": f["candidate"].replace(ours, names.get(ours, ours))})
    for goal in goals.GOALS:
        if "training step" not in goal.what:  # which is another stage's
            assert None not in goal.measure(everything), goal.what
            if "faster" not in goal.what:  # than rivals, whom Triton's kernels alone are raced with
                assert None not in goal.measure(goals.by_cuda(everything)), goal.what
    assert len(beside.lines(everything)) == len(wanted.keys()) + len(wanted.rivals())
    assert f"of {len(wanted.keys())} races" in beside.sentence(everything)


def test_every_race_has_torchs_fused_optimizer():
    for race in (*wanted.keys(), *wanted.rivals()):
        assert Entry("torch fused") in race.entries, race


def test_masters_are_raced_against_who_has_masters_too(small, capfd):
    """The fused float32 optimizer and a copy: 28 bytes a weight, 4 of them read again, 2 written."""
    assert racing.run([wanted.masters("gpt2")], usual=1e9, most=1.0) == 0
    found = {(f["candidate"], f["dtype"]): f for f in findings(capfd.readouterr().out)}
    assert {key: f["floor_bytes"] for key, f in found.items()} == {
        (OURS, "bfloat16"): 28,
        (f"plain {OURS}", "bfloat16"): 28,
        (OTHER, "bfloat16"): 28,
        (f"plain {OTHER}", "bfloat16"): 28,
        (COPIED, "bfloat16"): 34,
        ("torch fused", "float32"): 28,
    }
    assert found[COPIED, "bfloat16"]["masters"] and floors(COPIED, "rolling", "sgd", "bfloat16", True) == {"step": 26}

    params = [torch.nn.Parameter(torch.ones(3, 8))]
    rival = FusedAndCopy(params, "adamw")
    params[0].grad = torch.ones(3, 8)
    rival.step()
    assert rival.weights[0].dtype == torch.bfloat16 and torch.equal(rival.weights[0], params[0].to(torch.bfloat16))
    assert not torch.equal(params[0], torch.ones(3, 8))


def test_where_the_hosts_time_goes(small, monkeypatch, capfd):
    """Every call of every candidate has its times, and the functions that it is in are named, dearest first."""
    monkeypatch.setattr(profiled, "DRY", True)
    assert profiled.main([]) == 0
    found = findings(capfd.readouterr().out)
    calls = {(f["method"], f["candidate"], f["call"]) for f in found if f["kind"] == "host"}
    assert {call for method, label, call in calls if (method, label) == ("m-rwp", OURS)} == {
        "gradients", "perturb", "step",
    }  # fmt: skip
    assert {label for _, label, _ in calls} == {OURS, OTHER, "torch fused"}
    assert ("ire", OURS, "update_mask") in calls
    named = [f for f in found if f["kind"] == "function" and f["candidate"] == OURS and f["method"] == "m-rwp"]
    assert any(f["function"].startswith("optim/step.py:") for f in named)
    assert [f["own_us"] for f in named] == sorted((f["own_us"] for f in named), reverse=True)
    assert not any("deliver" in f["function"] for f in named), "what hands gradients over is no part of a call"
    kinds = {kind: [f for f in found if f["kind"] == kind] for kind in ("host", "function")}
    texts = [text for _, text in tables.host_sections(kinds)]
    assert [text.count("\n| ResNet-50") for text in texts] == [len(kinds["host"]), len(kinds["function"])]


def test_those_who_do_not_fit_are_named(small, monkeypatch):
    """Weights, gradients of two kinds, twice, and a copy, 7 times four bytes; then 3, 2 and 4 for those who fit."""
    device = stand_in.StandIn()
    monkeypatch.setattr(device, "free_bytes", lambda: int(4 * MODELS["gpt2"].numel * 17 / 0.9))
    runner = Runner(rounds=1, seconds=0.0, machine=device)
    runner.run(Race("gpu", "gpt2", "m-rwp", "sgd", tuple(map(Entry, (OURS, "torch fused", "foreach", "loop")))))
    assert [b["params"]["candidate"] for b in runner.benchmarks] == [OURS, "torch fused", "foreach"]
    (failure,) = runner.failures
    assert failure["candidate"] == "loop" and "GB" in failure["reason"]


@pytest.mark.parametrize("billion", [wanted.keys, wanted.rivals])
def test_a_billion_parameters_fit_an_h100(billion, monkeypatch):
    device = stand_in.StandIn()
    monkeypatch.setattr(device, "free_bytes", lambda: 78 * 2**30)
    (race,) = (race for race in billion() if race.model == "llama_1b")
    assert tuple(Runner(1, 0.0, machine=device).fitting(race)) == race.entries


def test_a_machine_without_cuda_kernels_races_the_others(small, monkeypatch, capfd):
    """And says so; where there is an nvcc, they should have been there."""
    monkeypatch.setattr(wanted, "CUDA", goals.CUDA)
    reason = {"live": False, "reason": "no nvcc\nwas there"}
    monkeypatch.setattr(flatkern, "backends", lambda: {"cuda": reason})
    for nvcc in (False, True):
        monkeypatch.setattr(racing, "WITH_CUDA", nvcc)
        assert racing.run(wanted.keys()[:1], usual=1e9, most=1.0) == nvcc
        text = capfd.readouterr().out
        absent, *found = findings(text)
        assert (absent["kind"], absent["candidate"], absent["reason"]) == ("miss", goals.CUDA, "no nvcc was there")
        assert [f["candidate"] for f in found] == [OURS, "torch fused"]
        assert text.splitlines()[-1] == "1 of 1 races; WITHOUT CUDA kernels (no nvcc was there)"


def test_each_candidate_steps_with_its_own_library(small, monkeypatch, capfd):
    """Which libraries those are is what a turn finds under the name of the backend."""
    from bench.gpu import hints
    from flatkern import dispatch

    seen = []
    monkeypatch.setattr(flatkern, "backends", lambda: {"cuda": {"live": True, "reason": ""}})
    build, turn = candidates.build, stand_in.StandIn.turn

    def built(label, *arguments):
        seen.append(("made", dispatch.MODULES["cuda"]))
        return build(OURS, *arguments)

    def turned(self, candidate, count):
        seen.append(("turn", dispatch.MODULES["cuda"]))
        return turn(self, candidate, count)

    monkeypatch.setattr(candidates, "build", built)
    monkeypatch.setattr(stand_in.StandIn, "turn", turned)
    usual = dispatch.MODULES["cuda"]
    assert racing.run(wanted.hints()[:1], usual=1e9, most=1.0, racer=hints.Switched, sentence=beside.policy) == 0
    assert [found[1] for found in seen[:2]] == [usual, hints.OTHER]
    assert set(seen) == {(what, library) for what in ("made", "turn") for library in (usual, hints.OTHER)}
    assert dispatch.MODULES["cuda"] == usual
    assert len(findings(capfd.readouterr().out)) == 2


# What goes wrong.


def test_a_candidate_that_raises_is_a_miss_and_stops_nobody(small, monkeypatch, capfd):
    build = candidates.build

    def broken(label, *arguments):
        if label == OURS:
            raise ValueError("no such kernel")
        return build(label, *arguments)

    monkeypatch.setattr(candidates, "build", broken)
    assert racing.run(wanted.keys()[:2], usual=1e9, most=1.0) == 1
    found = findings(capfd.readouterr().out)
    assert [f["kind"] for f in found] == ["race", "race", "miss"] * 2
    assert found[2]["reason"] == "ValueError: no such kernel" and found[2]["candidate"] == OURS


def test_a_race_that_raises_is_a_miss_and_stops_nobody(small, monkeypatch, capfd):
    optimizers = Racer.optimizers

    def broken(self, race):
        if race.method == "sam":
            raise ValueError("no")
        optimizers(self, race)

    monkeypatch.setattr(Racer, "optimizers", broken)
    assert racing.run(wanted.keys()[:3], usual=1e9, most=1.0) == 1
    found = findings(capfd.readouterr().out)
    assert [f["method"] for f in found if f["candidate"] == OURS] == ["m-rwp", "asam"]
    (miss,) = (f for f in found if f["kind"] == "miss")
    assert miss == {
        "kind": "miss", "model": "gpt2", "method": "sam", "base": "sgd", "candidate": "all", "reason": "ValueError: no",
    }  # fmt: skip


def test_a_lost_context_costs_its_race(small, monkeypatch, capfd):
    """Who lost it is named, once; another process goes on behind it."""
    walk, behind = Candidate.walk, []

    def lost(self, steps):
        if self.label == OURS and METHODS["sam"] is self.method:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        walk(self, steps)

    monkeypatch.setattr(Candidate, "walk", lost)
    monkeypatch.setattr(stand_in.StandIn, "turn", machine.Gpu.turn)
    monkeypatch.setattr(stage, "go_on_behind", behind.append)
    racing.run(wanted.keys()[:2], usual=1e9, most=1.0)
    assert behind == [1] and os.environ.pop(racing.MISSED) == "1"
    misses = [f for f in findings(capfd.readouterr().out) if f["kind"] == "miss"]
    assert [f["candidate"] for f in misses] == [OURS] and "illegal memory access" in misses[0]["reason"]


def test_the_next_process_begins_behind_it(tmp_path):
    """Once more with what is left of the time, and a counter that is not counted again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from bench.gpu.stage import each, left, say\n"
        "say(f'begin {left(0) <= 50}')\n"
        "wrong = {'b': 'CUDA error: unspecified launch failure', 'd': 'x'}\n"
        "for attempt in each('abcd', lambda item, error: say(f'miss {item}')):\n"
        "    with attempt as item:\n"
        "        if item in wrong: raise RuntimeError(wrong[item])\n"
        "        say(f'done {item}')\n"
    )
    environment = {**os.environ, stage.SECONDS: "50"}
    command = [sys.executable, str(script), "keys"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [
        "begin True", "done a", "miss b", "begin True", "done c", "miss d",
    ]  # fmt: skip


def test_races_beyond_the_time_are_named(small, monkeypatch, capfd):
    monkeypatch.setattr(racing, "DRY", False)
    monkeypatch.setattr(racing, "Gpu", stand_in.StandIn)
    monkeypatch.setattr(racing, "TURNS", 1)
    left = iter([50.0, 50.0, 2.4, 2.4])
    monkeypatch.setattr(racing, "left", lambda usual: next(left))
    assert racing.run(wanted.keys()[:2], usual=50.0, most=1.0) == 1
    found = findings(capfd.readouterr().out)
    ran = [("race", OURS), ("race", "torch fused"), ("race", OTHER), ("miss", "all")]
    assert [(f["kind"], f["candidate"]) for f in found] == ran
    assert "left" in found[-1]["reason"]


def test_torch_compile_may_take_all_the_time_there_is(small, monkeypatch, capfd):
    """Then the others of its race have their turns all the same."""

    def endless(function, **options):
        while True:
            pass

    monkeypatch.setattr(torch, "compile", endless)
    monkeypatch.setattr(racing, "COMPILING", 0.2)
    monkeypatch.setattr(Racer, "left", lambda self: 0.2)
    race = replace(wanted.rivals()[-1], model="resnet50")
    assert racing.run([race], usual=50.0, most=1.0) == 0  # ours is there
    found = findings(capfd.readouterr().out)
    assert [f["kind"] for f in found] == ["race", "race", "miss"]
    assert found[-1]["candidate"] == "compiled" and "TimeoutError" in found[-1]["reason"]


# Tunings.


@pytest.fixture
def plans(monkeypatch):
    """Triton's tables, made for no device."""
    pytest.importorskip("triton", minversion="3.6")
    from flatkern.triton_kernels import plan

    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90")
    return plan


def test_a_sweep_has_every_tuning_and_leaves_none(small, plans, capfd):
    from bench.gpu import sweep

    usual = plans.TUNING["sm_90"]
    assert racing.run(wanted.sweep(), usual=1e9, most=1.0, racer=sweep.Sweeper) == 0
    found = findings(capfd.readouterr().out)
    assert [tuple(f["tuning"]) for f in found] == 3 * list(wanted.TUNINGS) and found[0]["of_copy"]
    assert plans.TUNING["sm_90"] == usual and (usual.usual, usual.adam) == tuple(
        plans.Tuning(*t) for t in wanted.TUNINGS[:2]
    )


def test_tables_have_the_tuning_of_their_candidate(plans):
    like = [torch.ones(64, 16)]
    make = lambda: plans.build(like, ["params"], [(None,)], [True], True, [0], [0], torch.from_numpy)  # noqa: E731
    for tuning, rows in ((wanted.TUNINGS[0], 128), (wanted.TUNINGS[1], 256)):
        with wanted.tuned(tuning, torch.device("cpu")):
            assert make().groups[0].shapes == ((rows, 16),)
    with wanted.no_new_plans(torch.device("cpu")), pytest.raises(AttributeError):
        make()
    assert make().groups[0].shapes == ((128, 16),)


@pytest.mark.parametrize("name", wanted.STAGES)
def test_kernels_that_have_to_be_compiled_are_known(name, plans):
    """Optimizers of the real shapes, none of whose weights has been touched."""
    found = {}
    for label, opt in wanted.optimizers(name):
        assert label not in found and not opt.state
        found[label] = sum(p.numel() for p in opt.param_groups[0]["params"]), plans.TUNING["sm_90"]
    if name == "keys":
        assert found["gpt2 plain adamw bfloat16 True None"][0] == 124_439_808
    if name == "sweep":
        assert {tuning for _, tuning in found.values()} == {
            plans.Tunings(*3 * [plans.Tuning(*t)]) for t in wanted.TUNINGS
        }


# Clocks.


class Recorder(stand_in.StandIn):
    """Writes down what reaches the device, and says that every pair of events is 2 ms apart."""

    turn, steps_in_loop = machine.Gpu.turn, machine.Gpu.steps_in_loop

    def __init__(self):
        self.log = []
        super().__init__()
        self.log.clear()

    def event(self):
        recorder = self

        class Event:
            def record(self):
                recorder.log.append("event")

            def elapsed_time(self, end):
                return 2.0

        return Event()

    def spin(self, cycles):
        self.log.append(("spin", cycles))

    def flush(self):
        self.log.append("flush")

    def synchronize(self):
        self.log.append("wait")


def test_the_device_is_busy_before_a_call_is_timed():
    """Otherwise events measure how slow the host is; and the flush must not be between them."""
    recorder = Recorder()
    recorder.cycles_per_nanosecond = 2.0
    clock = machine.DeviceClock(recorder, ahead={"step": 1_000_000})
    clock.time("step", lambda: recorder.log.append("step"))
    assert recorder.log == ["flush", ("spin", 2 * (1_500_000 + machine.LEAST_AHEAD)), "event", "step", "event"]
    assert clock.read() == {"step": 2_000_000}


def test_a_rare_call_counts_with_its_share():
    recorder = Recorder()
    for clock in (machine.DeviceClock(recorder, {}), machine.HostClock(recorder)):
        clock.time("update_mask", lambda: None, 0.1)
        clock.time("update_mask", lambda: None, 0.1)
        spent = clock.read()
    assert spent["update_mask"] < 1_000_000  # the host's
    device = machine.DeviceClock(recorder, {})
    device.time("update_mask", lambda: None, 0.1)
    assert device.read() == {"update_mask": 200_000} and device.read() == {}


def test_the_host_does_not_wait_inside_a_call():
    recorder = Recorder()
    clock = machine.HostClock(recorder)
    clock.time("step", lambda: recorder.log.append("step"))
    clock.read()
    assert recorder.log == ["wait", "step"]


def test_a_turn_has_all_three_times():
    """The loop makes ten whole steps; a call whose share is a tenth comes once in them."""
    candidate = Candidate(OURS, WEIGHTS, Gradients(WEIGHTS), "ire", "sgd", machine=Recorder())
    calls = []
    for name in ("update_mask", "step"):
        original = getattr(candidate.optimizer, name)
        setattr(candidate.optimizer, name, lambda name=name, original=original: (calls.append(name), original()))
    spent = candidate(0)
    assert set(spent) == {"update_mask", "step", HOST + "update_mask", HOST + "step", LOOP}
    assert spent["step"] == 2_000_000 and spent["update_mask"] == 200_000
    assert calls[4:] == ["update_mask", *["step"] * 10]


# What the results say about the machine, and the command for the CPU.


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_files_are_called_after_the_gpu(name, expected):
    assert names.slug(name) == expected


def test_nvidia_smi_may_know_little():
    known = machine.parse_smi("580.65.06, 700.00 W, [N/A], 1980 MHz, 3201 MHz, 345 MHz, 31\n")
    assert known["driver_version"] == "580.65.06" and "power.draw" not in known
    assert machine.parse_smi("") == {}


def test_a_commit_can_be_named_where_git_is_not(monkeypatch):
    monkeypatch.setattr(results, "git", lambda *arguments: "")
    assert results.document([], [], 1, 0.0)["commit_info"]["id"] == "unversioned"
    monkeypatch.setenv("FLATKERN_COMMIT", "abc")
    assert results.document([], [], 1, 0.0)["commit_info"]["id"] == "abc"
