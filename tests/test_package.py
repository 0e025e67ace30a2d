"""What an sdist and a wheel contain, that flatkern installs without a compiler, and the rules of the house.

Builds run on a copy of the sources, offline, with the build tools of this environment.
"""

import ast
import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import flatkern

ROOT = Path(__file__).resolve().parents[1]
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "results"
)

BUILD_TOOLS = ("pip", "setuptools", "pybind11", "ninja")
builds = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in BUILD_TOOLS),
    reason=f"one of {', '.join(BUILD_TOOLS)} is not installed",
)


def build(*arguments, cwd, **environment):
    """Run a build in the environment of the tests, less what would steer it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLATKERN_")} | {"FLATKERN_CUDA": "0"} | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def pip_wheel(source, out, *arguments, **environment):
    return build(
        *"-m pip wheel --disable-pip-version-check --no-index --no-build-isolation --no-deps -v -w".split(),
        out, *arguments, source, cwd=out, **environment,
    )  # fmt: skip


def run(site, folder, *arguments):
    """Run Python with flatkern from `site`. -S keeps away the finder of an editable installation, which would
    supply from the checkout whatever modules `site` lacks."""
    paths = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = build("-S", *arguments, cwd=folder, PYTHONPATH=paths, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def doctor(site, folder):
    return json.loads(run(site, folder, "-m", "flatkern", "doctor", "--json"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "flatkern"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCES)
    return folder


def made_once(tmp_path_factory, name, make):
    """The folder that `make(folder)` fills; test processes share what the first of them makes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            (unfinished := shared / f"{name}.unfinished").mkdir()
            make(unfinished)
            unfinished.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory):
    def make(folder):
        done = build("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source)
        assert done.returncode == 0, done.stderr

    (archive,) = made_once(tmp_path_factory, "sdist", make).glob("*.tar.gz")
    return archive


def wheel_of(sdist, tmp_path_factory, name, **environment):
    """Made from the sdist, so that it is known to hold all that is needed."""

    def make(folder):
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        done = pip_wheel(folder / sdist.name.removesuffix(".tar.gz"), folder, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

    (archive,) = made_once(tmp_path_factory, name, make).glob("*.whl")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    return wheel_of(sdist, tmp_path_factory, "wheel", FLATKERN_BUILD="skip")


@pytest.fixture(scope="session")
def compiled_wheel(sdist, tmp_path_factory):
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "c++"))):
        pytest.skip("there is no C++ compiler")
    # -O0 is the fastest to compile; the optimized kernels are tested elsewhere.
    return wheel_of(sdist, tmp_path_factory, "compiled-wheel", FLATKERN_BUILD="require", CXXFLAGS="-O0")


class TestSdist:
    pytestmark = builds

    def test_holds_every_source(self, sdist, source):
        with tarfile.open(sdist) as archive:
            inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        for folder in ("csrc", "flatkern", "triton_kernels"):
            for path in (source / folder).rglob("*"):
                if path.suffix in CODE or path.name == "py.typed":
                    assert str(path.relative_to(source)) in inside
        assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= inside


