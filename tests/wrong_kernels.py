"""Kernels that are wrong in one way each: of memory, rounding, norms, the ascent and noise.

Each is the eager function with something done before, after or instead; its name says what the mistake is.
"""

import copy

import cases
import torch
from compare import bits

from flatkern.dispatch import resolve
from flatkern.ops import OPS
from flatkern.reference import noise, perturb
from flatkern.reference.arithmetic import float32
from flatkern.tables import rows

WRONG = []  # (op, function of its arguments by name)
UPDATES = ("sgd_update_", "adam_update_", "adamw_update_")


def wrong(*ops):
    def note(function):
        WRONG.extend((OPS[op], function) for op in ops)
        return function

    return note


def eager(op, values):
    cases.call(resolve(op.name, "cpu", "eager"), op, values)


def weights_before(values):
    return copy.deepcopy(values["masters"] or values["params"])


# Memory: what is written, and how far.


@wrong("perturb_gaussian_", "perturb_ascent_")
def forgets_the_backup(op, v):
    eager(op, v | {"backups": None})


@wrong("perturb_gaussian_", "perturb_ascent_")
def backs_up_the_perturbed_weights(op, v):
    eager(op, v)
    for p, b in zip(v["params"], v["backups"] or [], strict=False):
        b.copy_(p)


@wrong("fill_normal_", "perturb_gaussian_", "restore_", "perturb_ascent_", *UPDATES)
def skips_the_tail_of_a_row(op, v):
    name = "outs" if "outs" in v else "params"
    before = copy.deepcopy(v[name])
    eager(op, v)
    for t, old in zip(v[name], before, strict=True):
        tail = rows(t).shape[1] // 16 * 16
        rows(t)[:, tail:] = rows(old)[:, tail:]


@wrong("restore_", "perturb_ascent_", *UPDATES)
def skips_the_last_tensor(op, v):
    before = v["params"][-1].clone()
    eager(op, v)
    v["params"][-1].copy_(before)


@wrong(*UPDATES, "mix_gradients_")
def skips_what_is_beyond_a_thread(op, v):
    name = "params" if "params" in v else "grads"
    before = copy.deepcopy(v[name])
    eager(op, v)
    for t, old in zip(v[name], before, strict=True):
        t.view(-1)[8192:] = old.view(-1)[8192:]


@wrong(*UPDATES, "gradient_norm_")
def scales_a_gradient_in_place(op, v):
    eager(op, v)
    if v["grad_scale"] is not None:
        for g in v["grads"]:
            g.mul_(v["grad_scale"])


@wrong("perturb_gaussian_")
def updates_the_master_of_a_perturbation(op, v):
    eager(op, v)
    for p, m in zip(v["params"], v["masters"] or [], strict=False):
        m.copy_(p)


# Rounding.


@wrong("perturb_gaussian_")
def rounds_twice(op, v):
    """The perturbation is rounded to the parameter's dtype before it is added."""
    clean = weights_before(v)
    eager(op, v)
    for p, w in zip(v["params"], clean, strict=True):
        p.copy_(w.float() + (p.float() - w.float()).to(p.dtype).float())


@wrong("restore_", "perturb_gaussian_", "mix_gradients_", *UPDATES)
def truncates_instead_of_rounding_to_bfloat16(op, v):
    name = "params" if "params" in v else "grads"
    exact = dict(v)
    exact[name] = [p.float() for p in v[name]]
    eager(op, exact)
    for p, x in zip(v[name], exact[name], strict=True):
        p.copy_((bits(x) & -65536).view(torch.float32).view_as(x) if p.dtype == torch.bfloat16 else x)


@wrong("sgd_update_")
def contracts_to_fma(op, v):
    """w - lr d rounds once."""
    if not v["momentum_buffers"] and v["noise"] is None and not v["masters"] and not v["backups"]:
        for p, g, lr, decay in zip(v["params"], v["grads"], v["lr"], v["weight_decay"], strict=True):
            d = (g.float() + decay * p.float()).double()
            p.copy_((p.double() - torch.tensor(lr, dtype=torch.float32).double() * d).float())
    else:
        eager(op, v)


@wrong("perturb_gaussian_", "perturb_ascent_", "mix_gradients_", "restore_", *UPDATES)
def flushes_subnormals(op, v):
    eager(op, v)
    for t in v["params"] if "params" in v else v["grads"]:
        t[t.abs() < torch.finfo(t.dtype).smallest_normal] = 0.0


@wrong("perturb_gaussian_", "perturb_ascent_", "mix_gradients_", "restore_", *UPDATES)
def loses_negative_zeros(op, v):
    eager(op, v)
    for t in v["params"] if "params" in v else v["grads"]:
        t += 0.0


@wrong("fill_normal_", "perturb_gaussian_", "perturb_ascent_", *UPDATES)
def is_one_ulp_off_in_one_place(op, v):
    eager(op, v)
    t = max(v["outs"] if "outs" in v else v["params"], key=lambda t: t.numel()).view(-1)
    if t.numel():
        t[-1:] = torch.nextafter(t[-1:].float(), torch.tensor(9.0)).to(t.dtype)


# Norms.


@wrong("filter_norms_")
def measures_the_whole_tensor(op, v):
    for out, p in zip(v["norms"], v["params"], strict=True):
        out.fill_(p.float().norm())


@wrong("filter_norms_", "ascent_norm_", "gradient_norm_")
def is_a_little_more_than_its_bound_off(op, v):
    eager(op, v)
    for out in v["norms"] if "norms" in v else [v["norm"]]:
        out.view(torch.int32).add_(op.ulp + 1)


@wrong("filter_norms_")
def divides_by_the_root_of_the_size(op, v):
    eager(op, v)
    for out, p in zip(v["norms"], v["params"], strict=True):
        out.div_(max(rows(p).shape[1], 1) ** 0.5)


