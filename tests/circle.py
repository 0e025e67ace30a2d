"""A kernel that makes every radius and every angle of the noise. Used by test_triton.py, test_gpu.py and `make gpu`."""

import torch
import triton
import triton.language as tl
from compare import assert_ulp
from flatkern.triton_kernels import noise
from test_noise import strict_angles, strict_radii


@triton.jit
def circle_kernel(radii, cosines, sines, COUNT: tl.constexpr):
    """Radius of every low half of a word, and cosine and sine of every high half."""
    half = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(radii + half, noise.radius(half.to(tl.uint32)))
    cos, sin = noise.angle(half.to(tl.uint32) << 16)
    tl.store(cosines + half, cos)
    tl.store(sines + half, sin)


def drawn(device, count):
    """Every radius, cosine and sine as a device computes them, `count` of each a program; on the CPU."""
    found = [torch.zeros(65536, device=device) for _ in range(3)]
    circle_kernel[(65536 // count,)](*found, COUNT=count, enable_fp_fusion=False)
    return [t.cpu() for t in found]


def assert_radii(radii):
    assert_ulp("radius", radii, torch.from_numpy(strict_radii()))


def assert_angles(*cosines_and_sines):
    for name, got, want in zip(("cosine", "sine"), cosines_and_sines, strict_angles(), strict=True):
        assert_ulp(name, got, torch.from_numpy(want))


def assert_every_radius_and_angle(device, count):
    """Are as the definition says."""
    radii, *angles = drawn(device, count)
    assert_radii(radii)
    assert_angles(*angles)
