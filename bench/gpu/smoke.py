"""Stage smoke: every operation once against eager on the CPU, every radius and angle of the noise, and whole steps.

A check is a finding, and whatever is wrong with one, the others are made. With --brief there is one small call an
operation and nothing else that takes long, for tools that slow everything down.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bench.gpu import workers
from bench.gpu.stage import DRY, each, emit, is_lost, say

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # at the end: these names are looked for there only

import capturing  # noqa: E402
import cases  # noqa: E402
from compare import assert_within, bits  # noqa: E402
from interpreting import patch_once_a_launch  # noqa: E402

import flatkern  # noqa: E402
from flatkern import dispatch  # noqa: E402
from flatkern.ops import OPS  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once_a_launch()
DEVICE = "cpu" if DRY else "cuda"
# Rows of every kind, whose lengths are multiples of 16 bytes; then odd ones in mixed dtypes.
EVEN = [(64, 64, 3, 3), (256, 64), (64,), (2, 16384)]
ODD = [(3, 5), (3, 8193), (33,), (64, 3, 3, 3)]
SMALL = [(3, 5), (2, 16), (33,)]
# Words of the variants that are called: of each the shortest of tests/cases.py that has them. Where nothing is said,
# the longest.
UPDATES = {  # rolling; clean weights elsewhere, and IRE; what a captured graph reads on the device
    "even": ["backups noise", "masters masks", "lrs sigmas"],
    "odd": ["masters noise history"],
}
VARIANTS = {
    "perturb_gaussian_": {
        "even": ["norms backups masters", "backups masters history", "norms sigmas"],
        "odd": ["norms backups history"],
    },
    "sgd_update_": {key: [f"momentum_buffers {words}" for words in given] for key, given in UPDATES.items()},
    "adam_update_": UPDATES,
    "adamw_update_": UPDATES,
}
RADII = 65536 if DRY else 1024  # that a program makes
RULE, COLUMNS = "SGD", 24 if DRY else 8208  # of the network in training; the interpreter takes its time for long rows
CUDA = " by cuda"  # behind the name of a check: by the CUDA kernels, not by Triton's
CARRIED = "FLATKERN_GPU_SMOKE"  # environment variable: what was found before a lost context


class Call(NamedTuple):
    """One call of an operation."""

    op: Any
    shapes: list
    dtype: str
    words: str

    def values(self, device: str) -> dict[str, Any]:
        return getattr(cases, self.op.name)(self.shapes, cases.DTYPES[self.dtype], device, self.words)

    def run(self, backend: str, values: dict[str, Any]) -> None:
        cases.call(dispatch.load(self.op, backend), self.op, values)

    def check(self, backend: str) -> None:
        got, want = self.values(DEVICE), self.values("cpu")
        self.run(backend, got)
        synchronize()  # an error of the device is found here
        self.run("eager", want)
        assert_within(self.op, on_cpu(got), want)


class Check(NamedTuple):
    """`run()` returns what there is to say about it, and raises if something is wrong."""

    name: str
    run: Callable[[], str]


def main(arguments: list[str]) -> int:
    brief = "--brief" in arguments
    found: dict[str, bool] = json.loads(os.environ.get(CARRIED, "{}"))
    began = perf_counter()

    def note(name: str, ok: bool, detail: str) -> None:
        found[name] = ok
        os.environ[CARRIED] = json.dumps(found)
        emit("check", name=name, ok=ok, seconds=round(perf_counter() - began, 3), detail=detail)
        if not ok:
            say(f"{name}: {detail}")

    def failed(check: Check, error: Exception) -> None:
        note(check.name, False, told(error))

    planned = checks(brief)
    for attempt in each(planned, failed):
        with attempt as check:
            began = perf_counter()
            detail = check.run()
            synchronize()
            note(check.name, True, detail)
    say(sentence(found, brief))
    return 0 if found and all(found.values()) else 1


def told(error: BaseException) -> str:
    """An error in a line, with the one that led to it: the end of a failed capture hides why it failed."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    before = error.__cause__ or error.__context__
    return text if before is None else f"{text} (after {told(before)})"


