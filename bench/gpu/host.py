"""What a call costs the host: of an operation, and of an optimizer. Nothing is launched, and no GPU is needed.

Triton compiles the kernels for sm_90 and launches them by its own launchers, on a libcuda that does nothing (see
stub_driver.py); the CUDA kernels' emulation drops launches. So a launch counts without the CUDA driver's own part (a
few microseconds each), and tables are made but not copied to a device. Tensors are as many as ResNet-50 has and of its
shapes, or a thousand small ones; they are on the CPU and take no part.

An optimizer's call has the operation's in it, and reads the tensors several times more: gradients, versions, state,
values of groups. It is measured twice: one call after the other, and with caches that have been filled with other data
meanwhile, which is nearer to a training, where a forward and a backward pass come between. torch's fused SGD is beside
it, on as many tensors of one element, which cost its kernel next to nothing.

    python bench/gpu/host.py
    python bench/gpu/host.py --plain     # without flatkern._C, as where no compiler was found
    python bench/gpu/host.py --no-launcher     # without Triton's launchers, where there is no C compiler
    FLATKERN_CUDA_EMULATION=build/cuda-emulation/_CUDA_emul... python bench/gpu/host.py --cuda
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns

import torch

if __package__ in (None, ""):  # run as a script: the installed flatkern, if any, stays in front
    sys.path.append(str(Path(__file__).resolve().parents[2]))

import flatkern
from bench.baselines.loops import torch_optimizer
from bench.candidates import flatkern_optimizer
from bench.gpu import silent_driver, stub_driver
from bench.methods import METHODS
from bench.models import many_small, resnet50
from flatkern import dispatch
from flatkern.ops import OPS
from flatkern.tables import mask_shape

COLUMNS = "unchanged, reading, versions, launches, the rest, new gradients, another rate".split(", ")
COLUMNS_OF_CUDA = "unchanged, new gradients, another rate".split(", ")
NUMBERS = {
    "sigma": 0.01, "eta": -1.0, "beta": 0.99, "grad_weight": 1.0, "clean_weight": 0.0, "lr": 1e-3, "momentum": 0.9,
    "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "offset": 0,
    "kappa": 2.0, "rho": 0.05,
}  # fmt: skip
WARM_UP = 5  # cycles: kernels are compiled, tables made, and launches become known
OTHER_DATA = 16_000_000  # float32, more than a cache holds
OPTIMIZERS = (("m-rwp", "sgd"), ("sam", "sgd"), ("rolling", "sgd"), ("plain", "sgd"), ("plain", "adamw"))
CALLS = {  # label: op, and which optional arguments it is given
    "perturb_gaussian_": ("perturb_gaussian_", "backups"),
    "sgd_update_": ("sgd_update_", "momentum_buffers backups"),
    "adamw_update_": ("adamw_update_", ""),
    "adamw_update_, IRE, rolling": ("adamw_update_", "backups masks noise"),
}


def make(name: str, given: str, shapes: list[tuple[int, ...]]) -> dict:
    """Arguments of one op. Their memory is never written, and so hardly there, as no kernel runs."""
    values: dict = {}
    for a in OPS[name].arguments:
        if a.type.endswith("?") and a.name not in given.split():
            values[a.name] = None
        elif a.name == "noise":
            values[a.name] = torch.tensor([1, 2, 3])
        elif a.name == "masks":
            values[a.name] = [torch.zeros(mask_shape(torch.empty(s, device="meta")), dtype=torch.uint8) for s in shapes]
        elif a.name == "steps":
            values[a.name] = [torch.tensor(1.0) for _ in shapes]
        elif a.type.startswith("Tensor[]"):
            values[a.name] = [torch.empty(s) for s in shapes]
        else:
            values[a.name] = list(range(len(shapes))) if a.name == "index" else [NUMBERS[a.name]] * len(shapes)
    values["params"] = [torch.nn.Parameter(p) for p in values["params"]]
    return values


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, burst: int = 20) -> dict[str, float]:
    """Median microseconds of a call, over rounds in which every candidate has a burst of calls.

    Time of this thread on a processor, so that nobody else's work is counted; without the garbage collector.
    """
    times: dict[str, list[float]] = {label: [] for label in calls}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for label, call in calls.items():
            start = thread_time_ns()
            for _ in range(burst):
                call()
            times[label].append((thread_time_ns() - start) / burst / 1000)
    gc.enable()
    return {label: statistics.median(each) for label, each in times.items()}


def caller(name: str, backend: str) -> tuple[Callable[[dict], None], list[str]]:
    """A call of an op by its arguments' names; the names of those that are tensors."""
    op, run = OPS[name], dispatch.load(OPS[name], backend)
    numbers = [a.name for a in op.arguments if a.keyword_only]
    tensors = [a.name for a in op.arguments if not a.keyword_only]
    return lambda values: run(*[values[n] for n in tensors], **{n: values[n] for n in numbers}), tensors


