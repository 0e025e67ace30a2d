"""`python -m flatkern doctor` tells the truth: as installed, without the compiled extension, with and without triton.

Every report comes from a process of its own, because backends are imported once.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatkern
from flatkern import dispatch, doctor
from flatkern.ops import OPS

# What a process finds wrong before flatkern is imported.
ABSENT = "import sys; sys.modules[{name!r}] = None\n"
BROKEN = """
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "flatkern._C" else None
    def create_module(self, spec): return None
    def exec_module(self, module): raise ImportError("undefined symbol: GOMP_parallel")
sys.meta_path.insert(0, Broken())
"""


def run(folder, *arguments, before="", path=()):
    """`python -m flatkern ARGUMENTS`, from a folder that holds nothing of ours."""
    source = str(Path(flatkern.__file__).parents[1])
    code = (
        f"{before}\nimport runpy, sys\nsys.argv[1:] = {arguments!r}\nrunpy.run_module('flatkern', run_name='__main__')"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), source, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def report(folder, **how):
    done = run(folder, "doctor", "--json", **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def extension_works():
    try:
        dispatch.compiled_module("cpp")
    except ImportError:
        return False
    return True


def check_shape(facts):
    assert list(facts["backends"]) == ["eager", "cpp", "triton", "cuda"]
    for name, state in facts["backends"].items():
        assert bool(state["reason"]) is not state["live"], name
        assert bool(state["remedy"]) is not state["live"], name
        assert state["ops"] == [op.name for op in OPS.values() if name in ("eager", *op.backends.split())]
    assert facts["backends"]["eager"]["live"]
    assert facts["machine"]["threads"] >= 1
    assert facts["machine"]["processor"]


def test_as_installed(tmp_path):
    facts = report(tmp_path)
    check_shape(facts)
    assert facts["backends"]["cpp"]["live"] is extension_works()
    assert facts["serves"]["cpu"] == {"cpp" if extension_works() else "eager": list(OPS)}
    assert (facts["machine"]["compiled"] is not None) is extension_works()


@pytest.mark.parametrize("op", OPS)
def test_the_dispatcher_agrees(op):
    for name, state in flatkern.backends().items():
        here = {"any", "cpu"} & set(state["devices"])
        if here and state["live"] and name in ("eager", *OPS[op].backends.split()):
            assert callable(dispatch.resolve(op, "cpu", name))
        else:
            with pytest.raises(RuntimeError, match=name):
                dispatch.resolve(op, "cpu", name)


@pytest.mark.parametrize(
    "before, reason",
    [(ABSENT.format(name="flatkern._C"), "flatkern._C"), (BROKEN, "undefined symbol: GOMP_parallel")],
    ids=["not built", "built, but cannot be loaded"],
)
def test_without_the_extension(tmp_path, before, reason):
    facts = report(tmp_path, before=before)
    check_shape(facts)
    cpp = facts["backends"]["cpp"]
    assert not cpp["live"]
    assert reason in cpp["reason"]
    assert "compiler" in cpp["remedy"]
    assert facts["serves"]["cpu"] == {"eager": list(OPS)}
    assert facts["machine"]["compiled"] is None


def test_without_triton(tmp_path):
    facts = report(tmp_path, before=ABSENT.format(name="triton"))
    check_shape(facts)
    assert facts["versions"]["triton"] is None
    assert "not installed" in facts["backends"]["triton"]["reason"]


@pytest.mark.parametrize("number, reason", [("99.1", "cannot be used"), ("3.5.1", "triton 3.5.1 is too old")])
def test_with_triton(tmp_path, number, reason):
    """An installed triton is named; if it cannot be used, the backend is not live and says why, without a crash."""
    info = tmp_path / "site" / f"triton-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {number}\n")
    (tmp_path / "site" / "triton").mkdir()
    (tmp_path / "site" / "triton" / "__init__.py").write_text("")
    facts = report(tmp_path, path=[tmp_path / "site"])
    check_shape(facts)
    assert facts["versions"]["triton"] == number
    assert "not installed" not in facts["backends"]["triton"]["reason"]
    assert not facts["backends"]["triton"]["live"]
    assert reason in facts["backends"]["triton"]["reason"]


@pytest.mark.parametrize("before", ["", ABSENT.format(name="rich")], ids=["as installed", "without rich"])
def test_text(tmp_path, before):
    done = run(tmp_path, "doctor", before=before)
    assert done.returncode == 0, done.stderr
    for name, state in flatkern.backends().items():
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines()), f"no row for {name}"
        # What a compiler says has names of temporary files in it, and lines.
        assert state["reason"][:40] in done.stdout
        assert state["remedy"] in done.stdout


ABOUT = {
    "emulated": False, "file": "/there/_CUDA.so", "toolkit": "13.0", "capabilities": "8.0, 9.0",
    "driver": "12.4", "needs": "one for CUDA 13.0 (580 or later)", "devices": 0, "problem": "insufficient",
}  # fmt: skip


def test_the_cuda_backend_is_described():
    """Toolkit, architectures, the driver that there is and the one that is needed; emulated, there is none."""
    rows = dict(doctor.cuda_rows(ABOUT))
    assert rows == {
        "extension": "/there/_CUDA.so",
        "toolkit": "CUDA 13.0",
        "emulated": "no",
        "compiled for": "compute capability 8.0, 9.0; later ones of these generations too, newer generations by "
        "PTX of the highest",
        "driver": "for CUDA 12.4; it needs one for CUDA 13.0 (580 or later)",
        "GPUs": "0: insufficient",
    }
    assert dict(doctor.cuda_rows(ABOUT | {"emulated": True}))["emulated"].startswith("yes")
    assert dict(doctor.cuda_rows(ABOUT | {"driver": None}))["driver"].startswith("none; it needs")


def test_an_emulated_library_that_is_not_there(tmp_path):
    facts = report(tmp_path, before="import os; os.environ['FLATKERN_CUDA_EMULATION'] = '/nowhere.so'")
    state = facts["backends"]["cuda"]
    assert state["about"] is None and not state["live"] and state["devices"] == ["cpu"]
    assert "FLATKERN_CUDA_EMULATION is '/nowhere.so', which is not there" in state["reason"]
    assert facts["serves"]["cpu"] == {"cpp" if extension_works() else "eager": list(OPS)}


def test_brief_is_one_line(tmp_path):
    done = run(tmp_path, "doctor", "--brief")
    assert done.stdout.count("\n") == 1
    assert "eager" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")
def test_rich_shows_the_same_rows(capsys):
    tables = doctor.sections(doctor.report())
    doctor.show_rich(tables)
    shown = "".join(capsys.readouterr().out.split())
    for rows in tables.values():
        for row in rows:
            assert all("".join(text.split())[:8] in shown for text in row)


@pytest.mark.parametrize("arguments, status", [((), 0), (("--help",), 0), (("cure",), 2)])
def test_usage(tmp_path, arguments, status):
    done = run(tmp_path, *arguments)
    assert done.returncode == status
    assert "doctor" in done.stdout + done.stderr


def test_a_missing_requirement_is_named(tmp_path):
    done = run(tmp_path, "demo", "--help", before=ABSENT.format(name="typer"))
    assert done.returncode == 1
    assert "needs typer: pip install 'flatkern[demo]'" in done.stderr
