"""flatkern.landscape: closed forms of quadratics, and that whatever is measured nothing of the model changes."""

import math
import warnings

import pytest
import torch
from compare import assert_same
from interrupting import interrupt
from torch import nn

import flatkern
from flatkern import landscape
from flatkern.landscape import weights
from flatkern.landscape.evaluation import UnrepeatableLoss

# The losses that leave nothing as it is have dropout, too.
pytestmark = pytest.mark.filterwarnings("ignore::flatkern.landscape.evaluation.UnrepeatableLoss")

GENERATOR = torch.Generator().manual_seed(0)
SYMMETRIC = torch.randn(12, 12, generator=GENERATOR)
SYMMETRIC = SYMMETRIC + SYMMETRIC.T
CURVED = SYMMETRIC @ SYMMETRIC / 12  # positive definite


class Quadratic(nn.Module):
    """L(w) = w^T A w / 2 + b^T w, of one matrix."""

    def __init__(self, hessian, slope=0.0, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype))
        self.hessian, self.slope = hessian.to(dtype), slope

    def loss(self):
        w = self.w.flatten()
        return 0.5 * w @ self.hessian @ w + self.slope * w.sum()


def loss_of(model):
    return model.loss()


def network():
    """Every kind of filter and of buffer; BatchNorm in training mode, a part of it in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.utils.spectral_norm(nn.Conv2d(4, 3, 3)),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16, 5), nn.LayerNorm(5),
    )  # fmt: skip
    model[3].weight_orig.data = model[3].weight_orig.data.to(memory_format=torch.channels_last)
    model(torch.randn(6, 1, 8, 8))
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


IMAGES = torch.randn(6, 1, 8, 8, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def training_loss(model):
    """A loss that does all it should not: it trains BatchNorm and spectral norm."""
    model.train()
    return nn.functional.cross_entropy(model(IMAGES), LABELS)


class State:
    """All that a measurement must leave as it is."""

    def __init__(self, model):
        self.model = model
        self.tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers())
        self.values = [None if t is None else t.detach().clone() for t in self.tensors]
        self.modes = [m.training for m in model.modules()]

    def assert_unchanged(self):
        now = [t for p in self.model.parameters() for t in (p, p.grad)] + list(self.model.buffers())
        assert all(a is b for a, b in zip(now, self.tensors, strict=True))
        for t, value in zip(now, self.values, strict=True):
            if t is not None:
                assert_same([t.detach()], [value])
        assert [m.training for m in self.model.modules()] == self.modes


MEASURES = {
    "line": lambda model, loss, **options: landscape.line(model, loss, directions=2, points=3, **options),
    "plane": lambda model, loss, **options: landscape.plane(model, loss, points=2, **options),
    "average_sharpness": lambda model, loss, **options: landscape.average_sharpness(model, loss, draws=2, **options),
    "ascent_sharpness": lambda model, loss, **options: landscape.ascent_sharpness(model, loss, **options),
    "largest_eigenvalue": lambda model, loss, **options: landscape.largest_eigenvalue(
        model, loss, iterations=3, **options
    ),
}


# ---- directions


@pytest.mark.parametrize("include_vectors", [False, True])
@pytest.mark.parametrize("backend", ["eager", None])
def test_directions_are_filter_normalised(include_vectors, backend):
    """Each filter of d is as long as that of w, to what w + d rounds; directions differ; the plane's are the line's."""
    model, seen = network().eval(), []
    clean = [p.detach().clone() for p in model.parameters()]

    def loss(model):
        seen.append([p.detach() - w for p, w in zip(model.parameters(), clean, strict=True)])
        return training_loss(model)

    options = {"extent": 1.0, "points": 3, "seed": 7, "include_vectors": include_vectors, "backend": backend}
    landscape.line(model, loss, directions=2, **options)
    *_, minus, zero, plus, _, _, other = seen
    assert all(not d.any() for d in zero)
    for w, a, b, c in zip(clean, plus, minus, other, strict=True):
        if w.dim() < 2 and not include_vectors:
            assert not a.any() and not b.any()
            continue
        rows, of = (flatkern.filter_norms([t.contiguous()])[0].double() for t in (a, w))
        # w + d rounds each of n elements by 2^-24 of itself, and ||w + d|| <= 2 ||w||; the norms have 12 ulp.
        assert ((rows - of).abs() <= 2.0**-20 * of).all()
        assert torch.allclose(a, -b, atol=1e-6)
        assert not torch.allclose(a, c, atol=0.01) or not w.any()
    seen.clear()
    landscape.plane(model, loss, **options)
    for corner, a, c in zip(seen[-1], plus, other, strict=True):  # alpha = beta = 1
        assert torch.allclose(corner, a + c, atol=1e-6)


def test_the_line_of_a_quadratic():
    """f(alpha) = L(w) + alpha d^T (A w + b) + alpha^2 d^T A d / 2."""
    model, seen = Quadratic(CURVED, 0.3), []
    w = model.w.detach().double().flatten()

    def loss(model):
        seen.append(model.w.detach().double().flatten() - w)
        return model.loss()

    found = landscape.line(model, loss, directions=3, points=5, extent=2.0, seed=3)
    a = CURVED.double()
    assert found.alphas == [-2, -1, 0, 1, 2]
    assert found.loss == model.loss().item()
    for number, losses in enumerate(found.losses):
        d = seen[2 + 5 * number + 3]  # L(w) comes twice
        want = [found.loss + t * d @ (a @ w + 0.3) + t * t * d @ a @ d / 2 for t in found.alphas]
        assert losses == pytest.approx([x.item() for x in want], rel=1e-5, abs=1e-4)
    columns = [torch.tensor(at, dtype=torch.float64) for at in zip(*found.losses, strict=True)]
    assert found.mean == pytest.approx([c.mean().item() for c in columns])
    assert found.std == pytest.approx([c.std().item() for c in columns], abs=1e-9)


def test_a_loss_that_overflows_is_kept():
    """Far away a loss may be infinite; statistics are NaN there and nowhere else."""
    model = nn.Linear(2, 2)

    def loss(model):
        far = (model.weight - start).abs().sum() > 0
        return torch.tensor(math.inf) if far else torch.tensor(1.0)

    start = model.weight.detach().clone()
    found = landscape.line(model, loss, directions=2, points=3)
    assert found.losses == [[math.inf, 1, math.inf]] * 2
    assert found.mean == [math.inf, 1, math.inf] and found.std[1] == 0 and math.isnan(found.std[0])


# ---- sharpness


def test_the_average_sharpness_of_a_quadratic():
    """E = sigma^2 sum_i A_ii ||w_f(i)||^2 / 2, met within five standard errors, which are as they should be."""
    model, sigma, draws = Quadratic(CURVED, 0.3), 0.2, 4000
    found = landscape.average_sharpness(model, loss_of, sigma=sigma, draws=draws)
    scale = sigma * model.w.detach().double().norm(dim=1).repeat_interleave(4)
    a = CURVED.double() * scale[:, None] * scale  # in units of the noise
    slope = scale * (CURVED.double() @ model.w.detach().double().flatten() + 0.3)
    want = a.trace().item() / 2
    # Var(z^T A z / 2 + s^T z) = ||A||_F^2 / 2 + ||s||^2 of normals.
    error = math.sqrt((a.square().sum() / 2 + slope.square().sum()).item() / draws)
    assert abs(found.increase - want) < 5 * error
    assert found.standard_error == pytest.approx(error, rel=0.1)
    assert (found.draws, found.sigma, found.loss) == (draws, sigma, model.loss().item())


def test_the_ascent_sharpness_of_a_quadratic():
    """rho ||g|| + rho^2 g^T A g / (2 ||g||^2), and the weights meanwhile are those of SAM's own perturb()."""
    model, rho, seen = Quadratic(CURVED, 0.3), 0.5, []
    w = model.w.detach().double().flatten()
    g = CURVED.double() @ w + 0.3

    def loss(model):
        seen.append(model.w.detach().clone())
        return model.loss()

    found = landscape.ascent_sharpness(model, loss, rho=rho)
    want = rho * g.norm() + rho**2 * g @ CURVED.double() @ g / (2 * g.norm() ** 2)
    assert found.increase == pytest.approx(want.item(), rel=1e-4)
    assert found.gradient_norm == pytest.approx(g.norm().item(), rel=1e-5)
    opt = flatkern.SGD(model.parameters(), lr=0.1, perturb=flatkern.SAM(rho=rho))
    model.loss().backward()
    opt.perturb()
    assert_same([seen[-1]], [model.w.detach()])
    with pytest.raises(RuntimeError, match="holds the model's weights perturbed; call its eval"):
        landscape.ascent_sharpness(model, loss)


