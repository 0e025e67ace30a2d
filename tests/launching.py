"""What calls of the Triton backend launch on the driver that launches nothing, for tests of its host side."""

import cases
import torch
from covering import also
from flatkern.triton_kernels import launch, launcher

from flatkern import dispatch
from flatkern.ops import OPS

# A matrix, a vector, and rows that are longer than a program holds.
SHAPES = [(64, 16), (24,), (2, 8208)]
SHORT = SHAPES[:2]
WORDS = "backups noise momentum_buffers grad_scale"
# Those with most arguments: a kernel takes a second to compile.
VARIANTS = [
    row
    for op in OPS.values()
    for *others, most in [sorted(cases.VARIANTS[op.name], key=len)[-2:]]
    for row in [(op, most), *also(*((op, words) for words in others))]
]


def forget(monkeypatch):
    """Nothing is remembered of earlier calls."""
    monkeypatch.setattr(launch, "_caches", {op.name: launch.OpCache(op) for op in OPS.values()})


def make(op, shapes, words):
    return getattr(cases, op.name)(shapes, torch.float32, variant=words)


def launched(driver, op, values):
    """What a call launches, in which a pointer given as an integer is the tensor that it points to.

    Nothing else is a number as large. What is pointed to is kept alive by the caller, by the plan or by the last call.
    """
    driver.launches = []
    cases.call(dispatch.load(op, "triton"), op, values)
    alive = {t.data_ptr(): t for t in [*kept_for(op), *values.values()] if isinstance(t, torch.Tensor)}
    driver.launches = [
        x._replace(arguments=tuple([alive[a] if isinstance(a, int) and a >= 2**32 else a for a in x.arguments]))
        for x in driver.launches
    ]
    return driver.launches


def kept_for(op):
    """Memory that calls of an op have made."""
    for last in launch._caches[op.name].last_calls.values():
        yield from last.tables.values()
        yield from launcher.tensors_of(last.plan)


def repeats(op):
    """Whether the last call's launches can be repeated."""
    (last,) = launch._caches[op.name].last_calls.values()
    return bool(last.launches)


def seen(launches):
    """Launches as a kernel sees them; scratch is somewhere else in another plan."""

    def content(name, argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        if argument.dim() == 0 or name in ("component", "products"):  # the caller's own
            return argument.data_ptr()
        is_scratch = argument.dtype not in (torch.int64, torch.float64) or name == "partials"
        return tuple(argument.shape) if is_scratch else argument.tolist()

    def arguments(x):
        return [content(name, a) for name, a in zip(x.signature, x.arguments, strict=True)]

    return [(x.function, x.grid, x.stream, arguments(x)) for x in launches]


def assert_as_a_first_call(driver, op, values, got, monkeypatch):
    """`got` is what a call launches for which nothing is remembered."""
    with monkeypatch.context() as patch:
        forget(patch)
        assert seen(got) == seen(launched(driver, op, values))
