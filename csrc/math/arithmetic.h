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
#elif defined(__x86_64__) && !defined(__FMA__) && !defined(FK_EMULATION)
  // Without the instruction fmaf is a slow call. The sum below rounds twice, but only 65536 radii and 65536 angles ever
  // reach this function, and tests/test_noise.py compares all of them.
  return static_cast<float>(static_cast<double>(a) * b + c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

#if defined(__CUDACC__) || defined(FK_EMULATION)
// A GPU has estimates; its exact root and quotient are calls for arguments out of the ordinary, and a call costs
// registers even where it is never made. What follows is correctly rounded for all arguments, without one.
#define FK_ESTIMATES

#if !defined(FK_OWN_ESTIMATES)  // a test's, which are as far off as a GPU's
FK_HD float reciprocal_estimate(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

FK_HD double reciprocal_estimate(double x) {
#if defined(__CUDA_ARCH__)
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  return r;
#else
  return static_cast<double>(1.0f / static_cast<float>(x));
#endif
}

FK_HD float reciprocal_root_estimate(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / __builtin_sqrtf(x);
#endif
}
#endif

// The root of a radius's square, from its estimate: the nearest float for those that there are, but not for all
// numbers.
FK_HD float root_of_radius(float x) {
  const float estimate = reciprocal_root_estimate(x), s = x * estimate;
  return fma(fma(-s, s, x), 0.5f * estimate, s);
}

// The root of a number of [2^-96, 2^128). Half its reciprocal is refined, too: some roots come that near to the middle
// of two floats that an estimate which is off by one float would round them to the wrong one.
FK_HD float refined_root(float x) {
  const float estimate = reciprocal_root_estimate(x), s = x * estimate, h = 0.5f * estimate;
  const float rest = fma(-s, h, 0.5f), nearer = fma(s, rest, s);
  return fma(fma(-nearer, nearer, x), fma(h, rest, h), nearer);
}

FK_HD uint32_t exponent_of(float x) { return bits_of(x) >> 23 & 0xFF; }

// For [2^-60, 2^61) no step of a quotient leaves the normal numbers.
FK_HD bool is_moderate(float x) {
  return (bits_of(x) & 0x7FFFFFFF) - bits_of(0x1p-60f) < bits_of(0x1p61f) - bits_of(0x1p-60f);
}

// The one kind of divisor for which refining an estimate can end next to its reciprocal (Markstein 1990): all ones.
FK_HD bool is_stubborn(float b) { return (bits_of(b) & 0x007FFFFF) == 0x007FFFFF; }

FK_HD bool has_ordinary_quotient(float a, float b) {
  return (is_moderate(a) || bits_of(a) == 0) && is_moderate(b) && !is_stubborn(b);
}

FK_HD float refined_reciprocal(float b) {
  const float r = reciprocal_estimate(b);
  return fma(fma(-b, r, 1.0f), r, r);
}

// a / b, from the refined reciprocal of b.
FK_HD float ordinary_quotient(float a, float b, float reciprocal) {
  float q = a * reciprocal;
  q = fma(fma(-b, q, a), reciprocal, q);
  return fma(fma(-b, q, a), reciprocal, q);
}

// a / b where one of them is out of the ordinary: in float64 nothing is, but for zero and infinity.
FK_HD float rare_quotient(float a, float b) {
  const bool is_lasting = a == 0.0f || exponent_of(a) == 255;
  if (is_lasting && b != 0.0f && exponent_of(b) != 255) return a * b;  // zero, infinity or NaN, with the sign of both
  if (b == 0.0f || exponent_of(a) == 255 || exponent_of(b) == 255) return a * reciprocal_estimate(b);
  const double x = a, y = b;
  // The nearest that a quotient of two float32 numbers comes to the middle between two others is 2^-49 of it.
  double r = reciprocal_estimate(y);
  for (int i = 0; i < 2; ++i) r = __builtin_fma(__builtin_fma(-y, r, 1.0), r, r);
  double q = x * r;
  q = __builtin_fma(__builtin_fma(-y, q, x), r, q);
  return static_cast<float>(q);
}
#endif

// Correctly rounded, as IEEE asks of a square root.
FK_HD float root(float x) {
#if defined(FK_ESTIMATES)
  const bool small = x < 0x1p-96f;
  const float s = refined_root(small ? x * 0x1p64f : x);
  return x == 0.0f || x == __builtin_inff() ? x : small ? s * 0x1p-32f : s;
#else
  return __builtin_sqrtf(x);
#endif
}

// a / b, correctly rounded.
FK_HD float quotient(float a, float b) {
#if defined(FK_ESTIMATES)
  return has_ordinary_quotient(a, b) ? ordinary_quotient(a, b, refined_reciprocal(b)) : rare_quotient(a, b);
#else
  return a / b;
#endif
}

// Whether a number is neither infinite nor NaN.
FK_HD bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

// What g, once scaled, and g_clean are multiplied by. A component (q, r), null where there is none, puts
// q g_clean - r grad_scale g in the place of g_clean.
struct MixingWeights {
  float grad, clean;
};
FK_HD MixingWeights mixing_weights(float grad_weight, float clean_weight, const float* component) {
  if (component == nullptr) return {grad_weight, clean_weight};
  return {grad_weight - clean_weight * component[1], clean_weight * component[0]};
}

// g <- clip (factor g + clean_weight g_clean), with factor = weights.grad grad_scale. An absent clip is 1, which
// changes no bit.
FK_HD float mixed(float g, float clean, float factor, float clean_weight, float clip) {
  return (factor * g + clean_weight * clean) * clip;
}

// The same without a clean gradient. Adding 0 instead would turn -0 into +0.
FK_HD float mixed(float g, float factor, float clip) { return factor * g * clip; }

}  // namespace flatkern::math
