"""IRE: the selection is that of a sort of everything, bits are where they belong, steps are as long as said."""

import math

import numpy as np
import pytest
import torch
from compare import copies
from laws import Values, every_dtype, law

import flatkern
from flatkern import selection, tables
from flatkern.checks import MAGNITUDE_DIGITS
from flatkern.dispatch import resolve
from flatkern.reference.mask import unpacked

SHAPES = [(3, 5), (0,), (7, 3, 3, 3), (), (33,), (2, 1030), (40, 8)]


def gradients(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]
    if kind == "ties":
        grads = [g.mul(2).round() for g in grads]
    elif kind == "tiny":
        grads = [g * 2.0**-130 for g in grads]
    elif kind == "mostly zero":
        grads = [g * (g > 1) for g in grads]
    elif kind == "equal":
        grads = [torch.full_like(g, -0.5) for g in grads]
    return [torch.nn.Parameter(torch.randn(s)) for s in SHAPES], [g.to(dtype) for g in grads]


def masked(params, opt):
    return [unpacked(opt.cycle.state.entry(p)["mask"], p) for p in params]


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.001, 0.999])
@pytest.mark.parametrize("kind", ["random", "ties", "tiny", "mostly zero", "equal"])
@every_dtype
def test_the_mask_is_that_of_a_sort(kind, fraction, dtype, backend):
    """n = [ |g| <= the K-th smallest of all ], by sorting everything in float64."""
    params, grads = gradients(kind, dtype)
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
    opt = flatkern.SGD(params, enhance=flatkern.IRE(1.0, sharp_fraction=fraction), backend=backend)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    opt.update_mask()
    everything = torch.cat([g.double().abs().flatten() for g in grads]).sort().values
    k = min(max(int(len(everything) * (1 - fraction)), 1), len(everything))
    for mask, g in zip(masked(params, opt), grads, strict=True):
        assert torch.equal(mask, g.double().abs() <= everything[k - 1])
    assert all(p.grad is None for p in params)
    if kind == "random" and dtype == torch.float32:
        assert sum(int(m.sum()) for m in masked(params, opt)) == k, "without ties exactly K are amplified"


@law("count_magnitudes_")
@every_dtype
def test_counts_are_a_histogram(dtype):
    """Over all digits each element is counted once, among those that share its higher digits."""
    v = Values([(3, 5), (40,), ()], 1, dtype)
    grads = v.tensors()
    bits = np.concatenate([g.float().abs().flatten().view(torch.int32).numpy() for g in grads])
    prefix, higher = [], np.ones(len(bits), bool)
    for level, width in enumerate(MAGNITUDE_DIGITS):
        shift = sum(MAGNITUDE_DIGITS[level + 1 :])
        digits = bits >> shift & (2**width - 1)
        counts = torch.full((2**width + 2,), -1)
        v.run("count_magnitudes_", counts=counts, grads=grads, prefix=torch.tensor(prefix, dtype=torch.int64))
        assert counts[:-2].tolist() == np.bincount(digits[higher], minlength=2**width).tolist()
        begins = sum(d << sum(MAGNITUDE_DIGITS[k + 1 :]) for k, d in enumerate(prefix))
        assert counts[-2:].tolist() == [(bits < begins).sum(), (bits >= 0x7F800000).sum()]
        prefix.append(int(digits[higher][0]))
        higher &= digits == prefix[-1]


@pytest.mark.parametrize("wrong_by", [0, 1, -1, 40])
@pytest.mark.parametrize("infinite", [False, True])
def test_a_sample_only_saves_time(backend, monkeypatch, wrong_by, infinite):
    """The first digit is guessed from a sample of many gradients; the mask does not depend on the guess."""
    guess, found = selection._guess_first_digit, []

    def guessed(*args):
        found.append(guess(*args))
        return found[-1] + wrong_by

    monkeypatch.setattr(selection, "SAMPLED", 1000)
    monkeypatch.setattr(selection, "_guess_first_digit", guessed)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(300, 400), (9, 9, 5, 5), (7,)]]
    opt = make(backend, params)
    fill(params)
    grads = [p.grad.clone() for p in params]
    if infinite:
        params[1].grad[8, 8, 4, 4] = -torch.inf
        with pytest.raises(RuntimeError, match="not finite"):
            opt.update_mask()
        return
    opt.update_mask()
    magnitudes = torch.cat([g.abs().flatten() for g in grads])
    fraction = opt.enhancement.sharp_fraction
    threshold = magnitudes.sort().values[int(len(magnitudes) * (1 - fraction)) - 1]
    for mask, g in zip(masked(params, opt), grads, strict=True):
        assert torch.equal(mask, g.abs() <= threshold)
    first_digit = threshold.view(torch.int32) >> sum(MAGNITUDE_DIGITS[1:])
    assert abs(found[0].item() - first_digit) <= 1


