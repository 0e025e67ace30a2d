"""flatkern.landscape.largest_eigenvalue, where the eigenvalues are known one by one."""

import pytest
import torch
from torch import nn

from flatkern import landscape
from flatkern.landscape.power import MOST_DEFLATED

TWELVE = [0.1] * 12
SPECTRA = {  # and the bound on products
    "one": ([-100, 1, 0.5, 0, *TWELVE], 20),
    "much larger": ([-1000, 5, *[0.3] * 10], 20),
    "huge": ([-1e4, 0.1, 0.05, *TWELVE], 20),
    "five": ([-100, -60, -30, -15, -7, 1, 0.4, *TWELVE], 200),
    "multiple": ([-100, -100, -100, 1, 0.5, *TWELVE], 40),
    "signs below": ([-100, 1, -1, 0.5, *TWELVE], 200),
}


def diagonal(values, **options):
    d = torch.tensor(values, dtype=torch.float32)
    return landscape.largest_eigenvalue(
        nn.Linear(len(values), 1, bias=False), lambda m: 0.5 * (d * m.weight.square()).sum(), **options
    )


@pytest.mark.parametrize("case", SPECTRA)
def test_negative_eigenvalues_of_larger_magnitude(case):
    """They are found and left out; the residual is small beside the value, not beside them."""
    values, most = SPECTRA[case]
    found = diagonal(values)
    assert found.converged and found.dominant == pytest.approx(min(values), rel=1e-4)
    assert found.value == pytest.approx(max(values), rel=1e-3) and found.residual <= 0.01 * found.value
    assert found.products <= most


def test_eigenvalues_that_are_all_negative():
    """The largest where it is known to be: few parameters, or an iteration that ends there; else a lower bound."""
    assert (diagonal([-3]).value, diagonal([-3]).converged) == (-3, True)
    few = diagonal([-1, -2, -4, -8])
    assert few.converged and few.value == pytest.approx(-1, rel=1e-3) and few.products < 100
    many = diagonal([-(3.0**k) for k in range(MOST_DEFLATED + 2)])
    assert many.converged and many.value == pytest.approx(-1, rel=1e-3)
    short = diagonal([-1, -2, -4, -8], iterations=8)
    assert not short.converged and short.value <= -1 and short.products == 8


def test_a_negative_value_is_not_taken_for_the_largest():
    """Products enough for the eigenvalue of largest magnitude, and for no more."""
    for most in range(2, 8):
        found = diagonal([-1000, 5, 4.9, 4.8, *TWELVE], iterations=most)
        assert not found.converged and found.value <= 5 and found.products == most


def test_eigenvalues_of_equal_magnitude():
    """Power iteration of H alone would go to and fro between them."""
    found = diagonal([3.0, -3.0] * 6)
    assert found.converged and found.value == pytest.approx(3) and found.dominant is None


def test_a_linear_loss():
    found = landscape.largest_eigenvalue(nn.Linear(3, 2), lambda model: model(torch.ones(1, 3)).sum())
    assert (found.value, found.residual, found.converged) == (0, 0, True)


def compiled():
    torch._dynamo.reset()
    return torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), backend="aot_eager")


@pytest.mark.parametrize("trained", [False, True], ids=["product", "gradient"])
def test_a_compiled_model_is_named(trained):
    """In the first product, or, once an ordinary backward pass was compiled, while the gradient's graph is made."""
    model, text = compiled(), "donated buffers" if trained else "double backward"

    def loss(model):
        return model(torch.ones(2, 4)).square().sum()

    if trained:
        landscape.ascent_sharpness(model, loss)
    with pytest.raises(
        RuntimeError, match=rf"^largest_eigenvalue: .* torch says: .*{text}.*; .*torch.compile: pass the"
    ):
        landscape.largest_eigenvalue(model, loss)


def attention(model):
    q = model(torch.linspace(-1, 1, 64).view(1, 2, 8, 4))
    return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()


def test_fused_attention_is_named():
    with pytest.raises(RuntimeError, match=r"twice, but torch says: derivative for .*sdpa_kernel\(SDPBackend.MATH\)"):
        landscape.largest_eigenvalue(nn.Linear(4, 4), attention, iterations=3)

    def remedied(model):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attention(model)

    assert landscape.largest_eigenvalue(nn.Linear(4, 4), remedied, iterations=3).value > 0
