"""The structure of the package: who imports whom, which names cross a file, how far a step has to be followed.

Every rule is a function of sources, {module: text}, and is tried on a few lines that break it.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from conftest import live

import flatkern

ROOT = Path(flatkern.__file__).parent
OPTIM = "flatkern.optim"
KNOW_THE_OPTIMIZER = {f"{OPTIM}.{name}" for name in ("base", "fused", "sgd", "adam", "wrap")}


def read_package():
    """{dotted name: source}; a package is its __init__."""
    sources, folder = {}, Path(flatkern.__file__).resolve().parent  # not links to it, which rglob does not follow
    for path in sorted(folder.rglob("*.py")):
        parts = ("flatkern", *path.relative_to(folder).with_suffix("").parts)
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


PACKAGE = read_package()
OPTIM_SOURCES = {name: text for name, text in PACKAGE.items() if name.startswith(OPTIM)}


# --- imports --------------------------------------------------------------------------------------


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def runtime_nodes(tree):
    """All nodes but those that only type checkers see."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            waiting.extend(child.orelse if is_type_checking(child) else [child])


def imported_modules(sources, module):
    """The modules of `sources` that `module` imports when it runs, inside of functions too."""
    is_package = any(name.startswith(module + ".") for name in sources)
    found = set()
    for node in runtime_nodes(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package] if node.level else []
            start = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{start}.{a.name}" if f"{start}.{a.name}" in sources else start for a in node.names}
    return found & (sources.keys() - {module})


def circles(sources):
    """Sets of modules that import one another, directly or through others."""
    reached = {module: imported_modules(sources, module) for module in sources}
    for _ in sources:
        reached = {module: found.union(*(reached[other] for other in found)) for module, found in reached.items()}
    return {frozenset({m} | {n for n in reached[m] if m in reached[n]}) for m in sources if m in reached[m]}


def test_no_circle_of_imports():
    assert not circles(PACKAGE)


def test_circles_are_found():
    good = {"p": "from .a import f", "p.a": "from . import b", "p.b": "import p.c", "p.c": "import torch"}
    assert not circles(good)
    assert circles(good | {"p.c": "from .a import f"}) == {frozenset({"p.a", "p.b", "p.c"})}
    assert circles(good | {"p.c": "def f():\n    from . import b"}) == {frozenset({"p.b", "p.c"})}
    assert circles(good | {"p.c": "from . import g"}) == {frozenset({"p", "p.a", "p.b", "p.c"})}
    assert not circles(good | {"p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f"})


def names_of_the_optimizer(sources):
    """Where modules below the optimizer's class name it, or import the module that has it."""
    found = []
    for module in sources.keys() - KNOW_THE_OPTIMIZER:
        for node in ast.walk(ast.parse(sources[module])):
            names = [getattr(node, "id", None), getattr(node, "attr", None)]
            imported = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported = [getattr(node, "module", None), *(alias.name.split(".")[-1] for alias in node.names)]
            if "FlatOptimizer" in names + imported or "base" in imported:
                found.append(f"{module}:{node.lineno}")
    return sorted(found)


def test_nothing_below_the_class_knows_it():
    assert not KNOW_THE_OPTIMIZER - OPTIM_SOURCES.keys()
    assert not names_of_the_optimizer(OPTIM_SOURCES)


def test_names_of_the_optimizer_are_found():
    for line in ("from .base import FlatOptimizer", "from . import base", "def f(opt: FlatOptimizer): pass",
                 "def f(opt):\n    isinstance(opt, optim.FlatOptimizer)"):  # fmt: skip
        assert names_of_the_optimizer({f"{OPTIM}.step": line})
        assert not names_of_the_optimizer({f"{OPTIM}.wrap": line})
    assert not names_of_the_optimizer({f"{OPTIM}.step": '"""What FlatOptimizer calls."""\nself.base.step()'})


# --- private names --------------------------------------------------------------------------------

