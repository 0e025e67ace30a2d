"""What operations refuse of arguments that few of them have: all backends in the same words, and nothing is written."""

import copy
import re

import cases
import pytest
import torch
from test_backends import assert_same_bits

from flatkern.dispatch import resolve
from flatkern.ops import OPS

SHAPES = [(3, 4), (5,)]
PAIR, THREE = (
    "component is {}, but should be float32 (2,), contiguous",
    "products is {}, but should be float64 (3,), contiguous",
)
MIXING = ("gradient_norm_", "mix_gradients_", "sgd_update_", "adam_update_", "adamw_update_")
NO_CLEAN = "component is given, but clean_grads is None, and it is a component of them"
ROWS = [  # operations, variant, what is given instead, the error and its text
    (MIXING, "clean_grads component", lambda v: {"component": torch.ones(3)}, TypeError, PAIR.format("float32 (3,)")),
    (MIXING, "clean_grads component", lambda v: {"component": torch.ones(())}, TypeError, PAIR.format("float32 ()")),
    (MIXING, "clean_grads component", lambda v: {"component": torch.ones(2).double()},
     TypeError, PAIR.format("float64 (2,)")),
    (MIXING, "clean_grads component", lambda v: {"component": torch.ones(4)[::2]},
     TypeError, PAIR.format("float32 (2,)")),
    (MIXING, "clean_grads component", lambda v: {"clean_grads": None}, ValueError, NO_CLEAN),
    (MIXING, "clean_grads", lambda v: {"clean_grads": v["clean_grads"][:1]},
     ValueError, "clean_grads has 1 entries, but {reference} has 2"),
    (["gradient_products_"], "", lambda v: {"products": torch.zeros(3)}, TypeError, THREE.format("float32 (3,)")),
    (["gradient_products_"], "", lambda v: {"products": torch.zeros(2).double()},
     TypeError, THREE.format("float64 (2,)")),
    (["gradient_products_"], "", lambda v: {"products": torch.zeros(3, 1).double()},
     TypeError, THREE.format("float64 (3, 1)")),
    (["gradient_products_"], "", lambda v: {"products": torch.zeros(6).double()[::2]},
     TypeError, THREE.format("float64 (3,)")),
    (["gradient_products_"], "", lambda v: {"clean_grads": None},
     TypeError, "clean_grads is None, but should be Tensor[]"),
    (["gradient_products_"], "", lambda v: {"clean_grads": [*v["clean_grads"][:1], torch.ones(4)]},
     ValueError, "clean_grads[1] has shape (4,), but grads[1] has (5,)"),
    (["ascent_norm_"], "", lambda v: {"eta": [-1.0, 0.1]},
     ValueError, "params is None, but an eta is >= 0, and T_w = |w| + eta needs the weights"),
    (["ascent_norm_", "perturb_ascent_"], "means", lambda v: {"means": [torch.ones(4, 3).t(), v["means"][1]]},
     ValueError, "means[0] has strides (1, 3), but {reference}[0] has (4, 1); copy it into the other's memory format"),
    (["ascent_norm_", "perturb_ascent_"], "means", lambda v: {"sigma": [1.0, float("nan")]},
     ValueError, "sigma[1] is nan, but should be finite"),
    (["perturb_ascent_"], "means new_means", lambda v: {"momentum": [0.9]},
     ValueError, "momentum has 1 entries, but params has 2"),
    (["perturb_ascent_"], "means new_means", lambda v: {"means": None},
     ValueError, "new_means is given, but means is None, and they are made of those"),
    (["perturb_ascent_"], "means new_means", lambda v: {"new_means": [v["params"][0], v["new_means"][1]]},
     ValueError, "new_means[0] shares memory with params[0]; pass another tensor"),
    (["mix_gradients_"], "outs", lambda v: {"outs": [v["outs"][0], v["grads"][1]]},
     ValueError, "outs[1] shares memory with grads[1]; pass another tensor"),
    (["mix_gradients_"], "outs", lambda v: {"outs": v["outs"][:1]}, ValueError, "outs has 1 entries, but grads has 2"),
    (["mix_gradients_"], "outs", lambda v: {"found_inf": torch.ones(1)},
     TypeError, "found_inf is float32 (1,), but should be a 0-dim float32 tensor"),
]  # fmt: skip
CALLS = [(OPS[name], *row) for names, *row in ROWS for name in names]


@pytest.mark.parametrize("op, words, spoil, error, text", CALLS, ids=[f"{op.name} {row[-1]}" for op, *row in CALLS])
def test_it_is_refused(op, words, spoil, error, text, backend):
    if backend != "eager" and backend not in op.backends.split():
        pytest.skip(f"{backend} has no kernel of {op.name}")
    values = getattr(cases, op.name)(SHAPES, torch.float32, variant=words)
    values |= spoil(values)
    before = copy.deepcopy(values)
    text = f"{op.name}: {text.format(reference='params' if 'params' in op.writes else 'grads')}"
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        cases.call(resolve(op.name, "cpu", backend), op, values)
    assert_same_bits(op, values, before)
