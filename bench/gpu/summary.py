"""What `make gpu` says: how each stage ended, in a table, and the exit status that follows from it."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
from dataclasses import dataclass

from bench.gpu.stages import Stage

PASSED, FAILED, CUT, NOT_RUN = "passed", "FAILED", "OUT OF TIME", "NOT RUN"
ONE_LINE = 300  # characters of a sentence
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    status: str
    seconds: float
    sentence: str


def plain(text: str) -> str:
    """Text without what would move a terminal's cursor or colour it."""
    return ESCAPES.sub("", text)


def short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def judge(
    status: int | None, *, findings: int, cut: float | None, ended_by: str | None, said: str, complaint: str
) -> Result:
    """A stage by its exit status (None: it has none) and what it wrote; `cut`: when it was stopped."""
    said, complaint = short(said, ONE_LINE), short(complaint, ONE_LINE)
    if ended_by is not None:
        return Result(FAILED, 0, f"ended by {ended_by}")
    if cut is not None:
        return Result(
            CUT, 0, f"stopped after {cut:.0f} s with {findings} findings" + (f"; last: {said}" if said else "")
        )
    if status == 0 and findings:
        return Result(PASSED, 0, said)
    if status == 0:
        return Result(FAILED, 0, "found nothing, though its exit status is 0" + (f"; last: {said}" if said else ""))
    if status == 1 and findings:
        return Result(FAILED, 0, said or complaint or "exit status 1")
    ended = f"exit status {status}"
    if status is not None and status < 0:
        try:
            ended = f"ended by {signal.Signals(-status).name}"
        except ValueError:
            ended = f"ended by signal {-status}"
    why = (said if status == 1 else "") or complaint or said
    return Result(FAILED, 0, f"{why} ({ended})" if why else ended)


def status(table: list[Stage], results: dict[str, Result], errors: dict[str, str], ended_by: str | None) -> int:
    """0: every stage passed; 1: what is right is not known, or something is wrong; 3: anything else."""
    bad = [stage for stage in table if stage.name not in results or results[stage.name].status != PASSED]
    if any(stage.correct for stage in bad):
        return 1
    return 3 if bad or errors or ended_by else 0


ENDS = {
    0: "every stage passed",
    1: "a stage that looks for errors found one, or did not finish, or was not run",
    3: "no error was found, but not every stage passed, or a file could not be written",
}


def text(table: list[Stage], results: dict[str, Result], errors: dict[str, str], ended_by: str | None) -> str:
    """A line for each stage, and what else is to be known."""
    wide = max(len(stage.name) for stage in table)
    lines = []
    for stage in table:
        found = results.get(stage.name, Result(NOT_RUN, 0.0, "not yet ended when this was written"))
        lines.append(f"{stage.name:{wide}}  {found.status:11}  {found.seconds:5.1f} s  {found.sentence}".rstrip())
    if errors:
        told = "; ".join(f"{name} could not be written ({error})" for name, error in errors.items())
        if "results.jsonl" in errors:
            told += "; the findings are on the terminal"
        lines.append(f"{'OUT':{wide}}  {FAILED:11}  {'':5}    {told}")
    if ended_by:
        lines.append(f"make gpu was ended by {ended_by}")
    if all(stage.name in results for stage in table):
        end = status(table, results, errors, ended_by)
        lines.append(f"exit status {end}: {ENDS[end]}")
    return "\n".join(lines) + "\n"


def header(machine: dict, given: argparse.Namespace, seconds: float) -> str:
    """What ran where."""

    def known(name: str) -> str:
        return str(machine.get(name) or "unknown")

    where = f"make gpu on {known('gpu')}, driver {known('driver')}, CUDA {known('cuda')}"
    if given.dry_run:
        where = "make gpu, dry run on the CPU: it shows that everything works, and its numbers mean nothing"
    versions = ", ".join(f"{name} {known(name)}" for name in ("flatkern", "torch", "triton", "numpy", "python"))
    commit = str(machine.get("commit") or os.environ.get("FLATKERN_COMMIT") or "unknown")
    if machine.get("dirty"):
        commit += " (changed)"
    how = f"STAGES={given.stages} BUDGET={given.budget:g}, {seconds:.0f} s; files in {given.out}"
    return f"{where}\n{versions}\ncommit {commit}, {datetime.date.today()}\n{how}\n\n"


# ---- the terminal


def is_usual(found: dict) -> bool:
    """One of many that need nobody's attention while they come; these are only counted."""
    kind = found["kind"]
    if kind in ("race", "counter", "function"):
        return True
    return (kind == "test" and found.get("outcome") == "passed") or (kind == "check" and found.get("ok") is True)


SPEAKING = ("kind", "name", "who", "tool", "label", "gpu", "detail", "reason")  # need no name beside them


def brief(found: dict) -> str:
    """A finding in a line."""
    words = []
    for name, value in found.items():
        if name in ("stage", "at") or value is None or value == "" or isinstance(value, (dict, list)):
            continue
        if isinstance(value, bool):
            words.append(name if value else f"not {name}")
        elif isinstance(value, (int, float)):
            words.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
        else:
            words.append(str(value) if name in SPEAKING else f"{name}={value}")
    return short(plain(" ".join(", ".join(words).split())), 160)


def manual(table: tuple[Stage, ...], lists: dict[str, dict[str, float]], usual: float) -> str:
    """What --help says about stages, files and the exit status."""
    lines = ["stages, in their order, and their most seconds on a list:", ""]
    lines += [f"  {'':10} {' '.join(f'{name:>7}' for name in lists)}"]
    for stage in table:
        cells = " ".join(f"{seconds.get(stage.name, '-'):>7}" for seconds in lists.values())
        what = stage.what + (f"; needs {', '.join(stage.needs)}" if stage.needs else "")
        lines.append(f"  {stage.name:10} {cells}  {what}")
    side = ", ".join(stage.name for stage in table if stage.beside)
    late = " and ".join(stage.name for stage in table if stage.patience > 1)
    correct = ", ".join(stage.name for stage in table if stage.correct)
    return "\n".join(
        [
            *lines,
            "",
            f"The seconds are for a budget of {usual:g} and grow with it. {side or 'Nothing'} run side by side, all",
            "others alone. To name a stage is to ask for what it needs too. A stage that runs out of time, or",
            "crashes, or hangs is ended with all that it started, and what it found until then is kept.",
            *([f"{late} may take longer than that, at the expense of the last stages."] if late else []),
            "",
            "files in the folder (those of an earlier run are replaced; where OUT names no folder, and this is not",
            "dry, the earlier folder is renamed to build/gpu-1 or further):",
            "",
            "  summary.txt     a line for each stage; rewritten after each",
            "  results.jsonl   what was found, one JSON object a line, written at once",
            "  log.txt         what the stages printed, with [stage] in front",
            "  machine.json    GPU, driver, versions",
            "  ncu.csv, sanitizer.log   what those tools wrote",
            "",
            "exit status:",
            "",
            "  0   every stage that was asked for passed",
            f"  1   {correct}: one that was asked for failed, did not finish or was not run",
            "  2   the arguments are wrong; nothing was started",
            "  3   only others failed, or a file could not be written",
            "",
            "make itself ends with 2 where this is not 0; the last line of summary.txt has the number.",
            "",
            "make gpu-report FROM=FOLDER makes a report of such a folder. FLATKERN_COMMIT names the commit where",
            "there is no git. Stages are told the folder (FLATKERN_GPU_OUT), all stages of the run",
            "(FLATKERN_GPU_STAGES) and their own seconds (FLATKERN_STAGE_SECONDS).",
        ]
    )
