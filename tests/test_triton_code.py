"""The machine code that Triton makes for sm_90 writes eager's bits, without a GPU.

It is executed by bench/gpu/sass.py, program by program: slowly, so that tensors are few and small, and every operation
comes once. Needs kernels that are not interpreted, so it does not run in test_triton.py's process.
"""

import cases
import pytest
import stand_in_driver
from compare import assert_within

driver = stand_in_driver.driver  # without Triton, nothing below is imported

from bench.gpu import sass, triton_code  # noqa: E402
from flatkern import dispatch  # noqa: E402
from flatkern.ops import OPS  # noqa: E402

pytestmark = pytest.mark.matrix  # half a minute

# Several rows a tile, the last of which are not there; eights that are cut short.
SHAPES = [(9, 264), (2, 147), (7,)]
SEGMENTED = [(1, 8720)]  # a row that is cut
CASES = {  # of each operation, what most of the others do is in it
    "fill_normal_": ["offset"],
    "filter_norms_": ["specials segmented"],
    "ascent_norm_": ["params", "params means"],
    "gradient_norm_": ["clean_grads grad_scale", "clean_grads component grad_scale"],
    "gradient_products_": ["segmented"],
    "perturb_gaussian_": ["norms backups", "backups segmented", "masters history"],
    "perturb_ascent_": ["backups", "backups new_means means", "masters new_means means infinite"],
    "restore_": [""],
    "mix_gradients_": [
        "history clean_grads grad_scale clip",
        "history outs clean_grads component grad_scale found_inf",
        "history outs clean_grads component skip segmented",
    ],
    "sgd_update_": [
        "momentum_buffers backups noise segmented",
        "momentum_buffers backups masks",
        "clean_grads component",
    ],
    "adam_update_": ["masters skip history specials"],
    "adamw_update_": ["masters noise history clean_grads grad_scale"],
    "count_magnitudes_": ["second"],
    "pack_mask_": ["specials"],
    "amplify_": [""],
}


def execute(op, values, driver):
    """What a call launches, on the CPU."""
    memory = sass.Memory()
    made = triton_code.launches(driver, lambda: cases.call(dispatch.load(op, "triton"), op, values))
    memory.look()
    for launch in made:
        for index in range(launch.grid):
            launch.run(memory, index)


def make(name, words):
    shapes = SHAPES + SEGMENTED * ("segmented" in words)
    dtype = "bfloat16" if "masters" in words else "float32"  # masters are there for the sake of other dtypes
    return getattr(cases, name)(shapes, cases.DTYPES[dtype], variant=words)


@pytest.mark.parametrize("name, words", [(name, words) for name, each in CASES.items() for words in each])
def test_machine_code_writes_the_bits_of_eager(name, words, driver):
    op = OPS[name]
    got, want = make(name, words), make(name, words)
    execute(op, got, driver)
    cases.call(dispatch.load(op, "eager"), op, want)
    assert_within(op, got, want)


def test_every_operation_is_executed():
    assert set(CASES) == {name for name, op in OPS.items() if "triton" in op.backends.split()}
