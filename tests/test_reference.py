"""The eager reference against the papers' formulas in float64, and laws that hold to the bit.

Updates are in test_reference_updates.py.

Inputs are drawn by hypothesis: shapes, hyper-parameters and the seed of the values.
"""

import math

import numpy as np
import pytest
import torch
from compare import assert_same_values, bits, copies
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    Values,
    assert_close,
    every_dtype,
    examples,
    law,
    noise,
    rows64,
    scalar,
    seeds,
    shapes,
    weights,
)

# Norms.


@law("filter_norms_")
@every_dtype
@examples
@given(shapes=shapes, seed=seeds)
def test_filter_norms(dtype, shapes, seed):
    v = Values(shapes, seed, dtype)
    params, norms = v.tensors(), [torch.full((s[0] if len(s) > 1 else 1,), -1.0) for s in shapes]
    v.run("filter_norms_", norms=norms, params=params)
    for norm, p in zip(norms, params, strict=True):
        assert_close(norm, np.linalg.norm(rows64(p), axis=1), 1)


@law("filter_norms_")
def test_filters_of_channels_last_are_the_same_filters():
    p = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    v, norms = Values([p.shape], 0), [torch.zeros(4)]
    v.run("filter_norms_", norms=norms, params=[p])
    assert_close(norms[0], p.double().flatten(1).norm(dim=1), 1)


@law("ascent_norm_", "perturb_ascent_")
@pytest.mark.parametrize("eta", [-1.0, 0.0, 0.01], ids=["SAM", "ASAM without eta", "ASAM"])
@examples
@given(shapes=shapes, seed=seeds, rho=st.floats(0.001, 2.0), sign=st.sampled_from([1, -1]))
def test_the_ascent_is_that_of_the_paper(eta, shapes, seed, rho, sign):
    """e = rho T^2 g / ||T g||: Foret et al. 2021, eq. 2 (T = 1); Kwon et al. 2021, eq. 6 (T = |w| + eta)."""
    v = Values(shapes, seed)
    params, grads, norm = v.tensors(), v.tensors(), scalar(-1.0)
    clean, backups = copies(params), v.tensors()
    v.run("ascent_norm_", norm=norm, params=params if eta >= 0 else None, grads=grads, eta=eta)
    v.run("perturb_ascent_", params=params, backups=backups, grads=grads, norm=norm, rho=sign * rho, eta=eta)

    t = [np.abs(w.double().numpy()) + eta if eta >= 0 else np.ones(w.shape) for w in clean]
    g = [x.double().numpy() for x in grads]
    total = math.sqrt(sum(float(((ti * gi) ** 2).sum()) for ti, gi in zip(t, g, strict=True)))
    assert_close(norm, total, 4)
    assert_same_values(backups, clean)
    for p, w, ti, gi in zip(params, clean, t, g, strict=True):
        if total > 1e-3:
            e = sign * rho / total * ti**2 * gi
            assert_close(p, w.double().numpy() + e, 16, np.abs(e) + np.abs(w.double().numpy()))


@law("ascent_norm_", "perturb_ascent_")
@pytest.mark.parametrize("eta", [-1.0, 0.0], ids=["plain", "adaptive"])
@examples
@given(shapes=shapes, seed=seeds, sigma=st.floats(0.0, 2.0), momentum=weights)
def test_friendly_sam_climbs_beside_the_mean_and_then_renews_it(eta, shapes, seed, sigma, momentum):
    """d = g - sigma m, e = rho T^2 d / ||T d||, m <- momentum m + (1 - momentum) g."""
    v = Values(shapes, seed)
    params, grads, means, new, norm = v.tensors(), v.tensors(), v.tensors(), v.tensors(), scalar(-1.0)
    clean, before = copies(params), copies(means)
    numbers = dict(eta=eta, sigma=sigma)
    v.run("ascent_norm_", norm=norm, params=params if eta >= 0 else None, grads=grads, means=means, **numbers)
    ascent = dict(new_means=new, grads=grads, means=means, norm=norm, rho=0.3, momentum=momentum)
    v.run("perturb_ascent_", params=params, **ascent, **numbers)

    t = [np.abs(w.double().numpy()) + eta if eta >= 0 else np.ones(w.shape) for w in clean]
    pairs = [(g.double().numpy(), m.double().numpy()) for g, m in zip(grads, before, strict=True)]
    d = [g - sigma * m for g, m in pairs]
    total = math.sqrt(sum(float(((ti * di) ** 2).sum()) for ti, di in zip(t, d, strict=True)))
    size = math.sqrt(
        sum(float(((ti * (np.abs(g) + sigma * np.abs(m))) ** 2).sum()) for ti, (g, m) in zip(t, pairs, strict=True))
    )
    assert_close(norm, total, 8, size)
    assert_same_values(means, before)
    for k, (g, m) in enumerate(pairs):
        assert_close(new[k], momentum * m + (1 - momentum) * g, 4, np.abs(g) + np.abs(m))
        if total > 1e-3 * size:
            w, e = clean[k].double().numpy(), 0.3 / total * t[k] ** 2 * (np.abs(g) + sigma * np.abs(m))
            assert_close(params[k], w + 0.3 / total * t[k] ** 2 * d[k], 16 + 16 * size / total, e + np.abs(w))


