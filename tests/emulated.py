"""What the tests of the emulated CUDA backend share: its operations, shapes, and how they are called and compared."""

import os

import cases
import pytest
from compare import assert_within
from test_backends import make, name_of, run

from flatkern import cuda
from flatkern.ops import OPS

needs_emulation = pytest.mark.skipif(
    not os.environ.get(cuda.EMULATION), reason=f"{cuda.EMULATION} is not set; `make test-cuda` sets it and runs these"
)

CUDA = [op for op in OPS.values() if "cuda" in op.backends.split()]
VARIANTS = [(op, words) for op in CUDA for words in cases.VARIANTS[op.name]]
# Kernels of their own have those that need the least: cases.py has few of these.
LEAST = {
    "sgd_update_": "momentum_buffers unit, momentum_buffers masters noise clip, masters clean_grads, masters skip",
    "adam_update_": "masters clean_grads clip, masters noise grad_scale, backups grad_scale, masters noise skip",
    "adamw_update_": "masters grad_scale, masters noise clip, backups clean_grads clip, backups skip",
}
ALL_VARIANTS = VARIANTS + [(OPS[name], words) for name in LEAST for words in LEAST[name].split(", ")]
every_op = pytest.mark.parametrize("op", CUDA, ids=name_of)

# Blocks of 256 threads: nothing, ends of eights, many rows to a warp, a row to some warps, to all eight.
SHORT = [
    *[(0,), (3, 5), (0, 4), (5, 0), (), (1,), (17,), (7, 1), (3, 16), (2, 17), (70, 9), (513, 2), (8, 3, 3, 3)],
    *[(40, k) for k in (3, 24, 25)],
    *[(3, 256), (3, 257), (1023,), (8, 1024), (2, 1025), (3, 2049)],
]
# Longer rows, for which blocks are as large as they need, and what is cut into segments; beside short ones.
LONG = [
    *[(2, 6152), (300, 3), (1, 8192), (2, 8200), (257,), (20000,), (5, 0)],
    *[(1, 20003), (1, 32768), (2, 32769), (1, 70001)],
]
ALL = SHORT + LONG
FEW = [(3, 16), (17,), (5, 4, 3), (2, 2056), (300,)]
# What has most arguments: every way through a kernel.
RICHEST = {
    "fill_normal_": "offset",
    "filter_norms_": "",
    "ascent_norm_": "params",
    "gradient_norm_": "clean_grads grad_scale",
    "perturb_gaussian_": "backups masters history offset",
    "perturb_ascent_": "backups masters",
    "restore_": "wide",
    "mix_gradients_": "history clean_grads grad_scale clip",
    "count_magnitudes_": "second",
    "pack_mask_": "",
    "amplify_": "",
    "sgd_update_": "masters momentum_buffers noise masks history clean_grads grad_scale clip found_inf offset",
    "adam_update_": "masters noise masks history clean_grads grad_scale clip found_inf offset",
    "adamw_update_": "backups noise masks history clean_grads grad_scale clip found_inf offset",
}
UPDATES = ["sgd_update_", "adam_update_", "adamw_update_"]


def assert_like_eager(op, case, move=lambda values: values):
    got, want = move(make(op, *case)), make(op, *case)
    assert_within(op, run(op, "cuda", got), run(op, "eager", want))
