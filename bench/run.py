"""Benchmark flatkern on the CPU against plain torch, and against what users write instead.

Without a selection: every method on ResNet-50, a subset on smaller and larger models, half precision,
the cost of a call, the bandwidth of a copy; minutes on two cores. Selecting models, methods, bases or
dtypes runs their product instead. Only optimizer work is timed: gradients are preset. The default run
writes bench/results/cpu.{json,md,png}; the others write what they are asked for. A GPU has bench/gpu/run.py.

    python bench/run.py --quick
    python bench/run.py --models gpt2 --methods m-rwp sam --base adamw
    python bench/run.py --peers --methods mixed gsam friendly looksam momentum-rolling
    python bench/run.py --dtype bfloat16 --masters --methods plain rwp sam
    python bench/run.py --json NAME.json --table NAME.md --plot NAME.png
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.methods import BASES, METHODS
from bench.models import MODELS

RESULTS = Path(__file__).resolve().parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    select = parser.add_argument_group("selection")
    models = [name for name in MODELS if name != "tiny_160"]
    select.add_argument("--models", nargs="+", choices=models, metavar="MODEL", help=", ".join(models))
    select.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    select.add_argument("--base", nargs="+", choices=BASES, metavar="BASE", help=", ".join(BASES))
    dtypes = ["float32", "bfloat16"]
    select.add_argument("--dtype", nargs="+", choices=dtypes, metavar="DTYPE", help=", ".join(dtypes))
    select.add_argument(
        "--masters", action="store_true", help="float32 masters behind bfloat16 weights (flatkern only)"
    )
    backends = ["cpp", "eager", "triton"]
    select.add_argument("--backends", nargs="+", choices=backends, default=["cpp"], help="default: cpp")
    select.add_argument("--compile", action="store_true", help="also torch.compile; compiling takes a minute per race")
    select.add_argument("--peers", action="store_true", help="also classes of pytorch_optimizer and heavyball")
    select.add_argument("--quick", action="store_true", help="one model, four methods, under a minute")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    timing.add_argument("--rounds", type=int, help="steps per candidate (default 15, quick 7)")
    timing.add_argument("--seconds", type=float, default=1.5, help="of a candidate per race")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="results, readable by pytest-benchmark compare")
    output.add_argument("--table", metavar="FILE.md", help="the tables in Markdown")
    output.add_argument("--plot", metavar="FILE.png", help="bar chart")
    args = parser.parse_args()
    args.rounds = args.rounds or (7 if args.quick else 15)
    args.selected = bool(args.models or args.methods or args.base or args.dtype or args.masters)
    args.default = not (args.selected or args.quick or args.json or args.table or args.plot)
    if args.masters:
        args.dtype = args.dtype or ["bfloat16"]
        if args.dtype != ["bfloat16"]:
            parser.error("--masters needs --dtype bfloat16")
    return args


def measure(args, screen, runner) -> None:
    """Runs the races; `runner` has what they have found so far."""
    from bench import races

    chosen = races.plan(args)
    with screen.races(len(chosen)):
        for race in chosen:
            screen.race(race.title)
            runner.run(race)


def partial(path: str | None) -> str | None:
    """Where an interrupted run writes, so that it does not replace a whole one."""
    return path and str(Path(path).with_stem(Path(path).stem + "-partial"))


def write(args, found: dict) -> list[str]:
    """The files that are asked for; returns their names."""
    from bench.report import render, results

    written = [path for path in (args.json, args.table) if path]
    if args.json:
        results.write(args.json, found)
    if args.table:
        Path(args.table).write_text(render.markdown(found))
    if args.plot:
        try:
            from bench.report.chart import plot

            plot(found, args.plot)
            written.append(args.plot)
        except ImportError as error:
            print(f"no chart: {error.name} is not installed")
    return written


def main() -> int:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch

    from bench.report import results
    from bench.report.screen import screen
    from bench.report.tables import tables
    from bench.runner import Runner

    torch.set_num_threads(args.threads)
    show, started, busy = screen(), time.monotonic(), results.load()
    if busy > 0.5:
        show.note(f"this machine is not quiet (load {busy:.1f}); expect numbers that do not repeat", alarming=True)
    runner, interrupted = Runner(args.rounds, args.seconds, show.tick), False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(args, show, runner)
    except KeyboardInterrupt:
        show.note("interrupted: the results are those of the races that were over", alarming=True)
        interrupted = True

    seconds = time.monotonic() - started
    found = results.document(runner.benchmarks, runner.failures, args.threads, seconds, busy)
    for table in tables(found):
        show.table(table)
    if args.default:
        args.json, args.table, args.plot = (str(RESULTS / f"cpu.{kind}") for kind in ("json", "md", "png"))
    if interrupted:
        args.json, args.table, args.plot = map(partial, (args.json, args.table, args.plot))
    written = write(args, found)
    show.note(f"{found['seconds']:.0f} s; wrote {', '.join(written) or 'nothing'}")
    return 130 if interrupted else 0 if found["benchmarks"] else 1


if __name__ == "__main__":
    sys.exit(main())