@law("perturb_ascent_")
@pytest.mark.parametrize("rho, norm", [(0.0, 2.0), (0.1, math.inf), (0.1, math.nan)])
def test_no_ascent_leaves_every_bit(rho, norm):
    """A norm that is not finite must not reach the weights, and neither must gradients that are not."""
    v = Values([(3, 5), (7,)], 0)
    params, grads = v.tensors(), v.tensors()
    params[0][0, 0], grads[0][0, 1], grads[1][2] = -0.0, math.inf, math.nan
    clean, means, new = copies(params), v.tensors(), v.tensors()
    numbers = dict(rho=rho, eta=[-1.0, 0.1], sigma=0.5, momentum=0.9)
    v.run("perturb_ascent_", params=params, grads=grads, norm=scalar(norm), new_means=new, means=means, **numbers)
    assert_same_values(params, clean)
    if not math.isfinite(norm):
        assert_same_values(new, means)


# Gaussian noise.


@law("perturb_gaussian_", "fill_normal_")
@every_dtype
@pytest.mark.parametrize("masters", [False, True])
@examples
@given(shapes=shapes, seed=seeds, sigma=st.floats(-1.0, 1.0), eta=st.floats(0.0, 3.0), damped=st.booleans())
def test_the_noise_is_that_of_the_papers(dtype, masters, shapes, seed, sigma, eta, damped):
    """p = w + sigma ||w_f|| / sqrt(1 + eta F_f) z; F is one number a filter, one an element of vectors.

    Li et al. 2022 and 2024, eq. 5; ARWP: 2024, eq. 14, with power -1/2.
    """
    v = Values(shapes, seed, dtype)
    params, outs = v.tensors(), v.tensors(dtype=torch.float32)
    wide = v.tensors(dtype=torch.float32) if masters else None
    history, backups, clean = v.history(), v.tensors(), copies(params)
    v.run("fill_normal_", outs=outs, noise=noise())
    given = dict(params=params, backups=backups, masters=wide, history=history if damped else None)
    v.run("perturb_gaussian_", **given, noise=noise(), sigma=sigma, eta=eta)
    assert_same_values(backups, clean)
    for p, w, f, z in zip(params, wide or clean, history, outs, strict=True):
        std = sigma * np.linalg.norm(rows64(w), axis=1, keepdims=True)
        if damped:
            std = std / np.sqrt(1 + eta * f.double().numpy().reshape((-1, 1) if p.dim() > 1 else (1, -1)))
        e = std * rows64(z)
        assert_close(p, rows64(w) + e, 10, np.abs(e) + np.abs(rows64(w)))


@law("perturb_gaussian_")
@every_dtype
@examples
@given(shapes=shapes, seed=seeds, damped=st.booleans())
def test_no_sigma_leaves_every_bit(dtype, shapes, seed, damped):
    v = Values(shapes, seed, dtype)
    params = v.tensors()
    clean, history = copies(params), v.history() if damped else None
    v.run("perturb_gaussian_", params=params, history=history, noise=noise(), sigma=0.0, eta=0.5)
    assert all(torch.equal(p, w) for p, w in zip(params, clean, strict=True))


@law("perturb_gaussian_")
def test_history_without_eta_or_of_zeros_changes_nothing():
    v = Values([(3, 5), (7,)], 0)
    plain, no_eta, zeros = (Values([(3, 5), (7,)], 0).tensors() for _ in range(3))
    v.run("perturb_gaussian_", params=plain, noise=noise(), sigma=0.1)
    v.run("perturb_gaussian_", params=no_eta, history=v.history(), noise=noise(), sigma=0.1, eta=0.0)
    none = [torch.zeros(3), torch.zeros(7)]
    v.run("perturb_gaussian_", params=zeros, history=none, noise=noise(), sigma=0.1, eta=0.7)
    assert_same_values(no_eta, plain)
    assert_same_values(zeros, plain)


# Restoring.


@law("restore_")
@every_dtype
def test_restore_is_exact_for_every_bit_pattern(dtype):
    """All 65536 patterns of half types, as many of float32; NaN too, whose sign and payload come back."""
    patterns = torch.arange(-(2**15), 2**15)
    if dtype == torch.float32:
        backup = (patterns * 65537).to(torch.int32).view(dtype)
    else:
        backup = patterns.to(torch.int16).view(dtype)
    param = torch.zeros_like(backup)
    Values([(65536,)], 0).run("restore_", params=[param], backups=[backup])
    assert torch.equal(bits(param), bits(backup))


