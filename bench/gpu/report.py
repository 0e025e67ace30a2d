"""What `make gpu` brought back, as results that are committed: bench/results/<gpu>/, and a table in documents.

    make gpu-report FROM=build/gpu                          take a run in: raw files, results.json, report.md, the table
    python bench/gpu/report.py --check docs/benchmarks.md   fail if a document's table is not what the results say

Raw files stay as they came, in raw/<date>/. Everything else is a function of them: of each stage, test and race the
newest run counts, so that a second run, of other ones or after a repair, completes the first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.gpu import goals, tables
from bench.gpu.names import slug

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"  # those with the block have the table
BLOCK = re.compile(r"(<!-- bench: gpu -->\n).*?(<!-- /bench -->)", re.DOTALL)
SHOWN = ("h100", "h200")  # in the table, measured or not
FINDINGS, MACHINE = "results.jsonl", "machine.json"


class Unusable(Exception):
    """A folder that no report can be made of; says why, and what to do."""


@dataclass(frozen=True)
class Run:
    """One run of `make gpu`."""

    folder: Path
    machine: dict
    findings: list[dict]

    @property
    def date(self) -> str:
        return self.machine["date"]


def read(folder: Path) -> Run:
    """A folder that `make gpu` wrote, whole or cut off.

    Raises:
        Unusable: it is none, or nothing ran in it on a GPU.
    """
    path = folder / FINDINGS
    if not path.is_file():
        raise Unusable(f"{folder} has no {FINDINGS}; FROM is the folder that make gpu wrote (OUT=...)")
    findings = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a run that was killed, or a full disk, may leave half a line
        if isinstance(found, dict) and "kind" in found:
            findings.append(found)
    machines = [found for found in findings if found["kind"] == "machine"]
    if not machines and (folder / MACHINE).is_file():
        machines = [json.loads((folder / MACHINE).read_text())]
    if not machines:
        raise Unusable(f"{folder} does not say what it ran on: stage build found nothing; summary.txt has the reason")
    machine = machines[-1]
    if machine.get("dry") or not machine.get("gpu"):
        raise Unusable(f"{folder} is of a dry run (or of a machine without a GPU), whose numbers mean nothing")
    return Run(folder, machine, findings)


def store(run: Run, results: Path) -> Path:
    """Copy a run to raw/<date>/, or, where another run of that day lies, to raw/<date>-2/; again is no other."""
    files = sorted(path for path in run.folder.iterdir() if path.is_file())
    for n in range(1, 100):
        target = results / "raw" / (run.date if n == 1 else f"{run.date}-{n}")
        if not target.exists():
            target.mkdir(parents=True)
            for path in files:
                shutil.copy(path, target / path.name)
            return target
        there = target / FINDINGS
        if there.is_file() and there.read_bytes() == (run.folder / FINDINGS).read_bytes():
            return target
    raise Unusable(f"{results / 'raw'} has a hundred runs of {run.date}; name the folder's date otherwise")


def stored(results: Path) -> list[Run]:
    """The runs of a GPU, oldest first."""

    def age(folder: Path) -> tuple[str, int]:
        date, number = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?", folder.name).groups()  # type: ignore[union-attr]
        return date, int(number or 1)

    return [read(folder) for folder in sorted((results / "raw").iterdir(), key=age)]


def newest(runs: list[Run]) -> list[dict]:
    """Of each stage the findings of the newest run that has any, marked with that run's folder; tests, checks and races
    that this run did not get to, or that were not asked for, are those of before."""
    chosen: dict[str, list[dict]] = {}
    for run in runs:
        by_stage: dict[str, list[dict]] = {}
        for found in run.findings:
            by_stage.setdefault(found.get("stage", ""), []).append({**found, "run": run.folder.name})
        for name, found in by_stage.items():
            earlier = chosen.get(name, [])
            if name not in chosen or any(f["kind"] != "stage" for f in found):
                again = {subject(f) for f in found}
                chosen[name] = found + [f for f in earlier if subject(f) and subject(f) not in again]
    return [found for each in chosen.values() for found in each]


def subject(found: dict) -> tuple | None:
    """What a finding of a stage of many parts is about; None of others."""
    if found["kind"] in ("test", "check"):
        return found["kind"], found["name"]
    if found["kind"] == "race":
        return "race", found.get("race"), found["model"], found["method"], found["base"], found["masters"]
    return None


def evaluate(gpu: str, findings: list[dict]) -> list[dict]:
    """The goals, with what is measured of each."""
    rows = []
    for goal in goals.GOALS:
        values = goal.measure(findings)
        shown = [None if value is None else goal.show(value) for value in values]
        rows.append(
            {
                "what": goal.what,
                "wanted": goal.wanted,
                "model": goal.modelled(gpu),
                "measured": list(values),
                "shown": shown,
                "reached": goal.reached(values),
            }
        )
    return rows


def document(gpu: str, runs: list[Run]) -> dict:
    """results.json."""
    findings = newest(runs)
    about = [{"folder": run.folder.name, **run.machine} for run in runs]
    return {
        "gpu": gpu,
        "runs": about,
        "correctness": tables.correctness(findings),
        "goals": evaluate(gpu, findings),
        "goals_by_cuda": evaluate(gpu, goals.by_cuda(findings)),
        "findings": findings,
    }


def take_in(folder: Path, results: Path = RESULTS) -> Path:
    """Store a run and write the results of its GPU anew; returns their folder."""
    run = read(folder)
    gpu = slug(run.machine["gpu"])
    if (results / gpu / "raw").is_dir():
        for other in {earlier.machine["gpu"] for earlier in stored(results / gpu)} - {run.machine["gpu"]}:
            raise Unusable(
                f"{results / gpu} has runs of {other}, and {folder} is of {run.machine['gpu']}: what two cards "
                "measured makes no table; name another place for one of them (bench/gpu/report.py --results)"
            )
    store(run, results / gpu)
    found = document(gpu, stored(results / gpu))
    (results / gpu / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (results / gpu / "report.md").write_text(tables.report(found))
    return results / gpu


def goal_table(results: Path = RESULTS) -> str:
    """The table of documents: what is wanted, what the model says, what was measured."""
    measured = {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/results.json"))}
    return tables.goal_table(list(dict.fromkeys([*SHOWN, *measured])), measured)


def embed(text: str, results: Path = RESULTS, root: str = "") -> str:
    """A document with its block `<!-- bench: gpu -->` rewritten.

    Arguments:
        root: the way to the root from where the document lies, as its links have it; see `way_to_root`.
    """
    if not BLOCK.search(text):
        raise Unusable("the document has no block <!-- bench: gpu --> ... <!-- /bench -->")
    table = goal_table(results).replace("](bench/", f"]({root}bench/")
    return BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def way_to_root(document: Path) -> str:
    """ "../" of a document in docs/; empty of one in the root, or outside of this repository."""
    folder = document.resolve().parent
    return "../" * len(folder.relative_to(ROOT).parts) if folder.is_relative_to(ROOT) else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="what make gpu wrote (its OUT)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results lie (default: bench/results)")
    parser.add_argument(
        "--document", type=Path, action="append", help="whose table is rewritten (default: all of ours)"
    )
    parser.add_argument("--check", type=Path, metavar="DOCUMENT", help="only compare a document with the results")
    given = parser.parse_args(arguments)
    try:
        if given.check:
            text = given.check.read_text()
            if embed(text, given.results, way_to_root(given.check)) == text:
                return 0
            print(f"{given.check} is not what {given.results} says; run bench/gpu/report.py", file=sys.stderr)
            return 1
        if given.folder is not None:
            written = take_in(given.folder.expanduser(), given.results)
            print(f"wrote {written}/results.json, report.md and raw/")
        for document in given.document or [path for path in DOCUMENTS if BLOCK.search(path.read_text())]:
            document.write_text(embed(document.read_text(), given.results, way_to_root(document)))
            print(f"the table of {document} is up to date")
    except (Unusable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