@wrong("perturb_gaussian_", *UPDATES)
def measures_a_norm_that_is_off(op, v):
    """By 2^-17, 128 ulp: more than any order of summation."""
    clean = v["masters"] or v["backups"]
    before = None if op.family == "update" else weights_before(v)
    eager(op, v)
    if v["noise"] is None or v.get("norms") is not None:
        return
    for p, w in zip(v["params"], before or clean, strict=True):
        p.copy_(w.float() + (p.float() - w.float()) * (1 + 2.0**-17))


@wrong("ascent_norm_", "gradient_norm_", "gradient_products_")
def leaves_out_the_last_tensor(op, v):
    eager(op, v | {name: value[:-1] for name, value in v.items() if isinstance(value, list)})


def add_products(v, multiply):
    pairs = [multiply(a, g) for g, a in zip(v["grads"], v["clean_grads"], strict=True)]
    v["products"].copy_(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 3).sum(dim=0))


@wrong("gradient_products_")
def multiplies_in_float32(op, v):
    def multiply(a, g):
        a, g = a.float(), g.float()
        return [(a * a).double().sum(), (a * g).double().sum(), (g * g).double().sum()]

    add_products(v, multiply)


@wrong("gradient_products_")
def keeps_partial_sums_in_float32(op, v):
    def multiply(a, g):
        a, g = a.double(), g.double()
        return [(a * a).sum().float(), (a * g).sum().float(), (g * g).sum().float()]

    add_products(v, multiply)


@wrong("gradient_products_")
def exchanges_the_gradients(op, v):
    eager(op, v | {"grads": v["clean_grads"], "clean_grads": v["grads"]})


@wrong("gradient_products_")
def adds_to_what_was_there(op, v):
    before = v["products"].clone()
    eager(op, v)
    v["products"].add_(before)


@wrong("ascent_norm_", "perturb_ascent_")
def climbs_along_the_gradient_itself(op, v):
    eager(op, v | {"sigma": [0.0] * len(v["sigma"])})


@wrong("perturb_ascent_")
def contracts_the_direction_to_fma(op, v, monkeypatch):
    def fused(g, mean, sigma):
        return g.float() if mean is None else (g.double() - float32(sigma, g).double() * mean.double()).float()

    monkeypatch.setattr(perturb, "direction", fused)
    eager(op, v)


@wrong("perturb_ascent_")
def renews_the_means_before_it_uses_them(op, v):
    if v["new_means"]:
        untouched = {"params": copy.deepcopy(v["params"]), "backups": copy.deepcopy(v["backups"])}
        eager(op, v | untouched)
        eager(op, v | {"means": v["new_means"], "new_means": None})
    else:
        eager(op, v)


@wrong("perturb_ascent_")
def renews_the_means_in_place(op, v):
    eager(op, v)
    for mean, new in zip(v["means"] or [], v["new_means"] or [], strict=False):
        mean.copy_(new)


@wrong("perturb_ascent_")
def renews_the_means_where_the_norm_is_infinite(op, v):
    eager(op, v)
    if v["new_means"] and not v["norm"].isfinite():
        for g, mean, new, momentum in zip(v["grads"], v["means"], v["new_means"], v["momentum"], strict=True):
            new.copy_(momentum * mean.float() + (1 - momentum) * g.float())


@wrong("perturb_ascent_")
def weighs_the_mean_by_the_rest_of_a_rounded_momentum(op, v):
    """1 - momentum in float32."""
    eager(op, v)
    if v["new_means"] and v["norm"].isfinite():
        for g, mean, new, number in zip(v["grads"], v["means"], v["new_means"], v["momentum"], strict=True):
            momentum = float32(number, g)
            new.copy_(momentum * mean.float() + (1 - momentum) * g.float())


@wrong("perturb_ascent_")
def climbs_where_the_norm_is_infinite(op, v):
    if not v["norm"].isfinite():
        v["norm"].fill_(3e38)
    eager(op, v)


# Noise.


@wrong("fill_normal_", "perturb_gaussian_")
def takes_the_counter_words_in_another_order(op, v, monkeypatch):
    right = noise.philox4x32
    monkeypatch.setattr(noise, "philox4x32", lambda c, key: right([c[1], c[0], c[2], c[3]], key))
    eager(op, v)


@wrong("fill_normal_", "perturb_gaussian_")
def exchanges_seed_and_stream(op, v):
    eager(op, v | {"noise": v["noise"][[1, 0, 2]]})


@wrong("fill_normal_", "perturb_gaussian_")
def draws_one_counter_for_the_whole_tensor(op, v, monkeypatch):
    """Columns count on from row to row."""

    def flat(shape, noise_, index, offset, device):
        return normals((1, shape[0] * shape[1]), noise_, index, (0, offset[1]), device).reshape(shape)

    normals = noise.normals
    monkeypatch.setattr(noise, "normals", flat)
    eager(op, v)


@wrong("fill_normal_", "perturb_gaussian_", *UPDATES)
def ignores_the_offset(op, v):
    eager(op, v | {"offset": [0] * len(v["offset"])})


@wrong("fill_normal_", "perturb_gaussian_")
def rounds_the_offset_to_a_draw(op, v):
    eager(op, v | {"offset": [k // 8 * 8 for k in v["offset"]]})


@wrong("fill_normal_", "perturb_gaussian_", *UPDATES)
def takes_the_position_for_the_index(op, v):
    eager(op, v | {"index": list(range(len(v["index"])))})


@wrong("fill_normal_")
def uses_a_signed_cosine_only(op, v):
    eager(op, v)
    for t in v["outs"]:
        t.view(-1)[0::2].abs_()
