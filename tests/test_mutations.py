"""Wrong kernels, each wrong in one way that kernels are wrong in, have to be caught by the cases of test_backends.py.

Each is the eager function with something done before, after or instead; its name says what the mistake is.
"""

import copy
import functools

import cases
import pytest
import torch
from compare import assert_within, bits

from flatkern.dispatch import resolve
from flatkern.ops import OPS
from flatkern.reference import arithmetic, noise, norm, perturb, update
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
    if not v["momentum_buffers"] and not v["noise"] and not v["masters"] and not v["backups"]:
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


@wrong("ascent_norm_", "perturb_ascent_")
def contracts_the_direction_to_fma(op, v, monkeypatch):
    def fused(g, mean, sigma):
        return g.float() if mean is None else (g.double() - float32(sigma, g).double() * mean.double()).float()

    for module in (norm, perturb):
        monkeypatch.setattr(module, "direction", fused)
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


# Methods.


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


def grid(op, dtypes=("mixed", "float32", "bfloat16", "float16")):
    """Functions that make the cases of test_backends.py; not the long rows, which show what short ones do."""
    for words in cases.VARIANTS[op.name]:
        for shapes in ("mixed ranks", "vector ends", "chunk ends"):
            for dtype in dtypes:
                args = cases.SHAPES[shapes], cases.DTYPES[dtype], "cpu", words
                yield functools.partial(getattr(cases, op.name), *args)


@pytest.mark.parametrize("op, kernel", WRONG, ids=lambda x: getattr(x, "name", None) or x.__name__)
def test_a_wrong_kernel_is_caught(op, kernel, monkeypatch):
    for make in grid(op):
        got, want = make(), make()
        eager(op, want)
        with monkeypatch.context() as patch:
            kernel(op, got, *([patch] if kernel.__code__.co_argcount == 3 else []))
        try:
            assert_within(op, got, want)
        except AssertionError:
            return
    pytest.fail(f"no case tells this kernel from {op.name}")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_right_kernel_is_not(op):
    for make in grid(op, ["mixed"]):
        got, want = make(), make()
        eager(op, got)
        eager(op, want)
        assert_within(op, got, want)
