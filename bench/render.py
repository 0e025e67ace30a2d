"""Result files as Markdown and as a chart.

    python bench/render.py FILE.json                    all tables, on the standard output
    python bench/render.py FILE.json --embed README.md  rewrite the marked blocks of a document
    python bench/render.py FILE.json --check README.md  fail if a marked block differs from the file
    python bench/render.py FILE.json --plot FILE.png    bar chart

A marked block starts with the line `<!-- bench: NAME -->` and ends with `<!-- /bench -->`; --names lists
the names. The text between is a function of the JSON alone, so a test can compare the two. The block "gpu" is
bench/gpu/report.py's, and "ranks" is made of the file of bench/parallel.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import results as files
from bench.tables import tables

BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
ELSEWHERE = {"gpu", "ranks"}  # the blocks that are made of other files than bench/run.py's


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


def embed(text: str, results: dict) -> str:
    """The document with its marked blocks rewritten; those of other files stay.

    Raises:
        KeyError: a block names a table that the results do not have.
    """
    known = {table.name: table.markdown() for table in tables(results)}
    others = known.keys() and known.keys() <= ELSEWHERE  # all other blocks are bench/run.py's

    def block(match: re.Match) -> str:
        if match[2] not in known and (others or match[2] in ELSEWHERE):
            return match[0]
        if match[2] not in known:
            raise KeyError(f"no table {match[2]!r} in the results; there are {', '.join(known)}")
        return f"{match[1]}\n{known[match[2]]}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="JSON written by bench/run.py")
    parser.add_argument("--embed", metavar="DOCUMENT", help="rewrite the marked blocks of this Markdown file")
    parser.add_argument("--check", metavar="DOCUMENT", help="exit with 1 if a marked block is not what the file says")
    parser.add_argument("--plot", metavar="PNG", help="write the bar chart")
    parser.add_argument("--names", action="store_true", help="list the names of the tables")
    args = parser.parse_args()

    results = files.read(args.file)
    if args.names:
        print("\n".join(f"{table.name:24} {table.title}" for table in tables(results)))
    if args.plot:
        from bench.chart import plot

        plot(results, args.plot)
    if args.embed:
        document = Path(args.embed)
        document.write_text(embed(document.read_text(), results))
    if args.check:
        text = Path(args.check).read_text()
        if embed(text, results) != text:
            print(f"{args.check} is not what {args.file} says; run with --embed {args.check}", file=sys.stderr)
            return 1
    if not (args.names or args.plot or args.embed or args.check):
        print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
