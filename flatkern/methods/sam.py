"""SAM and the methods that ascend as it does: ASAM, GSAM, Friendly-SAM, LookSAM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..values import NOT_NEGATIVE, check_flag, check_positive, check_value
from .fields import check_numbers, check_rounds, put


@dataclass(frozen=True)
class _Ascent:
    """What methods share that ascend along the gradient at the clean weights."""

    rho: float = 0.05

    def __post_init__(self) -> None:
        check_numbers(self, "rho")
        check_rounds(self)

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {"rho": self.rho, "eta": 0.0, "adaptive": False, "ascent": type(self).__name__}


@dataclass(frozen=True)
class SAM(_Ascent):
    """Sharpness-aware minimization; several rounds before a step make micro-batch mSAM.

        a = grad L_B(w),    e = rho a / (||a||_2 + 1e-12),    g = grad L_B(w + e)        SAM
        g = (1 - lam) a + lam grad L_B(w + e)                                            lam: mixed SAM
        g = mean over shards j of grad L_j(w + e_j), every e_j from the same clean w     mSAM

    Arguments:
        rho: radius of the ascent step, in the L2 norm over all perturbed parameters.
        rounds: "mean" divides the sum over the shards by their number m. "sum" leaves it as it is, for losses that are
            divided by m already, as Hugging Face's Trainer, Accelerate and Lightning divide those of micro-batches (an
            ascent does not depend on the loss's scale). Under DDP the last perturbed backward synchronizes, and all
            others may run in `no_sync()`.

                a_j = grad (L_j / m)(w),    e_j = rho a_j / (||a_j||_2 + 1e-12),    g = sum_j grad (L_j / m)(w + e_j)

        lam: weight of the perturbed gradient, >= 0; None for SAM itself, as is 1. In [0, 1] it is the penalty on the
            gradient's norm (Zhao et al.'s alpha); WSAM's gamma is lam = gamma / (1 - gamma), beyond 1 for gamma > 1/2.
            Several rounds mix the means of both kinds. The ascent's gradient enters the update, so under DDP every
            backward at clean weights synchronizes, too.
        interval: every how many steps the ascent is made; those between are steps of the base optimizer.
            `opt.perturb_due` tells explicit loops; closures run once in between. Every step counts that is not
            skipped, as far as the host knows: on a GPU it does not wait to find out. Loops of several micro-batches
            divide their losses by the number of them between ascents, where there are no rounds to average.

    Group keys: `rho`; `lam`; `perturb_interval`, which has to be the same in all groups; `adaptive`, False, with True
    the group climbs by T_w = |w| + `eta` as in `ASAM`; `eta`, 0.

    Raises:
        ValueError: rho or lam negative or not finite; rounds neither "mean" nor "sum"; interval < 1.
        TypeError: a value of another type.

    Sources: Foret et al. 2021 (arXiv:2010.01412), eq. 2; mSAM: Behdin et al. 2023 (arXiv:2302.09693); mixed: Zhao et
    al. 2022 (arXiv:2202.03599), eq. 13, Yue et al. 2023 (WSAM, arXiv:2305.15817), eq. 4.
    """

    rounds: str = "mean"
    lam: float | None = field(default=None, kw_only=True)
    interval: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam is not None:
            check_value("lam", self.lam, type(self).__name__, tensors=False, wanted=NOT_NEGATIVE)
        put(self, "interval", check_positive(type(self).__name__, "interval", self.interval))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups; `perturb_count` counts the steps, so that an interval goes on."""
        return {**super().defaults, "lam": self.lam, "perturb_interval": self.interval, "perturb_count": 0}


@dataclass(frozen=True, init=False)
class ASAM(SAM):
    """Adaptive SAM: the ascent is scaled by the weights, so it does not change with their scale.

        e = rho T_w^2 a / (||T_w a||_2 + 1e-12),    T_w = |w| + eta    where adaptive, else T_w = 1

    By its authors' rule every parameter whose name contains "weight" is adaptive, norm layers' included, and no other.
    Names come from `model.named_parameters()`, passed to the optimizer in place of `parameters()`, or from
    `opt.name_parameters(model)`. Without names tensors of rank >= 2 are adaptive, and a warning says so.

    Arguments:
        rho: radius of the ascent step in the scaled norm (about 10 times SAM's).
        eta: floor of T_w, so that zero weights move too.
        all_tensors: every parameter is adaptive. `ASAM(eta=0, all_tensors=True)` is the widespread element-wise
            variant (davda54/sam, adaptive=True).
        rounds, lam, interval: as SAM's.

    Group keys: as SAM's; `adaptive`: True or False for the whole group, None for the rule.

    Raises:
        ValueError: rho, eta or lam negative or not finite; rounds neither "mean" nor "sum"; interval < 1.
        TypeError: a value of another type.

    Sources: Kwon et al. 2021 (arXiv:2102.11600), eqs. 4 and 6; the rule: the authors' code (SamsungLabs/ASAM, asam.py).
    """

    eta: float = 0.01
    all_tensors: bool = False

    def __init__(  # its own order, which would begin with the fields of SAM
        self,
        rho: float = 0.5,
        eta: float = 0.01,
        all_tensors: bool = False,
        rounds: str = "mean",
        *,
        lam: float | None = None,
        interval: int = 1,
    ) -> None:
        given = {"rho": rho, "eta": eta, "all_tensors": all_tensors, "rounds": rounds, "lam": lam, "interval": interval}
        for name, value in given.items():
            put(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "eta")
        put(self, "all_tensors", check_flag("ASAM", "all_tensors", self.all_tensors))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {**super().defaults, "eta": self.eta, "adaptive": True if self.all_tensors else None}


