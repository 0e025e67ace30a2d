"""Kernels that are wrong in one way each, as in wrong_kernels.py: of the final gradient, and of updates."""

import copy

import torch
from wrong_kernels import UPDATES, eager, wrong

from flatkern.ops import OPS
from flatkern.reference import arithmetic, norm, update
from flatkern.tables import rows


@wrong("perturb_gaussian_", *UPDATES)
def forgets_the_history(op, v):
    eager(op, v | {"history": None})


@wrong("mix_gradients_", *UPDATES)
def remembers_the_mixed_gradient(op, v):
    before = copy.deepcopy(v["history"])
    scale, clean = v["grad_scale"], v["clean_grads"]
    final = [g.clone() for g in v["grads"]]
    mixing = {key: v[key] for key in ("component", "clip", "found_inf", "grad_weight", "clean_weight", "beta")}
    given = dict(grads=final, history=None, outs=None, clean_grads=clean, grad_scale=scale)
    eager(OPS["mix_gradients_"], given | mixing)
    eager(op, v)
    for f, old, g, beta in zip(v["history"] or [], before or [], final, v["beta"], strict=False):
        f.copy_(beta * old + (norm.row_norms(rows(g)).square() if g.dim() > 1 else g.float().square().flatten()))


@wrong("gradient_norm_", "mix_gradients_", *UPDATES)
def scales_the_clean_gradient_too(op, v):
    scale = v["grad_scale"]
    eager(op, v | {"clean_grads": v["clean_grads"] and [g if scale is None else g * scale for g in v["clean_grads"]]})


def given_component(v, q=None, r=None):
    if v["component"] is None:
        return v
    known = v["component"].tolist()
    return v | {"component": torch.tensor([known[0] if q is None else q, known[1] if r is None else r])}


@wrong("gradient_norm_", "mix_gradients_", *UPDATES)
def forgets_what_is_left_of_the_clean_gradient(op, v):
    """q."""
    eager(op, given_component(v, q=1.0))


@wrong("gradient_norm_", "mix_gradients_", *UPDATES)
def forgets_what_is_taken_off_the_clean_gradient(op, v):
    """r."""
    eager(op, given_component(v, r=0.0))


@wrong("gradient_norm_", "mix_gradients_", *UPDATES)
def does_not_scale_what_it_takes_off(op, v):
    scale = 1.0 if v["grad_scale"] is None else v["grad_scale"].item()
    eager(op, given_component(v, r=None if v["component"] is None else v["component"][1].item() / scale))


@wrong("mix_gradients_", *UPDATES)
def forms_the_component_of_each_element(op, v, monkeypatch):
    """Instead of the weights of both gradients."""

    def one_by_one(g, clean, component, grad_scale, weight, clean_weight, clip):
        if component is not None:
            scaled = g.float() if grad_scale is None else g.float() * grad_scale
            clean = component[0] * clean.float() - component[1] * scaled
        return right(g, clean, None, grad_scale, weight, clean_weight, clip)

    right = arithmetic.mixed
    monkeypatch.setattr(update, "mixed", one_by_one)
    eager(op, v)


@wrong("mix_gradients_")
def writes_the_gradients_beside_the_outs(op, v):
    eager(op, v)
    for g, out in zip(v["grads"], v["outs"] or [], strict=False):
        g.copy_(out)


@wrong("mix_gradients_")
def leaves_the_outs_alone(op, v):
    eager(op, v | {"outs": None})


@wrong("mix_gradients_")
def remembers_a_gradient_that_is_skipped(op, v):
    if v["found_inf"] is not None and v["found_inf"]:
        grads = copy.deepcopy(v["grads"])
        eager(op, v | {"grads": grads, "outs": None, "found_inf": None})
    else:
        eager(op, v)


@wrong("gradient_norm_")
def measures_each_gradient_alone(op, v):
    eager(op, v | {"clean_grads": None, "component": None})


@wrong("mix_gradients_", *UPDATES)
def forgets_to_clip(op, v):
    eager(op, v | {"clip": None})


@wrong(*UPDATES)
def updates_the_perturbed_weights(op, v):
    eager(op, v | {"backups": None, "masters": None})


@wrong("sgd_update_", "adam_update_")
def decays_the_perturbed_weights(op, v):
    clean = v["masters"] or v["backups"] or v["params"]
    grads = [
        g.float() + decay * (p.float() - w.float())
        for g, decay, p, w in zip(v["grads"], v["weight_decay"], v["params"], clean, strict=True)
    ]
    eager(op, v | {"grads": grads})


@wrong("mix_gradients_", *UPDATES)
def forgets_found_inf(op, v):
    eager(op, v | {"found_inf": None})


@wrong(*UPDATES)
def does_not_restore_where_it_skips(op, v):
    before = copy.deepcopy(v["params"])
    eager(op, v)
    if v["found_inf"] is not None and v["found_inf"]:
        for p, old in zip(v["params"], before, strict=True):
            p.copy_(old)


@wrong("adam_update_", "adamw_update_")
def counts_a_skipped_step(op, v):
    eager(op, v)
    if v["found_inf"] is not None and v["found_inf"]:
        for step in v["steps"]:
            step += 1


@wrong("adam_update_", "adamw_update_")
def corrects_the_bias_of_another_step(op, v):
    eager(op, v | {"steps": [step + 1 for step in v["steps"]]})
    if v["found_inf"] is None or not v["found_inf"]:
        for step in v["steps"]:
            step += 1


@wrong("adamw_update_")
def couples_the_decay(op, v):
    eager(OPS["adam_update_"], v)


@wrong("sgd_update_")
def forgets_nesterov(op, v):
    eager(op, v | {"nesterov": [False] * len(v["nesterov"])})


@wrong("perturb_ascent_", "perturb_gaussian_", "mix_gradients_", *UPDATES)
def takes_the_scalars_of_the_first_tensor(op, v):
    first = {a.name: v[a.name][:1] * len(v[a.name]) for a in op.arguments if a.type == "float[]"}
    eager(op, v | first)
