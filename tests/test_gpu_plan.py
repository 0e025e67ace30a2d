"""What test_gpu.py calls, without a GPU: each two choices meet, calls are right ones, and few kernels are compiled."""

import collections
import itertools
import sys
from pathlib import Path

import cases
import gpu_cases
import pairwise
import pytest
import torch
from capturing import METHODS, TRAINED, Run, trained
from compare import assert_within
from conftest import live

from flatkern import dispatch
from flatkern.dispatch import load, resolve
from flatkern.jobs import recording

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind everything: only bench/ is looked for there

# A core compiles one or two a second.
MOST_KERNELS = 460


@pytest.mark.parametrize("op", gpu_cases.TRITON, ids=lambda op: op.name)
def test_each_two_arguments_meet(op):
    """Both there, either of them, and none, where that may be; and every op has both kinds of tensors."""
    found = [case for case in gpu_cases.CASES if case.op is op]
    assert {case.kind for case in found} == {gpu_cases.EVEN, gpu_cases.ANY}
    assert any(case.repeats for case in found)
    words, may = [set(case.words.split()) for case in found], gpu_cases.allowed(op)
    optional = [a.name for a in op.arguments if a.type.endswith("?")]
    for pair in itertools.combinations(optional, 2):
        for there in itertools.product((True, False), repeat=2):
            wanted = {name: name if yes else "" for name, yes in zip(pair, there, strict=True)}
            met = any(all((name in case) is yes for name, yes in zip(pair, there, strict=True)) for case in words)
            # A call that is skipped has found_inf too.
            met |= wanted.get("found_inf") == "found_inf" and any(
                "skip" in case and all((n in case) is bool(w) for n, w in wanted.items() if n != "found_inf")
                for case in words
            )
            assert met or not may(wanted), wanted


@pytest.mark.parametrize("op", gpu_cases.TRITON, ids=lambda op: op.name)
def test_what_was_special_is_still_called(op):
    found = [set(case.words.split()) for case in gpu_cases.CASES if case.op is op]
    if op.name == "adam_update_":
        return  # it differs from AdamW in the decay
    for words in (set(words.split()) for words in cases.VARIANTS[op.name]):
        if {"specials", "offset"} & words or op.family != "update":
            assert any(words <= case for case in found), words


@pytest.mark.parametrize("op", gpu_cases.TRITON, ids=lambda op: op.name)
def test_every_list_has_every_dtype(op):
    dtypes = {}
    for case in gpu_cases.CASES:
        for name, value in case.make("meta").items() if case.op is op and case.kind == gpu_cases.ANY else ():
            if isinstance(value, list) and isinstance(value[0], torch.Tensor):
                dtypes.setdefault(name, set()).update(t.dtype for t in value)
    assert dtypes
    for name, seen in dtypes.items():
        assert seen in ({torch.float32}, {torch.uint8}, set(cases.FLOATS)), name


def test_a_new_argument_shows_up():
    """And what two choices exclude is left out."""
    factors = {name: ("", name) for name in "abcdef"} | {"g": ("", "one", "two")}
    rows = pairwise.rows(factors, lambda row: not (row.get("a") and row.get("b")), first=[dict.fromkeys(factors, "")])
    assert rows[0] == dict.fromkeys(factors, "") and len(rows) <= 10
    assert rows == pairwise.rows(factors, lambda row: not (row.get("a") and row.get("b")), first=rows[:1])
    met = set().union(*map(pairwise.met_in, rows))
    assert not any(row["a"] and row["b"] for row in rows)
    for (m, x), (n, y) in itertools.combinations([(n, v) for n, values in factors.items() for v in values], 2):
        assert m == n or (x, y) == ("a", "b") or frozenset([(m, x), (n, y)]) in met


@pytest.mark.parametrize("case", gpu_cases.CASES, ids=str)
def test_the_calls_are_right(case):
    """What another backend makes of them is eager's, within its bounds."""
    live("cpp")
    got, want = (case.make("cpu", shapes=[(3, 5), (33,), (0,), (7, 2, 2, 3), (), (4, 0), (1, 1100)]) for _ in range(2))
    cases.call(resolve(case.op.name, "cpu", "cpp"), case.op, got)
    cases.call(resolve(case.op.name, "cpu", "eager"), case.op, want)
    assert_within(case.op, got, want)


@pytest.fixture
def silent(monkeypatch):
    """Triton serves the CPU, and launches nothing."""
    triton = pytest.importorskip("triton", minversion="3.6", reason="triton is not installed, so it compiles nothing")
    from bench.gpu import silent_driver

    monkeypatch.setitem(dispatch.DEVICES, "triton", ["cuda", "cpu"])
    before = triton.runtime.driver._active
    silent_driver.install()
    dispatch.resolve.cache_clear()
    yield
    dispatch.resolve.cache_clear()
    triton.runtime.driver.set_active(before)


def test_few_kernels_are_compiled(silent):
    """By calls, and by the networks in training; recorded, as warm_up() does, so that nothing is compiled here."""
    found = collections.Counter()
    seen = set()
    for case in gpu_cases.CASES:
        with recording("captured" in case.words.split()) as jobs:
            cases.call(load(case.op, "triton"), case.op, case.make("cpu"))
        found[case.op.name] += len(set(jobs) - seen)
        seen |= set(jobs)
        if case.repeats:
            with recording("captured" in case.words.split()) as jobs:
                cases.call(load(case.op, "triton"), case.op, case.make("cpu", 5))
            assert set(jobs) <= seen, f"{case} with more tensors needs other kernels"
    networks = []
    for rule, method, capturable in itertools.product(("SGD", "AdamW"), METHODS, (True, False)):
        with recording(capturable) as jobs:
            Run(rule, method, capturable).train(2).opt.eval()
        networks += jobs
    for method in TRAINED.values():
        with recording() as jobs:
            trained(method, "cpu", "triton")
        networks += jobs
    found["networks"] = len(set(networks) - seen)
    assert 200 < found.total() <= MOST_KERNELS, found
