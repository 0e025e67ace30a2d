"""The registered ops: torch's own checks, the bits that dispatch gives, one node under torch.compile, no fallback.

What runs behind them is cpp; in `make test-cuda`, the CUDA kernels, emulated.
"""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import cases
import pytest
import torch
from compare import assert_ulp, copies
from conftest import BACKENDS, live

import flatkern
from flatkern import dispatch, library
from flatkern.dispatch import resolve
from flatkern.library import register
from flatkern.ops import OPS

SHAPES = [(3, 5), (7,), ()]
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(params=[name for name in BACKENDS if name != "eager"])
def serving(request, monkeypatch):
    """The compiled backend that serves the registered ops. On the CPU that is cpp; another has to be preferred, as on a
    GPU."""
    live("cpp")  # without which nothing is registered for the CPU
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", (live(request.param), "eager"))
    for found in (library.backend_of, resolve):
        found.cache_clear()
    yield request.param
    for found in (library.backend_of, resolve):
        found.cache_clear()


def arguments(op, dtype=torch.float32):
    """Every optional argument, in one call."""
    words = " ".join(cases.VARIANTS[op.name]).replace("skip", "").replace("specials", "")
    return getattr(cases, op.name)(SHAPES, dtype, variant=words)


def registered(op):
    return getattr(torch.ops.flatkern, op.name).default


@every_op
def test_opcheck(op, serving):
    """Mutations are those of the schema, fakes agree, and functionalization keeps every result."""
    values = arguments(op)
    tensors = tuple(values[a.name] for a in op.arguments if not a.keyword_only)
    torch.library.opcheck(registered(op), tensors, {a.name: values[a.name] for a in op.arguments if a.keyword_only})


@every_op
def test_same_bits_and_versions_as_dispatch(op, serving):
    got, want = arguments(op, cases.FLOATS), arguments(op, cases.FLOATS)
    cases.call(registered(op), op, got)
    cases.call(resolve(op.name, "cpu", serving), op, want)
    for argument in op.arguments:
        if argument.type.startswith("Tensor[]") and got[argument.name] is not None:
            for k, (a, b) in enumerate(zip(got[argument.name], want[argument.name], strict=True)):
                assert_ulp(f"{argument.name}[{k}]", a, b)
                assert a._version == b._version, f"{argument.name}[{k}]"


def test_registering_twice_is_once():
    assert register() is register()


# torch.compile.


def parameters(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(3, 5, generator=generator)),
        torch.nn.Parameter(torch.randn(7, generator=generator).to(dtype)),
    ]


def saved(params):
    return [torch.zeros_like(p, requires_grad=False) for p in params]


@pytest.fixture
def compiled():
    """Compiles with fullgraph=True; `compiled.nodes` lists the flatkern ops of the graphs that were made."""
    torch._dynamo.reset()

    def backend(module, inputs):
        ops = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        compile_.nodes += [name for name in ops if name.startswith("flatkern.")]
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def compile_(function, fullgraph=True):
        return torch.compile(function, fullgraph=fullgraph, backend=backend)

    compile_.nodes = []
    yield compile_
    torch._dynamo.reset()


def test_perturb_and_restore_compile(compiled, serving):
    """One node an op, not one a tensor; the same bits and as many versions as outside."""

    def function(params, backups):
        norms = flatkern.filter_norms(params)
        flatkern.perturb_(params, 0.1, seed=1, round=2, norms=norms, backups=backups)
        sums = [p.sum() for p in params]
        flatkern.restore_(params, backups)
        return sums + norms

    results = []
    for run in (function, compiled(function)):
        params = parameters()
        backups, clean = saved(params), copies(params)
        results.append([t.detach() for t in run(params, backups)] + backups)
        assert all(torch.equal(p, c) for p, c in zip(params, clean, strict=True))
        assert [p._version for p in params] == [2, 2]
    for a, b in zip(*results, strict=True):
        assert_ulp("compiled", b, a)
    assert compiled.nodes == ["flatkern.filter_norms_", "flatkern.perturb_gaussian_", "flatkern.restore_"]


