"""`python -m flatkern doctor` tells the truth: as installed, without the compiled extension, with and without triton.

Reports of other installations come from processes of their own, because backends are imported once.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatkern
from flatkern import __main__ as commands
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


# Forks a process for each scenario when torch is imported, which takes the longest; nothing of flatkern is.
FORKS = """
import json, os, runpy, sys, traceback
import numpy, torch
for name, (before, path, arguments) in json.load(sys.stdin).items():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    status = 1
    try:
        sys.path[:0] = path
        exec(before)
        sys.argv[1:] = arguments
        runpy.run_module("flatkern", run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os.write(2, f"\\nstatus {status}".encode())
    os._exit(0)
"""

JSON = ["doctor", "--json"]
EMULATION = "import os; os.environ['FLATKERN_CUDA_EMULATION'] = '/nowhere.so'"
# What is done before flatkern is imported, which of the installed tritons is found, arguments.
SCENARIOS = {
    "as installed": ("", None, JSON),
    "not built": (ABSENT.format(name="flatkern._C"), None, JSON),
    "built, but cannot be loaded": (BROKEN, None, JSON),
    "without triton": (ABSENT.format(name="triton"), None, JSON),
    "triton 99.1": ("", "99.1", JSON),
    "triton 3.5.1": ("", "3.5.1", JSON),
    "emulation": (EMULATION, None, JSON),
    "no command": ("", None, []),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{scenario: (status, output, errors)}, from a folder that holds nothing of ours."""
    folder, waiting = tmp_path_factory.mktemp("doctor"), {}
    for name, (before, triton, arguments) in SCENARIOS.items():
        waiting[name] = (before, [install_triton(folder / name, triton)] if triton else [], arguments)
    path = os.pathsep.join([str(Path(flatkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if k != "FLATKERN_BACKEND"} | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(waiting), cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for name in SCENARIOS:
        errors, _, status = (folder / f"{name}.err").read_text().rpartition("\nstatus ")
        found[name] = int(status), (folder / f"{name}.out").read_text(), errors
    return found


def install_triton(site, number):
    """A folder in which a triton of that version is installed, and empty."""
    info = site / f"triton-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {number}\n")
    (site / "triton").mkdir()
    (site / "triton" / "__init__.py").write_text("")
    return str(site)


@pytest.fixture
def report(processes):
    def facts(scenario):
        status, output, errors = processes[scenario]
        assert status == 0, errors
        return json.loads(output)

    return facts


@pytest.fixture
def run(capsys):
    """`python -m flatkern ARGUMENTS` in this process: status, output, errors."""

    def call(*arguments):
        try:
            status = commands.main(list(arguments))
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


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


def test_as_installed(report):
    facts = report("as installed")
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
    "scenario, reason",
    [("not built", "flatkern._C"), ("built, but cannot be loaded", "undefined symbol: GOMP_parallel")],
)
def test_without_the_extension(report, scenario, reason):
    facts = report(scenario)
    check_shape(facts)
    cpp = facts["backends"]["cpp"]
    assert not cpp["live"]
    assert reason in cpp["reason"]
    assert "compiler" in cpp["remedy"]
    assert facts["serves"]["cpu"] == {"eager": list(OPS)}
    assert facts["machine"]["compiled"] is None
    assert "reinstall flatkern" in facts["next"]


def test_without_triton(report):
    facts = report("without triton")
    check_shape(facts)
    assert facts["versions"]["triton"] is None
    assert "not installed" in facts["backends"]["triton"]["reason"]


@pytest.mark.parametrize("number, reason", [("99.1", "cannot be used"), ("3.5.1", "triton 3.5.1 is too old")])
def test_with_triton(report, number, reason):
    """An installed triton is named; if it cannot be used, the backend is not live and says why, without a crash."""
    facts = report(f"triton {number}")
    check_shape(facts)
    assert facts["versions"]["triton"] == number
    assert "not installed" not in facts["backends"]["triton"]["reason"]
    assert not facts["backends"]["triton"]["live"]
    assert reason in facts["backends"]["triton"]["reason"]


@pytest.mark.parametrize("rich", [True, False], ids=["as installed", "without rich"])
def test_text(run, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    status, shown, errors = run("doctor")
    assert status == 0, errors
    for name, state in flatkern.backends().items():
        assert any(line.split()[:1] == [name] for line in shown.splitlines()), f"no row for {name}"
        # What a compiler says has names of temporary files in it, and lines.
        assert state["reason"][:40] in shown
        assert state["remedy"] in shown
    assert shown.splitlines()[-1] == f"Next: {doctor.report()['next']}"


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


def test_an_emulated_library_that_is_not_there(report):
    facts = report("emulation")
    state = facts["backends"]["cuda"]
    assert state["about"] is None and not state["live"] and state["devices"] == ["cpu"]
    assert "FLATKERN_CUDA_EMULATION is '/nowhere.so', which is not there" in state["reason"]
    assert facts["serves"]["cpu"] == {"cpp" if extension_works() else "eager": list(OPS)}


def test_brief_is_one_line(run):
    _, shown, _ = run("doctor", "--brief")
    assert shown.count("\n") == 1
    assert "eager" in shown


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")
def test_rich_shows_the_same_rows(capsys):
    tables = doctor.sections(doctor.report())
    doctor.show_rich(tables)
    shown = "".join(capsys.readouterr().out.split())
    for rows in tables.values():
        for row in rows:
            assert all("".join(text.split())[:8] in shown for text in row)


# ---- what to do next


def found(live=("eager", "cpp"), default=None, devices=("cpu",)):
    """What doctor looks at to say it."""
    names = ("eager", "cpp", "triton", "cuda")
    backends = {name: {"live": name in live, "remedy": f"the remedy of {name}"} for name in names}
    return {"backends": backends, "default": default, "serves": {device: {} for device in devices}}


NEXT = {
    "all is live": (found(), "try the demo: python -m flatkern demo"),
    "no backend's name": (found(default="abacus"), "FLATKERN_BACKEND=abacus names no backend: unset it, or set one of"),
    "named and not live": (found(default="triton"), "FLATKERN_BACKEND=triton is not live, so every call is refused"),
    "its remedy": (found(default="cuda"), "the remedy of cuda"),
    "named and live": (found(default="eager"), "try the demo"),
    "a GPU without kernels": (found(devices=("cpu", "cuda")), "the remedy of triton; see docs/gpu.md#install"),
    "a GPU with kernels": (found(("eager", "cpp", "cuda"), devices=("cpu", "cuda")), "try the demo"),
}


@pytest.mark.parametrize("name", NEXT)
def test_what_to_do_next(name, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: "1.0")
    facts, text = NEXT[name]
    assert text in doctor.next_step(facts)


def test_the_demo_needs_packages(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: None if package == "sklearn" else "1.0")
    assert "pip install 'flatkern[demo]', then python -m flatkern demo" in doctor.next_step(found())


def test_a_compiler_is_the_next_thing(monkeypatch, tmp_path):
    """How to get one, or, where there is one, how to see why it did not do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler" in doctor.next_step(found(live=("eager",)))
    (tmp_path / "my-c++").write_text("")
    (tmp_path / "my-c++").chmod(0o755)
    monkeypatch.setenv("CXX", "my-c++ -O2")
    assert "FLATKERN_BUILD=require, which shows why my-c++ built no" in doctor.next_step(found(live=("eager",)))


# ---- the command line


def test_the_overview(processes, run):
    """What it is, what is live, what there is to run and to read; the same for --help."""
    status, shown, errors = processes["no command"]
    assert status == 0, errors
    assert shown.startswith(f"flatkern {flatkern.__version__}: fused kernels and optimizers")
    assert f"Here {doctor.live(doctor.report())}." in shown
    for name, command in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +.*\({command.takes}\)$", shown, re.MULTILINE)
    assert re.search(r"^Documentation: .*docs/", shown, re.MULTILINE)
    assert run("--help") == (0, shown, "")


def test_the_overview_imports_no_command(monkeypatch, run):
    """Nor what only commands need."""
    for name in ("typer", "rich", "matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [m for m in sys.modules if m.startswith("flatkern.demos")]:
        monkeypatch.delitem(sys.modules, name)
    assert run()[0] == 0
    assert not [m for m in sys.modules if m.startswith("flatkern.demos")]


def test_no_such_command(run):
    status, _, errors = run("cure")
    assert status == 2
    assert "'cure' is not a command" in errors and "doctor" in errors


NEEDS = [("demo", name) for name in ("typer", "rich", "matplotlib", "scikit-learn")]
NEEDS += [("language", name) for name in ("typer", "rich", "matplotlib")]


@pytest.mark.parametrize("command, package", NEEDS)
def test_a_missing_requirement_is_named(command, package, run, monkeypatch):
    module = {"scikit-learn": "sklearn"}.get(package, package)
    for name in [m for m in sys.modules if m.startswith(("flatkern.demos", f"{module}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    status, shown, errors = run(command, "--help")
    assert status == 1 and not shown
    assert f"{command} needs {package}, which is not installed: pip install {package}, or" in errors
    assert "pip install 'flatkern[demo]'" in errors


def test_an_interrupted_command(run, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert run("doctor") == (130, "", "interrupted\n")
