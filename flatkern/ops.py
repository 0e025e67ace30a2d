"""THE TABLE: one row per operation. Dispatch, torch.library, tests and benchmarks all read it.

Nothing but the table lives here, and it imports nothing of ours. What the arguments mean, in every
op and in every backend:

    params          weights; a *filter* is a dim-0 slice (tensors of rank <= 1: the whole tensor)
    backups         clean copies of the weights, in the parameters' dtype
    masters         float32 weights behind half-precision parameters: the clean weights live there
    norms           L2 norm of each filter, float32 (filters,)
    history         ARWP's discounted sum of squared gradients, float32: (filters,), or (n,) when rank <= 1
    grads           gradients of the perturbed pass (the only ones, for methods that have one pass)
    clean_grads     gradients of the clean pass, or what else is added to `grads`; already unscaled
    component       float32 (2,), q and r: in place of g_clean comes q g_clean - r grad_scale g, which GSAM and LookSAM
                    take for the component of the clean gradient that is orthogonal to the other; absent = (1, 0)
    means           Friendly-SAM's mean of clean gradients; `new_means` are what it becomes
    products        float64 (3,): <g_clean, g_clean>, <g_clean, g> and <g, g> over all tensors
    masks           uint8, where IRE lengthens the step: (filters, ceil(columns / 8)), eight columns of a filter to a
                    byte, the lowest bit first; (n,), a byte each, when rank <= 1
    lrs, sigmas     float64 (tensors,) beside the tensors, of any stride: where they are given, `lr` and `sigma` are not
                    looked at. A captured graph reads what they are at the replay; nobody checks their values
    noise           int64 (3,): seed, stream, round of the counter-based normals
    index, offset   which normals a tensor draws: its parameter index, and the first row (rank <= 1:
                    the first element) of the unsharded tensor that it holds
    norm            0-dim float32
    grad_scale      0-dim float32, multiplies `grads`: 1 / (loss scale x rounds); absent = 1
    clip            0-dim float32, multiplies the final gradient; absent = 1
    found_inf       0-dim float32; nonzero: weights are restored and nothing else changes

Every list has one entry per parameter, or is absent (None) as a whole. Dtypes may differ from
entry to entry. Tensor arguments come first (mutated, then inputs, then device scalars), host
scalars are keyword-only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Argument:
    """One argument of a schema."""

    name: str
    type: str  # without the mutation mark, for example "Tensor[]?"
    mutated: bool
    keyword_only: bool


@dataclass(frozen=True)
class Op:
    """One operation: the same name, arguments and order of arguments in every backend."""

    name: str
    family: str  # basename of the file that holds it, in every folder
    schema: str  # mutated tensors, then inputs, then device scalars, then host scalars
    reads: str  # tensor arguments whose every element is loaded
    backends: str  # compiled ones; eager has every op
    ulp: int = 0  # furthest a backend may be from eager; 0 means bit for bit

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """The schema, parsed."""
        inside = self.schema[self.schema.index("(") + 1 : self.schema.rindex(") ->")]
        arguments, keyword_only = [], False
        for part in inside.split(", "):
            if part == "*":
                keyword_only = True
                continue
            type_, name = part.rsplit(" ", 1)
            plain = re.sub(r"\([a-z]!\)", "", type_)
            arguments.append(Argument(name, plain, type_ != plain, keyword_only))
        return tuple(arguments)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the mutated arguments."""
        return tuple(a.name for a in self.arguments if a.mutated)


# What every update takes besides its own state: how the gradient is formed, and what follows.
_UPDATE_INPUTS = (
    "Tensor[] grads, Tensor[]? clean_grads, Tensor[]? masks, "
    "Tensor? lrs, Tensor? sigmas, Tensor? noise, Tensor? component, Tensor? grad_scale, Tensor? clip, Tensor? found_inf"
)
_UPDATE_METHOD = (
    "float[] grad_weight, float[] clean_weight, float[] kappa, float[] beta, float[] sigma, float[] eta, "
    "int[] index, int[] offset"
)
_ADAM = (
    "(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[]? backups, Tensor(f!)[]? masters, Tensor(g!)[]? history, "
    f"{_UPDATE_INPUTS}, *, float[] lr, float[] beta1, float[] beta2, float[] eps, float[] weight_decay, "
    f"{_UPDATE_METHOD}) -> ()"
)