def changing(call: Callable[[dict], None], values: dict) -> dict[str, Callable[[], None]]:
    """Calls, by column, between which the gradients are others, or the learning rate."""

    def alternating(key: str, choices: list) -> Callable[[], None]:
        def run_one() -> None:
            choices.reverse()
            call(values | {key: choices[0]})

        return run_one

    if "grads" not in values:
        return {}
    grads = [[g.clone() for g in values["grads"]] for _ in range(2)]
    rates = [[rate] * len(values["grads"]) for rate in (1e-3, 2e-3)]
    return {"new gradients": alternating("grads", grads), "another rate": alternating("lr", rates)}


def measure_cuda(name: str, given: str, shapes: list[tuple[int, ...]], rounds: int) -> tuple:
    """The same of the CUDA kernels, whose call is one of C++."""
    module, values = dispatch.compiled_module("cuda"), make(name, given, shapes)
    call, _ = caller(name, "cuda")
    call(values)
    before = module.launch_count()
    call(values)
    count = module.launch_count() - before
    return interleaved({"unchanged": lambda: call(values), **changing(call, values)}, rounds), count


def measure(name: str, given: str, shapes: list[tuple[int, ...]], rounds: int) -> tuple:
    """Microseconds by column, and the number of launches."""
    from flatkern.triton_kernels import launch, signature

    values = make(name, given, shapes)
    run, tensors = caller(name, "triton")

    def call() -> None:
        run(values)

    for _ in range(3):  # it compiles, launches what it can repeat, repeats it
        call()
    arguments = tuple([values[n] for n in tensors])
    last = launch._caches[name].last_call(arguments)
    launches, bump = last.bound, dispatch.version_bumper()

    def launch_all() -> None:
        for start, everything in launches:
            start(*everything)

    found = interleaved(
        {
            "unchanged": call,
            "reading": lambda: signature.read(arguments, last.reading),
            "versions": lambda: bump(values["params"]),
            "launches": launch_all,
            **changing(run, values),
        },
        rounds,
    )
    found["the rest"] = found["unchanged"] - found["launches"] - found["reading"] - found["versions"]
    return found, len(launches)


def measure_optimizer(optimizer, params: list[torch.Tensor], method: str, rounds: int) -> dict[str, list[float]]:
    """Median microseconds of each call of a method's cycle: one after the other, and behind other data."""
    gradients = [[[torch.empty_like(p) for p in params] for _ in METHODS[method].cycle] for _ in range(2)]
    other = torch.ones(OTHER_DATA)
    found: dict[str, list[float]] = {}
    for between in (lambda: None, lambda: other.add_(1)):
        times: dict[str, list[float]] = {turn.call: [] for turn in METHODS[method].cycle}
        gc.collect()
        gc.disable()
        for count in range(WARM_UP + rounds):
            for turn, arriving in zip(METHODS[method].cycle, gradients[count % 2], strict=True):
                torch._C._increment_version(arriving)
                for p, grad in zip(params, arriving, strict=True):
                    p.grad = grad
                between()
                start = thread_time_ns()
                getattr(optimizer, turn.call)()
                if count >= WARM_UP:
                    times[turn.call].append((thread_time_ns() - start) / 1000)
        gc.enable()
        for call, each in times.items():
            found.setdefault(call, []).append(statistics.median(each))
    return found


