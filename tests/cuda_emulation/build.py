"""Compiles the CUDA kernels for the CPU: the module that the tests load, and programs without Python.

    python tests/cuda_emulation/build.py                            module and tests, into build/cuda-emulation
    python tests/cuda_emulation/build.py tests                      the emulation's own tests only
    python tests/cuda_emulation/build.py driver wrong               operations called from C++; kernels that are wrong
    python tests/cuda_emulation/build.py --sanitize thread driver   into build/cuda-emulation/thread
    python tests/cuda_emulation/build.py --sanitize address,undefined module
    CXX, CXXFLAGS, LDFLAGS                                          as everywhere

The module is flatkern._CUDA, made of the same sources as on a GPU; FLATKERN_CUDA_EMULATION names its file. Only what
has changed is compiled anew. The last lines of the output are the files that were asked for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent
DRIVER = EMULATION / "driver"
KERNELS = ROOT / "csrc" / "cuda"
TARGETS = ("module", "tests", "driver", "wrong")
# Contraction would change results; everything else is as in setup.py, where it has a reason.
FLAGS = """-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing
    -Wall -Wextra -Wno-unknown-pragmas -DFK_EMULATION""".split()
# Found in every build and reported as the kernel's fault, by undefined.cpp in place of a runtime library.
CHECKS = ["-fsanitize=alignment,bounds", "-fsanitize-recover=alignment,bounds"]


class BuildError(Exception):
    """What was asked for is not built; the text says why."""


class MissingTool(BuildError):
    """There is nothing to build with."""


def compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", "g++"))
    if not named or shutil.which(named[0]) is None:
        raise MissingTool(f"there is no C++ compiler {' '.join(named)!r}; set CXX")
    return named


def ninja() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise MissingTool("ninja is not installed")
    return found


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise MissingTool("pybind11 is not installed") from None
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    return [f"-isystem{path}" for path in [*sorted(python), pybind11.get_include()]]


def escape(path: Path) -> str:
    """`path` as a word of a ninja file, relative to the repository where it is inside: so errors name it."""
    text = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def sanitizer_flags(sanitize: str) -> list[str]:
    """What a list such as "address,undefined" means to compiler and linker."""
    if not sanitize:
        return []
    if sanitize == "thread":
        return ["-fsanitize=thread", "-DFK_EMULATION_TSAN"]
    flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    if "undefined" in sanitize.split(","):
        # Null pointers and the sizes of objects are AddressSanitizer's, too; to check them twice doubles the code.
        flags += ["-fsanitize=float-cast-overflow", "-fno-sanitize=null,object-size,vptr"]
    if "address" in sanitize.split(","):
        # By calls, which compile in half of the time. What is not initialised, such as arguments of tensors that a
        # launch does not have, is no address.
        flags += ["--param=asan-instrumentation-with-call-threshold=0", "-ftrivial-auto-var-init=pattern"]
    return flags


class Ninja:
    """The text of a ninja file."""

    def __init__(self, out: Path, sanitize: str) -> None:
        self.out = out
        self.own_checks = [] if "undefined" in sanitize.split(",") else CHECKS
        # The scheduler tells ThreadSanitizer what happens before what, and is not watched itself.
        self.unwatched = ["-fno-sanitize=thread"] if sanitize == "thread" else []
        # `make sanitize` watches what reads Python's lists, and pybind11's templates take a quarter of the time.
        self.unwatched_python = ["-fno-sanitize=all", "-O0"] if sanitize else []
        flags = [*FLAGS, "-g1", *(["-O1", "-fno-omit-frame-pointer"] if sanitize else ["-O2"])]
        sanitizers = sanitizer_flags(sanitize)
        flags += [*sanitizers, f"-I{escape(ROOT / 'csrc')}", f"-I{escape(EMULATION)}"]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        link = [*sanitizers, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.lines = [
            f"cxx = {shlex.join(compiler())}",
            f"flags = {shlex.join(flags)}",
            f"link = {shlex.join(link)}",
            "rule compile",
            "  command = $cxx $flags $unit_flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $kind $in -pthread $link -o $out",
        ]

    def compile(self, source: Path, flags: list[str]) -> Path:
        target = self.out / "objects" / source.parent.name / f"{source.name}.o"
        self.lines += [f"build {escape(target)}: compile {escape(source)}", f"  unit_flags = {shlex.join(flags)}"]
        return target

    def link(self, target: Path, kind: str, objects: list[Path]) -> Path:
        self.lines += [f"build {escape(target)}: link {' '.join(map(escape, objects))}", f"  kind = {kind}"]
        return target

    def machine(self) -> list[Path]:
        """The emulation itself."""
        names = ["scheduler.cpp", "fibers.cpp", *(["undefined.cpp"] if self.own_checks else [])]
        return [self.compile(EMULATION / name, self.unwatched) for name in names]

    def kernels(self) -> list[Path]:
        return [self.compile(path, ["-x", "c++", *self.own_checks]) for path in sorted(KERNELS.glob("*.cu"))]

    def module(self, machine: list[Path]) -> Path:
        if not (KERNELS / "bindings.cpp").exists():
            raise BuildError(f"{escape(KERNELS)} has no bindings.cpp")
        python = python_includes()
        objects = self.kernels()
        for path in sorted([*KERNELS.glob("*.cpp"), *(ROOT / "csrc" / "common").glob("*.cpp")]):
            is_watched = path.parent == KERNELS and path.name != "bindings.cpp"
            objects.append(self.compile(path, python if is_watched else [*python, *self.unwatched_python]))
        name = f"_CUDA_emul{sysconfig.get_config_var('EXT_SUFFIX')}"
        return self.link(self.out / name, "-shared", [*machine, *objects])

    def tests(self, machine: list[Path]) -> Path:
        flags = [*self.own_checks, *([] if self.own_checks else ["-DFK_UBSAN"])]
        objects = [self.compile(path, flags) for path in sorted(EMULATION.glob("test_*.cpp"))]
        return self.link(self.out / "test_emulation", "", [*machine, *objects])

    def driver(self, machine: list[Path]) -> Path:
        """Operations called from C++."""
        sources = [KERNELS / "plan.cpp", ROOT / "csrc" / "common" / "check.cpp", *sorted(DRIVER.glob("*.cpp"))]
        objects = [self.compile(path, []) for path in sources]
        return self.link(self.out / "driver", "-ldl", [*machine, *self.kernels(), *objects])

    def wrong(self, machine: list[Path]) -> Path:
        """Kernels that a sanitizer has to report."""
        sources = [EMULATION / "test_emulation.cpp", *sorted(EMULATION.glob("wrong_*.cpp"))]
        return self.link(self.out / "wrong", "", [*machine, *(self.compile(path, []) for path in sources)])


def build(targets: list[str], sanitize: str = "") -> list[Path]:
    """Build `targets`, of TARGETS; their files."""
    out = ROOT / "build" / "cuda-emulation" / sanitize.replace(",", "-")
    out.mkdir(parents=True, exist_ok=True)
    file = Ninja(out, sanitize)
    machine = file.machine()
    made = [getattr(file, target)(machine) for target in targets]
    # A file for each choice of targets, as one without the other must not forget how the other was made.
    text = out / f"{'-'.join(targets)}.ninja"
    text.write_text("\n".join([f"builddir = {escape(out)}", *file.lines, ""]))
    if subprocess.run([ninja(), "-C", str(ROOT), "-f", str(text), "--quiet"], check=False).returncode != 0:
        raise BuildError("the compiler's messages are above")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="|".join(TARGETS), help="what to build")
    parser.add_argument("--sanitize", default="", metavar="LIST", help="address, undefined or both; or thread")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(TARGETS)}")
    try:
        for path in build(arguments.targets or ["module", "tests"], arguments.sanitize):
            print(path)
    except BuildError as error:
        sys.exit(f"emulation: not built: {error}")


if __name__ == "__main__":
    main()