def sentence(found: dict[str, bool], brief: bool) -> str:
    agree = sum(found.get(name, False) for name in OPS)
    cuda = [ok for name, ok in found.items() if name.endswith(CUDA)]
    others = {name: ok for name, ok in found.items() if name not in OPS and not name.endswith(CUDA)}
    right, wrong = [name for name, ok in others.items() if ok], [name for name, ok in found.items() if not ok]
    text = f"{agree} of {len(OPS)} ops agree with eager"
    if "every radius" in right and "every angle" in right:
        text += ", 65536 radii and angles exact"
    text += f", {sum(cuda)} of {len(cuda)} checks of the CUDA kernels" if cuda else ""
    rest = [name for name in right if not name.startswith("every ") and name != AHEAD]
    text += "".join(f", {name}" for name in rest)
    return text + (f"; WRONG: {', '.join(wrong)}" if wrong else "") + (" (brief)" if brief else "")


# What is checked.

AHEAD = "compiled ahead"


def checks(brief: bool) -> list[Check]:
    ops = [Check(op.name, lambda op=op: check_op(op, brief)) for op in OPS.values()]
    if brief:
        return [*ops, Check("restore is exact", lambda: check_restore(brief)), *checks_of_cuda(brief)]
    return [
        *([] if DRY else [Check(AHEAD, compile_ahead)]),
        *ops,
        Check("every radius", check_radii),
        Check("every angle", check_angles),
        Check("restore is exact", lambda: check_restore(brief)),
        Check("no waits", check_no_waits),
        Check("capture", check_capture),
        Check("compiled model", check_compiled_model),
        *checks_of_cuda(brief),
    ]


def checks_of_cuda(brief: bool) -> list[Check]:
    """The same of the CUDA kernels, where they are live: of the ops that they have."""
    if not flatkern.backends()["cuda"]["live"]:
        return []
    found = [
        Check(op.name + CUDA, lambda op=op: check_op(op, brief, "cuda"))
        for op in OPS.values()
        if "cuda" in op.backends.split()
    ]
    found.append(Check(f"restore is exact{CUDA}", lambda: check_restore(brief, "cuda")))
    if brief:
        return found
    return [
        *found,
        Check(f"no waits{CUDA}", lambda: check_no_waits("cuda")),
        Check(f"capture{CUDA}", lambda: check_capture("cuda")),
    ]


def variants(op: Any, lengths: str) -> list[str]:
    known = cases.VARIANTS[op.name]
    if op.name not in VARIANTS:
        return [max(known, key=len)]
    return [
        min((words for words in known if wanted <= set(words.split())), key=len)
        for wanted in (set(words.split()) for words in VARIANTS[op.name][lengths])
    ]


def calls(op: Any, brief: bool) -> Iterator[Call]:
    even, odd = variants(op, "even"), variants(op, "odd")
    if brief or DRY:
        yield Call(op, SMALL, "float32", even[0])
    if DRY and not brief:
        yield Call(op, SMALL, "mixed", odd[0])
    if brief or DRY:
        return
    for words in even:
        yield Call(op, EVEN, "float32", words)
    for words in odd:
        yield Call(op, ODD, "mixed", words)


def check_op(op: Any, brief: bool, backend: str = "triton") -> str:
    wrong, count = [], 0
    for call in calls(op, brief):
        count += 1
        try:
            call.check(backend)
        except Exception as error:
            if is_lost(error):
                raise
            wrong.append(f"{call.dtype}, {call.words or 'plain'}: {type(error).__name__}: {error}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {count} calls are wrong: {'; '.join(wrong)}")
    return f"{count} calls"


def check_radii() -> str:
    import circle

    circle.assert_radii(circle.drawn(DEVICE, RADII)[0])
    return "65536, bit for bit"


def check_angles() -> str:
    import circle

    circle.assert_angles(*circle.drawn(DEVICE, RADII)[1:])
    return "65536, bit for bit"


def network(method: str, rule: str = RULE, capturable: bool = False, backend: str = "triton") -> capturing.Run:
    return capturing.Run(rule, method, capturable, device=DEVICE, columns=COLUMNS, backend=backend)


def with_masters(backend: str = "triton") -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE).bfloat16()) for s in ((48, 40), (40,), (3, 5, 7))]
    return params, flatkern.AdamW(params, 1e-3, perturb=flatkern.RWP(0.02), master_weights=True, backend=backend)