def report_optimizers(backend: str, rounds: int) -> None:
    """Whole calls of optimizers whose tensors are on the CPU; `backend` launches nothing."""
    if "cpu" not in dispatch.DEVICES[backend]:
        dispatch.DEVICES[backend].append("cpu")
    torch.set_num_threads(1)
    print(f"\n{'whole calls of optimizers, us':46}{'one by one':>15}{'behind others':>15}")

    def show(label: str, found: dict[str, list[float]]) -> None:
        for call, each in found.items():
            print(f"{f'{label}, {call}':46}" + "".join(f"{us:15.1f}" for us in each))

    shapes = resnet50()
    for method, base in OPTIMIZERS:
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        optimizer = flatkern_optimizer(params, METHODS[method], base, backend=backend)
        label = f"{len(params)} tensors, {METHODS[method].title}, {base}"
        show(label, measure_optimizer(optimizer, params, method, rounds))
    for base in ("sgd", "adamw"):
        params = [torch.nn.Parameter(torch.zeros(1)) for _ in shapes]
        optimizer = torch_optimizer(params, base, fused=True)
        label = f"{len(params)} tensors, torch fused, {base}"
        show(label, measure_optimizer(optimizer, params, "plain", rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help="read tensors in Python, as where there is no flatkern._C")
    parser.add_argument("--no-launcher", action="store_true", help="without what Triton's launchers cost")
    parser.add_argument("--cuda", action="store_true", help="of the CUDA kernels, which FLATKERN_CUDA_EMULATION names")
    args = parser.parse_args()
    if args.cuda:
        report_cuda(args.rounds)
    else:
        report_triton(args)


def report_cuda(rounds: int) -> None:
    state = flatkern.backends()["cuda"]
    if not (state["live"] and state["about"]["emulated"]):
        sys.exit("error: FLATKERN_CUDA_EMULATION should be the library that `make test-cuda` builds")
    dispatch.compiled_module("cuda").launch_nothing(True)
    print("us per call of the CUDA kernels; host side only, nothing is launched")
    table(COLUMNS_OF_CUDA, lambda *case: measure_cuda(*case, rounds))
    report_optimizers("cuda", rounds)


def report_triton(args: argparse.Namespace) -> None:
    if args.no_launcher:
        silent_driver.install()
    else:
        try:
            stub_driver.install()
        except stub_driver.Unavailable as error:
            sys.exit(f"error: {error}; --no-launcher measures without Triton's own part of a launch")
    import triton
    from flatkern.triton_kernels import signature

    if args.plain:
        signature.compiled = lambda: None
    read = "in Python" if signature.compiled() is None else "by flatkern._C"
    launched = "nothing is launched" if args.no_launcher else "launched by Triton on a libcuda that does nothing"
    print(f"us per call; host side only, {launched}; triton {triton.__version__}, tensors read {read}")
    table(COLUMNS, lambda *case: measure(*case, args.rounds))
    report_optimizers("triton", args.rounds)


def table(columns: list[str], measured: Callable[..., tuple]) -> None:
    """A row a call and list of tensors."""
    print(f"{'':38}{'launches':>9}" + "".join(f"{c:>15}" for c in columns))
    for shapes in (resnet50(), many_small()):
        for label, (name, given) in CALLS.items():
            found, count = measured(name, given, shapes)
            cells = "".join(f"{found[c]:15.1f}" if c in found else f"{'-':>15}" for c in columns)
            print(f"{f'{len(shapes)} tensors, {label}':38}{count:9}{cells}")


if __name__ == "__main__":
    main()
