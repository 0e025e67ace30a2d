"""The stages of `make gpu` that are about right and wrong, without a GPU: what they say when something is missing.

Wrong kernels, lost contexts, failing compilers and missing drivers are faked; nothing is timed.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flatkern
from bench.gpu import e2e, live, stage, stages, warm, workers
from flatkern.ops import OPS

ROOT = Path(__file__).resolve().parents[2]


def found_in(text: str) -> list[dict]:
    return [json.loads(line.removeprefix(stage.MARK)) for line in text.splitlines() if line.startswith(stage.MARK)]


def last_line(text: str) -> str:
    return [line for line in text.splitlines() if not line.startswith(stage.MARK)][-1]


def run_script(path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """A script in a process of its own, which finds flatkern where this process has found it."""
    where = os.pathsep.join([str(Path(flatkern.__file__).parents[1]), str(ROOT), str(path.parent)])
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": where, "FLATKERN_GPU_DRY": "1", **env}
    return subprocess.run([sys.executable, str(path), *arguments], env=env, capture_output=True, text=True, timeout=120)


# Live.


def fake_torch(cuda="13.0", error=None):
    def init():
        if error:
            raise RuntimeError(error)

    return SimpleNamespace(
        __version__="2.11.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: error is None, init=init),
    )


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"


@pytest.mark.parametrize(
    "torch_, words",
    [
        (fake_torch(cuda=None), "built without CUDA: install"),
        (fake_torch(error=TOO_OLD), "found version 12020.*update the NVIDIA driver, or install a torch for an older"),
        (fake_torch(error=NO_DRIVER), "install the NVIDIA driver; in a container"),
        (fake_torch(error="No CUDA GPUs are available"), "CUDA_VISIBLE_DEVICES is '-1': unset it"),
    ],
    ids=["CPU only", "old driver", "no driver", "hidden"],
)
def test_why_torch_sees_no_gpu(torch_, words, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(live.Missing, match=words):
        live.check_cuda(torch_)


@pytest.mark.parametrize(
    "reason, words",
    [
        ("triton finds no GPU: Failed to find C compiler. Please specify via CC", "install gcc"),
        ("triton finds no GPU: Command '['/usr/bin/gcc', 'x.c']' returned non-zero exit status 1.", "python3-dev"),
        ("triton finds no GPU: libcuda.so cannot found!\nPlease make sure GPU is set up", "TRITON_LIBCUDA_PATH"),
        ("triton is not installed (No module named 'triton')", "pip install"),
        ("triton 3.1.0 is too old; 3.6 or later is needed", "pip install"),
        ("RuntimeError: Triton Error [CUDA]: device kernel image is invalid", "the log"),
    ],
)
def test_what_to_do_about_what_triton_says(reason, words, monkeypatch):
    monkeypatch.setenv("CC", "cc")
    said = live.remedy(reason)
    assert words in said and "\n" not in said and said.startswith("Triton is not live (")


def test_without_a_compiler_gcc_is_named(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install gcc" in live.remedy("triton finds no GPU: 0 active drivers")


def test_without_torch_the_finding_is_kept(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert live.main([]) == 1
    out = capsys.readouterr().out
    (machine,) = found_in(out)
    assert machine["kind"] == "machine" and machine["torch"] is None and machine["python"]
    assert last_line(out).startswith("torch cannot be imported (")


def test_without_triton(monkeypatch, capsys):
    """The finding first, then the sentence."""
    monkeypatch.setattr(live, "check_cuda", lambda torch: None)
    monkeypatch.setattr(live, "version", lambda package: None)
    monkeypatch.setattr(live.importlib.util, "find_spec", lambda name: None)
    assert live.main([]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert found_in(first)[0]["triton"] is None and last.startswith("triton is not installed: pip install")


@pytest.mark.parametrize("told, expected", [("abc1234", "abc1234"), (None, "unversioned")])
def test_a_tree_without_git(told, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("FLATKERN_COMMIT", told) if told else monkeypatch.delenv("FLATKERN_COMMIT", raising=False)
    monkeypatch.setattr(live, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert live.commit() == {"commit": expected, "dirty": False}


@pytest.mark.parametrize(
    "wrote, words",
    [
        (lambda out: None, "was launched, but wrote nothing"),
        (7.0, "WROTE .7.0, 7.0, 7.0. instead of"),
        (1e-6, "eager's bits"),
        ("raises", "the log"),
    ],
)
def test_a_kernel_has_to_have_run(wrote, words, monkeypatch):
    """Live is what has written the normals, not what has been launched."""
    from flatkern import dispatch

    eager = dispatch.resolve("fill_normal_", "cpu", "eager")

    def resolve(name, device, backend):
        def launched(outs, *rest, **words):
            if wrote == "raises":
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            if wrote == 1e-6:
                eager(outs, *rest, **words)
                outs[0][0, 0] += wrote
            elif isinstance(wrote, float):
                outs[0].fill_(wrote)
            else:
                wrote(outs)

        return eager if backend == "eager" else launched

    monkeypatch.setattr(live, "DRY", True)  # tensors on the CPU
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(dispatch, "resolve", resolve)
    monkeypatch.setattr(flatkern, "backends", lambda: {"triton": {"live": True, "reason": ""}})
    if isinstance(wrote, float):
        assert re.search(words, live.launch(torch))
    else:
        with pytest.raises(live.Missing, match=words):
            live.launch(torch)


def test_what_does_not_compile_stops_nothing(tmp_path):
    """make is called again without the compiler, beside it for the CUDA kernels, and the second half follows."""
    for name, text in (
        ("make", 'echo "make $2 ${FLATKERN_BUILD:-$FLATKERN_CUDA_ARCHS}"; [ "${FLATKERN_BUILD:-}" = skip ]'),
        ("nvidia-smi", "echo 9.0"),
        ("python", '[ "$1" = -c ] || echo "python $*"'),  # the other one only reads torch from the disk
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    *command, _ = stages.build_command()
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}"}
    for name in ("FLATKERN_BUILD", "FLATKERN_CUDA_ARCHS", "FLATKERN_GPU_DRY"):
        environment.pop(name, None)
    done = subprocess.run(
        [*command, str(tmp_path / "python")], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    *made, last = done.stdout.splitlines()
    assert sorted(made) == ["make build 90", "make build skip", "make cuda-library 90"]
    assert last == "python bench/gpu/stage.py live"


# Smoke.

BROKEN = """
import sys
import flatkern.triton_kernels as kernels
from bench.gpu import smoke

