"""`python -m flatkern doctor`: what is live on this machine, why the rest is not, and what to do about it.

Needs torch and the standard library only, because it must run where an installation went wrong; rich makes
it prettier where it is installed. It reports what the dispatcher would do and decides nothing itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, dispatch
from .ops import OPS
from .pages import page

Rows = list[tuple[str, ...]]


def report() -> dict[str, Any]:
    """Everything that doctor knows, as plain values; `--json` prints this."""
    backends = {
        name: {**state, "ops": [op.name for op in OPS.values() if name in ("eager", *op.backends.split())]}
        for name, state in dispatch.backends().items()
    }
    facts = {
        "versions": {"flatkern": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("numpy", "triton")},
        "machine": machine(),
        "backends": backends,
        "serves": {device: serving(device) for device in devices()},
        "default": os.environ.get("FLATKERN_BACKEND"),
    }
    return facts | {"next": next_step(facts)}


def git(*arguments: str) -> str:
    """What a git command prints in flatkern's checkout; empty where flatkern is installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""  # and not of somebody else's checkout, which it may be installed inside of
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str | None:
    """Version of a package; None if it cannot be imported."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, but found"


def devices() -> list[str]:
    """Device types that this torch can compute on, among those flatkern knows."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def serving(device: str) -> dict[str, list[str]]:
    """Which backend runs which ops on `device` when none is named: {backend: [op, ...]}."""
    served: dict[str, list[str]] = {}
    for op in OPS:
        name, _ = dispatch.served_by(op, device)
        assert name is not None, "eager has every op"
        served.setdefault(name, []).append(op)
    return served


def machine() -> dict[str, Any]:
    """Processor, the instruction set that the compiled backend chose, threads."""
    about: dict[str, Any] = {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "compiled": None,
    }
    if torch.cuda.is_available():
        about["cuda"] = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    with contextlib.suppress(ImportError):
        kernels = dispatch.compiled_module("cpp")
        about["compiled"] = {
            "isa": kernels.isa(),
            "isas": kernels.isas(),
            "openmp": kernels.openmp,
            "compiler": kernels.compiler,
            "file": kernels.__file__,
        }
    return about