# torch's own that have no public name. (`torch._foreach_*`, one call for many tensors, are as good as public.)
TORCH_PRIVATE = {
    "_BatchNorm": "the class of all BatchNorm layers",
    "_C": "torch's module of C functions",
    "_SpectralNorm": "the parametrization of torch.nn.utils.parametrizations.spectral_norm",
    "_cuda_getCurrentRawStream": "a stream's handle; torch.cuda.current_stream() makes an object of it at every call",
    "_buffers": "a module's own; running statistics are exchanged there",
    "_compile": "where torch has _disable_dynamo",
    "_disable_dynamo": "torch.compiler.disable() imports Dynamo where it decorates; this does when it is called",
    "_disable_current_modes": "a followed forward may run in a fake mode, where nothing has memory",
    "_current_graph_task_id": "tells one backward pass from the next, as torch.autograd.graph does",
    "_functorch": "a followed forward may run in transforms, which wrap all that is computed there",
    "_get_scale_async": "a GradScaler's scale, without waiting for the device",
    "_increment_version": "autograd has to be told of raw writes",
    "_get_tracing_state": "of torch.jit.trace, which would record the noise",
    "_getframe": "Python's; ZeroRedundancyOptimizer makes an optimizer without another trace",
    "_is_view": "DDP's bucket views are overwritten by the next backward",
    "_len_torch_dispatch_stack": "tells that there is a mode, without importing anything",
    "_local_tensor": "what a DTensor has on this rank; to_local() is seen by autograd, and too slow for every call",
    "_optimizer_load_state_dict_post_hooks": "load_state_dict() is ours, and runs them",
    "_optimizer_load_state_dict_pre_hooks": "load_state_dict() is ours, and runs them",
    "_optimizer_state_dict_post_hooks": "Wrap's state_dict() is its base's, and runs them",
    "_optimizer_state_dict_pre_hooks": "Wrap's state_dict() is its base's, and runs them",
    "_forward_pre_hooks": "in which order a model's hooks run",
    "_parameters": "a module's own; models override named_parameters() and __getattr__()",
    "_optimizers": "what an Accelerator has prepared; the names of a skorch net's",
    "_modules": "the names of a skorch net's",
    "_criteria": "the names of a skorch net's",
    "_optim_factory": "timm's registry is in no public module",
    "_per_optimizer_states": "what a GradScaler has found",
    "_python_dispatch": "where torch has _disable_current_modes",
    "_register_load_state_dict_pre_hook": "the public one keeps the module in the hook, and so in copies of others",
    "_set_tracing_state": "as _get_tracing_state",
    "_utils": "torch.distributed.tensor's, which computes where a shard begins",
    "_version": "counts the writes of a tensor",
}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and not name.startswith("_foreach_")


