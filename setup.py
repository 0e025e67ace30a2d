"""Builds flatkern._C (every walk once per instruction set) and flatkern._CUDA (by nvcc), with ninja.

No torch headers, no torch link. Each module is built by itself: without a compiler the package is installed all the
same, and its operations run in eager PyTorch; without nvcc Triton serves GPUs.

    FLATKERN_BUILD=auto|require|skip     what a failed build of _C means: a message, an error; or do not try
    FLATKERN_CUDA=auto|1|0               the same for _CUDA
    FLATKERN_CUDA_ARCHS="80 90"          compute capabilities to compile for; PTX of the highest is for newer GPUs
    FLATKERN_NVCC, CUDA_HOME, CUDA_PATH  where nvcc is, in this order; then PATH, then /usr/local/cuda
    FLATKERN_SANITIZE=address,undefined  instrumented build of _C for tests
    CXX, CXXFLAGS, LDFLAGS               as everywhere; CXX compiles nvcc's host code, too
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FAMILIES = ("noise", "norm", "perturb", "update", "mask", "streams")
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

CUDA_OLDEST = (12, 1)  # kernel parameters of 32 KB
CUDA_ARCHS = (80, 90, 100)
CUDA_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG"]
CUDA_DEVICE_FLAGS = [*CUDA_FLAGS, "--fmad=false"]
CUDA_DEFAULT = Path("/usr/local/cuda")
LAUNCHERS = ("ccache", "sccache", "distcc")  # stand in front of a compiler; nvcc wants the compiler alone

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
    """Write build.ninja, which compiles csrc/ into `target`, flatkern._C."""
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


# ---- flatkern._CUDA


def output(*command: str) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:] or f"it says nothing, exit status {done.returncode}"
        raise BuildError(f"{shlex.join(command)} fails: {said}")
    return done.stdout + done.stderr


def find_nvcc() -> str:
    """The path of nvcc."""
    named = os.environ.get("FLATKERN_NVCC")
    if named:
        found = shutil.which(named)
        if found is None:
            raise BuildError(f"FLATKERN_NVCC is {named!r}, which is not there")
        return found
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    for path in (*(home / "bin" for home in homes), None, CUDA_DEFAULT / "bin"):
        found = shutil.which("nvcc", path=path)  # None: PATH
        if found:
            return found
    rocm = "; on ROCm Triton serves GPUs" if shutil.which("hipcc") else ""
    raise BuildError(f"no nvcc found (tried $FLATKERN_NVCC, $CUDA_HOME, $CUDA_PATH, PATH, {CUDA_DEFAULT}){rocm}")


def toolkit_version(nvcc: str) -> str:
    """The version of nvcc's CUDA, for example 13.0."""
    said = output(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise BuildError(f"{nvcc} --version names no release: {said.strip()[:200]!r}")
    if (int(found[1]), int(found[2])) < CUDA_OLDEST:
        oldest = ".".join(map(str, CUDA_OLDEST))
        raise BuildError(
            f"{nvcc} is of CUDA {found[1]}.{found[2]}, but {oldest} or later is needed; FLATKERN_NVCC names another"
        )
    return f"{found[1]}.{found[2]}"


def architectures(nvcc: str, toolkit: str) -> list[int]:
    """The compute capabilities to compile for, lowest first: those that are asked for, or the usual ones."""
    known = {int(n) for n in re.findall(r"\bsm_(\d+)\b", output(nvcc, "--list-gpu-code"))}
    asked = re.findall(r"[^\s,;]+", os.environ.get("FLATKERN_CUDA_ARCHS", ""))
    wrong = [word for word in asked if not (word.isdecimal() and int(word) in known)]
    if wrong:
        raise BuildError(
            f"FLATKERN_CUDA_ARCHS names {', '.join(wrong)}, but should name some of "
            f"{' '.join(map(str, sorted(known)))}, which nvcc {toolkit} knows"
        )
    found = sorted(map(int, asked) if asked else known.intersection(CUDA_ARCHS))
    if not found:
        raise BuildError(f"nvcc {toolkit} knows none of {CUDA_ARCHS}; FLATKERN_CUDA_ARCHS may name others")
    return list(dict.fromkeys(found))


def toolkit_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """Where the toolkit's headers and its libraries are: nvcc knows, wherever it is installed."""
    said = output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)

    def folders(variable: str, mark: str) -> list[str]:
        found = re.search(rf"^#\$ {variable}=(.*)$", said, re.MULTILINE)
        return [word[2:] for word in shlex.split(found[1] if found else "") if word.startswith(mark)]

    include, libraries = folders("INCLUDES", "-I"), folders("LIBRARIES", "-L")
    return [f"-isystem{path}" for path in include], [f"-L{path}" for path in libraries]


def host_compiler() -> list[str]:
    """$CXX as nvcc takes it: the compiler alone, its flags one by one."""
    named = [word for word in shlex.split(os.environ.get("CXX", "")) if Path(word).name not in LAUNCHERS]
    return ["-ccbin", named[0], *(f"-Xcompiler={flag}" for flag in named[1:])] if named else []