@law("pack_mask_")
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 1030])
def test_bits_are_those_of_packbits(columns, backend):
    """NumPy's little-endian packing, row by row; the bits beyond the last column are zero."""
    g = torch.randn(5, columns)
    mask = torch.full(tables.mask_shape(g), 255, dtype=torch.uint8)
    resolve("pack_mask_", "cpu", backend)([mask], [g], torch.tensor(0.5))
    small = (g.abs() <= 0.5).numpy()
    assert np.array_equal(mask.numpy(), np.packbits(small, axis=1, bitorder="little"))
    assert torch.equal(unpacked(mask, g), torch.from_numpy(small))


@law("amplify_")
@every_dtype
def test_the_displacement_is_lengthened_where_the_mask_is(dtype):
    v = Values([(3, 5), (40,), ()], 0, dtype)
    params, previous = v.tensors(), v.tensors()
    masks = [torch.randint(0, 256, tables.mask_shape(p), dtype=torch.uint8) for p in params]
    before = [p.double() for p in params]
    v.run("amplify_", params=params, previous=previous, masks=masks, kappa=3.0)
    unit = torch.finfo(dtype).eps
    for p, w, old, mask in zip(params, before, previous, masks, strict=True):
        n = unpacked(mask, p)
        want = torch.where(n, w + 3 * (w - old.double()), w)
        assert torch.equal(p[~n], w[~n].to(dtype))
        assert ((p.double() - want).abs() <= unit * (want.abs() + 8 * (w - old).abs()) + 2.0**-149).all()


def trained(backend, base, half=False, perturb=None, steps=50, **ire):
    """Weights after training with IRE, beside the equation in float64; the largest difference."""
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(6, 17), torch.nn.Tanh(), torch.nn.Linear(17, 4))
    twin = torch.nn.Sequential(torch.nn.Linear(6, 17), torch.nn.Tanh(), torch.nn.Linear(17, 4)).double()
    twin.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    options = dict(lr=0.05, weight_decay=0.01)
    rules = {"SGD": (flatkern.SGD, torch.optim.SGD), "AdamW": (flatkern.AdamW, torch.optim.AdamW),
             "Adam": (flatkern.Adam, torch.optim.Adam), "Wrap": (None, torch.optim.AdamW)}  # fmt: skip
    own, reference = rules[base]
    options |= {"momentum": 0.9} if base == "SGD" else {}
    enhance = flatkern.IRE(**{"kappa": 2.0, "sharp_fraction": 0.3, "interval": 10} | ire)
    if own is None:
        opt = flatkern.Wrap(reference(net.parameters(), **options), enhance=enhance, perturb=perturb, backend=backend)
    else:
        opt = own(net.parameters(), **options, enhance=enhance, perturb=perturb, backend=backend)
    exact = reference(twin.parameters(), **options)
    masks, refreshed = None, 0
    for _ in range(steps):
        x, y = torch.randn(16, 6), torch.randint(0, 4, (16,))
        if opt.mask_due:
            refreshed += 1
            labels = torch.randint(0, 4, (16,))
            for model, inputs in ((net, x), (twin, x.double())):
                model.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            opt.update_mask()
            masks = masked(net.parameters(), opt)
            everything = torch.cat([p.grad.abs().flatten() for p in twin.parameters()])
            threshold = everything.kthvalue(int(len(everything) * 0.7)).values
            wrong = sum(int((m != (p.grad.abs() <= threshold)).sum())
                        for m, p in zip(masks, twin.parameters(), strict=True))  # fmt: skip
            assert wrong <= 2, "only float32's rounding of the gradients may tell the two selections apart"
        for model, inputs, o in ((net, x, opt), (twin, x.double(), exact)):
            o.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), y).backward()
        if perturb is not None:
            rho, gradient = perturb.rho, [p.grad for p in twin.parameters()]
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            opt.perturb()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                clean = [p.clone() for p in twin.parameters()]
                for p, g in zip(twin.parameters(), gradient, strict=True):
                    p.add_(rho / norm * g)
            twin.zero_grad()
            torch.nn.functional.cross_entropy(twin(x.double()), y).backward()
            with torch.no_grad():
                for p, w in zip(twin.parameters(), clean, strict=True):
                    p.copy_(w)
        old = copies(twin.parameters())
        opt.step()
        exact.step()
        with torch.no_grad():
            for p, w, n in zip(twin.parameters(), old, masks, strict=True):
                p.add_(2.0 * n * (p - w))
    assert refreshed == math.ceil(steps / enhance.interval)
    return max((p.double() - q).abs().max().item() for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("perturb", [None, flatkern.SAM(0.05)], ids=["alone", "SAM-IRE"])
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "Wrap"])
def test_fifty_steps_against_float64(base, perturb, backend):
    """Masks refreshed five times; float32 may drift from float64 by its rounding, not by a step."""
    assert trained(backend, base, perturb=perturb) < 2e-4