def defined_names(tree):
    """Private names that a file defines: of its module, of its classes, and of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return found


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_privates(sources, allowed=()):
    """Private names that a file takes from another one, by import or by attribute; also from `self`, by inheritance."""
    found = []
    for module, text in sources.items():
        tree = ast.parse(text)
        ours = defined_names(tree) | set(allowed)
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names] + (node.module or "").split(".")
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            found += [f"{module}:{node.lineno} {name}" for name in names if is_private(name) and name not in ours]
    return sorted(found)


def test_no_private_name_crosses_a_file():
    assert not foreign_privates(PACKAGE, TORCH_PRIVATE)


def test_every_exception_is_needed():
    """What nobody uses any more is no exception any more."""
    needed = {line.split()[1] for line in foreign_privates(PACKAGE)}
    assert not TORCH_PRIVATE.keys() - needed


def test_foreign_privates_are_found():
    for line in ("opt._parameters()", "from .plan import _build", "def f(self):\n    return self._masters(1)",
                 "import torch._dynamo", "from . import _private", "opt._step = 1"):  # fmt: skip
        assert foreign_privates({"p.a": line}), line
    for lines in ("class A:\n    def __init__(self):\n        self._x = 1\n\ndef f(a):\n    return a._x",
                  "def _f():\n    pass\n\n_f()", "class A:\n    _x: int = 0\n\nA._x", "a.__dict__",
                  "class A:\n    def _g(self):\n        return self._g()"):  # fmt: skip
        assert not foreign_privates({"p.a": lines}), lines


# --- how far a step has to be followed ------------------------------------------------------------


class Calls:
    """Counts named calls of Python functions below a folder, and how often two in a row are of different files."""

    def __init__(self, folder):
        self.folder, self.files = str(folder), []

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.folder) and not code.co_name.startswith("<"):
            self.files.append(code.co_filename)

    def count(self, call):
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(before)
        return len(self.files), sum(a != b for a, b in zip(self.files, self.files[1:], strict=False))


RWP = flatkern.RWP(sigma=0.01, lam=0.5)
LIMITS = [  # the method, which call of a step: calls, and borders between files
    ("plain", None, "step", 34, 22),
    ("m-RWP", RWP, "perturb", 34, 22),
    ("SAM", flatkern.SAM(), "perturb", 34, 22),
    ("m-RWP", RWP, "step", 40, 30),
    ("SAM", flatkern.SAM(), "step", 40, 30),
    ("rolling", flatkern.RWP(sigma=0.01, rolling=True), "step", 44, 33),
]


@pytest.mark.parametrize(
    ("name", "method", "call", "calls", "borders"), LIMITS, ids=lambda v: v if type(v) is str else ""
)
def test_a_step_can_be_read(name, method, call, calls, borders):
    """Named calls and borders between files of one call in the steady state; fewer are better."""
    live("cpp")
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    opt = flatkern.SGD(net.parameters(), lr=0.1, momentum=0.9, perturb=method, backend="cpp")

    def backward():
        net(torch.ones(4, 20)).square().mean().backward()

    counted = {}
    for _ in range(4):  # the last one is counted
        opt.zero_grad()
        backward()
        if method is not None and not opt.rolling:
            counted["perturb"] = Calls(ROOT).count(opt.perturb)
            backward()
        counted["step"] = Calls(ROOT).count(opt.step)
    found = counted[call]
    assert found[0] <= calls and found[1] <= borders, f"{name} {call}: {found[0]} calls, {found[1]} borders"


def test_calls_are_counted():
    calls = Calls(Path(__file__).parent)

    def outer():
        is_private("_x")
        return [inner() for _ in range(2)]

    def inner():
        return torch.ones(1)

    assert calls.count(outer) == (4, 0)
    assert Calls(ROOT).count(lambda: flatkern.filter_norms([torch.ones(2)]))[1] > 2


# --- functions ------------------------------------------------------------------------------------


def lengths(sources):
    """{function: its lines without the docstring}; of constructors without the signature, which is torch's."""
    found = {}
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
                docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
                start = first.lineno if node.name == "__init__" else node.lineno
                found[f"{module}:{node.lineno} {node.name}"] = node.end_lineno - start + 1 - docstring
    return found


def test_no_function_is_long():
    assert not {name: n for name, n in lengths(OPTIM_SOURCES).items() if n > 40}


def test_lengths_are_counted():
    text = 'def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    y = x\n    return y\n\n\nx = 1'
    assert lengths({"a": text}) == {"a:1 f": 5}
    assert lengths({"a": text.replace("def f", "def __init__")}) == {"a:1 __init__": 2}


METHODS = {"RWP", "SAM", "ASAM"}


def asks_for_a_method(node):
    """isinstance(x, RWP), type(x) is SAM, case RWP(): a question which method something is."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        asked = node.args[1:]
    elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
        asked = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchClass):
        asked = [node.cls]
    else:
        return False
    names = {getattr(n, "id", None) or getattr(n, "attr", None) for root in asked for n in ast.walk(root)}
    return bool(names & METHODS)


def questions(sources):
    """Functions that ask which method something is; a question outside of any is the module's."""
    found = set()
    for module, text in sources.items():
        waiting = [(ast.parse(text), module)]
        while waiting:
            node, inside = waiting.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = f"{module}.{node.name}"
            if asks_for_a_method(node):
                found.add(inside)
            waiting += [(child, inside) for child in ast.iter_child_nodes(node)]
    return found


def test_only_one_function_asks_which_method_it_is():
    sources = {module: text for module, text in PACKAGE.items() if module != "flatkern.methods"}
    assert questions(sources) == {f"{OPTIM}.perturb.perturbation_of"}


def test_questions_are_found():
    for line in ("isinstance(m, RWP)", "isinstance(m, (IRE, methods.SAM))", "type(m) is flatkern.ASAM",
                 "type(m) in (RWP, SAM)", "match m:\n        case SAM():\n            pass"):  # fmt: skip
        assert questions({"a": f"def f(m):\n    {line}"}) == {"a.f"}, line
        assert questions({"a": line.replace("\n    ", "\n")}) == {"a"}, line
    assert not questions({"a": "isinstance(m, IRE) and RWP(0.1) and type(RWP).__name__"})
