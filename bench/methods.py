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

    @property
    def rounds(self) -> int:
        """Perturbed passes in one step (mSAM: the number of shards)."""
        return sum(turn.call == "perturb" for turn in self.cycle)


def is_plain(candidate: str) -> bool:
    """Whether a candidate makes plain steps, whatever the method of its race: "torch fused", "plain flatkern cpp"."""
    return candidate.startswith(("torch ", "plain "))


ONE_PASS = (Turn("none", "perturb"), Turn("noisy", "step"))
TWO_PASSES = (Turn("clean", "perturb"), Turn("noisy", "step"))
SHARD = (Turn("clean", "perturb"), Turn("add", "restore"))
LAST_SHARD = (Turn("clean", "perturb"), Turn("add", "step"))

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
    if method.rolling:
        return {"step": update + backup}
    if method.rho:
        norm = grad + (clean if method.floor is not None else 0)
        climb = clean + grad + param
        restore = clean + param
        perturb = method.rounds * (norm + climb) + backup  # the clean weights stay saved between rounds
        floors = {"perturb": perturb, "restore": (method.rounds - 1) * restore, "step": update}
        return {call: floor for call, floor in floors.items() if floor}
    if method.sigma:
        return {"perturb": clean + param + backup, "step": update + (grad if method.lam is not None else 0)}
    return {"step": update}
