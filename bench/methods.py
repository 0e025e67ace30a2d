"""The table of benchmarked methods: what a training loop calls, and the fewest bytes that it must move.

Nothing is timed here. Every candidate (flatkern, and what users write instead) answers the same three
calls, perturb(), restore() and step(), on the gradients it finds in `.grad`; a method's `cycle` is the
sequence of calls that makes one optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LR = {"sgd": 1e-3, "adamw": 1e-4}
WEIGHT_DECAY = {"sgd": 1e-4, "adamw": 1e-2}
MOMENTUM = 0.9
BASES = {"sgd": "SGD, momentum 0.9", "adamw": "AdamW"}


class Turn(NamedTuple):
    """One call of a cycle, and how its gradients arrive before it (never timed, except "add").

    "none": `.grad` is None; "clean", "noisy": `.grad` is a fresh gradient; "keep": left alone;
    "add": as autograd does it, taken where `.grad` is None and added in place elsewhere. A call that
    comes only once in several steps counts with its `share`.
    """

    gradient: str
    call: str
    share: float = 1.0


@dataclass(frozen=True)
class Method:
    """A training method and its hyper-parameters, which are those of the papers' recipes."""

    title: str
    cycle: tuple[Turn, ...]
    sigma: float = 0.0  # noise relative to the filter norm; 0: no noise
    lam: float | None = None  # weight of the perturbed gradient; None: there is only that one
    history: float = 0.0  # eta of ARWP; 0: no history
    beta: float = 0.99
    rho: float = 0.0  # radius of the climb; 0: no climb
    floor: float | None = None  # eta of ASAM; None: SAM
    rolling: bool = False
    kappa: float = 0.0  # IRE's enhancement; 0: none
    sharp_fraction: float = 0.2
    absolute: bool = False  # the noise is relative to nothing
    rule: str = ""  # gsam, friendly, looksam, momentum: what is done with the gradients, beyond SAM
    alpha: float = 0.0  # of GSAM and LookSAM
    decay: float = 0.0  # of Friendly-SAM's mean of gradients
    every: int = 1  # how many steps a cycle has; its first one climbs

    @property
    def rounds(self) -> int:
        """Perturbed passes in one step (mSAM: the number of shards)."""
        return sum(turn.call == "perturb" for turn in self.cycle)

    @property
    def mixes(self) -> bool:
        """Whether the gradient at the clean weights enters the update, or what is kept for later ones."""
        return self.lam is not None or self.rule in ("gsam", "looksam")


def is_plain(candidate: str) -> bool:
    """Whether a candidate makes plain steps, whatever the method of its race: "torch fused", "plain flatkern cpp"."""
    return candidate.startswith(("torch ", "plain "))


ONE_PASS = (Turn("none", "perturb"), Turn("noisy", "step"))
TWO_PASSES = (Turn("clean", "perturb"), Turn("noisy", "step"))
SHARD = (Turn("clean", "perturb"), Turn("add", "restore"))
LAST_SHARD = (Turn("clean", "perturb"), Turn("add", "step"))


def climbing_once(steps: int) -> tuple[Turn, ...]:
    """A climb, and steps without one; each call counts with its share, so that all is the mean of a step."""
    share = 1 / steps
    return Turn("clean", "perturb", share), Turn("noisy", "step", share), *[Turn("clean", "step", share)] * (steps - 1)


