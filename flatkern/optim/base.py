"""The optimizer around every base rule: parameter groups, the perturb / restore / step cycle, rolling mode.

A subclass brings a rule: `_flags`, `_update_bucket`. What changes between calls is in `self.cycle`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import shards
from ..checks import check_backend, check_outer_filters, check_parameters, check_value
from ..dispatch import gather_state, resolve
from ..methods import IRE, RWP, SAM, check_uint32, is_number
from ..tables import history_length
from . import capture, checkpoint, closures, enhance, follow, messages, perturbations, scaling, update
from .cycle import Cycle, holders
from .plan import Bucket, Group

Closure = Callable[[], Any]


class FlatOptimizer(torch.optim.Optimizer):
    """Base of flatkern's optimizers; see `SGD`, `Adam`, `AdamW`, `Wrap`.

    The cycle is CLEAN -> perturb() -> PERTURBED -> restore() or step() -> CLEAN.
    """

    _step_supports_amp_scaling = True
    cycle: Cycle
    method: RWP | SAM | None
    enhancement: IRE | None
    backend: str | None
    master_weights: bool
    max_grad_norm: float | None
    capturable: bool = False

    def _configure(
        self,
        perturb: RWP | SAM | None,
        enhance: IRE | None,
        backend: str | None,
        master_weights: bool,
        max_grad_norm: float | None,
    ) -> dict[str, Any]:
        """Set what stays fixed; returns the group defaults that the method adds."""
        name = type(self).__name__
        if perturb is not None and not isinstance(perturb, (RWP, SAM)):
            raise TypeError(f"{name}: perturb is {perturb!r}, but should be flatkern.RWP, SAM or ASAM, or None")
        if enhance is not None and not isinstance(enhance, IRE):
            raise TypeError(f"{name}: enhance is {enhance!r}, but should be flatkern.IRE(kappa=...), or None")
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ValueError(f"{name}: max_grad_norm is {max_grad_norm!r}, but should be a number > 0, or None")
        self.method = perturb
        self.enhancement = enhance
        self.backend = check_backend(backend)
        self.master_weights = master_weights
        self.max_grad_norm = max_grad_norm
        self._new_cycle()
        defaults = {} if perturb is None else {**perturb.defaults, "perturb": True}
        return defaults if enhance is None else {**defaults, **enhance.defaults}

    def _new_cycle(self) -> None:
        self.cycle = Cycle(self.backend, weakref.ref(self))
        # An optimizer that is collected while its parameters are perturbed leaves clean weights behind.
        weakref.finalize(self, self.cycle.abandon).atexit = False

    def _check_new_parameters(self) -> None:
        """Refuse parameters that no kernel can walk, that repeat, or that somebody else holds perturbed."""
        params = self._parameters()
        name = type(self).__name__
        shards.check(name, params)
        parts = [shards.local(p) for p in params]
        check_parameters(name, parts)
        if self.method is not None or self.enhancement is not None:
            check_outer_filters(name, "params", parts)
        if self.backend is not None:
            for device_type in {p.device.type for p in params} - {"meta"}:
                resolve("restore_", device_type, self.backend)
        for other in holders(params):
            if other is not self.cycle:
                raise RuntimeError(
                    f"{name}: another optimizer holds these parameters perturbed; call its restore(), eval() or step()"
                )
        if self.capturable:
            capture.check(self)
        for group in self.param_groups:
            self._check_group(group)

    def _check_group(self, group: Group) -> None:
        if self.capturable:
            capture.check_group(self, group)
        for key, value in group.items():
            if self.capturable and isinstance(value, Tensor):
                continue  # it was checked when it was set from a number; now the host would have to wait
            unset = key == "lam" and value is None
            if (self._is_ours(key) and not unset) or is_number(value):
                check_value(key, value)
        if isinstance(self.method, RWP):
            self._check_lam(group)
            for key in ("seed", "stream", "round"):
                self._check_word(key, group[key])

    def _check_word(self, key: str, value: Any) -> None:
        if not (self.capturable and isinstance(value, Tensor)):
            check_uint32(type(self).__name__, key, value)

    def _is_ours(self, key: str) -> bool:
        """True if a group's `key` means what it means here, so that its value must be a number."""
        return (self.method is not None and key in self.method.defaults) or (
            self.enhancement is not None and key == "kappa"
        )

    def _check_groups(self) -> None:
        """Check what has changed in the groups since the last call, before anything is written."""
        capture.refuse(self, "perturb() or step()")
        checked = self.cycle.checked
        for k, group in enumerate(self.param_groups):
            if isinstance(self.method, RWP):
                self._check_word("round", group["round"])
            values = [v for key, v in group.items() if key not in ("params", "round", "drawn", "mask_age")]
            if self.capturable:
                values = [id(v) if isinstance(v, Tensor) else v for v in values]  # which one, not what is in it
            if checked.get(k) != values:
                self._check_group(group)
                checked[k] = values
        capture.adopt(self)

    def _check_lam(self, group: Group) -> None:
        assert isinstance(self.method, RWP)
        if (group["lam"] is None) != (self.method.lam is None):
            raise ValueError(
                f"{type(self).__name__}: a group has lam={group['lam']!r} and the method lam={self.method.lam!r}; "
                "lam may not mix None and a number"
            )

    # --- what is where ---------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _flags(self, group: Group) -> tuple[Any, ...]:
        """What splits parameters into different op calls, besides device and masters."""
        return ()

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype != torch.float32

    def _masters(self, params: list[Tensor]) -> list[Tensor]:
        """The float32 weights behind `params`."""
        raise NotImplementedError

    def _histories(self, params: list[Tensor]) -> list[Tensor]:
        """ARWP's history of `params`: float32 (filters,), or per element for tensors of rank <= 1."""
        return self._kept(params, "history", history_length, torch.float32)

    def _kept(
        self, params: list[Tensor], key: str, shape: Callable[[Tensor], int | tuple[int, ...]], dtype: torch.dtype
    ) -> list[Tensor]:
        """Our own state `key` of `params`; zeros where it is missing."""
        found = gather_state(self.state, params, (key,))
        if found is not None:
            return found[0]
        result = []
        for p in params:
            state = self._state_of(p)
            if key not in state:
                with torch.inference_mode(False):
                    part = torch.zeros(shape(shards.local(p)), dtype=dtype, device=p.device)
                    state[key] = shards.beside(p, part, shape(p))
                self.cycle.created.append((p, key))
            result.append(state[key])
        return result

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """Where our own state of `p` is kept."""
        state: dict[str, Any] = self.state[p]
        return state

    def _update_bucket(self, bucket: Bucket, grads: list[Tensor], forming: update.Forming) -> None:
        """Apply the base rule to one bucket."""
        raise NotImplementedError

    def _finish(self, work: update.Work) -> None:
        """Called once when every bucket has had its `_update_bucket`."""

    def _sign(self, group: Group) -> float:
        """maximize turns the gradient over on its way in, as torch does."""
        return -1.0 if group["maximize"] else 1.0

    @property
    def is_perturbed(self) -> bool:
        """True while the parameters hold perturbed weights."""
        return self.cycle.plan is not None and not self.cycle.suspended

    @property
    def ascent_norm(self) -> Tensor | None:
        """SAM/ASAM: norm of the last ascent gradient (scaled by T_w for ASAM); 0-dim float32 on the device."""
        return self.cycle.ascent_norm

    @property
    def grad_norm(self) -> Tensor | None:
        """With `max_grad_norm`: norm of the last final gradient before clipping; 0-dim float32 on the device."""
        return self.cycle.grad_norm

    @property
    def loss_weight(self) -> float:
        """mix="losses": what the next loss is to be multiplied by, 1 - lam at clean weights, lam at perturbed ones."""
        if not isinstance(self.method, RWP) or self.method.lam is None:
            return 1.0
        lam = {g["lam"] for g in self.param_groups}
        if len(lam) > 1:
            raise RuntimeError(f"loss_weight: groups have different lam {sorted(lam)}, so no single loss weight exists")
        value = float(lam.pop())
        return value if self.is_perturbed else 1.0 - value

    @property
    def rolling(self) -> bool:
        return isinstance(self.method, RWP) and self.method.rolling

    # --- the cycle -------------------------------------------------------------------------------

    @torch.no_grad()
    def perturb(self, scaler: Any = None) -> None:
        """Move the weights to the perturbed point; the gradient of the next backward is taken there.

            CLEAN -> PERTURBED

        RWP draws noise (no gradient needed), m-RWP keeps the gradient in `.grad` as the clean one,
        SAM and ASAM climb along the gradient in `.grad`. The gradients of earlier rounds return to
        `.grad`, so that the next backward accumulates into them.

        Arguments:
            scaler: the torch.amp.GradScaler in use; m-RWP with mix="gradients" needs it to unscale
                and inf-check the clean gradient.

        Raises:
            RuntimeError: already perturbed; rolling; no method; RWP with a fresh gradient, which
                would be lost; SAM without one; a second clean gradient for m-RWP.
        """
        with self._refusing():
            perturbations.perturb(self, scaler)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the clean weights back, bit for bit, and count one round if it has a gradient.

            PERTURBED -> CLEAN

        The round's gradients are set aside (pointers, no arithmetic) until the next `perturb()` or
        `step()`. On clean weights nothing happens.
        """
        if self.rolling:
            raise RuntimeError("restore: a rolling optimizer is restored by eval(), or by follow(model)")
        perturbations.restore(self)

    @torch.no_grad()
    def step(self, closure: Closure | list[Closure] | None = None) -> Any:
        """Restore, form the final gradient, and apply the base rule, in one pass.

            PERTURBED or CLEAN -> CLEAN          (rolling: perturbed for the next forward)

        Arguments:
            closure: zeroes the gradients, runs forward and backward, returns the loss. It is called
                once (plain, RWP, rolling) or twice (SAM, m-RWP); `[clean, noisy]` gives m-RWP two
                batches, a list gives mSAM its shards.

        Returns:
            The closure's loss, the clean one where there is one; None without a closure.

        Raises:
            RuntimeError: the cycle lacks a gradient it needs, or has one too many; a closure together
                with a gradient scaler. A refused call has changed nothing.
        """
        try:
            if closure is not None:
                return closures.step(self, closure)
            self._step()
        except BaseException:
            scaling.forget(self)
            raise
        return None

    def _step(self) -> None:
        """step() without a closure and without torch's step hooks, which fire once around the whole."""
        messages.refuse_suspended(self, "step")
        with self._refusing():
            update.step(self)
        self.cycle.steps += 1
        if self.cycle.steps == 10:
            messages.warn_never_perturbed(self)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """State that was made for a call which is then refused goes again."""
        self.cycle.created.clear()
        try:
            yield
        except BaseException:
            for p, key in self.cycle.created:
                self.state[p].pop(key, None)
                if not self.state[p]:
                    del self.state[p]
            raise

    @contextmanager
    def perturbed(self, scaler: Any = None) -> Iterator[None]:
        """`perturb()` on entry; on every way out the weights are clean again.

        If the body did not step, `restore()` follows. After an exception this round's gradients are dropped.
        """
        self.perturb(scaler)
        try:
            yield
        except BaseException:
            perturbations.abort_round(self)
            raise
        self.restore()

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Clean weights inside, whatever the mode; outside everything is as before, bit for bit."""
        with perturbations.clean(self):
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and the zeroed gradients do not count as new ones.

        Between rounds the sum of earlier rounds survives: it is dropped by no `zero_grad()`.
        """
        if self.cycle.plan is not None and self.cycle.rounds:
            if perturbations.has_round_gradient(self):
                raise RuntimeError("zero_grad: earlier rounds are summed up in .grad; call step() or restore() first")
            return
        super().zero_grad(set_to_none)
        self.cycle.mark_zeroed(self._parameters())

    # --- rolling ---------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Rolling: apply the noise of the current round (idempotent; draws nothing new). Otherwise nothing."""
        if not mode:
            return self.eval()
        if self.rolling and self.cycle.plan is None:
            perturbations.roll_on(self)
        return None

    @torch.no_grad()
    def eval(self) -> None:
        """Rolling: clean weights (idempotent; the trajectory does not change). Otherwise as `restore()`."""
        if not self.rolling:
            self.restore()
        elif self.cycle.plan is not None:
            messages.refuse_suspended(self, "eval")
            self.cycle.put_clean_weights(self.cycle.plan)
            self.cycle.leave()

    def follow(self, model: torch.nn.Module) -> follow.Handles:
        """Rolling: noise on in the model's training forwards, clean weights in eval forwards and `state_dict()`.

        Registers a forward pre-hook and a state-dict pre-hook; returns a handle with `remove()`.
        The documented way for trainers that call only `step()`: Hugging Face, Lightning, Accelerate, timm.

        Raises:
            RuntimeError: the optimizer is not rolling.
        """
        return follow.follow(self, model)

    def release(self) -> None:
        """Free the scratch (saved copies); pending rounds are dropped. The next `perturb()` allocates again.

        Raises:
            RuntimeError: the weights are perturbed, so the scratch holds the clean ones.
        """
        if self.cycle.plan is not None:
            raise RuntimeError(f"release: the weights are perturbed; call {messages.way_back(self)} first")
        self.cycle.drop_pending()
        self.cycle.release()

    # --- enhancement -----------------------------------------------------------------------------

    @property
    def mask_due(self) -> bool:
        """IRE: True when the mask has served its steps, or there is none yet, and `update_mask()` should follow."""
        return enhance.is_due(self)

    @torch.no_grad()
    def update_mask(self, scaler: Any = None) -> None:
        """IRE: set the mask from the gradients in `.grad`, and drop them.

            n_i <- [ |g_i| <= the K-th smallest |g| of all parameters ]

            if opt.mask_due:
                flatkern.sampled_label_loss(model(x)).backward()
                opt.update_mask()

        On clean weights, with no gradients of a step pending. Only the order of the gradients counts, so a loss scale
        does not matter. Reads the gradients three or four times; a parameter without one gets a mask of zeros.

        Arguments:
            scaler: the GradScaler in use: gradients that are not finite then leave the mask as it is, in silence.

        Raises:
            RuntimeError: no enhancement; perturbed weights; no gradient; a gradient that is not finite. Nothing has
                changed then.
        """
        with self._refusing():
            enhance.update_mask(self, scaler)

    # --- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refused while a perturbation or a round is under way."""
        if "cycle" in self.__dict__:
            messages.refuse_unfinished(self, "add_param_group")
        self._join_round(param_group)
        super().add_param_group(param_group)
        if self.__dict__.get("_ready"):
            try:
                self._check_new_parameters()
            except Exception:
                self.param_groups.pop()
                raise
            capture.adopt(self)

    def _join_round(self, param_group: dict[str, Any]) -> None:
        """A group that joins during training draws the round of the others."""
        if isinstance(self.method, RWP) and self.__dict__.get("_ready"):
            param_group.setdefault("round", self.param_groups[0]["round"])

    def state_dict(self) -> dict[str, Any]:
        """Base state, masters and ARWP's history, in torch's format; no scratch.

        Raises:
            RuntimeError: the weights are perturbed, or rounds are pending.
        """
        messages.refuse_unfinished(self, "state_dict")
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of flatkern or of the torch optimizer with the same rule.

        Dtypes are kept as saved, strides follow the parameters, group keys that the checkpoint lacks
        keep their present values. On perturbed weights the perturbation ends: parameters that others
        wrote since keep their values, the rest are restored.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        messages.refuse_unfinished(self, "pickle or deepcopy")
        return checkpoint.getstate(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint.setstate(self, state)
