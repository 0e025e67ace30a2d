"""`python -m flatkern COMMAND`. Nothing is imported for a command that was not asked for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

from . import __version__, pages


class Command(NamedTuple):
    """A module with `main(arguments)`, which returns the exit status."""

    module: str
    text: str
    takes: str


COMMANDS = {
    "doctor": Command("doctor", "what is live on this machine, why the rest is not, what to do about it", "seconds"),
    "demo": Command("demos.digits.command", "handwritten digits: SGD, RWP, SAM, IRE and their kin", "a minute"),
    "landscape": Command("landscape.command", "how flat a trained model is: the digits', or your own", "a minute"),
    "bench": Command("bench.command", "benchmarks against what one would otherwise write; bench compare", "minutes"),
    "language": Command("demos.language.command", "a small Llama on bytes: AdamW against AdamW-IRE", "a few minutes"),
}
# What packages are called where they are installed from, if not as they are imported.
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def usage() -> str:
    lines = [f"  {name:10}{command.text} ({command.takes})\n" for name, command in COMMANDS.items()]
    return "usage: python -m flatkern COMMAND [--help]\n\n" + "".join(lines)


def overview() -> str:
    """What flatkern is, what is live here, what there is to run and to read."""
    from . import doctor

    facts = doctor.report()
    return (
        f"flatkern {facts['versions']['flatkern']}: fused kernels and optimizers for training methods that look for "
        f"flat minima.\nHere {doctor.live(facts)}.\n\n{usage()}\nDocumentation: {pages.where()}\n"
    )


def main(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"flatkern {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"python -m flatkern: {name!r} is not a command\n\n{usage()}", end="", file=sys.stderr)
        return 2
    try:
        return run(name, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run(name: str, arguments: list[str]) -> int:
    """Import a command and call it; 1 where a package is missing."""
    try:
        module = importlib.import_module(f"flatkern.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "flatkern").partition(".")[0]
        if missing == "flatkern":
            raise
        package = DISTRIBUTIONS.get(missing, missing)
        print(
            f"python -m flatkern {name} needs {package}, which is not installed: pip install {package}, or all that "
            "the demos need: pip install 'flatkern[demo]'",
            file=sys.stderr,
        )
        return 1
    return module.main(arguments) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