METHODS = {
    "plain": Method("plain", (Turn("noisy", "step"),)),
    "rwp": Method("RWP", ONE_PASS, sigma=0.01),
    "arwp": Method("ARWP", ONE_PASS, sigma=0.01, history=0.1),
    "m-rwp": Method("m-RWP", TWO_PASSES, sigma=0.01, lam=0.5),
    "m-arwp": Method("m-ARWP", TWO_PASSES, sigma=0.01, lam=0.5, history=0.1),
    "sam": Method("SAM", TWO_PASSES, rho=0.05),
    "asam": Method("ASAM", TWO_PASSES, rho=0.5, floor=0.01),
    "msam": Method("mSAM, 4 shards", 3 * SHARD + LAST_SHARD, rho=0.05),
    "rolling": Method("rolling RWP", (Turn("noisy", "step"),), sigma=0.01, rolling=True),
    "absolute": Method("RWP, absolute", ONE_PASS, sigma=0.01, absolute=True),
    "absolute-rolling": Method(
        "rolling RWP, absolute", (Turn("noisy", "step"),), sigma=0.01, absolute=True, rolling=True
    ),
    "mixed": Method("mixed SAM", TWO_PASSES, rho=0.05, lam=0.5),
    "sam-5": Method("SAM every 5 steps, mean of 5", climbing_once(5), rho=0.05, every=5),
    "gsam": Method("GSAM", TWO_PASSES, rho=0.05, rule="gsam", alpha=0.4),
    "friendly": Method("Friendly-SAM", TWO_PASSES, rho=0.05, rule="friendly", decay=0.9),
    "looksam": Method("LookSAM, mean of 5", climbing_once(5), rho=0.05, rule="looksam", alpha=0.7, every=5),
    "momentum": Method("Momentum-SAM", ONE_PASS, rho=0.3, rule="momentum"),
    "momentum-rolling": Method(
        "rolling Momentum-SAM", (Turn("noisy", "step"),), rho=0.3, rule="momentum", rolling=True
    ),
    "ire": Method("IRE, a mask per 10 steps", (Turn("clean", "update_mask", 0.1), Turn("noisy", "step")), kappa=2.0),
}


def floor_bytes(method: Method, base: str, param: int, masters: bool = False) -> float:
    """Bytes per parameter that one step must move at least, when weights have `param` bytes."""
    return sum(call_floors(method, base, param, masters).values())


def call_floors(method: Method, base: str, param: int, masters: bool = False) -> dict[str, float]:
    """The same by call, all calls of a step with one name together (rare ones with their share).

    Each tensor that a call needs is read once and each that it changes is written once. Rows are
    assumed to stay on chip between the norm and the noise; the accumulation of mSAM's gradients is
    autograd's and not counted. With float32 `masters` the clean weights live there and need no copy;
    optimizer state has the dtype of the clean weights.
    """
    grad = param
    clean = 4 if masters else param
    backup = 0 if masters else param
    states = {"sgd": 1, "adamw": 2}[base]
    update = grad + 2 * clean + 2 * clean * states + (param if masters else 0)

    if method.kappa:
        # A bit per weight to read; every ten steps four reads of the gradient and the mask to write.
        return {"update_mask": (4 * grad + 1 / 8) / 10, "step": update + 1 / 8}
    perturb = clean + param + backup
    if method.rule == "momentum":
        perturb += 2 * clean  # the norm and the climb read the momentum
        # float32 weights are climbed from their copies, which the step has updated in place.
        return {"step": update + perturb - (4 if backup == 4 else 0)} if method.rolling else split(perturb, update)
    if method.rolling:
        return {"step": update + (perturb if method.absolute else backup)}
    if method.rho:
        norm = grad + (clean if method.floor is not None else 0)
        climb = clean + grad + param
        restore = clean + param
        perturb = method.rounds * (norm + climb) + backup  # the clean weights stay saved between rounds
        if method.rule == "friendly":
            perturb += 3 * clean  # the norm and the climb read the mean, and the climb writes the new one
        mixing = {"": grad if method.mixes else 0, "gsam": 3 * grad, "looksam": 4 * grad + clean, "friendly": 0}
        between = grad + clean if method.rule == "looksam" else 0  # the norm, and what is kept
        update += (mixing[method.rule] + between * (method.every - 1)) / method.every
        floors = {"perturb": perturb / method.every, "restore": (method.rounds - 1) * restore, "step": update}
        return {call: floor for call, floor in floors.items() if floor}
    if method.sigma:
        return split(perturb, update + (grad if method.lam is not None else 0))
    return {"step": update}


def split(perturb: float, step: float) -> dict[str, float]:
    return {"perturb": perturb, "step": step}