def test_parameters_that_the_loss_does_not_use():
    """And sparse gradients, and gradients in another memory format."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(5, 3, sparse=True), "unused": nn.Linear(2, 2), "l": nn.Linear(3, 4)})

    def loss(model):
        return (model["e"](torch.tensor([1, 1, 4])) @ model["l"].weight.t().contiguous()).square().sum()

    before = State(model)
    found = landscape.ascent_sharpness(model, loss)
    assert found.increase > 0
    before.assert_unchanged()


# ---- the Hessian


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_eigenvalue(sign, dtype):
    """Whatever the sign of the eigenvalue of largest magnitude, which is told apart."""
    hessian = sign * (SYMMETRIC - SYMMETRIC.diagonal().mean() * torch.eye(12))
    values = torch.linalg.eigvalsh(hessian.double())
    extremes = [values[0].item(), values[-1].item()]
    found = landscape.largest_eigenvalue(Quadratic(hessian, dtype=dtype), loss_of, iterations=400)
    assert found.converged
    assert found.residual <= 0.01 * found.value
    # An error of residual^2 / gap, and never above.
    bound = found.residual**2 / (values[-1] - values[-2]).item()
    assert extremes[1] - bound <= found.value <= extremes[1] + 1e-4
    assert found.dominant == pytest.approx(max(extremes, key=abs), rel=1e-3)
    assert (found.dominant < 0) is (abs(extremes[0]) > abs(extremes[1]))


def test_both_signs_are_met():
    values = torch.linalg.eigvalsh(SYMMETRIC - SYMMETRIC.diagonal().mean() * torch.eye(12))
    assert values[0] < 0 < values[-1] and abs(values[0] + values[-1]) > 0.5


def test_an_eigenvalue_that_has_not_converged():
    """It says so, and is a number that the eigenvalue is not below."""
    found = landscape.largest_eigenvalue(Quadratic(SYMMETRIC), loss_of, iterations=4)
    assert not found.converged and found.products == 4
    assert found.value <= torch.linalg.eigvalsh(SYMMETRIC)[-1]
    assert found.residual > 0.01 * abs(found.value)


def test_products_that_nothing_can_be_written_into():
    """autograd returns one number, expanded to a matrix."""
    found = landscape.largest_eigenvalue(Quadratic(CURVED), lambda m: 0.5 * m.w.sum() ** 2)
    assert found.value == pytest.approx(12) and found.converged and found.products > 1


# ---- a loss that is not the same at every call


def dropping(model):
    return nn.functional.dropout(model.w, 0.5).square().sum()


def shrinking(model):
    with torch.no_grad():
        model.w.mul_(0.99)
    return model.w.square().sum()


@pytest.mark.parametrize("loss", [dropping, shrinking])
@pytest.mark.parametrize("name", MEASURES)
def test_a_loss_that_is_not_the_same_at_every_call(name, loss):
    with pytest.warns(UnrepeatableLoss, match=rf"^{name}: loss\(model\) is not the same at every call: \d.*, then \d"):
        MEASURES[name](Quadratic(CURVED), loss)


@pytest.mark.parametrize("dtype, rise", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_rounding_is_no_difference(dtype, rise):
    """As of kernels that add up in another order at each call; much more is one."""
    calls = []

    def loss(model, by):
        calls.append(1)
        return model.w.float().square().sum() * (1 + by * (len(calls) % 2))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnrepeatableLoss)
        landscape.ascent_sharpness(Quadratic(CURVED, dtype=dtype), lambda m: loss(m, rise))
    with pytest.warns(UnrepeatableLoss):
        landscape.ascent_sharpness(Quadratic(CURVED, dtype=dtype), lambda m: loss(m, 20 * rise))


# ---- what is put back


@pytest.mark.parametrize("name", MEASURES)
def test_everything_is_put_back(name):
    """After success, an exception of the loss at any evaluation, and Ctrl-C there."""
    model = network()
    before = State(model)
    MEASURES[name](model, training_loss)
    before.assert_unchanged()
    for error in (ZeroDivisionError, KeyboardInterrupt):
        for which in range(5):
            calls = []

            def loss(model, which=which, error=error, calls=calls):
                calls.append(1)
                if len(calls) > which:
                    raise error
                return training_loss(model)

            try:
                MEASURES[name](model, loss)
            except error:
                pass
            else:
                assert name in ("ascent_sharpness", "largest_eigenvalue", "average_sharpness"), "called fewer times"
            before.assert_unchanged()


def test_interrupts_at_any_time():
    """An alarm that raises wherever it is, in the restoring too, and a second one in the restoring of the first."""
    model, interrupted = network(), 0
    before = State(model)
    for k in range(60):
        call = MEASURES["line" if k % 2 else "ascent_sharpness"]
        interrupted += interrupt(lambda call=call: call(model, training_loss), after=1e-4 + 1.1e-4 * k)
        before.assert_unchanged()
    assert interrupted > 20


def test_an_interrupted_restore_is_begun_again(monkeypatch):
    model, restored = network(), []
    before, restore = State(model), weights.restore_

    def interrupted(params, *args, **options):
        restored.append(1)
        if len(restored) == 2:  # the first one is tried before anything moves
            restore(params[:1], args[0][:1], **options)
            raise KeyboardInterrupt
        restore(params, *args, **options)

    monkeypatch.setattr(weights, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        landscape.ascent_sharpness(model, training_loss, rho=1.0)
    before.assert_unchanged()
    assert len(restored) == 3


def test_a_forward_that_replaces_a_buffer():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("calls", torch.zeros(()))

        def loss(self):
            self.calls = self.calls + 1
            return self.w.square().sum()

    model = Counting()
    before = State(model)
    MEASURES["line"](model, loss_of)
    before.assert_unchanged()


def test_evaluation_mode_inside():
    seen = []

    def loss(model):
        seen.extend(m.training for m in model.modules())
        return model[7].weight.sum() + model[6].weight.sum()

    for measure in MEASURES.values():
        measure(network(), loss)
    assert seen and not any(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)).to(dtype)
    before = State(model)
    for measure in MEASURES.values():
        measure(model, lambda m: m(torch.ones(4, 8, dtype=dtype)).float().square().mean())
    before.assert_unchanged()


# ---- bad input


REFUSED = {
    "no tensor": (nn.Linear(2, 2), lambda m: 1.0, TypeError, r"loss\(model\) is float, but should be a tensor; return"),
    "integer": (nn.Linear(2, 2), lambda m: torch.tensor(1), TypeError, "int64, but should be floating point"),
    "vector": (nn.Linear(2, 2), lambda m: m.bias, ValueError, r"shape \(2,\), but should be a scalar; reduce it"),
    "NaN": (nn.Linear(2, 2), lambda m: m.bias.sum() * math.nan, ValueError, "is nan at the model's own weights, but"),
    "no parameters": (
        nn.ReLU(),
        lambda m: torch.ones(()),
        ValueError,
        "model ReLU has no parameter that requires grad",
    ),
    "no module": (torch.ones(2), lambda m: m.sum(), TypeError, "model is Tensor, but should be a torch.nn.Module"),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, measure):
    model, loss, error, text = REFUSED[case]
    with pytest.raises(error, match=f"^{measure}: .*{text}"):
        MEASURES[measure](model, loss)


@pytest.mark.parametrize("measure", ["ascent_sharpness", "largest_eigenvalue"])
def test_a_loss_without_gradient_is_refused(measure):
    for loss in (lambda m: m.weight.sum().detach(), lambda m: torch.ones(2, requires_grad=True).sum()):
        with pytest.raises(ValueError, match=f"{measure}: .* no gradient .* without torch.no_grad"):
            MEASURES[measure](nn.Linear(2, 2), loss)


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "largest_eigenvalue"])
def test_what_is_refused_changes_nothing(name):
    """A backend, a dtype, a layout: before anything moves."""
    model = nn.Linear(3, 3)
    before = State(model)
    with pytest.raises(RuntimeError, match="triton"):
        MEASURES[name](model, lambda m: m.weight.sum(), backend="triton")
    before.assert_unchanged()
    with pytest.raises(TypeError, match=f"{name}: params.0. has dtype torch.float64"):
        MEASURES[name](nn.Linear(3, 3).double(), lambda m: m.weight.sum())
    turned = nn.Linear(3, 3)
    turned.weight = nn.Parameter(torch.randn(3, 4).t())
    with pytest.raises(ValueError, match=f"{name}: params.0. has strides"):
        MEASURES[name](turned, lambda m: m.weight.sum())


VALUES = [
    ("line", {"directions": 0}, "line: directions is 0"),
    ("line", {"points": 1}, "line: points is 1"),
    ("line", {"extent": 0}, "line: extent is 0, but should be a number > 0"),
    ("plane", {"seed": -1}, "plane: seed is -1"),
    ("average_sharpness", {"sigma": -0.1}, "average_sharpness: sigma is -0.1"),
    ("average_sharpness", {"draws": 1}, "average_sharpness: draws is 1"),
    ("ascent_sharpness", {"rho": math.inf}, "ascent_sharpness: rho is inf"),
    ("largest_eigenvalue", {"iterations": 1}, "largest_eigenvalue: iterations is 1"),
    ("largest_eigenvalue", {"tolerance": 0.0}, "largest_eigenvalue: tolerance is 0.0"),
]


@pytest.mark.parametrize("name, options, text", VALUES, ids=[v[2] for v in VALUES])
def test_values_out_of_range(name, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(landscape, name)(nn.Linear(2, 2), lambda m: m.weight.sum(), **options)


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_a_loss_that_is_finite_at_the_weights_alone(beyond):
    model = nn.Linear(2, 2)
    before, start = State(model), model.weight.detach().clone()

    def loss(model):
        return model.weight.sum() * (1.0 if torch.equal(model.weight, start) else beyond)

    with pytest.raises(
        ValueError, match=rf"^average_sharpness: .* is -?{beyond}, .* in draw 0 of the noise of sigma 0.01"
    ):
        MEASURES["average_sharpness"](model, loss)
    with pytest.raises(
        ValueError, match=rf"^ascent_sharpness: .* is -?{beyond}, .* after the ascent of rho 0.05; take"
    ):
        MEASURES["ascent_sharpness"](model, loss)
    before.assert_unchanged()


def test_only_vectors():
    with pytest.raises(
        ValueError, match=r"line: model has no parameter of two dimensions or more.*include_vectors=True"
    ):
        MEASURES["line"](nn.LayerNorm(3), lambda m: m.weight.sum())
    assert landscape.line(nn.LayerNorm(3), lambda m: m.weight.sum(), include_vectors=True).loss == 3


def test_a_gradient_that_is_not_finite():
    model = nn.Linear(2, 2)
    before = State(model)
    with pytest.raises(ValueError, match="ascent_sharpness: the gradient's norm is"):
        landscape.ascent_sharpness(model, lambda m: (m.weight - m.weight).norm().sqrt())
    before.assert_unchanged()
