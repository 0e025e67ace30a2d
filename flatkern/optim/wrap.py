"""Wrap: a flatness-seeking method around any torch.optim.Optimizer instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods import IRE, RWP, SAM
from . import checkpoint, messages, perturbations
from .base import FlatOptimizer
from .plan import Bucket, Group
from .update import Forming, Work


class Wrap(FlatOptimizer):
    """Any optimizer at the perturbed weights of a flatness-seeking method.

        restore w;  g <- clip (lam g + (1 - lam) g_clean), in place;  base.step();  rolling: perturb again

    The base keeps its rule, its state and its parameter groups, which are shared: schedulers work on
    either, and `state_dict()` is the base's. Restore and mixing are passes of their own here, so the
    fused `SGD`, `Adam` and `AdamW` are faster; under a GradScaler `found_inf` is read on the host. The round is a
    number of the host, so that no CUDA graph can be captured, whatever the base.

    Arguments:
        base_optimizer: an instance, constructed on the parameters.
        perturb, enhance, backend, max_grad_norm: as `flatkern.SGD`.

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer instance, or already one of flatkern's,
            or a ZeroRedundancyOptimizer, whose ranks own disjoint parameters.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        perturb: RWP | SAM | None = None,
        enhance: IRE | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Wrap: base_optimizer is {base_optimizer!r}, but should be a torch.optim.Optimizer instance"
            )
        if isinstance(base_optimizer, FlatOptimizer):
            raise TypeError("Wrap: base_optimizer is flatkern's already; pass perturb= to it instead")
        if type(base_optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise TypeError(
                "Wrap: ZeroRedundancyOptimizer steps a shard of the parameters; use FSDP2 or a plain optimizer"
            )
        method_defaults = self._configure(perturb, enhance, backend, False, max_grad_norm)
        self.base = base_optimizer
        for group in base_optimizer.param_groups:
            for key, value in method_defaults.items():
                group.setdefault(key, value)
        super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, **method_defaults})
        self._check_new_parameters()
        self._ready = True

    @property
    def param_groups(self) -> list[Group]:
        """The base's own, also after it has loaded a checkpoint."""
        groups: list[Group] = self.base.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        if self.__dict__.get("_ready"):  # torch's constructor sets a list of its own, which nobody needs
            self.base.param_groups = value

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if self.__dict__.get("_ready"):
            self.base.state = value

    def _sign(self, group: Group) -> float:
        return 1.0  # the base turns the gradient over itself

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The base's, but only once the base has made it: many initialise on an empty dict."""
        state: dict[str, Any] = self.state[p] if p in self.state else self.cycle.early.setdefault(p, {})
        return state

    def _update_bucket(self, bucket: Bucket, grads: list[Tensor], forming: Forming) -> None:
        """Clean weights and the final gradient in `.grad`; the base steps when all buckets are ready."""
        if forming.backups is not None:
            self.cycle.restore(bucket.params, forming.backups)
        if _is_skipped(forming):
            return
        trivial = forming.grad_scale is None and forming.clip is None and forming.history is None
        if forming.clean_grads is not None or not trivial:
            bucket.op("mix_gradients_", self.backend)(
                grads, forming.history, forming.clean_grads, forming.grad_scale, forming.clip,
                grad_weight=forming.grad_weight, clean_weight=forming.clean_weight, beta=forming.beta,
            )  # fmt: skip
        if forming.masks is not None and forming.backups is None:
            # The displacement of a base that is not ours is known only from a copy; a perturbation has one already.
            forming.backups = self.cycle.backups_of(bucket)
            self.cycle.restore(forming.backups, bucket.params)
        if forming.clean_grads is not None:
            for p, g in zip(bucket.params, grads, strict=True):
                p.grad = g

    def _finish(self, work: Work) -> None:
        if not any(_is_skipped(forming) for _, _, forming in work):
            self.base.step()
            for p in [p for p in self.cycle.early if p in self.state]:
                self.state[p].update(self.cycle.early.pop(p))
            for bucket, _, forming in work:
                if forming.masks is not None:
                    bucket.op("amplify_", self.backend)(
                        bucket.params, forming.backups, forming.masks, kappa=forming.kappa
                    )
        for bucket, _, forming in work:
            if forming.noise is not None:
                perturbations.scatter_bucket(self, bucket, forming.noise)

    # --- groups and state belong to the base -----------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, on the base, which shares its groups."""
        if not self.__dict__.get("_ready"):
            return  # torch's constructor hands over the groups that the base has already
        messages.refuse_unfinished(self, "add_param_group")
        self._join_round(param_group)
        for key, value in self.defaults.items():
            param_group.setdefault(key, value)
        self.base.add_param_group(param_group)
        try:
            self._check_new_parameters()
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict; ARWP's history is in its state."""
        messages.refuse_unfinished(self, "state_dict")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        result = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, result) or result
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the base. Group keys of ours that the checkpoint lacks keep their values."""
        state_dict = checkpoint.prepare(self, state_dict)
        self.cycle.end_by_version()
        self.base.load_state_dict(state_dict)
        # torch casts every state tensor to its parameter's dtype; ours keep theirs, and so do the base's.
        for p, saved in checkpoint.by_parameter(self, state_dict):
            for name, value in saved.items():
                loaded = self.state[p].get(name)
                if isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                    self.state[p][name] = checkpoint.fit(name, value, p)
        self.cycle.early.clear()
        checkpoint.settle(self)


def _is_skipped(forming: Forming) -> bool:
    return forming.found_inf is not None and bool(forming.found_inf)