def processor() -> str:
    """The processor's name, as its maker writes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout
        return name.strip() or platform.machine()
    return platform.processor() or platform.machine()


# ---- as text


def brief(facts: dict[str, Any]) -> str:
    """One line."""
    return f"flatkern {facts['versions']['flatkern']}, torch {facts['versions']['torch']}; {live(facts)}"


def live(facts: dict[str, Any]) -> str:
    """Which backends are live, and which of them serve whom."""
    compiled = facts["machine"]["compiled"]
    names = ", ".join(name for name, state in facts["backends"].items() if state["live"])
    served = "; ".join(f"{device} is served by {', '.join(by)}" for device, by in facts["serves"].items())
    isa = f" ({compiled['isa']})" if compiled else ""
    named = f"; FLATKERN_BACKEND={facts['default']} overrides this" if facts["default"] else ""
    return f"live: {names}{isa}; {served}{named}"


def next_step(facts: dict[str, Any]) -> str:
    """The one thing to do next, by what was found."""
    backends, named = facts["backends"], facts["default"]
    if named and named not in backends:
        return f"FLATKERN_BACKEND={named} names no backend: unset it, or set one of {', '.join(backends)}"
    if named and not backends[named]["live"]:
        return (
            f"FLATKERN_BACKEND={named} is not live, so every call is refused: unset it, or {backends[named]['remedy']}"
        )
    if not backends["cpp"]["live"]:
        return no_kernels(compiler())
    if "cuda" in facts["serves"] and not (backends["triton"]["live"] or backends["cuda"]["live"]):
        return f"no kernels are live for the GPU: {backends['triton']['remedy']}; {page('gpu', 'install')}"
    missing = [name for name in ("matplotlib", "rich", "sklearn", "typer") if version(name) is None]
    install = "pip install 'flatkern[demo]', then " if missing else ""
    return f"all that this machine has is live; try the demo: {install}python -m flatkern demo"


def no_kernels(found: str | None) -> str:
    """How to get the compiled kernels, with or without a compiler."""
    if found:
        return f"reinstall flatkern with FLATKERN_BUILD=require, which shows why {found} built no kernels"
    how = "xcode-select --install" if sys.platform == "darwin" else "apt install g++, dnf install gcc-c++, ..."
    return f"there is no C++ compiler: {how}; then reinstall flatkern"


def compiler() -> str | None:
    """The C++ compiler that an installation would take."""
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(name)), None)


def cuda_rows(about: dict[str, Any]) -> Rows:
    """What the cuda backend was compiled for, what it needs, and what there is."""
    if about["emulated"]:
        return [("extension", about["file"]), ("emulated", "yes: kernels run on the CPU, for tests")]
    found = f"for CUDA {about['driver']}" if about["driver"] else "none"
    return [
        ("extension", about["file"]),
        ("emulated", "no"),
        ("toolkit", f"CUDA {about['toolkit']}"),
        (
            "compiled for",
            f"compute capability {about['capabilities']}; later ones of these generations too, newer generations by "
            "PTX of the highest",
        ),
        ("driver", f"{found}; it needs {about['needs']}"),
        ("GPUs", f"{about['devices']}{about['problem'] and ': '}{about['problem']}"),
    ]


def sections(facts: dict[str, Any]) -> dict[str, Rows]:
    """The report as titled tables of text, first column bold."""
    about, compiled = facts["machine"], facts["machine"]["compiled"]
    about_cuda = facts["backends"]["cuda"]["about"]
    machine_rows: Rows = [("processor", f"{about['processor']} ({about['system']})")]
    if compiled:
        machine_rows.append(("instruction set", f"{compiled['isa']} (of {', '.join(compiled['isas'])})"))
        machine_rows.append(("OpenMP", "yes" if compiled["openmp"] else "no: the compiled kernels use one thread"))
        machine_rows.append(("compiled by", compiled["compiler"]))
        machine_rows.append(("extension", compiled["file"]))
    machine_rows.append(("threads", str(about["threads"])))
    machine_rows += [(f"cuda:{k}", name) for k, name in enumerate(about.get("cuda", []))]
    backend_rows: Rows = []
    for name, state in facts["backends"].items():
        ops = "every op" if len(state["ops"]) == len(OPS) else ", ".join(state["ops"]) or "no ops"
        if state["live"]:
            where = "any device" if "any" in state["devices"] else ", ".join(state["devices"])
            backend_rows.append((name, "live", f"{ops}, on {where}"))
        else:
            backend_rows.append((name, "not live", state["reason"]))
            backend_rows.append(("", "", f"remedy: {state['remedy']}"))
    served_rows: Rows = [
        (device, f"{backend}: {'every op' if len(ops) == len(OPS) else ', '.join(ops)}")
        for device, served in facts["serves"].items()
        for backend, ops in served.items()
    ]
    if facts["default"]:
        served_rows.append(("note", f"FLATKERN_BACKEND={facts['default']} overrides this"))
    return {
        "Versions": [(name, value or "not installed") for name, value in facts["versions"].items()],
        "Machine": machine_rows,
        "Backends": backend_rows,
        **({"Backend cuda": cuda_rows(about_cuda)} if about_cuda else {}),
        "Without backend=, tensors run on": served_rows,
    }


def show_plain(tables: dict[str, Rows]) -> None:
    """With the standard library alone."""
    for title, rows in tables.items():
        print(title)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def show_rich(tables: dict[str, Rows]) -> None:
    """The same, prettier."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for title, rows in tables.items():
        console.print(Text(title, style="bold"))
        table = Table(show_header=False, box=None, padding=(0, 2))
        for row in rows:
            style = {"live": "green", "not live": "yellow"}.get(row[1], "")
            table.add_row(*(Text(text, style=style if k == 1 else "") for k, text in enumerate(row)))
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0 whatever it says."""
    parser = argparse.ArgumentParser(prog="python -m flatkern doctor", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--brief", action="store_true", help="one line")
    options = parser.parse_args(arguments)
    facts = report()
    if options.json:
        print(json.dumps(facts, indent=2))
    elif options.brief:
        print(brief(facts))
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR") and importlib.util.find_spec("rich"):
        show_rich(sections(facts))
        print(f"\nNext: {facts['next']}")
    else:
        # A pipe gets plain lines: rich would cut them at 80 columns.
        show_plain(sections(facts))
        print(f"Next: {facts['next']}")
    return 0
