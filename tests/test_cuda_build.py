"""How setup.py finds nvcc and what it asks of it, and that flatkern._CUDA never stands in the way of flatkern._C.

The compilers are scripts here; `make test-cuda` builds with a real nvcc.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_package import ROOT, builds

KNOWN = (75, 80, 86, 90, 100, 120)
FOLDERS = '#$ INCLUDES="-I/toolkit/include"  \n#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"'


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py. They need nothing of setuptools, which minds what has been imported before it."""
    spec = importlib.util.spec_from_file_location("flatkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        patch.setitem(sys.modules, "setuptools", SimpleNamespace(Extension=None, setup=None))
        patch.setitem(sys.modules, "setuptools.command.build_ext", SimpleNamespace(build_ext=object))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def clean(setup, monkeypatch, tmp_path):
    """An environment in which there is no nvcc."""
    for name in ("FLATKERN_NVCC", "FLATKERN_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(setup, "CUDA_DEFAULT", tmp_path / "default")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def nvcc(path, release="13.0", known=KNOWN, compiles="touch"):
    """One that answers, and compiles by writing an empty file."""
    code = " ".join(f"sm_{arch}" for arch in known)
    return script(path, f"""
case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
*--list-gpu-code*) printf '%s\\n' {code} ;;
*--dryrun*) echo {shlex.quote(FOLDERS)} >&2 ;;
*) while [ "$1" != -o ]; do shift; done; {compiles} "$2" ;;
esac""")  # fmt: skip


class TestWhereNvccIs:
    @pytest.fixture
    def places(self, tmp_path):
        """All places at once, the first one first."""
        names = ("FLATKERN_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "default")
        return {name: nvcc(tmp_path / name / "bin" / "nvcc") for name in names}

    @pytest.mark.parametrize("first", range(5))
    def test_the_order(self, setup, clean, monkeypatch, places, first):
        given = dict(list(places.items())[first:])
        for name, path in places.items():
            if name not in given:
                Path(path).unlink()
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.setenv(name, str(Path(places[name]).parents[1]))  # also where it holds no nvcc
        monkeypatch.setenv("PATH", str(Path(places["PATH"]).parent))
        if "FLATKERN_NVCC" in given:
            monkeypatch.setenv("FLATKERN_NVCC", given["FLATKERN_NVCC"])
        assert setup.find_nvcc() == next(iter(given.values()))

    def test_nowhere(self, setup, clean, tmp_path):
        with pytest.raises(setup.BuildError, match=r"no nvcc found \(tried .*CUDA_HOME.*PATH, .*default\)$"):
            setup.find_nvcc()

    def test_on_rocm_it_is_not_missed(self, setup, clean, tmp_path):
        script(tmp_path / "empty" / "hipcc", "exit 0")
        with pytest.raises(setup.BuildError, match="on ROCm Triton serves GPUs"):
            setup.find_nvcc()

    def test_one_that_is_named_is_used_or_refused(self, setup, clean, monkeypatch, tmp_path):
        nvcc(tmp_path / "default" / "bin" / "nvcc")
        monkeypatch.setenv("FLATKERN_NVCC", "/nonexistent/nvcc")
        with pytest.raises(setup.BuildError, match="FLATKERN_NVCC is '/nonexistent/nvcc', which is not there"):
            setup.find_nvcc()


class TestWhatNvccIs:
    @pytest.mark.parametrize("release", ["11.8", "12.0", "9.2"])
    def test_too_old(self, setup, tmp_path, release):
        with pytest.raises(setup.BuildError, match=rf"is of CUDA {release}, but 12\.1 or later is needed"):
            setup.toolkit_version(nvcc(tmp_path / "nvcc", release))

    @pytest.mark.parametrize("release", ["12.1", "12.10", "13.0"])
    def test_new_enough(self, setup, tmp_path, release):
        assert setup.toolkit_version(nvcc(tmp_path / "nvcc", release)) == release

    def test_nothing_that_answers(self, setup, tmp_path):
        for text, message in (
            ("echo hello", "names no release: 'hello'"),
            ("echo broken >&2; exit 3", "fails: broken"),
            ("exit 3", "fails: it says nothing, exit status 3"),
        ):
            with pytest.raises(setup.BuildError, match=message):
                setup.toolkit_version(script(tmp_path / "nvcc", text))
        (tmp_path / "nvcc").chmod(0o644)
        with pytest.raises(setup.BuildError, match="cannot be run: Permission denied"):
            setup.toolkit_version(str(tmp_path / "nvcc"))


class TestArchitectures:
    @pytest.fixture
    def found(self, setup, clean, monkeypatch, tmp_path):
        def found(asked, known=KNOWN):
            monkeypatch.setenv("FLATKERN_CUDA_ARCHS", asked)
            return setup.architectures(nvcc(tmp_path / "nvcc", known=known), "13.0")

        return found

    def test_the_usual_ones_that_this_nvcc_knows(self, found):
        assert found("") == [80, 90, 100]
        assert found("", known=(50, 80, 90)) == [80, 90]

    @pytest.mark.parametrize("asked", ["90 80", "80,90", "90;80;90"])
    def test_others(self, found, asked):
        assert found(asked) == [80, 90]

    @pytest.mark.parametrize("asked", ["95", "80 9.0", "sm_90", "90a"])
    def test_unknown_ones_are_refused(self, setup, found, asked):
        with pytest.raises(setup.BuildError, match=r"FLATKERN_CUDA_ARCHS names \S+, but should name some of 75 80 86"):
            found(asked)

    def test_none_of_the_usual_ones(self, setup, found):
        with pytest.raises(setup.BuildError, match="knows none of"):
            found("", known=(110,))


@builds
class TestCommands:
    @pytest.fixture
    def text(self, setup, clean, monkeypatch, tmp_path):
        def text(**environment):
            script(tmp_path / "bin" / "g++", "exit 0")
            script(tmp_path / "bin" / "ccache", "exit 0")
            monkeypatch.setenv("PATH", str(tmp_path / "bin"))
            monkeypatch.setenv("FLATKERN_NVCC", nvcc(tmp_path / "nvcc"))
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            setup.write_cuda_ninja(tmp_path, tmp_path / "_CUDA.so")
            lines = (tmp_path / "build.ninja").read_text().splitlines()
            return {line.split(" = ")[0]: line.split(" = ")[1] for line in lines if " = " in line}

        return text

    def test_code_for_each_and_ptx_of_the_highest(self, text):
        device = text(FLATKERN_CUDA_ARCHS="90 80")["device"]
        code = [word.removeprefix("-gencode=") for word in device.split() if "gencode" in word]
        assert code == [f"arch=compute_{a},code={c}" for a, c in ((80, "sm_80"), (90, "sm_90"), (90, "compute_90"))]

    def test_numbers_are_those_of_every_compiler(self, text):
        device = text()["device"].split()
        assert "--fmad=false" in device and "-Xcompiler=-ffp-contract=off" in device
        assert not {"--use_fast_math", "-use_fast_math", "--ftz=true"} & set(device)

    def test_what_the_module_says_of_itself(self, text):
        flags = shlex.split(text(FLATKERN_CUDA_ARCHS="80 90")["flags"])
        assert {'-DFK_CUDA_TOOLKIT="13.0"', '-DFK_CUDA_ARCHS="80 90"', "-isystem/toolkit/include"} <= set(flags)

    def test_cxx_is_the_host_compiler_too(self, text):
        assert "-ccbin" not in text()["device"]
        found = text(CXX="ccache g++ -m64")
        assert "-ccbin g++ -Xcompiler=-m64" in found["device"]
        assert found["cxx"] == "ccache g++ -m64"

    def test_the_runtime_is_inside(self, text):
        link = text(LDFLAGS="-Wl,-z,now")["link"].split()
        assert {"-L/toolkit/lib", "-lcudart_static", "-Wl,--exclude-libs,ALL", "-Wl,-z,now"} <= set(link)
        assert "-lcudart" not in link


@builds
class TestBothModules:
    """Builds of setup.py with sources that are empty, and compilers that write empty files."""

    @pytest.fixture
    def tree(self, tmp_path, setup):
        tree = tmp_path / "tree"
        sources = [*setup.COMMON, *(f"cpu/{family}.cpp" for family in setup.FAMILIES), "cuda/update.cu"]
        for name in sources:
            path = tree / "csrc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        shutil.copy(ROOT / "setup.py", tree)
        return tree

    @pytest.fixture
    def build(self, tree, tmp_path):
        cxx = script(tmp_path / "g++", 'while [ "$1" != -o ]; do shift; done; touch "$2"')

        def build(nvcc, **environment):
            env = {k: v for k, v in os.environ.items() if not k.startswith("FLATKERN_")}
            done = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--build-lib=lib"],
                cwd=tree, env=env | {"CXX": cxx, "FLATKERN_NVCC": nvcc} | environment,
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            found = {path.name.partition(".")[0]: path for path in (tree / "lib" / "flatkern").glob("*.so")}
            texts = {path.stem: path.read_text() for path in (tree / "lib" / "flatkern").glob("*.txt")}
            return done, set(found), texts

        return build

    def test_both_are_built_where_there_is_an_nvcc(self, build, tmp_path):
        done, found, texts = build(nvcc(tmp_path / "nvcc"))
        assert done.returncode == 0, done.stderr
        assert found == {"_C", "_CUDA"}
        assert not texts

    def test_a_failing_nvcc_leaves_the_other(self, build, tmp_path):
        done, found, texts = build(nvcc(tmp_path / "nvcc", compiles="echo no such type >&2; false"))
        assert done.returncode == 0, done.stderr
        assert found == {"_C"}
        assert "no such type" in done.stdout
        assert done.stderr.count("the CUDA kernels are not built: the compiler failed") == 1
        assert "FLATKERN_CUDA=1 refuses" in done.stderr
        assert texts == {"_CUDA": "the compiler failed, and has said why\n"}

    def test_without_nvcc(self, build):
        done, found, texts = build("/nonexistent")
        assert done.returncode == 0, done.stderr
        assert found == {"_C"}
        assert "continuing without them; Triton serves GPUs" in done.stderr
        assert "which is not there" in texts["_CUDA"]

    def test_1_makes_it_an_error(self, build):
        done, _, _ = build("/nonexistent", FLATKERN_CUDA="1")
        assert done.returncode != 0
        assert "cannot build the CUDA kernels: FLATKERN_NVCC is '/nonexistent'" in done.stderr

    def test_0_builds_none_and_keeps_none(self, build, tmp_path):
        """A folder that an earlier build has left is no reason for a wheel to hold them."""
        compiler = nvcc(tmp_path / "nvcc")
        assert build(compiler)[1] == {"_C", "_CUDA"}
        done, found, texts = build(compiler, FLATKERN_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert found == {"_C"}
        assert texts == {"_CUDA": "FLATKERN_CUDA was 0\n"}

    def test_flatkern_build_governs_the_other_alone(self, build, tmp_path):
        done, found, texts = build(nvcc(tmp_path / "nvcc"), FLATKERN_BUILD="skip", FLATKERN_CUDA="1")
        assert done.returncode == 0, done.stderr
        assert found == {"_CUDA"}
        assert texts == {"_C": "FLATKERN_BUILD was skip\n"}

    @pytest.mark.parametrize("name, known", [("FLATKERN_CUDA", "auto, 1 or 0"), ("FLATKERN_BUILD", "auto, require or")])
    def test_other_words_are_refused(self, build, name, known):
        done, found, _ = build("/nonexistent", **{name: "yes"})
        assert done.returncode != 0
        assert f"{name} is 'yes', but should be {known}" in done.stderr
        assert not found