def make(backend, params, **options):
    return flatkern.AdamW(params, lr=0.1, enhance=flatkern.IRE(3.0, interval=2), backend=backend, **options)


def fill(params):
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype)


def test_kappa_zero_and_no_mask_are_the_base(backend):
    """G8: bit for bit, before the first mask and with kappa 0."""
    torch.manual_seed(0)
    start = [torch.randn(5, 9), torch.randn(4)]
    results = []
    for kappa, enhanced in ((0.0, True), (3.0, False), (None, False)):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(t.clone()) for t in start]
        ire = None if kappa is None else flatkern.IRE(kappa)
        opt = flatkern.AdamW(params, lr=0.1, enhance=ire, backend=backend)
        for _ in range(3):
            if enhanced:
                for p in params:
                    p.grad = torch.ones_like(p)
                opt.update_mask()
            fill(params)
            opt.step()
        results.append(copies(params))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_step_too_small_for_bfloat16_is_amplified_before_it_rounds(backend):
    """The displacement is taken in float32 registers: kappa times a step below half an ulp still moves the weight."""
    p = torch.nn.Parameter(torch.ones(3, 8, dtype=torch.bfloat16))
    opt = flatkern.SGD([p], lr=1.0, enhance=flatkern.IRE(7.0, sharp_fraction=0.5), backend=backend)
    p.grad = torch.ones_like(p)
    opt.update_mask()
    p.grad = torch.full_like(p, 2.0**-10)
    opt.step()
    assert torch.equal(p.detach(), torch.full_like(p, 1 - 8 * 2.0**-10))