def test_gradients_are_those_of_the_perturbed_weights(compiled, serving):
    """The perturbation is part of the graph, the backward pass follows it, the weights are then put back."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

    def loss(params, backups):
        flatkern.perturb_(params, 0.3, seed=1, round=2, backups=backups)
        return torch.tanh(x @ params[0].t()).square().sum() + params[1].float().pow(3).sum()

    results = []
    for run in (loss, compiled(loss)):
        params = parameters()
        backups = saved(params)
        value = run(params, backups)
        value.backward()
        flatkern.restore_(params, backups)
        results.append([value.detach(), *(p.grad for p in params), *(p.detach() for p in params)])
    for a, b in zip(*results, strict=True):
        assert_ulp("compiled", b, a)


def test_rounds_do_not_recompile_without_end(compiled, serving):
    """Seed and round change every step; after the first changes torch takes them as inputs of the graph."""

    def function(params, round):
        flatkern.perturb_(params, 0.1, seed=1, round=round)

    run = compiled(function)
    for round in range(12):
        got, want = parameters(), parameters()
        run(got, round)
        function(want, round)
        for a, b in zip(got, want, strict=True):
            assert_ulp(f"round {round}", a.detach(), b.detach())
    assert len(compiled.nodes) <= 3


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_eager_by_name_is_eager_when_compiled(compiled, monkeypatch, how):
    """No registered op is in the graph: what is asked for is used."""
    live("cpp")
    if how == "environment":
        monkeypatch.setenv("FLATKERN_BACKEND", "eager")

    def function(params):
        flatkern.perturb_(params, 0.1, seed=1, round=2, backend="eager" if how == "argument" else None)

    got, want = parameters(), parameters()
    compiled(function, fullgraph=False)(got)
    flatkern.perturb_(want, 0.1, seed=1, round=2, backend="eager")
    for a, b in zip(got, want, strict=True):
        assert_ulp(how, a.detach(), b.detach())
    assert compiled.nodes == []


@pytest.mark.parametrize("backend, message", [("triton", "triton runs on cuda only"), ("fast", "backend is 'fast'")])
def test_a_backend_that_cannot_run_is_refused_when_compiled(compiled, backend, message):
    live("cpp")
    params = parameters()
    clean = copy.deepcopy(params)
    with pytest.raises(Exception, match=message):
        compiled(lambda: flatkern.perturb_(params, 0.1, seed=1, round=2, backend=backend))()
    assert all(torch.equal(p, c) for p, c in zip(params, clean, strict=True))


BAD = {"sigma": (dict(sigma=float("nan")), "sigma"), "seed": (dict(seed=-1), "seed is -1")}


@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD)
def test_bad_numbers_are_refused_when_compiled(compiled, bad, message):
    live("cpp")
    params = parameters()
    clean = copy.deepcopy(params)
    with pytest.raises(Exception, match=message):
        compiled(lambda: flatkern.perturb_(params, **dict(sigma=0.1, seed=1, round=2) | bad))()
    assert all(torch.equal(p, c) for p, c in zip(params, clean, strict=True))


# Without compiled kernels. Backends are imported once, so in a process of its own.


def without_cpp(code):
    """Run code in a process where flatkern._C does not exist; its assertions are the test."""
    folders = [str(Path(flatkern.__file__).parents[1]), str(Path(__file__).parent)]
    before = f"import sys; sys.path[:0] = {folders!r}; sys.modules['flatkern._C'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", before + textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_is_no_eager_fallback_kernel():
    """A registered op that has no kernel says so, and writes nothing."""
    without_cpp("""
        import copy, torch, flatkern, cases
        from flatkern.ops import OPS
        assert not flatkern.backends()["cpp"]["live"]
        for op in OPS.values():
            values = getattr(cases, op.name)([(3, 5), (7,)], torch.float32)
            before = copy.deepcopy(values)
            try:
                cases.call(getattr(torch.ops.flatkern, op.name), op, values)
            except NotImplementedError as error:
                assert op.name in str(error)
            else:
                raise AssertionError(f"{op.name} ran")
            for name, value in values.items():
                if isinstance(value, list) and isinstance(value[0], torch.Tensor):
                    assert all(torch.equal(a, b) for a, b in zip(value, before[name])), name
    """)


def test_compiled_functions_work_without_compiled_kernels():
    """As outside of torch.compile: eager, after one warning that says why."""
    without_cpp("""
        import warnings, torch, flatkern
        def function(p):
            flatkern.perturb_([p], 0.1, seed=1, round=2)
        got, want = torch.ones(3, 5), torch.ones(3, 5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile(function, backend="aot_eager")(got)
        assert any("eager PyTorch" in str(w.message) for w in caught)
        flatkern.perturb_([want], 0.1, seed=1, round=2, backend="eager")
        assert torch.equal(got, want) and not torch.equal(got, torch.ones(3, 5))
    """)
