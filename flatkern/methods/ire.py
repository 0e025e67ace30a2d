"""IRE: implicit regularization enhancement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..values import check_flag, check_positive
from .fields import check_numbers, put


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
        check_numbers(self, "kappa", "sharp_fraction")
        put(self, "interval", check_positive("IRE", "interval", self.interval))
        put(self, "kappa_follows_lr", check_flag("IRE", "kappa_follows_lr", self.kappa_follows_lr))

    @property
    def defaults(self) -> dict[str, Any]:
        """What enters the parameter groups; `mask_age` counts the steps since the mask was updated."""
        values = {"kappa": self.kappa, "sharp_fraction": self.sharp_fraction, "mask_interval": self.interval}
        following = {"largest_lr": 0.0} if self.kappa_follows_lr else {}
        return {**values, "enhance": True, "mask_age": None, **following}