def write_cuda_ninja(build: Path, target: Path) -> None:
    """Write build.ninja, which compiles csrc/cuda and csrc/common into `target`, flatkern._CUDA."""
    if sys.platform != "linux":
        raise BuildError(f"they are for Linux, and this is {sys.platform}")
    nvcc, cxx = find_nvcc(), compiler()
    toolkit = toolkit_version(nvcc)
    archs = architectures(nvcc, toolkit)
    include, libraries = toolkit_flags(nvcc)
    host = ["-fPIC", "-fvisibility=hidden", *NUMERICS]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    device = [*CUDA_DEVICE_FLAGS, f"--threads={len(code)}", *code, *host_compiler()]
    device += [f"-Xcompiler={flag}" for flag in host]
    flags = [*CUDA_FLAGS, *host, "-Wall", "-Wextra", *include_flags(), *include]
    flags += [f'-DFK_CUDA_TOOLKIT="{toolkit}"', f'-DFK_CUDA_ARCHS="{" ".join(map(str, archs))}"']
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    # The CUDA runtime is inside, and its names are hidden: torch may have loaded one of another version for the whole
    # process, which would take our calls.
    link = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    link = [*libraries, *link, *shlex.split(os.environ.get("LDFLAGS", ""))]

    lines = [
        f"nvcc = {shlex.quote(nvcc)}",
        f"cxx = {shlex.join(cxx)}",
        f"device = {shlex.join(device)}",
        f"flags = {shlex.join(flags)}",
        f"link = {shlex.join(link)}",
        "rule device",
        "  command = $nvcc $device -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $link -o $out",
    ]
    objects = []
    for source in map(Path, CUDA_SOURCES):
        rule = "device" if source.suffix == ".cu" else "compile"
        objects.append(f"{source.parent.name}.{source.name}.o")
        lines.append(f"build {objects[-1]}: {rule} {escape(str(ROOT / source))}")
    lines += [f"build {escape(str(target))}: link {' '.join(objects)}", ""]
    (build / "build.ninja").write_text("\n".join(lines))


# ---- both


@dataclass(frozen=True)
class Module:
    """A compiled module, and what happens where it cannot be built."""

    name: str
    variable: str  # of the environment, whose value is one of the next three
    auto: str  # build it, or print a message
    require: str  # build it, or fail
    skip: str
    what: str
    instead: str
    sources: tuple[str, ...]
    write_ninja: Callable[[Path, Path], None]

    def policy(self) -> str:
        policy = os.environ.get(self.variable) or self.auto
        if policy not in (self.auto, self.require, self.skip):
            raise SystemExit(f"{self.variable} is {policy!r}, but should be {self.auto}, {self.require} or {self.skip}")
        return policy


CUDA_SOURCES = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("cuda/*.cu", "cuda/*.cpp", "common/*.cpp")
    for path in sorted((ROOT / "csrc").glob(pattern))
)
MODULES = {
    module.name: module
    for module in (
        Module("flatkern._C", "FLATKERN_BUILD", "auto", "require", "skip", "C++ kernels",
               "operations run in eager PyTorch", tuple(f"csrc/{name}" for name in COMMON), write_ninja),
        Module("flatkern._CUDA", "FLATKERN_CUDA", "auto", "1", "0", "CUDA kernels",
               "Triton serves GPUs, where it is installed", CUDA_SOURCES, write_cuda_ninja),
    )
}  # fmt: skip


class NinjaBuild(build_ext):
    """build_ext that leaves the work to ninja, and the installation alive where it cannot be done."""

    def run(self) -> None:
        for module in MODULES.values():
            module.policy()  # a wrong word is told at once
        super().run()

    def build_extensions(self) -> None:
        """Build the modules one after the other: none keeps another from being built.

        In the place of one that is not built comes a text that says why, for `python -m flatkern doctor`.
        """
        built = []
        for ext in self.extensions:
            module, target = MODULES[ext.name], Path(self.get_ext_fullpath(ext.name)).resolve()
            reason = target.with_name(f"{module.name.rpartition('.')[2]}.txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            why = self.built(module, target)
            if why is None:
                reason.unlink(missing_ok=True)
                built.append(ext)
            else:
                target.unlink(missing_ok=True)  # that an earlier build has left
                reason.write_text(f"{why}\n")
        self.extensions = built

    def built(self, module: Module, target: Path) -> str | None:
        """Build one module; why it is not built, or None."""
        policy = module.policy()
        if policy == module.skip:
            return f"{module.variable} was {policy}"
        folder = "sanitized" if os.environ.get("FLATKERN_SANITIZE") else "release"
        build = Path(self.build_temp).resolve() / folder / module.name
        build.mkdir(parents=True, exist_ok=True)
        try:
            module.write_ninja(build, target)
            if subprocess.run([ninja(), "-C", str(build)], check=False).returncode != 0:
                raise BuildError("the compiler failed, and has said why")
        except BuildError as error:
            if policy == module.require:
                raise SystemExit(f"flatkern: cannot build the {module.what}: {error}") from error
            print(
                f"flatkern: the {module.what} are not built: {error}\n"
                f"flatkern: continuing without them; {module.instead} ({module.variable}={module.require} refuses)",
                file=sys.stderr,
            )
            return str(error)
        return None


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(module.name, list(module.sources)) for module in MODULES.values()],
        cmdclass={"build_ext": NinjaBuild},
    )