_ROWS = (
    Op(
        name="fill_normal_",
        family="noise",
        schema="(Tensor(a!)[] outs, Tensor noise, *, int[] index, int[] offset) -> ()",
        reads="",
        backends="cpp triton cuda",
    ),
    Op(
        name="filter_norms_",
        family="norm",
        schema="(Tensor(a!)[] norms, Tensor[] params) -> ()",
        reads="params",
        backends="cpp triton cuda",
        # float32 within chunks of 1024, 64 lanes of 16 elements: a square passes 1 + 16 + 6 roundings of 2^-24 each,
        # float64 above them. The root halves that, and an ulp is 2^-24 of the result at least: 11.5.
        ulp=12,
    ),
    Op(
        name="ascent_norm_",
        family="norm",
        schema="(Tensor(a!) norm, Tensor[]? params, Tensor[] grads, Tensor[]? means, *, "
        "float[] eta, float[] sigma) -> ()",
        reads="params grads means",
        backends="cpp triton cuda",
        ulp=12,
    ),
    Op(
        name="gradient_norm_",
        family="norm",
        schema="(Tensor(a!) norm, Tensor[] grads, Tensor[]? clean_grads, Tensor? component, Tensor? grad_scale, *, "
        "float[] grad_weight, float[] clean_weight) -> ()",
        reads="grads clean_grads",
        backends="cpp triton cuda",
        ulp=12,
    ),
    Op(
        name="gradient_products_",
        family="norm",
        schema="(Tensor(a!) products, Tensor[] grads, Tensor[] clean_grads) -> ()",
        reads="grads clean_grads",
        backends="cpp triton cuda",
        # In units of 2^-53 of the product of two lengths, which bounds the sum of the magnitudes: products are exact in
        # float64, and each passes fewer than 256 additions on either side, with fewer than a hundred tensors.
        ulp=512,
    ),
    Op(
        name="perturb_gaussian_",
        family="perturb",
        schema="(Tensor(a!)[] params, Tensor(b!)[]? backups, Tensor[]? masters, Tensor[]? norms, Tensor[]? history, "
        "Tensor? sigmas, Tensor noise, *, float[] sigma, float[] eta, int[] index, int[] offset) -> ()",
        reads="params masters",
        backends="cpp triton cuda",
    ),
    Op(
        name="perturb_ascent_",
        family="perturb",
        schema="(Tensor(a!)[] params, Tensor(b!)[]? backups, Tensor(c!)[]? new_means, Tensor[]? masters, "
        "Tensor[] grads, Tensor[]? means, Tensor norm, *, "
        "float[] rho, float[] eta, float[] sigma, float[] momentum) -> ()",
        reads="params masters grads means",
        backends="cpp triton cuda",
    ),
    Op(
        name="restore_",
        family="perturb",
        schema="(Tensor(a!)[] params, Tensor[] backups) -> ()",
        reads="backups",
        backends="cpp triton cuda",
    ),
    Op(
        name="mix_gradients_",
        family="update",
        schema="(Tensor(a!)[] grads, Tensor(b!)[]? history, Tensor(c!)[]? outs, Tensor[]? clean_grads, "
        "Tensor? component, Tensor? grad_scale, Tensor? clip, Tensor? found_inf, *, "
        "float[] grad_weight, float[] clean_weight, float[] beta) -> ()",
        reads="grads clean_grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="sgd_update_",
        family="update",
        schema="(Tensor(a!)[] params, Tensor(b!)[]? momentum_buffers, "
        "Tensor(c!)[]? backups, Tensor(d!)[]? masters, Tensor(e!)[]? history, "
        f"{_UPDATE_INPUTS}, *, float[] lr, float[] momentum, float[] dampening, float[] weight_decay, "
        f"bool[] nesterov, {_UPDATE_METHOD}) -> ()",
        reads="params momentum_buffers backups masters grads clean_grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="adam_update_",
        family="update",
        schema=_ADAM,
        reads="params exp_avgs exp_avg_sqs backups masters grads clean_grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="adamw_update_",
        family="update",
        schema=_ADAM,
        reads="params exp_avgs exp_avg_sqs backups masters grads clean_grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="count_magnitudes_",
        family="mask",
        schema="(Tensor(a!) counts, Tensor[] grads, Tensor prefix) -> ()",
        reads="grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="pack_mask_",
        family="mask",
        schema="(Tensor(a!)[] masks, Tensor[] grads, Tensor threshold) -> ()",
        reads="grads",
        backends="cpp triton cuda",
    ),
    Op(
        name="amplify_",
        family="mask",
        schema="(Tensor(a!)[] params, Tensor[] previous, Tensor[] masks, *, float[] kappa) -> ()",
        reads="params previous",
        backends="cpp triton cuda",
    ),
)

OPS = {op.name: op for op in _ROWS}