def wrong(params, backups):
    for p in params:
        p.zero_()

def lost(*args, **kwargs):
    raise RuntimeError("Triton Error [CUDA]: misaligned address")

kernels.restore_, kernels.pack_mask_ = wrong, lost
sys.exit(smoke.main(sys.argv[1:]))
"""


@pytest.mark.matrix
def test_smoke_names_a_wrong_op_and_goes_on_behind_a_lost_context(tmp_path):
    """In the interpreter. A lost context ends the process; the one that follows begins with the next check."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = run_script(script, "--brief", TRITON_INTERPRET="1")
    checks = {f["name"]: f for f in found_in(done.stdout)}
    assert list(checks) == [*OPS, "restore is exact"], done.stderr
    assert {name for name, f in checks.items() if not f["ok"]} == {"restore_", "pack_mask_", "restore is exact"}
    assert "1 of 1 calls are wrong" in checks["restore_"]["detail"] and "params[0]" in checks["restore_"]["detail"]
    assert "misaligned address" in checks["pack_mask_"]["detail"]
    assert last_line(done.stdout) == (
        "13 of 15 ops agree with eager; WRONG: restore_, pack_mask_, restore is exact (brief)"
    )
    assert done.returncode == 1


def test_what_smoke_calls_is_among_the_cases():
    """Of the variants that the tests know, and of every op."""
    from bench.gpu import smoke

    for op in OPS.values():
        for brief in (True, False):
            made = list(smoke.calls(op, brief))
            assert made and all(call.words in smoke.cases.VARIANTS[op.name] for call in made), op.name


# Warm.

JOBS = """
import os

class Job:
    def __init__(self, k):
        self.key, self.name = k, f"kernel {k}"

    def compile(self):
        if self.key == 3:
            raise RuntimeError("ptxas fatal")
        if self.key == 5:
            os.abort()

def listed(names, failed):
    failed("a race", ValueError("no such model"))
    return [Job(k) for k in range(9)]
"""