def restored(brief: bool) -> tuple[str, ...]:
    """Of the brief one there is no backward pass: cuBLAS is large, and its kernels are not what is looked at."""
    return ("RWP",) if brief else ("RWP", "m-RWP", "SAM", "mSAM")


def check_restore(brief: bool, backend: str = "triton") -> str:
    """perturb() and restore() give back every bit, and perturb() did something."""
    taken = []
    for method in restored(brief):
        run = network(method, backend=backend)
        if method != "RWP":  # whose only gradient is taken at the perturbed weights
            run.backward()
        taken.append((method, list(run.net.parameters()), run.opt))
    taken.append(("RWP, bfloat16 with masters", *with_masters(backend)))
    for method, params, opt in taken:
        before = [bits(p).clone() for p in params]
        opt.perturb()
        if all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True)):
            raise AssertionError(f"{method}: perturb() changed nothing")
        opt.restore()
        for k, (p, b) in enumerate(zip(params, before, strict=True)):
            if not torch.equal(bits(p), b):
                raise AssertionError(f"{method}: parameter {k} is not what it was")
    return ", ".join(method for method, *_ in taken)


def check_no_waits(backend: str = "triton") -> str:
    for method in ("rolling ARWP", "m-RWP"):
        run = network(method, backend=backend).train(2)
        with contextlib.nullcontext() if DRY else capturing.nobody_waits():
            run.train(2)
    return "rolling ARWP, m-RWP"


def check_capture(backend: str = "triton") -> str:
    """A graph of a whole m-RWP step goes where a host's optimizer goes."""
    run, host = network("m-RWP", capturable=True, backend=backend), network("m-RWP", backend=backend)
    if DRY:
        replay = run.step
        run.train(3)
    else:
        replay = capturing.capture(run, warm=3).replay
    host.train(3)
    for _ in range(3):
        replay()
        run.schedule()
        host.train(1)
        capturing.assert_close(run, host)
    return "plain steps, no graph" if DRY else "3 replays of an m-RWP step"


def check_compiled_model() -> str:
    """A training step whose forward and backward pass are torch.compile's."""
    run, plain = network("m-RWP", "AdamW"), network("m-RWP", "AdamW")
    if not DRY:
        # A few small kernels: worker processes would take longer to start.
        torch._inductor.config.compile_threads = 1
        run.net.forward = torch.compile(run.net.forward)
    for _ in range(2):
        run.train(1)
        plain.train(1)
        capturing.assert_close(run, plain)
    return "plain steps, nothing compiled" if DRY else "m-RWP, AdamW"


# What is compiled for them.


def jobs(brief: bool) -> list[Any]:
    """Distinct compilation jobs of the calls and the optimizers above."""
    from flatkern import compilation

    found = []
    with compilation.recording() as recorded:
        for op in OPS.values():
            for call in calls(op, brief):
                call.run("triton", call.values(DEVICE))
        for opt in optimizers(brief):  # rolling ones begin with noise
            found += compilation.jobs_of(opt)
    return list({job.key: job for job in [*recorded, *found]}.values())


def all_jobs(names: list[str], failed: Any) -> list[Any]:
    """As workers.py asks for them, in each process."""
    return jobs(brief=False)


def optimizers(brief: bool) -> Iterator[torch.optim.Optimizer]:
    for method in (*restored(brief), *(() if brief else ("rolling ARWP",))):
        yield network(method).opt
    yield with_masters()[1]
    if not brief:
        yield network("m-RWP", capturable=True).opt
        yield network("m-RWP", "AdamW").opt


def compile_ahead() -> str:
    """All kernels side by side: one after the other, they would take minutes on a machine that has none yet. In
    processes, as half of the work is Triton's own, in Python."""
    count = min(8, workers.processes())
    if workers.run(["smoke"], count, "bench.gpu.smoke:all_jobs"):
        raise RuntimeError("kernels were not compiled; the log names them")
    return f"by {count} processes"


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        # Strides are compared, too, and cpu() makes a tensor with gaps dense.
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

    return {name: moved(value) for name, value in values.items()}
