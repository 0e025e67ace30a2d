"""`make gpu`: checks and races on a GPU, in stages, of which none can stop another."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from time import monotonic

if sys.version_info < (3, 10):  # noqa: UP036 (a system's python3 may be older)
    sys.exit("error: flatkern needs Python 3.10 or later: make gpu PYTHON=...")
if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.gpu import out, stages, summary
from bench.gpu.process import GRACE, Child
from bench.gpu.stages import Stage
from bench.gpu.summary import CUT, FAILED, NOT_RUN, PASSED, Result, brief, plain

ROOT = Path(__file__).resolve().parents[2]
MARK = "@ "
LEAST = 30.0  # seconds of a budget
RESERVE = GRACE + 1  # seconds at the end, for a stage that has to be killed, and the summary
WORTH_IT = 2.0  # seconds; a stage that has fewer is not begun
EVERY = 10.0  # seconds between two lines about how far stages are
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_LINES = 15  # of a failed stage, on the terminal


class Running:
    """A stage that runs, and what is known of it."""

    def __init__(self, stage: Stage, child: Child) -> None:
        self.stage, self.child = stage, child
        self.findings, self.said, self.complaint = 0, "", ""  # the last lines of stdout and stderr
        self.text: deque[str] = deque(maxlen=LAST_LINES)


class Run:
    """The stages of `asked`, with their seconds, one after the other or side by side."""

    def __init__(self, table: tuple[Stage, ...], asked: dict[str, float], given: argparse.Namespace) -> None:
        self.began, self.given = monotonic(), given
        self.table, self.asked = [stage for stage in table if stage.name in asked], asked
        self.budget, self.dry = given.budget, given.dry_run
        self.deadline = self.began + self.budget - RESERVE
        self.results: dict[str, Result] = {}
        self.machine: dict = {}
        self.ended_by: str | None = None
        self.terminal = True
        self.earlier = out.prepare(given.out)
        self.out = out.Out(given.out)

    # ---- the whole

    def go(self) -> int:
        held = out.hold(self.given.out)
        for number in SIGNALS:
            signal.signal(number, self.end)
        names = ", ".join(stage.name for stage in self.table)
        self.show(f"{names}; at most {self.budget:g} s; files in {self.given.out}")
        if self.earlier:
            self.show(f"replaced there, of an earlier run: {', '.join(self.earlier)}")
        self.write_summary()
        waiting = list(self.table)
        while waiting:
            together = [waiting.pop(0)]
            while waiting and together[0].beside and waiting[0].beside:
                together.append(waiting.pop(0))
            self.watch([running for stage in together if (running := self.start(stage))])
        self.show(f"\n{self.write_summary().rstrip()}", "")
        out.release(held)
        return summary.status(self.table, self.results, self.out.errors(), self.ended_by)

    def end(self, number: int, _frame) -> None:
        self.ended_by = signal.Signals(number).name

    def write_summary(self) -> str:
        seconds = monotonic() - self.began

        def text() -> str:
            header = summary.header(self.machine, self.given, seconds)
            return header + summary.text(self.table, self.results, self.out.errors(), self.ended_by)

        self.out.replace(out.SUMMARY, text())
        return text()  # that it could not be written is known only now

    # ---- one stage

    def obstacle(self, stage: Stage) -> str | None:
        """Why a stage is not begun."""
        if self.ended_by:
            return f"ended by {self.ended_by}"
        for name in stage.needs:
            needed, found = next(other for other in self.table if other.name == name), self.results[name]
            if found.status == NOT_RUN:
                return f"{name} was not run"
            if needed.enough == "passed" and found.status != PASSED:
                return f"{name} {'was out of time' if found.status == CUT else 'failed'}"
        if self.deadline - monotonic() < WORTH_IT:
            return f"no time is left of BUDGET={self.budget:g}"
        return None

    def start(self, stage: Stage) -> Running | None:
        why = self.obstacle(stage)
        if why is not None:
            self.close(stage, Result(NOT_RUN, 0.0, why))
            return None
        now = monotonic()
        seconds = min(self.asked[stage.name] * self.budget / stages.USUAL, self.deadline - now)
        limit = min(now + seconds * stage.patience, self.deadline)
        try:
            child = Child(stage.argv(), self.environment(stage, seconds), ROOT, now, limit)
        except (OSError, subprocess.SubprocessError) as error:
            self.close(stage, Result(FAILED, 0.0, f"cannot be started: {error}"))
            return None
        self.show(f"{stage.name}: {stage.what}; at most {limit - now:.0f} s")
        return Running(stage, child)

    def environment(self, stage: Stage, seconds: float) -> dict[str, str]:
        """What a stage sees: nothing that changes what runs is inherited."""
        unwanted = ("FLATKERN_GPU_DRY", "FLATKERN_GPU_CUDA", "FLATKERN_CUDA_EMULATION", "TRITON_INTERPRET")
        unwanted += ("OMP_NUM_THREADS",)
        env = {name: value for name, value in os.environ.items() if name not in unwanted}
        env |= {
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(ROOT / "build" / "gpu-cache" / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "gpu-cache" / "inductor"),
            "FLATKERN_GPU_OUT": str(self.given.out.absolute()),
            "FLATKERN_GPU_STAGES": ",".join(self.asked),
            "FLATKERN_STAGE_SECONDS": f"{seconds:.1f}",
        }
        if self.machine.get("nvcc") and not self.dry:
            env["FLATKERN_GPU_CUDA"] = "1"  # CUDA kernels that are not live are an error then
        path = [env.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        if self.dry:
            env["FLATKERN_GPU_DRY"] = "1"
            path.insert(0, str(ROOT / "bench" / "gpu" / "tools"))
            if stage.interpreted:
                env["TRITON_INTERPRET"] = "1"
            # That `make test-cuda` has built. Without it the CUDA kernels are left out, and the stages say so.
            for library in (ROOT / "build" / "cuda-emulation").glob("_CUDA_emul*"):
                env["FLATKERN_CUDA_EMULATION"] = str(library)
        trees = [] if self.dry else [ROOT / stages.CUDA / "tree"]
        if "MAKELEVEL" not in env:  # make decides otherwise
            trees.append(ROOT / "build" / "tree")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, trees), env.get("PYTHONPATH", "")]))
        return env | {"PATH": os.pathsep.join(path)}

    # ---- what comes from stages

    def watch(self, running: list[Running]) -> None:
        """Read and tend some stages until all have ended."""
        shown = monotonic()
        while running:
            with DefaultSelector() as selector:
                for one in running:
                    for lines in (one.child.out, one.child.err):
                        if lines.open:
                            selector.register(lines, EVENT_READ, (one, lines))
                for key, _ in selector.select(0.05):
                    self.read(*key.data)
            for one in list(running):
                if self.ended_by:
                    one.child.limit = 0.0
                if one.child.tend(monotonic()):
                    running.remove(one)
                    self.close(one.stage, self.result(one), one)
            if running and monotonic() > shown + EVERY:
                shown = monotonic()
                self.show(", ".join(f"{one.stage.name} {one.findings} findings" for one in running))

    def read(self, one: Running, lines) -> None:
        of_stdout = lines is one.child.out
        for line in map(out.placeless, lines.read()):
            found = parse(line) if of_stdout else None
            if found is not None:
                one.findings += 1
                self.finding(one.stage.name, found)
                continue
            text = plain(line)
            self.out.text(one.stage.name, text)
            if not text.strip():
                continue
            one.text.append(text)
            if of_stdout:
                one.said = text.strip()
            elif not text.startswith("make"):  # that a recipe failed is known, and why was said before
                one.complaint = text.strip()

    def finding(self, stage: str, found: dict) -> None:
        found = {**found, "stage": stage, "at": self.clock()}
        kept = self.out.finding(stage, found)
        if found["kind"] == "machine":
            self.machine = found
            self.out.replace(out.MACHINE, json.dumps(found, indent=1) + "\n")
        if not kept:
            self.show(f"{stage}: {MARK}{json.dumps(found)}")
        elif not summary.is_usual(found):
            self.show(f"{stage}: {brief(found)}")

    def result(self, one: Running) -> Result:
        child, lost = one.child, self.out.of(one.stage.name).findings_left_out
        found = summary.judge(
            child.status,
            findings=one.findings,
            cut=None if child.asked is None or self.ended_by else child.asked - child.begun,
            ended_by=self.ended_by if child.asked is not None else None,
            said=one.said,
            complaint=one.complaint,
        )
        seconds = (child.gone or monotonic()) - child.begun
        remarks = [found.sentence]
        if lost:
            remarks.append(f"{lost} findings are not in {out.RESULTS}, which would be too large")
        if child.left_behind:
            pids = ", ".join(map(str, child.left_behind))
            remarks.append(f"left behind: process {pids}, which SIGKILL does not end (a driver that hangs?)")
        status = FAILED if lost and found.status == PASSED else found.status
        return Result(status, seconds, "; ".join(filter(None, remarks)))

    def close(self, stage: Stage, result: Result, one: Running | None = None) -> None:
        self.results[stage.name] = result
        if one is not None:
            self.out.end_of(stage.name)
        end = {
            "kind": "stage",
            "status": result.status,
            "seconds": round(result.seconds, 1),
            "sentence": result.sentence,
        }
        self.out.results.append(json.dumps({**end, "stage": stage.name, "at": self.clock()}) + "\n")
        if one is not None and result.status != PASSED:
            for text in one.text:
                self.show(f"{stage.name} | {text[:200]}")
        after = f" after {result.seconds:.0f} s, {one.findings} findings" if one else ""
        self.show(f"{stage.name}: {result.status}{after}: {result.sentence}")
        self.write_summary()

    def clock(self) -> float:
        return round(monotonic() - self.began, 2)

    def show(self, text: str, begin: str | None = None) -> None:
        """A line on the terminal, as long as there is one."""
        if self.terminal:
            try:
                print(f"[{monotonic() - self.began:5.1f} s] {text}" if begin is None else f"{begin}{text}", flush=True)
            except OSError:
                self.terminal = False


def parse(line: str) -> dict | None:
    """The finding in a line."""
    if line.startswith(MARK):
        with suppress(ValueError, RecursionError):
            found = json.loads(line[len(MARK) :])
            if isinstance(found, dict) and isinstance(found.get("kind"), str):
                return found
    return None


# ---- what is asked for


def usual(lists: dict[str, dict[str, float]], dry: bool) -> list[str]:
    return list(lists) if dry else list(lists)[:1]


def chosen(table: tuple[Stage, ...], lists: dict[str, dict[str, float]], words: str, dry: bool) -> dict[str, float]:
    """Seconds of the stages that are asked for, and of those that they need, in the order of the table.

    Raises:
        Refused: a word is neither a list nor a stage.
    """
    most = stages.most_seconds(lists)
    given = re.findall(r"[^,\s]+", words) or usual(lists, dry)
    unknown = [word for word in given if word not in lists and word not in most]
    if unknown:
        remedy = f"name lists ({', '.join(lists)}) or stages ({', '.join(most)})"
        raise out.Refused(f"STAGES: there is no list or stage {', '.join(unknown)}; {remedy}")
    asked: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        asked[name] = max(seconds, asked.get(name, 0))

    for word in given:
        for name, seconds in lists.get(word, {word: most.get(word, 0)}).items():
            add(name, seconds)
    for stage in reversed(table):
        for name in stage.needs if stage.name in asked else ():
            add(name, asked.get(name, most.get(name, 0)))
    return {stage.name: float(asked[stage.name]) for stage in table if stage.name in asked}


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not LEAST <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"BUDGET: {text!r} should be a number of seconds, at least {LEAST:g}")
    return value


def table_of(path: str | None) -> tuple[tuple[Stage, ...], dict[str, dict[str, float]]]:
    found = runpy.run_path(path) if path else vars(stages)
    return found["STAGES"], found["LISTS"]


def main(arguments: list[str] | None = None) -> int:
    hidden = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    hidden.add_argument("--table")
    known, rest = hidden.parse_known_args(arguments)
    table, lists = table_of(known.table)
    parser = argparse.ArgumentParser(
        prog="run.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=summary.manual(table, lists, stages.USUAL),
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=seconds, default=stages.USUAL, metavar="SECONDS", help=f"(default: {stages.USUAL:g})")
    add("--stages", default="", metavar="NAMES", help="lists and stages, with commas (default: first; if dry, all)")
    add("--out", type=Path, metavar="FOLDER", help="(default: build/gpu; if dry, build/gpu-dry)")
    add("--dry-run", action="store_true", help="on the CPU, to see that everything works; numbers mean nothing")
    given = parser.parse_args(rest)
    unnamed = given.out is None
    given.out = given.out or ROOT / "build" / ("gpu-dry" if given.dry_run else "gpu")
    given.out = given.out.expanduser()  # not every shell does it behind OUT=
    if given.out.is_relative_to(Path.cwd()):  # it is shown, and what is shown is committed
        given.out = given.out.relative_to(Path.cwd())
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    try:
        asked = chosen(table, lists, given.stages, given.dry_run)
        if given.dry_run:  # on whatever machine, which may have to compile everything with two cores
            asked = {name: stages.USUAL if name == "build" else 2 * value for name, value in asked.items()}
        given.stages = given.stages or ",".join(usual(lists, given.dry_run))
        if unnamed and not given.dry_run and (kept := out.set_aside(given.out)):
            print(f"an earlier run is kept in {kept}: make gpu-report FROM={kept}")
        return Run(table, asked, given).go()
    except out.Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
