"""Whether a candidate computes what flatkern's reference computes, on a few small tensors: a wrong rival may be a fast
one, and no speed-up over it is printed.

Gradients are preset. Compared are the weights after three steps, with noise of size zero, and of methods that climb the
points where they take their gradients; of methods that draw noise, its mean and size per filter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from .baselines.loops import filter_norm, per_filter
from .candidates import build, flatkern_optimizer
from .methods import METHODS, Method
from .timing.harness import Gradients, run_cycle

Build = Callable[[list[Tensor], Method, str], object]  # an optimizer of parameters, method and base

SHAPES = [(64, 8, 3, 3), (64,), (1, 5, 16), (40, 100), (40,)]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}  # a few roundings of three steps; a restore by subtraction is within it


def weights(device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device)) for s in SHAPES]


def silent(method: Method) -> Method:
    """The same method with noise of size zero: everything but the noise can be compared exactly."""
    return replace(method, sigma=1e-30) if method.sigma else method


def trained(make: Build, method: Method, base: str, steps: int = 3, device="cpu") -> list[Tensor]:
    """The clean weights after some steps."""
    params = weights(device)
    optimizer = make(params, method, base)
    gradients = Gradients(params, sets=2)
    for _ in range(steps):
        run_cycle(optimizer, params, method.cycle, gradients)
    if method.rolling:
        optimizer.eval()
    return [p.detach() for p in params]


def renew(gradients: Gradients, seed: int) -> None:
    """Other gradients."""
    kinds = gradients.sources.values()
    generator = torch.Generator(next(iter(kinds))[0].device).manual_seed(seed)
    for sources in kinds:
        for s in sources:
            s.normal_(0, 0.01, generator=generator)


def moved(make: Build, method: Method, base: str, device="cpu") -> list[Tensor]:
    """The perturbed weights of a third cycle, each with gradients of its own: the first two make means and momenta."""
    params = weights(device)
    optimizer = make(params, method, base)
    gradients = Gradients(params, sets=1)
    for seed in (11, 12):
        run_cycle(optimizer, params, method.cycle, gradients)
        renew(gradients, seed)
    arrive_at_perturbed_weights(optimizer, params, method, gradients)
    return [p.detach().clone() for p in params]  # which an optimizer that is forgotten restores


def arrive_at_perturbed_weights(optimizer, params: list[Tensor], method: Method, gradients: Gradients) -> None:
    if method.rolling or method.cycle[0].call != "perturb":
        run_cycle(optimizer, params, method.cycle, gradients)
    else:
        gradients.deliver(params, method.cycle[0].gradient, 0)
        optimizer.perturb()


def normals(make: Build, method: Method, base: str, device="cpu") -> list[Tensor]:
    """What the noise of a third round is in units of the size that it should have."""
    params = weights(device)
    optimizer = make(params, method, base)
    gradients = Gradients(params, sets=1)
    for _ in range(2):
        run_cycle(optimizer, params, method.cycle, gradients)
    history = [gradients.history(k, method.beta, 2) for k in range(len(params))]
    if method.rolling:
        noisy = [p.detach().clone() for p in params]
        optimizer.eval()
        clean = [p.detach() for p in params]
    else:
        clean = [p.detach().clone() for p in params]
        arrive_at_perturbed_weights(optimizer, params, method, gradients)
        noisy = [p.detach().clone() for p in params]
    found = []
    for k, (w, p) in enumerate(zip(clean, noisy, strict=True)):
        scale = method.sigma * (torch.ones((), device=w.device) if method.absolute else filter_norm(w))
        if method.history:
            scale = scale / (1 + method.history * history[k]).sqrt()
        scale = scale.expand(w.shape[0]) if method.absolute else scale
        found.append((p - w) / per_filter(scale, w))
    return found


def are_normal(normals: list[Tensor]) -> bool:
    """Mean and standard deviation within five deviations of what they should be."""
    return all(abs(z.mean()) < 5 / z.numel() ** 0.5 and abs(z.std() - 1) < 5 / (2 * z.numel()) ** 0.5 for z in normals)


def are_close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, **TOLERANCE) for a, b in zip(one, other, strict=True))


def reference(params: list[Tensor], method: Method, base: str):
    return flatkern_optimizer(params, method, base, backend="eager")


# Every candidate of a race asks for the same.
reference_trained = cache(partial(trained, reference))
reference_moved = cache(partial(moved, reference))


def difference(make: Build, method: Method, base: str, device="cpu") -> str:
    """Where what `make` builds leaves the reference; empty if nowhere."""
    quiet = silent(method)
    if not are_close(trained(make, quiet, base, device=device), reference_trained(quiet, base, device=device)):
        return "other weights after three steps"
    if method.rho and not are_close(
        moved(make, method, base, device=device), reference_moved(method, base, device=device)
    ):
        return "a gradient at other weights"
    if method.sigma and not are_normal(normals(make, method, base, device)):
        return "noise of another size"
    return ""


def difference_of(label: str, name: str, base: str, device="cpu") -> str:
    """The same of a candidate by its label; what it raises is raised."""

    def make(params: list[Tensor], method: Method, base: str):
        return build(label, params, name, method, base)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return difference(make, METHODS[name], base, device)
