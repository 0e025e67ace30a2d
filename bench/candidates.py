"""Who competes: flatkern on its backends, the baselines, and plain torch optimizers, ready to be timed.

Each candidate owns its parameters and its optimizer; gradients are shared (see harness.Gradients).
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from .baselines.ire import IRE_STYLES
from .baselines.libraries import LIBRARIES, PEERS, is_installed, libraries_of
from .baselines.loops import STYLES, FusedAndCopy, torch_optimizer
from .baselines.sam import MIXED, RULES
from .methods import LR, METHODS, MOMENTUM, WEIGHT_DECAY, Method, call_floors, is_plain
from .timing.harness import Clock, Cpu, Gradients, Timed, run_cycle

TORCH = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}, "torch loop": {"foreach": False}}
FLOOR = "torch fused"  # the plain optimizer every ratio is against
COPIED = "torch fused + copy"  # and the plain one with half-precision weights in front of it
HOLDERS = "flatkern", "bench", "torch.optim", *LIBRARIES  # modules whose objects hold an optimizer's tensors
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def flatkern_optimizer(params: list[Tensor], method: Method, base: str, *, backend: str, masters: bool = False):
    """The one line that a user changes, for any method of the table; rolling noise is on."""
    optimizer = untouched_optimizer(params, method, base, backend=backend, masters=masters)
    if method.rolling:
        optimizer.train()
    return optimizer


def styles_of(method: Method) -> dict:
    """Who writes a method, by the degree of care."""
    if method.kappa:
        return IRE_STYLES
    return MIXED if method.rho and method.lam is not None else RULES[method.rule]


def perturbation(method: Method):
    """flatkern's description of a method of the table."""
    import flatkern

    if method.rule == "momentum":
        return flatkern.MomentumSAM(method.rho, rolling=method.rolling)
    if method.rule == "gsam":
        return flatkern.GSAM(method.rho, method.alpha)
    if method.rule == "friendly":
        return flatkern.FriendlySAM(method.rho, sigma=1.0, momentum=method.decay)
    if method.rule == "looksam":
        return flatkern.LookSAM(method.rho, method.every, method.alpha)
    if method.rho and method.floor is not None:
        return flatkern.ASAM(rho=method.rho, eta=method.floor)
    if method.rho:
        return flatkern.SAM(rho=method.rho, lam=method.lam, interval=method.every)
    if method.sigma:
        noise = {"eta": method.history, "beta": method.beta, "scale": "absolute" if method.absolute else "norm"}
        return flatkern.RWP(sigma=method.sigma, lam=method.lam, rolling=method.rolling, **noise)
    return None


def untouched_optimizer(
    params: list[Tensor], method: Method, base: str, *, backend: str | None = None, masters: bool = False
):
    """The same before the first noise: no weight has been looked at."""
    import flatkern

    if method.floor is not None:
        params = [(f"{k}.{'weight' if p.dim() >= 2 else 'bias'}", p) for k, p in enumerate(params)]  # as the baselines
    enhance = flatkern.IRE(method.kappa, sharp_fraction=method.sharp_fraction) if method.kappa else None
    ours = {"perturb": perturbation(method), "enhance": enhance, "backend": backend, "master_weights": masters}
    if base == "sgd":
        return flatkern.SGD(params, LR[base], MOMENTUM, weight_decay=WEIGHT_DECAY[base], **ours)
    return flatkern.AdamW(params, LR[base], weight_decay=WEIGHT_DECAY[base], **ours)


DOCUMENTED = "documented "  # prefix: the base optimizer by name alone, as pages of documentation show it
DOCUMENTED_PAPERS = "sam"  # the method whose widespread code takes the base optimizer's class


def labels(method: str, base: str, args, dtype: str, masters: bool) -> list[str]:
    """Everybody who competes in `method`, most wanted first: where memory is short the last ones are left out.

    Master weights are something that only flatkern has here. A library that is not installed is named all the same: it
    fails with what to install.
    """
    ours = [f"flatkern {backend}" for backend in args.backends]
    if method == "plain":
        return [*ours, *TORCH]
    if masters:
        return [*ours, FLOOR]
    does = METHODS[method]
    found = [*ours, FLOOR, *reversed(STYLES)]
    if args.compile and not (does.rule or (does.mixes and does.rho) or does.every > 1 or does.absolute):
        found.append("compiled")
    if dtype != "float32" or not args.rivals:
        return found
    found += libraries_of(method, base)
    if method == DOCUMENTED_PAPERS:
        found += [DOCUMENTED + label for label in ("papers", "pytorch_optimizer")]
    return found


def arriving(label: str, dtype: str) -> str:
    """The dtype of the weights and gradients that a candidate is given, which `dtype` is trained in."""
    return "float32" if label == COPIED else dtype


