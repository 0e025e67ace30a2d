"""The wheel that `make wheel-cuda` has built: what it holds, and that it does no harm where there is no driver."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from test_package import doctor, run

BUILT = Path(os.environ["FLATKERN_CUDA_BUILD"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, installed."""
    (wheel,) = (BUILT / "dist").glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def library(site):
    (library,) = (site / "flatkern").glob("_CUDA*.so")
    return library


def read(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=True).stdout


def test_it_holds_both_modules_and_nothing_else_that_is_compiled(site, library):
    compiled = [path for path in site.rglob("*") if path.suffix in (".so", ".a", ".o", ".cubin")]
    assert {re.match(r"_[A-Z]+", path.name)[0] for path in compiled} == {"_C", "_CUDA"}
    assert not [path.name for path in (site / "flatkern").glob("*.txt")], "they would say why a module was not built"


def test_it_needs_no_library_of_cuda_or_torch(library):
    needed = re.findall(r"^\s*(\S+)", read("ldd", library), re.MULTILINE)
    assert not [name for name in needed if re.search("cuda|torch|c10|nvidia", name)], needed


def test_the_runtime_inside_stays_inside(library):
    """torch may have loaded a runtime of another version for the whole process."""
    names = read("nm", "-D", library).splitlines()
    assert any(name.endswith(" T PyInit__CUDA") for name in names)
    assert not [name for name in names if re.search(r"\bcuda[A-Z]|\bcu[A-Z]", name)]


def test_without_a_gpu_it_is_installed_and_not_live(site, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = doctor(site, tmp_path)
    state = facts["backends"]["cuda"]
    about = state["about"]
    assert facts["backends"]["cpp"]["live"]
    assert not state["live"]
    assert state["reason"].startswith("cuda cannot be used (")
    assert re.search("driver|GPU", state["reason"])
    assert about["file"].startswith(str(site))
    assert re.fullmatch(r"\d+\.\d+", about["toolkit"])
    assert re.fullmatch(r"(\d+\.\d, )*\d+\.\d", about["capabilities"])
    text = run(site, tmp_path, "-m", "flatkern", "doctor")
    assert "Backend cuda" in text and about["needs"] in text


def test_importing_flatkern_does_not_load_it(site, tmp_path):
    code = "import flatkern, sys; print([name for name in sys.modules if name.endswith('_CUDA')])"
    assert run(site, tmp_path, "-c", code).strip() == "[]"
