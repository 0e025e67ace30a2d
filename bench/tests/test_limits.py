"""The limits of calls: their streams are those of the calls. No test looks at a clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from bench import races
from bench.candidates import DTYPES, flatkern_optimizer
from bench.methods import BASES, METHODS, call_floors
from bench.models import MODELS, Model
from bench.runner import Runner
from bench.timing.harness import Gradients, run_cycle
from bench.timing.limits import MASK, Limit, Streams, streams, streams_of
from flatkern import dispatch

KINDS = [(dtype, masters) for dtype in DTYPES for masters in (False, True) if not (masters and dtype == "float32")]


@pytest.mark.parametrize("dtype, masters", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_floors(method, base, dtype, masters):
    """Of every call that a step of the method makes."""
    does, kind = METHODS[method], DTYPES[dtype]
    floors = call_floors(does, base, kind.itemsize, masters)
    assert {turn.call for turn in does.cycle} == floors.keys()
    got = {call: sum(p.bytes for p in streams(does, base, call, kind, masters)) for call in floors}
    assert got == pytest.approx(floors)


@pytest.fixture
def called(monkeypatch):
    """What operations are called with from here on: the streams that they have."""
    found, load = [], dispatch.load

    def recording(op, backend):
        function = load(op, backend)

        def run(*args, **kwargs):
            values = dispatch.bind(op, args, kwargs)
            lists = {a.name: values.get(a.name) for a in op.arguments if a.type.startswith("Tensor[]")}
            # One number per row or tensor is no stream.
            dtypes = {k: v[0].dtype for k, v in lists.items() if v is not None and k not in ("history", "steps")}
            found.append(streams_of(op.name, noise=values.get("noise") is not None, **dtypes))
            function(*args, **kwargs)

        run.progress = function.progress
        return run

    monkeypatch.setattr(dispatch, "load", recording)
    dispatch.resolve.cache_clear()
    yield found
    dispatch.resolve.cache_clear()


def counted(passes):
    """How often each pass comes, whatever the order of its streams and of the passes."""
    counts = Counter()
    for p in passes:
        sorted_streams = [tuple(sorted(map(str, dtypes))) for dtypes in (p.reads, p.updates, p.writes)]
        counts[(p.op, *sorted_streams)] += p.share
    return {key: round(count, 6) for key, count in counts.items()}


@pytest.mark.parametrize("dtype, masters", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_passes_are_the_ops_of_a_step(method, base, dtype, masters, called):
    """Those that an optimizer calls in a cycle, and the lists of tensors that it gives them."""
    does, kind = METHODS[method], DTYPES[dtype]
    torch.manual_seed(0)
    params = [torch.randn(4, 8).to(kind).requires_grad_() for _ in range(2)]
    optimizer, gradients = flatkern_optimizer(params, does, base, backend="eager", masters=masters), Gradients(params)
    run_cycle(optimizer, params, does.cycle, gradients)
    got = defaultdict(list)
    for turn in does.cycle:
        gradients.deliver(params, turn.gradient, 1)
        called.clear()
        getattr(optimizer, turn.call)()
        got[turn.call] += [replace(p, share=turn.share) for p in called]
    wanted = {call: streams(does, base, call, kind, masters) for call in got}
    if does.rounds > 1 and not masters:
        # The floor saves the weights once, and the optimizer in every round.
        wanted["perturb"] = does.rounds * wanted["perturb"][:2]
    assert {k: counted(passes) for k, passes in got.items()} == {k: counted(passes) for k, passes in wanted.items()}


def test_unknown():
    """A list that an operation does not take, and a call that no method makes."""
    with pytest.raises(ValueError, match="restore_ takes no grads"):
        streams_of("restore_", params=torch.float32, backups=torch.float32, grads=torch.float32)
    with pytest.raises(ValueError, match="call is 'climb'"):
        streams(METHODS["sam"], "sgd", "climb", torch.float32)


SHAPES = [(3, 5), (), (0, 7), (1030,)]


def test_a_limit():
    """Each pass has memory of its own, with the fastest of its variants; passes alike are measured once."""
    pytest.importorskip("flatkern._C", reason="the C++ kernels are not built")
    one = Streams("", (torch.float32, MASK), (torch.bfloat16,), (torch.float32,))
    other = Streams("", (torch.float32,), (), (), share=0.2)
    limit = Limit(SHAPES, [one, other, replace(one, share=0.5)], "cpu")
    moves = limit.variants()
    assert len(moves) % 2 == 0 and {name.partition(":")[0] for name in moves} == {"0", "1"}
    seconds = {name: 9.0 for name in moves}
    first, second = list(moves)[1], list(moves)[-1]
    seconds |= {first: 2.0, second: 5.0}
    assert limit.choose(seconds) == pytest.approx(2.0 + 0.2 * 5.0 + 0.5 * 2.0)
    assert limit.chosen == [first, second, first]
    limit()
    for move in moves.values():
        move()


@pytest.mark.skipif(bool(dispatch.refuse("sgd_update_", "cpp", "cpu")), reason="the C++ kernels are not built")
def test_a_race_measures_the_limits_of_its_calls(monkeypatch):
    """Of each call of ours, as the fastest way to move its streams; of a rival's none, and of a small model's none."""
    monkeypatch.setitem(MODELS, "one", Model("One", lambda: [(64, 80)], 1, 5120))
    entries = (races.Entry("flatkern cpp"), races.Entry("torch fused"))
    runner = Runner(1, 0.01, limits=True)
    runner.run(races.Race("limits", "one", "sam", "sgd", entries))
    runner.run(races.Race("limits", "tiny_160", "sam", "sgd", entries))
    rows = {(b["params"]["model"], b["params"]["candidate"]): b["extra_info"].get("limits") for b in runner.benchmarks}
    assert rows.pop(("one", "flatkern cpp")).keys() == {"perturb", "step"}
    assert set(rows.values()) == {None} and runner.failures == []