class TestWheel:
    pytestmark = builds

    def test_wheel_installs_flatkern_and_nothing_else(self, wheel):
        """A top-level `triton_kernels` would hide the package of that name that other projects import."""
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            info = next(n.split("/")[0] for n in names if n.endswith(".dist-info/RECORD"))
            record = archive.read(f"{info}/RECORD").decode().splitlines()
            top_level = archive.read(f"{info}/top_level.txt").decode().split()
        assert {line.split(",")[0].split("/")[0] for line in record} == {"flatkern", info}
        assert top_level == ["flatkern"]

    def test_holds_every_module(self, wheel, source):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        for path in (source / "flatkern").rglob("*.py"):
            assert str(path.relative_to(source)) in names
        for path in (source / "triton_kernels").rglob("*.py"):
            assert f"flatkern/{path.relative_to(source)}" in names
        assert "flatkern/triton_kernels/__init__.py" in names
        for folder in (".", "baselines", "timing", "report", "training"):
            for path in (source / "bench" / folder).glob("*.py"):
                assert f"flatkern/{path.relative_to(source)}" in names
        assert not [n for n in names if n.startswith(("flatkern/bench/tests", "flatkern/bench/gpu"))]
        assert not [n for n in names if n.startswith(("flatkern/tests", "tests", "bench", "csrc"))]

    def test_metadata(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
            licenses = [n for n in archive.namelist() if n.endswith("LICENSE")]
        assert metadata["Name"] == "flatkern"
        assert metadata["Version"] == flatkern.__version__
        assert metadata["Summary"]
        assert metadata["License-Expression"] == "Apache-2.0"
        assert licenses
        assert metadata["Requires-Python"].startswith(">=3.")
        assert metadata["Description-Content-Type"].startswith("text/markdown")
        needed = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
        names = {re.split(r"[^a-z]", r)[0] for r in needed}
        assert names == {"torch", "numpy"}, "everything else is optional"

    @pytest.mark.matrix
    def test_installed_wheel_runs_compiled_kernels(self, compiled_wheel, tmp_path):
        with zipfile.ZipFile(compiled_wheel) as archive:
            names = archive.namelist()
            archive.extractall(tmp_path / "site")
        assert [n for n in names if re.fullmatch(r"flatkern/_C\..*(so|pyd)", n)]
        assert not [n for n in names if re.fullmatch(r"flatkern/_CUDA\..*(so|pyd)", n)], "FLATKERN_CUDA is 0 here"
        facts = doctor(tmp_path / "site", tmp_path)
        assert facts["backends"]["cpp"]["live"], facts["backends"]["cpp"]
        assert facts["backends"]["cuda"]["about"] is None
        assert "FLATKERN_CUDA was 0" in facts["backends"]["cuda"]["reason"]
        assert facts["machine"]["compiled"]["file"].startswith(str(tmp_path))
        # Not imported: that needs triton.
        code = "import importlib.util as u; print(u.find_spec('flatkern.triton_kernels').origin)"
        assert run(tmp_path / "site", tmp_path, "-c", code).startswith(str(tmp_path))


class TestWithoutCompiler:
    pytestmark = builds

    @pytest.fixture
    def nothing(self, tmp_path):
        """An environment in which no compiler can be found."""
        (tmp_path / "bin").mkdir()
        return {"PATH": str(tmp_path / "bin"), "CXX": "/nonexistent", "CC": "/nonexistent"}

    def test_installs_and_says_so(self, source, tmp_path, nothing):
        done = pip_wheel(shutil.copytree(source, tmp_path / "source"), tmp_path, **nothing)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "/nonexistent" in done.stdout + done.stderr
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert not [n for n in archive.namelist() if n.endswith((".so", ".pyd"))]
            archive.extractall(tmp_path / "site")
        facts = doctor(tmp_path / "site", tmp_path)
        assert not facts["backends"]["cpp"]["live"]
        assert "compiler" in facts["backends"]["cpp"]["remedy"]

    def test_require_makes_it_an_error(self, source, tmp_path, nothing):
        done = pip_wheel(shutil.copytree(source, tmp_path / "source"), tmp_path, FLATKERN_BUILD="require", **nothing)
        assert done.returncode != 0
        assert re.search(r"cannot build the C\+\+ kernels: .*/nonexistent", done.stdout + done.stderr)


# ---- the rules of the house


def sources(*folders, suffixes=CODE):
    """Code files below the given folders of the checkout."""
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes]


def imported(path):
    """What a Python file imports: absolute names; relative ones with their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names |= {start} if node.module else {start + alias.name for alias in node.names}
    return names


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_no_code_file_is_longer_than_500_lines():
    files = [ROOT / "setup.py", *sources("flatkern", "csrc", "triton_kernels", "tests", "bench")]
    too_long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 500}
    assert not too_long


@pytest.mark.parametrize(
    ("name", "allowed"), [("ops.py", set()), ("values.py", set()), ("methods/*.py", {"..values", ".fields"})]
)
def test_descriptions_import_nothing_of_ours(name, allowed):
    for path in (ROOT / "flatkern").glob(name):
        ours = {n for n in imported(path) if n.startswith((".", "flatkern"))}
        assert path.name == "__init__.py" or ours <= allowed


def test_only_dispatch_knows_where_backends_live():
    for path in sources("flatkern", suffixes={".py"}):
        if path.name == "dispatch.py" or path.parent.name == "reference":
            continue
        named = {n for n in imported(path) if re.search(r"_C\b|triton_kernels", n)}
        assert not named and not re.search(r"flatkern\._C|flatkern\.triton_kernels", path.read_text()), path


def test_importing_flatkern_imports_no_backend_but_eager():
    done = build(
        "-c", "import flatkern, sys; print(*sorted(m for m in sys.modules if m.startswith('flatkern')))", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "flatkern.ops" in done.stdout.split()
    assert not {m for m in done.stdout.split() if "triton" in m or "demo" in m or m.endswith("_C")}


def test_only_the_bindings_include_pybind11():
    found = {str(p.relative_to(ROOT / "csrc")) for p in sources("csrc") if any("pybind11" in i for i in includes(p))}
    assert found <= {"common/bind.h", "cpu/bindings.cpp", "cuda/bindings.cpp"}


def test_no_torch_in_the_extension():
    for path in sources("csrc"):
        assert not [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))], path


def test_element_functions_include_the_standard_library_only():
    """csrc/math is compiled by every compiler, for every machine."""
    for path in sources("csrc/math"):
        foreign = [i for i in includes(path) if "/" in i or (i.endswith(".h") and not (path.parent / i).exists())]
        assert not foreign and "omp.h" not in includes(path) and "#pragma omp" not in path.read_text(), path


def test_triton_kernels_refuses_to_be_top_level():
    """Run from a checkout it would otherwise hide a package of that name that other projects import."""
    done = build("-c", "import triton_kernels", cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "ImportError" in done.stderr
