"""`python -m flatkern bench`: flatkern beside what one would otherwise write, and beside what memory allows.

Only optimizer work is timed, unless a suite says otherwise: gradients are preset. In each round every candidate makes
one step, in an order that changes; what is shown are medians, with half of the interquartile range behind them.

suites:
  calls    what a call costs, and its share of what memory allows (a kernel with the same streams and no arithmetic)
  methods  whole optimizer steps, beside the papers' loops, careful loops, torch._foreach_* and other libraries
  train    whole training steps: forward, backward, optimizer
  ranks    training steps of two processes under DistributedDataParallel

Selecting models runs these of the suites, or without a suite every method on them; selecting methods, bases or dtypes
runs their product.

  python -m flatkern bench --quick
  python -m flatkern bench --models gpt2 --methods m-rwp sam --base adamw
  python -m flatkern bench --suite train --models gpt
  python -m flatkern bench --dtype bfloat16 --masters --methods plain rwp sam
  python -m flatkern bench compare BEFORE.json AFTER.json
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import races, ranks
from .methods import BASES, METHODS
from .models import MODELS
from .report import quiet, render, results
from .report.screen import Screen, screen
from .report.tables import tables
from .runner import Runner
from .training import suite as training
from .training.networks import NETWORKS

RACED = [name for name in MODELS if name != "tiny_160"]
OTHER_SUITES = "train", "ranks"
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
BUSY = 0.5  # processes that want a core before the first race


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m flatkern bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    select = made.add_argument_group("selection")
    suites = [*races.SUITES, *OTHER_SUITES]
    select.add_argument("--suite", nargs="+", choices=suites, metavar="SUITE", help=f"default: {', '.join(suites)}")
    models = f"{', '.join(RACED)}; of the suite train {', '.join(NETWORKS)}"
    select.add_argument("--models", nargs="+", choices=[*RACED, *NETWORKS], metavar="MODEL", help=models)
    select.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    select.add_argument("--base", nargs="+", choices=BASES, metavar="BASE", help=", ".join(BASES))
    dtypes = ["float32", "bfloat16"]
    select.add_argument("--dtype", nargs="+", choices=dtypes, metavar="DTYPE", help=", ".join(dtypes))
    select.add_argument("--masters", action="store_true", help="float32 masters behind bfloat16 weights (flatkern's)")
    select.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    backends = ["cpp", "eager", "triton", "cuda"]
    select.add_argument("--backends", nargs="+", choices=backends, metavar="BACKEND", help="default: the device's best")
    select.add_argument("--no-rivals", dest="rivals", action="store_false", help="without other libraries' classes")
    select.add_argument("--compile", action="store_true", help="also torch.compile; compiling takes a minute per race")
    select.add_argument("--quick", action="store_true", help="a part of the suites calls and methods: under a minute")
    timing = made.add_argument_group("timing")
    timing.add_argument("--threads", type=positive, default=os.cpu_count(), help="default: all cores")
    timing.add_argument("--rounds", type=positive, help="steps per candidate (default 15, quick 7)")
    timing.add_argument("--seconds", type=seconds, default=1.5, help="of a candidate per race (default 1.5)")
    output = made.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("bench-results"), metavar="FOLDER", help="bench-results")
    output.add_argument(
        "--name", type=stem, default="bench", help="files NAME.json, NAME.md, NAME.png (default: bench)"
    )
    return made


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} should be a finite number above 0")
    return number


def stem(text: str) -> str:
    if not re.fullmatch(r"[\w+-][\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} should be a file's name: letters, digits and . + - _")
    return text


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked before anything is measured."""
    made = parser()
    args = made.parse_args(arguments)
    args.rounds = args.rounds or (7 if args.quick else 15)
    if args.masters:
        args.dtype = args.dtype or ["bfloat16"]
        if args.dtype != ["bfloat16"]:
            made.error("--masters needs --dtype bfloat16")
    if reason := unusable(args):
        made.error(reason)
    select(made, args)
    return args


