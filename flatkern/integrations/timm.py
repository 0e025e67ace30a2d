"""timm: names for its optimizer registry, so that `create_optimizer_v2(model, "rwpsgd", ...)` and `--opt rwpsgd` work.

from flatkern.integrations import timm as flatkern_timm

flatkern_timm.register()
optimizer = create_optimizer_v2(model, "rwpadamw", lr=1e-3, weight_decay=0.05, sigma=0.01)
optimizer.follow(model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from ..methods import ASAM, GSAM, IRE, RWP, SAM, FriendlySAM, LookSAM, MomentumSAM
from ..optim.adam import Adam, AdamW
from ..optim.sgd import SGD
from ..optim.wrap import Wrap

try:
    from timm.optim import list_optimizers
    from timm.optim._optim_factory import default_registry
except ImportError as error:
    raise ImportError("flatkern.integrations.timm needs timm 1.0.16 or later; pip install 'flatkern[timm]'") from error

Perturbation = type[RWP | SAM | GSAM | FriendlySAM | LookSAM | MomentumSAM]
Method = tuple[Perturbation | None, dict[str, Any], str]

METHODS: dict[str, Method] = {
    "rwp": (RWP, {"rolling": True}, "rolling RWP: noise in training forwards, nothing else in the loop"),
    "arwp": (RWP, {"rolling": True, "eta": 0.1}, "rolling ARWP: noise in training forwards, nothing else in the loop"),
    "mrwp": (RWP, {"lam": 0.5}, "m-RWP: perturb() between the backwards of two batches"),
    "marwp": (RWP, {"lam": 0.5, "eta": 0.1}, "m-ARWP: perturb() between the backwards of two batches"),
    "sam": (SAM, {}, "SAM: perturb() between two backwards of a batch"),
    "asam": (ASAM, {}, "ASAM: perturb() between two backwards of a batch"),
    "gsam": (GSAM, {}, "GSAM: perturb() between two backwards of a batch"),
    "friendlysam": (FriendlySAM, {}, "Friendly-SAM: perturb() between two backwards of a batch"),
    "looksam": (LookSAM, {}, "LookSAM: where perturb_due, perturb() between two backwards of a batch"),
    "momentumsam": (
        MomentumSAM,
        {"rolling": True},
        "rolling Momentum-SAM: perturbed weights in training forwards, nothing else in the loop",
    ),
    "ire": (None, {}, "IRE: update_mask() where mask_due"),
}
# Values of a method that IRE or the base have, too, go by their names in the groups.
KEYWORDS = {"interval": "perturb_interval", "momentum": "perturb_momentum"}
WRAP_KEYS = ("max_grad_norm", "backend")


def register(*bases: str) -> list[str]:
    """Add flatkern's optimizers to timm's registry, under names of a method and a base.

        rwpsgd  rwpmomentum  rwpadam  rwpadamw      and so for arwp, mrwp, marwp, sam, asam, gsam,
                                                friendlysam, looksam, momentumsam, ire

    They take what timm passes, and values of the method and of the optimizer by name: `--opt rwpsgd --opt-kwargs
    sigma=0.02 max_grad_norm=1.0`. `kappa=` adds IRE to any of them; `interval` is IRE's then, and `momentum` always the
    base's: SAM's interval is `perturb_interval`, Friendly-SAM's momentum `perturb_momentum`. `sgd` has Nesterov
    momentum and `momentum` the classical one, as timm's own. rwp, arwp and momentumsam are rolling, so that timm's
    training loop stays as it is, but for `optimizer.follow(model)` behind the line that makes it; the other methods
    need their passes in the loop.

    Arguments:
        bases: further names of timm's registry, each to be wrapped: `register("lamb")` adds rwplamb, samlamb, ...

    Returns:
        All names.

    Raises:
        ValueError: timm has no optimizer of that name.
    """
    infos = [_ours("sgd", SGD), _ours("momentum", SGD), _ours("adam", Adam), _ours("adamw", AdamW)]
    for base in bases:
        info = default_registry.get_optimizer_info(base)
        wrapped = partial(_wrapped, default_registry.get_optimizer_class(info, bind_defaults=False))
        infos.append(replace(info, opt_class=wrapped))
    names = []
    for info in infos:
        for key, (method, values, description) in METHODS.items():
            names.append(key + info.name)
            if not list_optimizers(names[-1]):
                made = partial(_make, info.opt_class, method, values)
                default_registry.register(replace(info, name=names[-1], opt_class=made, description=description))
    return names


def _ours(name: str, made: Callable[..., torch.optim.Optimizer]) -> Any:
    """As timm describes its own optimizer of that name, which decides what it passes."""
    return replace(default_registry.get_optimizer_info(name), opt_class=made)


def _make(
    base: Callable[..., torch.optim.Optimizer],
    method: Perturbation | None,
    fixed: dict[str, Any],
    params: Iterable[Any],
    **keywords: Any,
) -> torch.optim.Optimizer:
    """An optimizer of what timm passes: every value goes to whom it belongs."""
    enhance = IRE(**_taken(keywords, IRE, {})) if method is None or "kappa" in keywords else None
    perturb = None if method is None else method(**{**fixed, **_taken(keywords, method, KEYWORDS)})
    return base(params, **keywords, perturb=perturb, enhance=enhance)


def _taken(keywords: dict[str, Any], cls: Any, renamed: dict[str, str]) -> dict[str, Any]:
    names = {f.name: renamed.get(f.name, f.name) for f in fields(cls)}
    return {name: keywords.pop(keyword) for name, keyword in names.items() if keyword in keywords}


def _wrapped(base: Callable[..., torch.optim.Optimizer], params: Iterable[Any], **keywords: Any) -> Wrap:
    perturb, enhance = keywords.pop("perturb"), keywords.pop("enhance")
    own = {key: keywords.pop(key) for key in WRAP_KEYS if key in keywords}
    return Wrap(base(params, **keywords), perturb=perturb, enhance=enhance, **own)
