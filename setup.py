"""Builds flatkern._C with ninja: every walk once per instruction set, no torch headers, no torch link.

Without a compiler the package is installed all the same, and its operations run in eager PyTorch.

    FLATKERN_BUILD=auto|require|skip     what a failed build means: a message, an error; or do not try
    FLATKERN_SANITIZE=address,undefined  instrumented build for tests
    CXX, CXXFLAGS, LDFLAGS               as everywhere
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FAMILIES = ("noise", "norm", "perturb", "update", "mask")
COMMON = ("cpu/bindings.cpp", "cpu/isa.cpp", "common/check.cpp", "common/describe.cpp", "common/from_python.cpp")
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}
# Contraction would change results from one instruction set to the next. Traps and errno are never read; without them
# the compiler may turn branches into selections and sqrtf into an instruction, with the same bits.
NUMERICS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

ROOT = Path(__file__).parent.resolve()


class BuildError(Exception):
    """The extension cannot be built; the text says why."""


def compiler() -> list[str]:
    """The C++ compiler's command."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX is {named[0]!r}, which is not there")
        return named
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (tried $CXX, g++, clang++, c++)")


def accepts(cxx: list[str], flags: list[str], source: str, build: Path) -> bool:
    """Whether a program compiles and links with `flags`."""
    probe = build / "probe.cpp"
    probe.write_text(source)
    command = [*cxx, *flags, str(probe), "-o", str(build / "probe")]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def ninja() -> str:
    """The path of ninja: the build requirement's, else the system's."""
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is not installed") from None
        return found


def include_flags() -> list[str]:
    """Where Python's and pybind11's headers are."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed") from None
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    return [f"-isystem{path}" for path in [*sorted(python), pybind11.get_include()]]


def escape(text: str) -> str:
    """`text` as a word of a ninja file."""
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def write_ninja(build: Path, target: Path) -> None:
    """Write build.ninja, which compiles csrc/ into `target`."""
    cxx = compiler()
    sanitizers = os.environ.get("FLATKERN_SANITIZE", "")
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *NUMERICS]
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    if sanitizers:
        sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        flags += ["-O1", "-g", *sanitize]
        link += sanitize
    else:
        flags += ["-O3", "-DNDEBUG"]
    # g++ 12 takes its own vector intrinsics for uninitialised reads.
    for candidate in ("-fopenmp-simd", "-Wno-psabi", "-Wno-maybe-uninitialized"):
        if accepts(cxx, [candidate, "-Werror"], "int main() {}", build):
            flags.append(candidate)
    if accepts(cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }", build):
        flags.append("-fopenmp")
        link.append("-fopenmp")
    else:
        print("flatkern: the compiler has no OpenMP; kernels will run on one thread", file=sys.stderr)
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link += shlex.split(os.environ.get("LDFLAGS", ""))

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = X86_ISAS if x86 else {"baseline": []}
    units = [(ROOT / "csrc" / name, "common", include_flags() + ["-DFK_X86"] * x86) for name in COMMON]
    units += [
        (ROOT / "csrc" / "cpu" / f"{family}.cpp", isa, [f"-DFK_ISA={isa}", *isa_flags])
        for isa, isa_flags in isas.items()
        for family in FAMILIES
    ]

    lines = [
        f"cxx = {shlex.join(cxx)}",
        f"flags = {shlex.join(flags)}",
        f"link = {shlex.join(link)}",
        "rule compile",
        "  command = $cxx $flags $unit_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $link -o $out",
    ]
    objects = []
    for source, isa, unit_flags in units:
        objects.append(f"{source.stem}.{isa}.o")
        lines += [f"build {objects[-1]}: compile {escape(str(source))}", f"  unit_flags = {shlex.join(unit_flags)}"]
    lines += [f"build {escape(str(target))}: link {' '.join(objects)}", ""]
    (build / "build.ninja").write_text("\n".join(lines))


class NinjaBuild(build_ext):
    """build_ext that leaves the work to ninja, and the installation alive where it cannot be done."""

    def run(self) -> None:
        policy = os.environ.get("FLATKERN_BUILD", "auto")
        if policy not in ("auto", "require", "skip"):
            raise SystemExit(f"FLATKERN_BUILD is {policy!r}, but should be auto, require or skip")
        self.extensions = [] if policy == "skip" else self.extensions
        try:
            super().run()
        except BuildError as error:
            if policy == "require":
                raise SystemExit(f"flatkern: cannot build the C++ kernels: {error}") from error
            self.extensions = []
            print(
                f"flatkern: the C++ kernels are not built: {error}\n"
                "flatkern: continuing without them; operations run in eager PyTorch (FLATKERN_BUILD=require refuses)",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / ("sanitized" if os.environ.get("FLATKERN_SANITIZE") else "release")
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(build, target)
        if subprocess.run([ninja(), "-C", str(build)], check=False).returncode != 0:
            raise BuildError("the compiler's messages are above")


setup(
    ext_modules=[Extension("flatkern._C", [f"csrc/{name}" for name in COMMON])],
    cmdclass={"build_ext": NinjaBuild},
)
