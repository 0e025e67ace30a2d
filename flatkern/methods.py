"""RWP, SAM, ASAM, IRE: frozen descriptions of a method, each with its equation. No tensors here.

Any value may be overridden per parameter group under the same key, and changed at any step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .values import check_flag, check_uint32, check_value


def _check_numbers(method: Any, *keys: str) -> None:
    for key in keys:
        check_value(key, getattr(method, key), type(method).__name__, tensors=False)


def _check_rounds(method: Any) -> None:
    if method.rounds not in ("mean", "sum"):
        raise ValueError(f'{type(method).__name__}: rounds is {method.rounds!r}, but should be "mean" or "sum"')


def _set(method: Any, name: str, value: Any) -> None:
    """Store what a check made of a field: a plain int or bool where it was NumPy's."""
    object.__setattr__(method, name, value)


@dataclass(frozen=True)
class RWP:
    """Filter-wise random weight perturbation: RWP, m-RWP, ARWP and m-ARWP.

        e_f = sigma ||w_f|| / sqrt(1 + eta F_f) z,    z ~ N(0, 1)
        g   = grad L(w + e)                                      lam=None:  RWP, ARWP (one gradient)
        g   = (1 - lam) grad L_A(w) + lam grad L_B(w + e)        lam=0.5:   m-RWP, m-ARWP (two batches)
        F_f <- beta F_f + sum over the filter of grad L(w + e)^2             eta > 0: ARWP, m-ARWP

    A filter f is a dim-0 slice; tensors of rank <= 1 are one filter (their history F is per element).

    Arguments:
        sigma: standard deviation of the noise relative to the filter's L2 norm (no 1/sqrt(n)).
        lam: weight of the perturbed gradient; None for the one-gradient methods.
        eta: strength of ARWP's attenuation; 0 switches the history off.
        beta: decay of the history per step.
        seed, stream: unsigned 32-bit key of the noise. Two optimizers of one model, or ranks that
            should draw different noise, need different streams. With several ranks a checkpoint leaves each its own.
        rolling: the noise stays on between steps and `step()` renews it in the same pass over
            memory, for trainers that call nothing but `step()`. Excludes `lam`.
        mix: "gradients" mixes in the update's registers; "losses" expects every loss multiplied by
            `opt.loss_weight`, so that autograd adds the gradients up. "ranks" is the papers' parallel form, at the
            speed of ordinary training: of W >= 2 ranks the W // 2 odd ones are noisy, the others clean, and each runs
            `opt.perturb(); (opt.loss_weight * loss).backward(); opt.step()` on data of its own. On clean ranks
            `perturb()` moves nothing. `loss_weight` is W lam / noisy or W (1 - lam) / clean, so that DDP's mean is
            (1 - lam) of the clean ranks' mean gradient and lam of the noisy ones'. Nothing else is sent; m-ARWP, whose
            F_f takes the mean of the squares of each noisy rank's own gradient (all micro-batches of the step), sends
            4 bytes a filter and an element of vectors. All noisy ranks draw the same noise unless `stream` differs.
            Under accumulation every backward but the last runs in `no_sync()`.
        group: process group of mix="ranks", that over which DDP takes the mean; None for all ranks. FSDP2's hybrid
            sharding brings its own, that of the mesh's replicate dimension (m-RWP only, eta=0). A copy of the method
            keeps the group; pickled, it is left out, and all ranks take its place.
        rounds: what the gradients of several passes before one step make together. "mean": rounds that `restore()`
            separates are averaged. "sum": every loss is divided by the number of the step's backward passes already, as
            Hugging Face's Trainer, Accelerate and Lightning divide those of micro-batches. Rounds are then summed up,
            and m-RWP, whose n1 clean and n2 noisy losses are all divided by n1 + n2, mixes the means of both kinds:

                g = (1 - lam) (n1 + n2) / n1  sum grad L_A / (n1 + n2)  +  lam (n1 + n2) / n2  sum grad L_B / (n1 + n2)

            n1 and n2 are counted, or `opt.passes = (n1, n2)` says them. ARWP's history sees the mean over the noisy
            passes either way. Under DDP the last noisy backward synchronizes, and m-RWP's last clean one; the others
            may run in `no_sync()`. A rolling step has no rounds, and both are the same.

    Raises:
        ValueError: a value out of range, `rolling` together with `lam`, mix="losses" or "ranks" without it, or
            rounds="sum" together with another mix than "gradients", where the loss weights take its place.
        TypeError: a value of another type.
        An optimizer with mix="ranks" refuses to be made where torch.distributed is not initialized, in a group of one
        rank or that this rank is not in, and on a one-dimensional FSDP2 mesh.

    Sources: Li et al. 2022 (arXiv:2211.11489); Li et al. 2024 (arXiv:2404.00357), eqs. 5, 8, 14, with
    the released code's power -1/2 and per-filter sums.
    """

    sigma: float = 0.01
    lam: float | None = None
    eta: float = 0.0
    beta: float = 0.99
    seed: int = 0
    stream: int = 0
    rolling: bool = False
    mix: str = "gradients"
    group: Any = None
    rounds: str = "mean"

    def __post_init__(self) -> None:
        _check_numbers(self, "sigma", "eta", "beta")
        _check_rounds(self)
        _set(self, "rolling", check_flag("RWP", "rolling", self.rolling))
        if self.rolling and self.mix == "ranks":
            raise ValueError(
                'RWP: rolling=True excludes mix="ranks", whose steps begin with perturb(); use one of them'
            )
        if self.lam is not None:
            _check_numbers(self, "lam")
            if self.rolling:
                raise ValueError("RWP: rolling=True excludes lam: a rolling step has one gradient; pass lam=None")
        for name in ("seed", "stream"):
            _set(self, name, check_uint32("RWP", name, getattr(self, name)))
        if self.mix not in ("gradients", "losses", "ranks"):
            raise ValueError(f'RWP: mix is {self.mix!r}, but should be "gradients", "losses" or "ranks"')
        if self.mix == "losses" and self.lam is None:
            raise ValueError('RWP: mix="losses" mixes two losses; give lam, the weight of the perturbed one')
        if self.mix == "ranks" and self.lam is None:
            raise ValueError('RWP: mix="ranks" mixes clean and noisy ranks; give lam, the weight of the noisy ones')
        if self.group is not None and self.mix != "ranks":
            raise ValueError(f'RWP: group is given, but mix="{self.mix}" has none; pass group=None, or mix="ranks"')
        if self.rounds == "sum" and self.mix != "gradients":
            raise ValueError(
                f'RWP: rounds="sum" is for mix="gradients", but mix is {self.mix!r}, where every loss is multiplied by '
                'opt.loss_weight; divide that by the number of passes, and pass rounds="mean"'
            )

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        keys = ("sigma", "lam", "eta", "beta", "seed", "stream")
        return {k: getattr(self, k) for k in keys} | {"round": 0}

    # A process group can be neither copied nor pickled. A copy of what never changes may be the same.

    def __copy__(self) -> RWP:
        return self

    def __deepcopy__(self, memo: Any) -> RWP:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": None}


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimization; several rounds before a step make micro-batch mSAM.

        a = grad L_B(w),    e = rho a / (||a||_2 + 1e-12),    g = grad L_B(w + e)        SAM
        g = mean over shards j of grad L_j(w + e_j), every e_j from the same clean w     mSAM

    Arguments:
        rho: radius of the ascent step, in the L2 norm over all perturbed parameters.
        rounds: "mean" divides the sum over the shards by their number m. "sum" leaves it as it is, for losses that are
            divided by m already, as Hugging Face's Trainer, Accelerate and Lightning divide those of micro-batches (an
            ascent does not depend on the loss's scale). Under DDP the last perturbed backward synchronizes, and all
            others may run in `no_sync()`.

                a_j = grad (L_j / m)(w),    e_j = rho a_j / (||a_j||_2 + 1e-12),    g = sum_j grad (L_j / m)(w + e_j)

    Group keys: `rho`; `adaptive`, False, with True the group climbs by T_w = |w| + `eta` as in `ASAM`; `eta`, 0.

    Raises:
        ValueError: rho negative or not finite; rounds neither "mean" nor "sum".
        TypeError: rho is not a number.

    Sources: Foret et al. 2021 (arXiv:2010.01412), eq. 2; mSAM: Behdin et al. 2023 (arXiv:2302.09693).
    """

    rho: float = 0.05
    rounds: str = field(default="mean", kw_only=True)  # behind the fields of classes that derive from this one

    def __post_init__(self) -> None:
        _check_numbers(self, "rho")
        _check_rounds(self)

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {"rho": self.rho, "eta": 0.0, "adaptive": False, "ascent": "SAM"}


@dataclass(frozen=True)
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
        rounds: as SAM's.

    Group keys: `rho`, `eta`; `adaptive`: True or False for the whole group, None for the rule.

    Raises:
        ValueError: rho or eta negative or not finite; rounds neither "mean" nor "sum".
        TypeError: a value of another type.

    Sources: Kwon et al. 2021 (arXiv:2102.11600), eqs. 4 and 6; the rule: the authors' code (SamsungLabs/ASAM, asam.py).
    """

    rho: float = 0.5
    eta: float = 0.01
    all_tensors: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "rho", "eta")
        _check_rounds(self)
        _set(self, "all_tensors", check_flag("ASAM", "all_tensors", self.all_tensors))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups."""
        return {"rho": self.rho, "eta": self.eta, "adaptive": True if self.all_tensors else None, "ascent": "ASAM"}


@dataclass(frozen=True)
class IRE:
    """Implicit regularization enhancement: longer steps along flat directions; alone or with a perturbation.

        w <- w_base + kappa n (w_base - w_old),    n_i = [ |g_i| <= t ]
        t = the K-th smallest |g_i| of all parameters,    K = clamp(int(N (1 - sharp_fraction)), 1, N)

    w_base is what the base optimizer made of w_old, so momentum and weight decay are amplified too. g is the gradient
    of a loss with labels drawn from the model (`flatkern.sampled_label_loss`), taken at clean weights; its square
    estimates the diagonal of the Gauss-Newton matrix. `opt.update_mask()` reads it from `.grad` whenever
    `opt.mask_due`; until the first update the mask is zero.

    Everything tied with the threshold joins the mask, exact zeros first: parameters that the batch did not reach,
    such as embedding rows of unseen tokens, count as flat. `enhance=False` in a parameter group leaves it out.

    Arguments:
        kappa: by how much the step is lengthened where the mask is set; 0 is the base optimizer.
        sharp_fraction: the fraction of coordinates that is not amplified, in (0, 1).
        interval: steps that a mask serves.
        kappa_follows_lr: kappa shrinks with the learning rate, kappa min(1, lr / the largest lr of the group so far),
            so that it is whole while the learning rate warms up, and never more than `kappa`.

    Group keys: `kappa`, `enhance`; `sharp_fraction` and `mask_interval`, which have to be the same in all groups.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.

    Source: Wang et al. 2024 (arXiv:2405.20763), algorithm 1; |g| in place of g^2 gives the same order.
    """

    kappa: float
    sharp_fraction: float = 0.2
    interval: int = 10
    kappa_follows_lr: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "kappa", "sharp_fraction")
        _set(self, "interval", check_uint32("IRE", "interval", self.interval))
        if self.interval < 1:
            raise ValueError(f"IRE: interval is {self.interval}, but should be >= 1")
        _set(self, "kappa_follows_lr", check_flag("IRE", "kappa_follows_lr", self.kappa_follows_lr))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups; `mask_age` counts the steps since the mask was updated."""
        values = {"kappa": self.kappa, "sharp_fraction": self.sharp_fraction, "mask_interval": self.interval}
        following = {"largest_lr": 0.0} if self.kappa_follows_lr else {}
        return {**values, "enhance": True, "mask_age": None, **following}
