"""Result files as Markdown and as a chart.

    python bench/report/render.py FILE.json          all tables, on the standard output
    python bench/report/render.py --all              rewrite all that is made of the committed results
    python bench/report/render.py --embed FILE.md    rewrite a document's marked blocks, of the committed results
    python bench/report/render.py --check FILE.md    fail if a marked block differs from them
    python bench/report/render.py --speed docs/images/speed.svg   the chart of the start page
    python bench/report/render.py FILE.json --plot FILE.png       bar chart of everything

With a FILE.json, --embed and --check look at its tables alone. A marked block starts with the line
`<!-- bench: NAME -->` and ends with `<!-- /bench -->`; --names lists the names. The text between is a function of the
JSON alone, so a test can compare the two. The block "gpu" is made by bench/gpu/report.py; "brief", "losing" and
"wanted" are made of the other tables.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    __package__ = "bench.report"

from . import results as files
from .tables import METHODS, brief_table, losing_table, tables
from .wanted import wanted_table

BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "bench" / "results" / "cpu.json"
ELSEWHERE = {"gpu"}  # made by bench/gpu/report.py


def markdown(results: dict) -> str:
    """All tables as one document."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = f"Python {machine['python_version']}, torch {machine['torch']}, flatkern {machine['flatkern']}"
    compiler = machine["flatkern_cpp"].get("compiler")
    head = (
        f"`{results['command'].strip()}`, {results['datetime'][:10]}, commit {commit['id'][:10]}"
        f"{' with local changes' if commit['dirty'] else ''}; {versions}{f' ({compiler})' if compiler else ''}; "
        f"{machine['threads']} of {machine['cores']} cores.\n"
    )
    return "\n".join([head, *(f"### {table.title}\n\n{table.markdown()}\n" for table in tables(results))])


def differing(results: dict) -> list[str]:
    """Of ours, what does not compute what the reference does."""
    rows = [b for b in results["benchmarks"] if b["extra_info"].get("differs")]
    return [
        f"WRONG: {b['params']['candidate']}, {METHODS[b['params']['method']].title}, {b['params']['base']}: "
        f"{b['extra_info']['differs']} than the reference"
        for b in rows
        if b["params"]["candidate"].startswith("flatkern")
    ]


def embed(text: str, results: dict) -> str:
    """The document with its marked blocks rewritten; those of other files stay.

    Raises:
        KeyError: a block names a table that the results do not have.
    """
    found = tables(results)
    made_of_them = brief_table(found), losing_table(found), wanted_table(found)
    known = {table.name: table.markdown() for table in [*found, *made_of_them] if table.rows}

    def block(match: re.Match) -> str:
        if match[2] in ELSEWHERE:
            return match[0]
        if match[2] not in known:
            raise KeyError(f"no table {match[2]!r} in the results; there are {', '.join(known)}")
        return f"{match[1]}\n{known[match[2]]}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def embed_committed(document: Path) -> str:
    """A document's text with every marked block rewritten, by the results that are committed."""
    from ..gpu import report

    text = embed(document.read_text(), files.read(COMMITTED))
    return report.embed(text, root=report.way_to_root(document)) if report.BLOCK.search(text) else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="of `python -m flatkern bench` (default: what is committed)")
    parser.add_argument("--all", action="store_true", help="rewrite all that is made of the committed results")
    parser.add_argument("--embed", metavar="DOCUMENT", help="rewrite the marked blocks of this Markdown file")
    parser.add_argument("--check", metavar="DOCUMENT", help="exit with 1 if a marked block is not what the file says")
    parser.add_argument("--plot", metavar="PNG", help="write the bar chart")
    parser.add_argument("--speed", metavar="SVG", help="write the chart of the start page")
    parser.add_argument("--names", action="store_true", help="list the names of the tables")
    args = parser.parse_args()

    if args.all:
        rewrite_all()
        return 0
    results = files.read(args.file or COMMITTED)
    if args.names:
        print("\n".join(f"{table.name:24} {table.title}" for table in tables(results)))
    if args.plot:
        from .chart import plot

        plot(results, args.plot)
    if args.speed:
        from .speed import speed

        Path(args.speed).write_text(speed(results))
    if not (args.names or args.plot or args.speed or args.embed or args.check):
        print(markdown(results))
    return documents(args, (lambda path: embed(path.read_text(), results)) if args.file else embed_committed)


def rewrite_all() -> None:
    """Every document with marked blocks, the chart of the start page, the tables as one document."""
    from .speed import speed

    results = files.read(COMMITTED)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if BLOCK.search(path.read_text()):
            path.write_text(embed_committed(path))
    (ROOT / "docs" / "images" / "speed.svg").write_text(speed(results))
    COMMITTED.with_suffix(".md").write_text(markdown(results))


def documents(args: argparse.Namespace, rewritten: Callable[[Path], str]) -> int:
    """--embed and --check; returns the exit status."""
    if args.embed:
        document = Path(args.embed)
        document.write_text(rewritten(document))
    if args.check:
        document = Path(args.check)
        if rewritten(document) != document.read_text():
            print(f"{args.check} is not what the results say; run with --embed {args.check}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