def test_warm_goes_on_without_a_kernel_and_without_a_process(tmp_path, monkeypatch, capfd):
    (tmp_path / "some_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    assert workers.run(["keys"], 2, "some_jobs:listed") == 1
    out = capfd.readouterr().out
    assert "the kernels of a race are not known: ValueError: no such model" in out
    assert "kernel 3: RuntimeError: ptxas fatal" in out
    assert "ended by SIGABRT (status -6) while compiling kernel 5; the others went on" in out
    findings = found_in(out)
    assert {f["share"] for f in findings} == {"1/2", "2/2"}
    assert sum(f["kernels"] for f in findings) == 7 and sum(f["failed"] for f in findings) == 3
    assert last_line(out).startswith("7 kernels in ") and last_line(out).endswith("by 2 processes, 3 failed")


def test_warm_refuses_stages_that_it_does_not_know(capsys):
    assert warm.main(["--for=keys,rvials"]) == 2
    assert "--for names rvials, but should name some of keys" in capsys.readouterr().out


def test_a_list_that_cannot_be_made_is_named(monkeypatch):
    def parts(name):
        if name == "sweep":
            raise ImportError("no wanted")
        yield "good", lambda: [SimpleNamespace(key=name), SimpleNamespace(key="shared")]
        yield "bad", lambda: 1 / 0

    told = []
    monkeypatch.setattr(warm, "DRY", False)
    monkeypatch.setattr(warm, "jobs_of_stage", parts)
    jobs = warm.jobs_for(["keys", "sweep", "ncu"], lambda what, error: told.append(what))
    assert [job.key for job in jobs] == ["keys", "shared", "ncu"]
    assert told == ["keys, bad", "sweep", "ncu, bad"]


HIT = """
import multiprocessing
import sys
import torch
import flatkern
from bench.gpu import workers
from flatkern import compilation

def optimizer(backend):
    p = torch.nn.Parameter(torch.ones(64, 48))
    return p, flatkern.SGD([p], 0.1, perturb=flatkern.RWP(0.01, lam=0.5), backend=backend)

def listed(names, failed):
    return compilation.jobs_of(optimizer(None)[1])

if __name__ == "__main__" and sys.argv[1:] == ["warm"]:
    spawned = multiprocessing.get_context("spawn")
    workers.work(["keys"], "hit:listed", 0, 1, spawned.Value("l", 0), workers.Share(spawned))
elif __name__ == "__main__":
    import triton
    workers.pretend()
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
    p, opt = optimizer("triton")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.perturb()
        p.grad = torch.ones_like(p)
        opt.step()
    print(len(hits), all(hits))
"""


@pytest.mark.matrix
def test_what_was_warmed_is_not_compiled_again(tmp_path):
    """Jobs of an optimizer in one process, its steps in another: all that they launch is in the cache."""
    pytest.importorskip("triton")
    script = tmp_path / "hit.py"
    script.write_text(HIT)
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    (warmed,) = found_in(run_script(script, "warm", **environment).stdout)
    assert warmed["kernels"] > 0 and warmed["failed"] == 0
    used = run_script(script, "use", **environment)
    count, all_hit = used.stdout.split()
    assert 0 < int(count) <= warmed["kernels"] and all_hit == "True", used.stderr


# The small GPT.


def test_ratios_are_to_the_plain_burst_of_the_same_round():
    """A machine that gets slower by half in the middle changes no ratio."""
    pace = [1.0, 1.0, 1.5, 1.5, 1.5]
    times = {
        e2e.PLAIN: [100 * x for x in pace],
        e2e.AGAIN: [100 * x for x in pace],
        e2e.ROLLING: [100 * x * r for x, r in zip(pace, (1.1, 1.2, 1.3, 1.4, 1.5), strict=True)],
    }
    found = e2e.compared(times)
    assert found[e2e.PLAIN] == {"step_us": 150.0, "ratio": 1.0, "q1": 1.0, "q3": 1.0, "turns": 5}
    assert found[e2e.ROLLING]["ratio"] == pytest.approx(1.3) and found[e2e.ROLLING]["turns"] == 5
    assert found[e2e.ROLLING]["q1"] < 1.3 < found[e2e.ROLLING]["q3"]
    text = e2e.sentence(found)
    assert text.startswith("rolling RWP / plain = 1.300 (quartiles 1.") and "plain again / plain = 1.000" in text


@pytest.mark.parametrize(
    "losses, words", [([3.0, math.nan, 2.0], "loss of step 2 is nan"), ([3.0, 3.5], "did not fall")]
)
def test_a_training_that_is_none(losses, words, monkeypatch):
    monkeypatch.setattr(e2e, "DRY", False)
    model = torch.nn.Linear(1, 1)
    training = e2e.Training(model, [torch.zeros(1)], torch.optim.SGD(model.parameters()))
    training.losses = [torch.tensor(x) for x in losses]
    with pytest.raises(ArithmeticError, match=words):
        training.fell()


def test_the_optimizers_that_are_compiled_for_are_those_that_train(monkeypatch):
    """Of the same shapes, with the head tied."""
    monkeypatch.setattr(e2e, "SHAPE", e2e.Shape(1, 16, 2, 8, 32, 2))
    model = e2e.Gpt(e2e.SHAPE)
    made = {who: make() for who, make in e2e.optimizers().items()}
    assert list(made) == [e2e.ROLLING, e2e.OURS] and made[e2e.ROLLING].rolling
    for optimizer in made.values():
        (group,) = optimizer.param_groups
        assert [p.shape for p in group["params"]] == [p.shape for p in model.parameters()]