@dataclass(frozen=True)
class GSAM(_Ascent):
    """Surrogate-gap guided SAM: SAM's step, without climbing down what SAM's perturbed loss does not see.

        a = grad L_B(w),    e = rho a / (||a||_2 + 1e-12),    g_p = grad L_B(w + e)        as SAM
        a_v = a - cos(a, g_p) ||a|| g_p / (||g_p|| + 1e-12)                                a beside g_p
        g   = g_p - alpha a_v

    Norms and the inner product are over all perturbed parameters; parameters of groups with perturb=False have g = g_p.
    Where ||a_v|| < 1e-6 ||a||, which rounding would be all of, g = g_p. alpha = 0 is SAM, bit for bit. Its authors let
    rho follow the learning rate: `flatkern.schedules.follow_lr`.

    Arguments:
        rho: radius of the ascent step, as SAM's.
        alpha: how far a_v is ascended, >= 0.
        rounds: as SAM's; a and g_p are the means, or sums, of all rounds.

    Under DDP every backward at clean weights synchronizes, because its gradient enters the update.

    Group keys: `rho`, `alpha`, and `adaptive`, `eta` as SAM's.

    Raises:
        ValueError: a value negative or not finite; rounds neither "mean" nor "sum".
        TypeError: a value of another type.

    Source: Zhuang et al. 2022 (arXiv:2203.08065), eq. 8 and algorithm 1; the authors' code (juntang-zhuang/GSAM).
    """

    alpha: float = 0.4
    rounds: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "alpha")

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {**super().defaults, "alpha": self.alpha}


@dataclass(frozen=True)
class FriendlySAM(_Ascent):
    """Friendly-SAM: the ascent leaves out what a batch's gradient shares with a mean of earlier ones.

        d = a - sigma m,    e = rho d / (||d||_2 + 1e-12),    g = grad L_B(w + e),    a = grad L_B(w)
        m <- momentum m + (1 - momentum) a        behind it; the first m is a, and the first d is a

    m counts ascents: where the second gradient is not finite and the step is skipped, m has seen the first one on a
    GPU, where the host does not wait to know, and of several rounds; on the CPU it has not. An ascent that is not
    finite leaves it alone (the first of all is forgotten on the CPU; on a GPU m begins as zeros then), and m of groups
    with perturb=False stands still.

    Arguments:
        rho: radius of the ascent step, as SAM's.
        sigma: the share of m that is left out; 0 is SAM.
        momentum: decay of m per ascent, in [0, 1); the group key is `perturb_momentum`.
        rounds: as SAM's; each round is an ascent.

    Under DDP every backward at clean weights synchronizes, because its gradient enters m.

    State, per parameter: `ascent_mean` (as `momentum_buffer`). One more copy is kept, and not saved, so that an ascent
    that fails, or that no gradient follows, leaves m as it was.

    Group keys: `rho`, `sigma`, `perturb_momentum`, and `adaptive`, `eta` as SAM's.

    Raises:
        ValueError: a value out of range; rounds neither "mean" nor "sum".
        TypeError: a value of another type.

    Source: Li et al. 2024 (arXiv:2403.12350), eqs. 9 and 10; the authors' code (nblt/F-SAM), where m is used before it
    is renewed.
    """

    sigma: float = 1.0
    momentum: float = 0.9
    rounds: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "sigma")
        check_value("perturb_momentum", self.momentum, "FriendlySAM", tensors=False)

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {**super().defaults, "sigma": self.sigma, "perturb_momentum": self.momentum}


@dataclass(frozen=True)
class LookSAM(_Ascent):
    """LookSAM: SAM every k-th step; those between reuse what its gradient had beside the ordinary one.

        every k-th step:   g = g_p = grad L_B(w + e), e as SAM's,    g_v = g_p - <a, g_p> / ||a||^2 a    is kept
        between:           g = a + alpha ||a|| / ||g_v|| g_v

    Norms and the inner product are over all perturbed parameters. Where ||g_v|| < 1e-6 ||g_p||, which rounding would be
    all of, nothing is kept, and steps between are those of the base. `opt.perturb_due` tells explicit loops which step
    is which; closures run once in between. What is kept is of the perturbed parameters as they were at that ascent.

    Arguments:
        rho: radius of the ascent step, as SAM's.
        k: every how many steps the ascent is made; the group key is `perturb_interval`.
        alpha: weight of the reused direction, >= 0; 0 leaves it out.
        rounds: as SAM's.

    Under DDP every backward at clean weights synchronizes, because its gradient enters what is kept.

    State, per parameter: `orthogonal` (as `momentum_buffer`), 1024 g_v / ||g_v||: a direction, of a length that
    float16 holds in large models, too.

    Group keys: `rho`, `alpha`; `perturb_interval`, which has to be the same in all groups; `adaptive`, `eta` as SAM's.

    Raises:
        ValueError: a value out of range; rounds neither "mean" nor "sum".
        TypeError: a value of another type.

    Source: Liu et al. 2022 (arXiv:2203.02714), eq. 6 and algorithm 1, norms over all parameters.
    """

    k: int = 5
    alpha: float = 0.7
    rounds: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "alpha")
        put(self, "k", check_positive("LookSAM", "k", self.k))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups; `perturb_count` counts the steps."""
        return {**super().defaults, "alpha": self.alpha, "perturb_interval": self.k, "perturb_count": 0}
