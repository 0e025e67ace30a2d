// "flatkern normal, version 1" for one random word and one counter. Mirrors flatkern/reference/noise.py line by line.
#pragma once

#include "arithmetic.h"

namespace flatkern::math {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;

// One 32-bit word in the lower half of 64 bits. The upper half is undefined: products leave their high word there.
struct Word {
  uint64_t x;
};
FK_HD Word multiply(Word a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // One instruction. Of the same in C++ nvcc makes two: it adds what the upper half of a.x & 0xFFFFFFFF contributes, 0.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a.x)), "r"(b));
  return {product};
#else
  return {(a.x & 0xFFFFFFFFu) * b};
#endif
}
FK_HD Word high(Word a) { return {a.x >> 32}; }
FK_HD Word exclusive_or(Word a, Word b, uint32_t c) { return {a.x ^ b.x ^ c}; }

// Philox4x32-10 (Salmon et al. 2011). A template, because vectors of words run the same ten rounds.
template <class Words>
FK_HD void philox4x32(Words (&c)[4], uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const Words product0 = multiply(c[0], kMultiplier0);
    const Words product1 = multiply(c[2], kMultiplier1);
    c[0] = exclusive_or(high(product1), c[1], k0);
    c[1] = product1;
    c[2] = exclusive_or(high(product0), c[3], k1);
    c[3] = product0;
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
}

// Coefficients from the highest power down.
template <class... Coefficients>
FK_HD float horner(float x, float first, Coefficients... rest) {
  float result = first;
  ((result = fma(result, x, rest)), ...);
  return result;
}

// sqrt(-2 ln u) from the low 16 bits k, u = (k + 1/2) / 65536.
FK_HD float radius(uint32_t word) {
  const uint32_t k = word & 0xFFFF;
  const float u = fma(float_of(k | 0x4B000000u), 0x1p-16f, -(128.0f - 0x1p-17f));
  const uint32_t bits = bits_of(u), shifted = bits - 0x3F3504F3u;
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float f = float_of(bits - (shifted & 0xFF800000u)) - 1.0f;
  const float log = horner(f, -0x1.e743bep-3f, 0x1.7e515ap-2f, -0x1.a3c3cep-2f, 0x1.fe26ccp-2f, -0x1.5523fcp-1f,
                           0x1.000176p+0f, -0x1.00001p+1f);
  const float t = fma(static_cast<float>(e), -0x1.62e43p+0f, log * f);
#if defined(FK_ESTIMATES)
  return root_of_radius(t);  // t is in [2^-17, 23]
#else
  return root(t);
#endif
}

struct CosSin {
  float cos, sin;
};

// Cosine and sine of the angle in bits 16-31: 15 bits choose it in a half circle, bit 31 mirrors the cosine.
FK_HD CosSin angle(uint32_t word) {
  const int32_t h = static_cast<int32_t>(word << 1) >> 17;
  const float x = fma(static_cast<float>(h), 0x1.921fb6p-14f, 0x1.921fb6p-15f);
  const float q = x * x;
  const float tail = horner(q, 0x1.5bb08p-19f, -0x1.9f4142p-13f, 0x1.110d6ep-7f, -0x1.55553cp-3f);
  const float sin = x * fma(q, tail, 1.0f);
  const float cos = horner(q, 0x1.847576p-16f, -0x1.6b2aa4p-10f, 0x1.554edep-5f, -0x1.ffffcp-2f, 0x1.fffffep-1f);
  return {float_of(bits_of(cos) ^ (word & 0x80000000u)), sin};
}

struct Pair {
  float first, second;
};

// The two normals of one word: columns 2j and 2j + 1 of its eight.
FK_HD Pair normals(uint32_t word) {
  const float r = radius(word);
  const CosSin a = angle(word);
  return {r * a.cos, r * a.sin};
}

}  // namespace flatkern::math