def test_age_and_mask_resume(backend, tmp_path):
    """Save in the middle of a mask's life, load into a new optimizer, continue: bit for bit."""

    def run(opt, params, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            if opt.mask_due:
                fill(params)
                opt.update_mask()
            fill(params)
            opt.step()

    torch.manual_seed(0)
    start = [torch.randn(5, 9), torch.randn(4), torch.randn(3, 2, 3)]
    whole, first = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    opt, half = make(backend, whole), make(backend, first)
    run(opt, whole, range(7))
    run(half, first, range(3))
    torch.save({"weights": [p.detach() for p in first], "state": half.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    second = [torch.nn.Parameter(t.clone()) for t in saved["weights"]]
    resumed = make(backend, second)
    resumed.load_state_dict(saved["state"])
    assert resumed.param_groups[0]["mask_age"] == 1
    assert not resumed.mask_due
    run(resumed, second, range(3, 7))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(opt.state[a]["mask"], resumed.state[b]["mask"])
        assert resumed.state[b]["mask"].dtype == torch.uint8


def test_a_checkpoint_without_a_mask_starts_empty(backend):
    params = [torch.nn.Parameter(torch.randn(5, 9))]
    base = torch.optim.AdamW(params, lr=0.1)
    fill(params)
    base.step()
    opt = make(backend, params)
    fill(params)
    opt.update_mask()
    with pytest.warns(UserWarning, match="no IRE mask"):
        opt.load_state_dict(base.state_dict())
    assert opt.mask_due
    assert "mask" not in opt.state[params[0]]


def test_a_checkpoint_from_before_the_first_mask_has_lost_nothing(backend, recwarn):
    params = [torch.nn.Parameter(torch.randn(5, 9))]
    opts = [make(backend, params) for _ in range(2)]
    fill(params)
    opts[0].step()
    opts[1].load_state_dict(opts[0].state_dict())
    assert opts[1].mask_due
    assert not [w for w in recwarn if "mask" in str(w.message)]


def test_memory_is_a_bit_per_weight(backend):
    params = [torch.nn.Parameter(torch.randn(64, 72)), torch.nn.Parameter(torch.randn(16, 8, 3, 3))]
    opt = flatkern.SGD(params, enhance=flatkern.IRE(1.0), backend=backend)
    fill(params)
    opt.update_mask()
    kept = sum(t.numel() * t.element_size() for p in params for t in opt.state[p].values())
    assert kept * 8 == sum(p.numel() for p in params)
    fill(params)
    opt.step()
    assert not opt.cycle.weights.backups


def test_cost_counts_the_mask():
    """A bit per weight kept and read each step; four reads of the gradient and a write of the mask every ten."""
    p = torch.nn.Parameter(torch.randn(64, 80))
    plain, ire = (flatkern.cost(flatkern.SGD([p], momentum=0.9, enhance=e)) for e in (None, flatkern.IRE(1.0)))
    assert ire.state_bytes - plain.state_bytes == 640
    assert ire.bytes_moved - plain.bytes_moved == 640 + (4 * 4 * 5120 + 640) // 10


def test_excluded_frozen_and_unreached_parameters(backend):
    """enhance=False takes no part in the threshold; a parameter without gradient has a mask of zeros."""
    inside, left_out, unreached = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3))
    opt = flatkern.SGD([{"params": [inside, unreached]}, {"params": [left_out], "enhance": False}], lr=0.1,
                       enhance=flatkern.IRE(1.0, sharp_fraction=0.5), backend=backend)  # fmt: skip
    inside.grad, left_out.grad = torch.arange(1.0, 17).view(4, 4), torch.full((4, 4), 1e-9)
    opt.update_mask()
    assert torch.equal(unpacked(opt.state[inside]["mask"], inside), torch.arange(1, 17).view(4, 4) <= 8)
    assert not opt.state[unreached]["mask"].any()
    assert "mask" not in opt.state[left_out]
    before = left_out.detach().clone()
    for p in (inside, left_out, unreached):
        p.grad = torch.ones(4, 4)
    opt.step()
    assert torch.equal(left_out.detach(), before - torch.tensor(0.1))


@pytest.mark.parametrize("name", ["SGD", "Wrap"])
def test_refusals(name, backend):
    """Each with its way out, and nothing has changed."""
    params = [torch.nn.Parameter(torch.randn(3, 5))]

    def build(**options):
        if name == "Wrap":
            return flatkern.Wrap(torch.optim.SGD(params, lr=0.1), backend=backend, **options)
        return flatkern.SGD(params, lr=0.1, backend=backend, **options)

    ire = flatkern.IRE(1.0)
    with pytest.raises(RuntimeError, match="update_mask: this optimizer has no enhancement"):
        build().update_mask()
    opt = build(enhance=ire)
    with pytest.raises(RuntimeError, match="update_mask: no parameter has a gradient; run flatkern"):
        opt.update_mask()
    params[0].grad = torch.full((3, 5), math.nan)
    with pytest.raises(RuntimeError, match="update_mask: a gradient is not finite, so the mask is kept"):
        opt.update_mask()
    assert opt.mask_due and params[0].grad is not None
    assert not opt.state
    opt.update_mask(scaler=torch.amp.GradScaler("cpu"))
    assert opt.mask_due and params[0].grad is None and not opt.state
    perturbed = build(enhance=ire, perturb=flatkern.RWP())
    perturbed.perturb()
    fill(params)
    with pytest.raises(RuntimeError, match=r"update_mask: the weights are perturbed; call restore\(\)"):
        perturbed.update_mask()
    perturbed.restore()
    with pytest.raises(RuntimeError, match="update_mask: gradients of an unfinished step are pending"):
        perturbed.update_mask()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kappa": -1.0}, "IRE: kappa is -1.0, but should be a number >= 0"),
        ({"kappa": math.nan}, "IRE: kappa is nan"),
        ({"kappa": 1.0, "sharp_fraction": 0.0}, r"sharp_fraction is 0.0, but should be a number in \(0, 1\)"),
        ({"kappa": 1.0, "sharp_fraction": 1.0}, "sharp_fraction is 1.0"),
        ({"kappa": 1.0, "interval": 0}, r"interval is 0, but should be an integer in \[1, 2\^32\)"),
        ({"kappa": 1.0, "interval": 2.5}, "interval is 2.5, but should be an integer"),
    ],
)
def test_values(values, message):
    with pytest.raises(ValueError, match=message):
        flatkern.IRE(**values)


def test_sampled_labels_follow_the_model():
    """Labels are drawn from softmax(logits), so the mean loss is the entropy; the gradient is softmax minus label."""
    logits = torch.tensor([0.3, -1.0, 2.0]).repeat(20000, 1).requires_grad_()
    loss = flatkern.sampled_label_loss(logits, generator=torch.Generator().manual_seed(0))
    p = logits[0].detach().softmax(0)
    entropy, spread = -(p * p.log()).sum(), (p * p.log() ** 2).sum() - (p * p.log()).sum() ** 2
    assert abs(loss.item() - entropy) < 5 * math.sqrt(spread / 20000)
    loss.backward()
    labels = p - logits.grad * 20000
    assert torch.equal(labels.round().sum(dim=1), torch.ones(20000))
    for bad, error in ((torch.ones(3, dtype=torch.int64), TypeError), (torch.tensor(1.0), ValueError)):
        with pytest.raises(error, match="sampled_label_loss: logits has"):
            flatkern.sampled_label_loss(bad)
