"""Operations, and calls of optimizers, at ResNet-50's size, the usual pytest-benchmark way.

    pytest bench/tests/test_bench.py --benchmark-only
    pytest bench/tests/test_bench.py --benchmark-only -k "test_op and perturb and cpp"
    pytest bench/tests/test_bench.py --benchmark-only -k "test_call and sam"

Operations, their arguments and their traffic are read from flatkern.ops.OPS, so a new row is a new benchmark; methods
and candidates are those of `python -m flatkern bench`, whose rounds are interleaved. Nothing here asserts a time.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.baselines.loops import filter_norm
from bench.candidates import Candidate
from bench.methods import BASES, METHODS
from bench.models import MODELS
from bench.races import MAIN
from bench.timing.harness import Clock, Gradients
from flatkern.dispatch import DEVICES, refuse, resolve
from flatkern.ops import OPS
from flatkern.tables import mask_shape

CASES = [
    (op, backend)
    for op in OPS.values()
    for backend in (*op.backends.split(), "eager")
    if {"any", "cpu"} & set(DEVICES[backend])
]

# Optional arguments that the benchmark leaves out: the common case has no masters, no history, no scaler,
# and its noise comes from perturb_gaussian_ (which measures its norms itself), not from a rolling update.
ABSENT = {
    "masters", "history", "masks", "norms", "lrs", "sigmas", "noise", "component", "grad_scale", "clip", "found_inf",
    "means", "new_means", "outs",
}  # fmt: skip

SCALARS = {
    "sigma": 0.01, "rho": 0.05, "eta": -1.0, "beta": 0.99, "grad_weight": 0.5, "clean_weight": 0.5,
    "lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False,
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "offset": 0, "kappa": 2.0,
}  # fmt: skip


def make(argument, shapes):
    """A value for one argument of a schema, by its name and type."""
    if argument.type.endswith("?") and argument.name in ABSENT:
        return None
    if argument.type in ("float[]", "int[]", "bool[]"):
        return list(range(len(shapes))) if argument.name == "index" else [SCALARS[argument.name]] * len(shapes)
    if argument.name == "noise":
        return torch.tensor([0, 0, 0])
    if argument.name in ("norm", "threshold"):
        return torch.tensor(1.0)
    if argument.name == "products":
        return torch.zeros(3, dtype=torch.float64)
    if argument.name == "counts":
        return torch.zeros(2050, dtype=torch.int64)
    if argument.name == "prefix":
        return torch.zeros(0, dtype=torch.int64)
    if argument.name == "masks":
        return [torch.zeros(mask_shape(torch.empty(s)), dtype=torch.uint8) for s in shapes]
    if argument.name == "norms":
        return [torch.atleast_1d(filter_norm(torch.ones(s))) for s in shapes]
    if argument.name == "steps":
        return [torch.tensor(1.0) for _ in shapes]
    return [0.05 * torch.rand(s) for s in shapes]


def traffic(op, values) -> int:
    """Bytes of the elements that the table says are read and written, each once."""
    read, written = set(op.reads.split()), set(op.writes)
    if "backups" in read:
        read -= {"params"}  # the clean weights are in the copy,
        written -= {"backups"}  # which only a rolling update renews
    lists = [values[name] for name in [*read, *written] if values.get(name) is not None]
    return sum(t.numel() * t.element_size() for ts in lists for t in (ts if isinstance(ts, list) else [ts]))


@pytest.mark.parametrize("op, backend", CASES, ids=[f"{op.name}-{backend}" for op, backend in CASES])
def test_op(op, backend, benchmark):
    try:
        function = resolve(op.name, "cpu", backend)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    shapes = MODELS["tiny_160" if benchmark.disabled else "resnet50"].shapes()  # a smoke test needs no size
    torch.manual_seed(0)
    values = {argument.name: make(argument, shapes) for argument in op.arguments}
    args = [values[a.name] for a in op.arguments if not a.keyword_only]
    kwargs = {a.name: values[a.name] for a in op.arguments if a.keyword_only}

    benchmark.group = op.name
    if backend == "eager":  # seconds per call where noise is drawn
        benchmark.pedantic(function, args, kwargs, rounds=2, warmup_rounds=1)
    else:
        benchmark(function, *args, **kwargs)

    if benchmark.stats:
        moved = traffic(op, values)
        benchmark.extra_info["bytes"] = moved
        benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9


CALLS = [
    (name, base, label, call)
    for name, base in itertools.product(MAIN, BASES)
    for label in (*(f"flatkern {b}" for b in ("cpp", "eager")), "foreach", "loop", "torch fused", "torch foreach")
    if label.startswith("flatkern") or label.startswith("torch") == (name == "plain")
    for call in dict.fromkeys(turn.call for turn in METHODS[name].cycle)
]


class UpTo:
    """An optimizer on its way to a call: gradients arrive, and the calls before it are made."""

    def __init__(self, candidate: Candidate, call: str) -> None:
        self.candidate, self.call = candidate, call
        self.turns = itertools.cycle(candidate.method.cycle)

    def __call__(self) -> None:
        for turn in self.turns:
            self.candidate.gradients.deliver(self.candidate.params, turn.gradient, 0)
            if turn.call == self.call:
                return
            getattr(self.candidate.optimizer, turn.call)()


def parameters(case: tuple[str, ...]):
    """Whether it runs is seen with one base and the fastest candidates."""
    rest = [pytest.mark.matrix] if case[1] == "adamw" or case[2] == "flatkern eager" else []
    return pytest.param(*case, id="-".join(case).replace(" ", "-"), marks=rest)


@pytest.mark.parametrize("name, base, label, call", map(parameters, CALLS))
def test_call(name, base, label, call, benchmark):
    if label == "flatkern cpp" and (reason := refuse("sgd_update_", "cpp", "cpu")):
        pytest.skip(reason)
    shapes = MODELS["tiny_160" if benchmark.disabled else "resnet50"].shapes()
    torch.manual_seed(0)
    weights = [0.05 * torch.randn(s) for s in shapes]
    candidate = Candidate(label, weights, Gradients(weights), name, base)
    candidate.steps(Clock(), 0)

    benchmark.group = f"{name} {base} {call}()"
    rounds = 2 if "eager" in label else 15
    benchmark.pedantic(getattr(candidate.optimizer, call), setup=UpTo(candidate, call), rounds=rounds, warmup_rounds=1)