@law("restore_")
def test_float32_masters_round_to_nearest_even():
    """Against rounding by hand: bfloat16 in integers, float16 by NumPy."""
    patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    patterns[:1000] = (patterns[:1000] & 0xFFFF0000) | 0x8000  # ties of bfloat16
    patterns[1000:2000] = (patterns[1000:2000] & 0xFFFFE000) | 0x1000  # ties of float16
    x = patterns.view(np.float32)
    x = x[np.isfinite(x)]
    v, master = Values([x.shape], 0), torch.from_numpy(x)

    half = torch.zeros(x.shape, dtype=torch.float16)
    v.run("restore_", params=[half], backups=[master])
    with np.errstate(over="ignore"):
        assert np.array_equal(half.view(torch.int16).numpy(), x.astype(np.float16).view(np.int16))

    brain = torch.zeros(x.shape, dtype=torch.bfloat16)
    v.run("restore_", params=[brain], backups=[master])
    i = x.view(np.uint32).astype(np.uint64)
    rounded = (i + 0x7FFF + ((i >> 16) & 1)) >> 16
    assert np.array_equal(brain.view(torch.int16).numpy(), rounded.astype(np.uint16).view(np.int16))


# Gradients: mixed, scaled, clipped, remembered.


@law("mix_gradients_", "gradient_norm_")
@examples
@given(
    shapes=shapes, seed=seeds, lam=weights, scale=weights, clip=weights, beta=st.floats(0.0, 0.999), two=st.booleans()
)
def test_mixing(shapes, seed, lam, scale, clip, beta, two):
    """g = clip (lam scale g + (1 - lam) g_clean), F = beta F + sum_f (scale g)^2; Li et al. 2024, eq. 8."""
    v = Values(shapes, seed)
    grads, clean, history, norm = v.tensors(), v.tensors() if two else None, v.history(), scalar(-1.0)
    given, before = copies(grads), copies(history)
    mixing = dict(clean_grads=clean, grad_scale=scalar(scale), grad_weight=lam, clean_weight=1 - lam)
    v.run("gradient_norm_", norm=norm, grads=grads, **mixing)
    assert_same_values(grads, given)
    v.run("mix_gradients_", grads=grads, history=history, clip=scalar(clip), beta=beta, **mixing)

    total = 0.0
    for k, g in enumerate(grads):
        first, second = lam * scale * rows64(given[k]), (1 - lam) * rows64(clean[k]) if two else 0.0
        assert_close(g, clip * (first + second), 8, np.abs(first) + np.abs(second))
        total += float(((first + second) ** 2).sum())
        squares = (scale * rows64(given[k])) ** 2
        new = squares.sum(axis=1) if g.dim() > 1 else squares[0]
        assert_close(history[k], beta * before[k].double().numpy() + new, 8)
    size = sum(float(t.double().square().sum()) for t in given + (clean or []))
    assert_close(norm, math.sqrt(total), 8, math.sqrt(size))


@law("gradient_products_")
@examples
@given(shapes=shapes, seed=seeds)
def test_products_are_in_float64(shapes, seed):
    v = Values(shapes, seed)
    grads, clean, products = v.tensors(), v.tensors(), torch.full((3,), -1.0, dtype=torch.float64)
    v.run("gradient_products_", products=products, grads=grads, clean_grads=clean)
    g, a = (np.concatenate([x.double().numpy().ravel() for x in side]) for side in (grads, clean))
    size = np.array([a @ a, np.abs(a) @ np.abs(g), g @ g])
    assert np.all(np.abs(products.numpy() - [a @ a, a @ g, g @ g]) <= 1e-13 * size)


@law("mix_gradients_", "gradient_norm_")
@examples
@given(shapes=shapes, seed=seeds, weight=weights, clean_weight=st.floats(-2.0, 2.0), q=weights, r=st.floats(-2.0, 2.0))
def test_a_component_takes_the_place_of_the_clean_gradient(shapes, seed, weight, clean_weight, q, r):
    """g = weight s g + clean_weight (q a - r s g), kept in `outs` where they are given."""
    v = Values(shapes, seed)
    grads, clean, outs, norm = v.tensors(), v.tensors(), v.tensors(), scalar(-1.0)
    given, component = copies(grads), torch.tensor([q, r], dtype=torch.float32)
    mixing = dict(clean_grads=clean, component=component, grad_scale=scalar(0.5), grad_weight=weight)
    mixing["clean_weight"] = clean_weight
    v.run("gradient_norm_", norm=norm, grads=grads, **mixing)
    v.run("mix_gradients_", grads=grads, outs=outs, found_inf=scalar(0.0), **mixing)
    assert_same_values(grads, given)
    total, size = 0.0, 0.0
    for k, out in enumerate(outs):
        g, a = 0.5 * rows64(given[k]), rows64(clean[k])
        want, largest = weight * g + clean_weight * (q * a - r * g), np.abs(g) * (weight + abs(clean_weight * r))
        largest += np.abs(a) * abs(clean_weight) * q
        assert_close(out, want, 8, largest)
        total, size = total + float((want**2).sum()), size + float((largest**2).sum())
    assert_close(norm, math.sqrt(total), 16, math.sqrt(size))
    kept = copies(outs)
    v.run("mix_gradients_", grads=grads, outs=outs, found_inf=scalar(1.0), **mixing)
    assert_same_values(outs, kept)
