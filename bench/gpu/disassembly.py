"""Kernels as nvcc or Triton has compiled them: their machine code (SASS), read by CUDA's disassemblers or
those of Triton."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path


@dataclass
class Instruction:
    guard: str  # "", or the predicate without which it does nothing
    name: str
    operands: list[str]
    source: tuple[tuple[str, int], ...] = ()  # file and line, then where that was inlined, and so on

    def __str__(self) -> str:
        return f"{f'@{self.guard} ' if self.guard else ''}{self.name} {', '.join(self.operands)}"


class Code:
    """A kernel: what nvdisasm prints of it, with or without -gi, and the registers and memory that it uses."""

    def __init__(self, listing: str, used: dict[str, int], numbers: bytes = b"") -> None:
        self.listing = listing
        self.used = used  # REG, STACK, LOCAL, ...
        self.numbers = numbers  # bank 2 of the constants: where a jump goes that has many targets

    def count(self, pattern: str) -> int:
        """How many instructions have such a name, from its first letter to its last."""
        return len(
            re.findall(rf"^ {{8}}/\*[0-9a-f]{{4,}}\*/ +(?:@!?U?P\w+ +)?{pattern}[ ;]", self.listing, re.MULTILINE)
        )

    @cached_property
    def instructions(self) -> list[Instruction]:
        return self._read[0]

    @cached_property
    def labels(self) -> dict[str, int]:
        """Before which instruction each label stands."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[Instruction], dict[str, int]]:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        source: list[tuple[str, int, bool]] = []
        for line in self.listing.splitlines():
            if found := re.match(r" {8}/\*[0-9a-f]{4,}\*/ +(?:@(!?U?P\w+) +)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
                operands = [part.strip() for part in re.split(r",(?![^\[]*\])", found[3])] if found[3] else []
                where = tuple((file, number) for file, number, _ in source)
                instructions.append(Instruction(found[1] or "", found[2], operands, where))
            elif found := re.match(r"(\.L\w+|\$\S+):", line):  # $...: a function that is called
                labels[found[1]] = len(instructions)
            elif found := re.match(r'\s*//## File "([^"]*)", line (\d+)( inlined at)?', line):
                # A chain: each line but the last one says where it is inlined.
                if not (source and source[-1][2]):
                    source = []
                source.append((found[1], int(found[2]), bool(found[3])))
        return instructions, labels


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm; FileNotFoundError."""
    folders = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    with contextlib.suppress(ImportError):
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: neither on PATH nor in {', '.join(folders)}")
    return found


def output(*command: object, folder: str | None = None) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, cwd=folder).stdout


def plain(demangled: str) -> str:
    """A kernel's name without its parameters, and without what nvcc and g++ write differently."""
    short = re.sub(r"^void |flatkern::cuda::|\(anonymous namespace\)::", "", demangled)
    return re.sub(r"(?<=\d)ul\b", "", short[: short.rfind(">(") + 1]) if ">(" in short else short


def read(cubin: Path, lines: bool = False) -> dict[str, Code]:
    """Kernels by their plain names; `lines`: instructions know where they come from."""
    usage = dict(re.findall(r"Function (\S+):\s+(\S.*)", output(tool("cuobjdump"), "-res-usage", cubin)))
    parts = re.split(
        r"^\.text\.(\S+):\n", output(tool("nvdisasm"), "-c", *(["-gi"] if lines else []), cubin), flags=re.M
    )
    names, listings = parts[1::2], parts[2::2]
    plains = [plain(name) for name in output("c++filt", *names).splitlines()] if names else []
    numbers = numbers_of(cubin) if any("c[0x2]" in listing for listing in listings) else {}
    return {
        short: Code(
            listing,
            {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", usage[name])},
            numbers.get(name, b""),
        )
        for name, short, listing in zip(names, plains, listings, strict=True)
    }


def numbers_of(cubin: Path) -> dict[str, bytes]:
    """Bank 2 of the constants, by kernel."""
    parts = re.split(r"^\.nv\.constant2\.(\S+):\n", output(tool("nvdisasm"), cubin), flags=re.M)
    return {
        name: bytes(
            int(byte, 16) for line in re.findall(r"\.byte\t(.*)", text.split("\n\n")[0]) for byte in line.split(",")
        )
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@cache
def read_library(library: Path, architecture: str) -> dict[str, Code]:
    """All kernels of a shared library for one architecture; none if it is not compiled for that."""
    with tempfile.TemporaryDirectory() as folder:
        output(tool("cuobjdump"), "-xelf", f".{architecture}.", library.resolve(), folder=folder)
        codes: dict[str, Code] = {}
        for cubin in sorted(Path(folder).iterdir()):
            codes.update(read(cubin))
    return codes
