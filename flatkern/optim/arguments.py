"""What every update takes, whatever its rule: filled in by the step, and by the perturbation where it mixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .buckets import Bucket, Call
from .external_writes import REPEATABLE
from .weights import CleanStore

DRAWN_WITH = ("sigma", "eta", "index", "offset")


@dataclass
class SharedArguments:
    """What every update op takes besides its rule's own state and numbers."""

    params: list[Tensor]  # what is updated: the bucket's, or copies of them that stay clean
    store: CleanStore  # where the clean weights are; (None, None) where the parameters hold them
    history: list[Tensor] | None
    grads: list[Tensor]
    clean_grads: list[Tensor] | None
    masks: list[Tensor] | None
    lrs: Tensor | None  # on the device; None where the rule reads numbers of the host
    sigmas: Tensor | None
    noise: Tensor | None  # rolling: of the coming round
    component: Tensor | None  # what of the clean gradient enters
    grad_scale: Tensor | None
    clip: Tensor | None
    found_inf: Tensor | None
    numbers: dict[str, list[Any]]
    drawn_with: Callable[[], tuple[Any, Any]] | None = None  # see Call
    keep: Call | None = None  # a call that keeps something of the gradients, when the step is made

    def tensors(self) -> tuple[Any, ...]:
        """The positional arguments that follow a rule's own state."""
        return (
            *self.store, self.history, self.grads, self.clean_grads, self.masks,
            self.lrs, self.sigmas, self.noise, self.component, self.grad_scale, self.clip, self.found_inf,
        )  # fmt: skip

    def draw(self, bucket: Bucket) -> Call:
        """Rolling: the draw of the coming round by itself, as the update makes it in the same pass."""
        arguments = bucket.params, *self.store, None, self.history, self.sigmas, self.noise
        numbers = {key: self.numbers[key] for key in DRAWN_WITH}
        return Call(bucket, REPEATABLE, arguments, numbers, drawn_with=self.drawn_with)