def floors(label: str, method: str, base: str, dtype: str, masters: bool) -> dict[str, float]:
    """Bytes per parameter that a candidate must move at least, by call of a step."""
    does, width = METHODS["plain" if is_plain(label) else method], DTYPES[dtype].itemsize
    if label == COPIED:
        full = DTYPES["float32"].itemsize
        return {"step": call_floors(does, base, full)["step"] + full + width}
    return call_floors(does, base, width, masters)


def held_at_most(label: str, method: str, base: str, dtype: str, masters: bool) -> int:
    """Bytes per parameter that a candidate may need: weights, moments, buffers and temporaries."""
    width = DTYPES[dtype].itemsize
    full = 4 if masters else width
    moments = {"sgd": 1, "adamw": 2}[base]
    if "flatkern" in label or is_plain(label):
        saved = 0 if is_plain(label) or masters else 1
        return (1 + moments + saved) * full + (width if masters else 0)
    loops = label not in ("foreach", "compiled")
    return (1 + moments + (6 if loops else 2 if METHODS[method].floor is None else 3)) * full


def build(label: str, params: list[Tensor], name: str, method: Method, base: str, masters: bool = False):
    """The optimizer of a candidate; `method` may differ from the one of that `name` in its numbers."""
    who = label.removeprefix(DOCUMENTED)
    kind, _, backend = who.removeprefix("plain ").partition(" ")
    if who in TORCH:
        return torch_optimizer(params, base, **TORCH[who])
    if who == COPIED:
        return FusedAndCopy(params, base)
    if kind == "flatkern":
        return flatkern_optimizer(params, method, base, backend=backend, masters=masters)
    if kind == "compiled":
        from .baselines.compiled import Compiled

        return Compiled(params, method, base)
    if kind in LIBRARIES:
        if not is_installed(kind):
            raise ModuleNotFoundError(f"{kind} is not installed: pip install 'flatkern[rivals]'")
        return PEERS[name, base, kind].build(params, method, base, fused=label == who)
    optimizer = styles_of(method)[kind](params, method, base)
    if label != who:
        optimizer.base = torch_optimizer(params, base)
    return optimizer


class Candidate:
    """One optimizer with its own weights; calling it takes a turn on its machine and returns nanoseconds by call.

    With a `burst` a turn has that many steps and its result are their medians: where calls are all there is to
    measure, the one before decides whether Python's own code is in the cache.
    """

    def __init__(
        self,
        label: str,
        weights: list[Tensor],
        gradients: Gradients,
        method: str,
        base: str,
        masters: bool = False,
        burst: int = 1,
        machine=None,
    ) -> None:
        self.label, self.gradients, self.burst = label, gradients, burst
        self.machine = machine or Cpu()
        self.params = [torch.nn.Parameter(w.clone()) for w in weights]
        self.name = "plain" if is_plain(label) else method
        self.method = METHODS[self.name]
        self.optimizer = build(label, self.params, self.name, self.method, base, masters)

    def __call__(self, count: int) -> dict[str, int]:
        return self.machine.turn(self, count)

    def steps(self, clock: Clock, count: int) -> dict[str, int]:
        """The steps of a turn, on the clock: medians by call."""
        steps = [
            run_cycle(self.optimizer, self.params, self.method.cycle, self.gradients, i, clock)
            for i in range(count * self.burst, (count + 1) * self.burst)
        ]
        return {name: statistics.median_low(step.get(name, 0) for step in steps) for name in steps[-1]}

    def walk(self, steps: int) -> None:
        """Steps one after the other, on gradients that are handed over; rare calls in their share of the steps."""
        for i in range(steps):
            for kind, name, share in self.method.cycle:
                if i % round(1 / share) == 0:
                    self.gradients.deliver(self.params, kind, i, fresh=False)
                    getattr(self.optimizer, name)()

    def held_bytes(self) -> int:
        """Bytes of tensors held besides weights and their `.grad`, at the point of a step where most are held."""
        most = 0
        for kind, call, _ in self.method.cycle:
            self.gradients.deliver(self.params, kind, 0)
            own = {t.untyped_storage().data_ptr() for p in self.params for t in (p, p.grad) if t is not None}
            sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable(self.optimizer)}
            most = max(most, sum(size for pointer, size in sizes.items() if pointer not in own))
            getattr(self.optimizer, call)()
        return most


def reachable(root: object) -> list[Tensor]:
    """All tensors that an optimizer holds, through containers and through objects of optimizers' modules."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        elif type(item).__module__.startswith(HOLDERS) and not isinstance(item, type):
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(item, name) for name in slots if hasattr(item, name)]
            stack += vars(item).values() if hasattr(item, "__dict__") else ()
    return found


def prepare(*args, **kwargs) -> tuple[Timed, int]:
    """A warm candidate, and the bytes that it holds."""
    candidate = Candidate(*args, **kwargs)
    candidate.steps(Clock(), 0)
    return candidate, candidate.held_bytes()