def select(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is run: suites, some of their models, or the product of what was selected (`selected`)."""
    args.networks = [name for name in args.models or () if name in NETWORKS]
    args.models = [name for name in args.models or () if name in MODELS]
    product = bool(args.methods or args.base or args.dtype or args.masters)
    if args.networks and product:
        made.error("--models: methods, bases and dtypes select races; networks of the suite train have their own")
    if args.suite and product:
        made.error("--suite has a plan of its own; without it methods, bases and dtypes select their product")
    args.selected = product or bool(args.models and not args.suite)
    if args.device != "cpu" and (args.networks or set(OTHER_SUITES) & set(args.suite or ())):
        made.error("--device: the suites train and ranks run on the CPU; a GPU's whole steps are stage e2e of make gpu")
    if args.suite is None:
        usual = [*races.SUITES] if args.quick or args.device != "cpu" else [*races.SUITES, *OTHER_SUITES]
        args.suite = ["train"] * bool(args.networks) if args.selected or args.networks else usual
    if args.models and not args.selected:
        args.suite = [name for name in args.suite if name not in OTHER_SUITES or (name == "train" and args.networks)]
        known = {race.model for suite in args.suite if suite in races.SUITES for race in races.SUITES[suite](args)}
        if unknown := [name for name in args.models if name not in known]:
            made.error(
                f"--models: no suite that was asked for has {', '.join(unknown)}; without --suite all methods run"
            )
    args.networks = args.networks or list(training.QUICK if args.quick else NETWORKS)


def unusable(args: argparse.Namespace) -> str:
    """Why the device, a backend or the folder cannot be used; empty if they can. Fills in the backends."""
    from flatkern import dispatch

    if args.device not in ("cpu", "cuda"):
        return f"--device: {args.device!r} should be cpu or cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device: this torch finds no GPU; `python -m flatkern doctor` says what is live"
    best = ["cpp"] if args.device == "cpu" else ["triton", "cuda"]
    live, refusals = [], []
    for backend in args.backends or best:
        served, refused = dispatch.served_by("sgd_update_", args.device, backend)
        live += [backend] * (served is not None)
        refusals += refused
    if refusals and (args.backends or not live):
        return f"--backends: {'; '.join(refusals)}"
    args.backends = live
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        return f"--out: nothing can be written to {args.out} ({error.strerror}); name another folder"
    return ""


def machine(device: str):
    """Whose clocks are read."""
    if device == "cpu":
        return None
    from .timing.gpu import Gpu

    return Gpu()


def measure(args: argparse.Namespace, show: Screen, runner: Runner) -> None:
    """Runs the races; `runner` has what they have found so far."""
    chosen, train, ranked = races.plan(args), "train" in args.suite, "ranks" in args.suite
    with show.races(len(chosen) + train * len(training.parts(args.networks)) + ranked):
        for race in chosen:
            show.race(race.title)
            runner.run(race)
        runner.release()
        if train:
            training.run(
                args.networks, rows=runner.benchmarks, failures=runner.failures, part=show.race, tick=show.tick,
                backend=args.backends[0], device=args.device,
            )  # fmt: skip
        if ranked:
            show.race("two processes, a step of each method")
            runner.benchmarks += ranks.measured(ranks.ROUNDS, show.tick)


def write(args: argparse.Namespace, found: dict, name: str) -> list[Path]:
    """The three files; returns those that were written. Results that were there already are kept under another name."""
    numbers, text, picture = (args.out / f"{name}.{kind}" for kind in ("json", "md", "png"))
    earlier = args.out / f"{name}-before.json"
    if numbers.exists():
        numbers.replace(earlier)
        print(f"the earlier results are {earlier} now: python -m flatkern bench compare {earlier} {numbers}")
    results.write(numbers, found)
    text.write_text(render.markdown(found))
    try:
        from .report.chart import plot

        drawn = plot(found, picture)
    except ImportError as error:
        print(f"no chart: {error.name} is not installed")
        drawn = False
    return [numbers, text, *[picture] * drawn]


def was_interrupted(args: argparse.Namespace, show: Screen, runner: Runner) -> bool:
    """Measure; whether that was ended before it was over. What was measured is kept all the same."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has SIGINT ignored, in the background
        signal.signal(number, signal.default_int_handler)
    try:
        measure(args, show, runner)
    except KeyboardInterrupt:
        show.note("interrupted: the results are those of what was over", alarming=True)
        return True
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    return False


def main(arguments: list[str]) -> int:
    """Run the command; the exit status is 1 where nothing was measured or a result of ours is wrong."""
    if arguments[:1] == ["compare"]:
        from .report import compare

        return compare.main(arguments[1:])
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    show, started, busy = screen(), time.monotonic(), results.load()
    show.note(results.machine_line(args.threads))
    if busy > BUSY:
        show.note(f"this machine is not quiet (load {busy:.1f}); expect numbers that do not repeat", alarming=True)
    if args.threads > (os.cpu_count() or args.threads):
        show.note(f"{args.threads} threads are more than there are cores; they will wait for each other", alarming=True)
    runner = Runner(args.rounds, args.seconds, show.tick, machine(args.device), compares=True, limits=True)
    interrupted = was_interrupted(args, show, runner)
    took = time.monotonic() - started
    found = results.document(runner.benchmarks, runner.failures, args.threads, took, busy, arguments=arguments)
    if not found["benchmarks"]:
        show.note("nothing was measured; nothing is written", alarming=True)
        return INTERRUPTED if interrupted else 1
    written = write(args, found, f"{args.name}-partial" if interrupted else args.name)  # whatever happens to the screen
    for table in tables(found):
        show.table(table)
    wrong = render.differing(found)
    for remark in [*quiet.remarks(found), *wrong]:
        show.note(remark, alarming=True)
    show.note(f"{took:.0f} s; wrote {', '.join(map(str, written))}")
    return INTERRUPTED if interrupted else int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
