"""`python -m flatkern doctor | demo | language`. Nothing is imported for a command that was not asked for."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "doctor": "what is live on this machine, why the rest is not, and what to do about it",
    "language": "train a small Llama on bytes: AdamW against AdamW with IRE",
    "demo": "train on handwritten digits with every method: accuracy, time, passes over memory",
}
MODULES = {
    "doctor": "flatkern.doctor",
    "language": "flatkern.demos.language.command",
    "demo": "flatkern.demos.digits.command",
}
USAGE = "usage: python -m flatkern COMMAND [--help]\n\n" + "".join(f"  {c:10}{text}\n" for c, text in COMMANDS.items())


def main(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"python -m flatkern: {command!r} is not a command\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(MODULES[command])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flatkern"):
            raise
        print(f"python -m flatkern {command} needs {error.name}: pip install 'flatkern[demo]'", file=sys.stderr)
        return 1
    return module.main(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
