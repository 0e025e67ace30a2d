"""RWP: RWP, m-RWP, ARWP and m-ARWP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..values import check_choice, check_flag, check_uint32
from .fields import check_numbers, check_rounds, put

SCALES = ("norm", "rms", "absolute")


@dataclass(frozen=True)
class RWP:
    """Filter-wise random weight perturbation: RWP, m-RWP, ARWP and m-ARWP.

        e_f = sigma ||w_f|| / sqrt(1 + eta F_f) z,    z ~ N(0, 1)
        g   = grad L(w + e)                                      lam=None:  RWP, ARWP (one gradient)
        g   = (1 - lam) grad L_A(w) + lam grad L_B(w + e)        lam=0.5:   m-RWP, m-ARWP (two batches)
        F_f <- beta F_f + sum over the filter of grad L(w + e)^2             eta > 0: ARWP, m-ARWP

    A filter f is a dim-0 slice; tensors of rank <= 1 are one filter (their history F is per element).

    Arguments:
        sigma: standard deviation of the noise, relative to what `scale` says.
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
        scale: what sigma is relative to. "norm": the filter's L2 norm ||w_f||, as in the papers. "rms":
            ||w_f|| / sqrt(n), n the filter's elements, so that sigma means the same for a row of 64 and one of 14,336.
            "absolute": 1, so that the standard deviation is sigma itself, and no norm is computed: the variational
            weight noise of speech recipes.

    Group keys: `sigma`, `lam`, `eta`, `beta`, `scale`.

    Raises:
        ValueError: a value out of range, `rolling` together with `lam`, mix="losses" or "ranks" without it, or
            rounds="sum" together with another mix than "gradients", where the loss weights take its place.
        TypeError: a value of another type.
        An optimizer with mix="ranks" refuses to be made where torch.distributed is not initialized, in a group of one
        rank or that this rank is not in, and on a one-dimensional FSDP2 mesh.

    Sources: Li et al. 2022 (arXiv:2211.11489); Li et al. 2024 (arXiv:2404.00357), eqs. 5, 8, 14, with
    the released code's power -1/2 and per-filter sums. "rms": Li et al. 2024 (Flat-LoRA, arXiv:2409.14396), eq. 6.
    "absolute": Graves 2011 (Practical variational inference for neural networks), section 3.
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
    scale: str = "norm"

    def __post_init__(self) -> None:
        check_numbers(self, "sigma", "eta", "beta")
        check_rounds(self)
        check_choice("RWP", "scale", self.scale, SCALES)
        put(self, "rolling", check_flag("RWP", "rolling", self.rolling))
        if self.rolling and self.mix == "ranks":
            raise ValueError(
                'RWP: rolling=True excludes mix="ranks", whose steps begin with perturb(); use one of them'
            )
        if self.lam is not None:
            check_numbers(self, "lam")
            if self.rolling:
                raise ValueError("RWP: rolling=True excludes lam: a rolling step has one gradient; pass lam=None")
        for name in ("seed", "stream"):
            put(self, name, check_uint32("RWP", name, getattr(self, name)))
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
        keys = ("sigma", "lam", "eta", "beta", "scale", "seed", "stream")
        return {k: getattr(self, k) for k in keys} | {"round": 0}

    # A process group can be neither copied nor pickled. A copy of what never changes may be the same.

    def __copy__(self) -> RWP:
        return self

    def __deepcopy__(self, memo: Any) -> RWP:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": None}
