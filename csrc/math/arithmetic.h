// Scalars, roots and bit patterns with the rounding every backend agrees on, and the mixing of gradients.
// Mirrors flatkern/reference/arithmetic.py; one element, no torch, no vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Internal linkage: the same function is compiled for several instruction sets, and the linker must not merge them.
#if defined(__CUDACC__)
#define FK_HD static __host__ __device__ __forceinline__
#else
#define FK_HD static inline __attribute__((always_inline))
#endif

namespace flatkern::math {

FK_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FK_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FK_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__x86_64__) && !defined(__FMA__)
  // Without the instruction fmaf is a slow call. The sum below rounds twice, but only 65536 radii and 65536 angles ever
  // reach this function, and tests/test_noise.py compares all of them.
  return static_cast<float>(static_cast<double>(a) * b + c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Correctly rounded, as IEEE asks of a square root.
FK_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// g <- clip (factor g + clean_weight g_clean). An absent clip is 1, which changes no bit.
FK_HD float mixed(float g, float clean, float factor, float clean_weight, float clip) {
  return (factor * g + clean_weight * clean) * clip;
}

// The same without a clean gradient. Adding 0 instead would turn -0 into +0.
FK_HD float mixed(float g, float factor, float clip) { return factor * g * clip; }

}  // namespace flatkern::math
