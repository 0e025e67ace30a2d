// The one order in which squares and products are added, so that the result depends on nothing but the length of a row.
//
// A row is cut into chunks of 1024 elements. In a chunk, lane j of 64 adds the squares of elements j, j + 64, ... in
// float32; the lanes fold pairwise, 64 to 32 to ... to 1. Chunks are added in float64, in their order.
#pragma once

#include <cmath>
#include <cstring>

#include "convert.h"

namespace flatkern::cpu::FK_ISA {

constexpr int64_t kChunk = 1024;

// Hardware prefetchers stop at the end of a page, which is about a chunk.
FK_INLINE void fetch_next_chunk(const float* x) { __builtin_prefetch(x + kChunk, 0, 3); }

// A quarter of the 64 lanes; the compiler splits it where vectors are narrower.
typedef float Lanes16 __attribute__((vector_size(64)));
typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes4 __attribute__((vector_size(16)));

FK_INLINE void add_squares(Lanes16& sum, const float* x) {
  Lanes16 v;
  std::memcpy(&v, x, sizeof v);
  sum += v * v;
}

// The first n < 16 elements; the lanes beyond add a zero, which changes no bit of a sum of squares.
FK_INLINE void add_squares(Lanes16& sum, const float* x, int64_t n) {
#if defined(__AVX512F__)
  const Lanes16 v = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), x);
#else
  Lanes16 v = {};
  float padded[16] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  std::memcpy(&v, padded, sizeof v);
#endif
  sum += v * v;
}

FK_INLINE float fold(const Lanes16& lanes) {
  Lanes8 a8, b8;
  std::memcpy(&a8, &lanes, sizeof a8);
  std::memcpy(&b8, reinterpret_cast<const char*>(&lanes) + sizeof a8, sizeof b8);
  a8 += b8;
  Lanes4 a4, b4;
  std::memcpy(&a4, &a8, sizeof a4);
  std::memcpy(&b4, reinterpret_cast<const char*>(&a8) + sizeof a4, sizeof b4);
  a4 += b4;
  return (a4[0] + a4[2]) + (a4[1] + a4[3]);
}

// The sum of squares of one chunk, n <= kChunk.
inline float sum_squares(const float* x, int64_t n) {
  Lanes16 sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) add_squares(sums[j], x + i + 16 * j);
  for (int j = 0; j < 4; ++j, i += 16) {
    if (i + 16 <= n) {
      add_squares(sums[j], x + i);
    } else if (i < n) {
      add_squares(sums[j], x + i, n - i);
    }
  }
  return fold((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

// For sums beyond float32: squares of 2^-80 x, of which those that matter for such a sum are normal numbers.
constexpr float kShrink = 0x1p-80f;
constexpr double kGrow = 0x1p160;

// The sum of squares of one chunk for `sum_partials`. Where it overflows: that of kShrink x, with a minus sign to mark
// it, since no other sum is negative. Infinity and NaN stay.
inline float partial_squares(const float* x, int64_t n) {
  const float sum = sum_squares(x, n);
  if (__builtin_expect(!std::isinf(sum), 1)) return sum;
  float shrunk[kChunk];
  for (int64_t i = 0; i < n; ++i) shrunk[i] = x[i] * kShrink;
  return -sum_squares(shrunk, n);
}

// In float64 and in their order.
inline double sum_partials(const float* partials, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += partials[i] < 0.0f ? partials[i] * -kGrow : partials[i];
  return sum;
}

// <a, a>, <a, g>, <g, g>, in float64: a product of two float32 numbers is exact there.
struct Products {
  double of[3];

  FK_INLINE Products operator+(const Products& other) const {
    return {{of[0] + other.of[0], of[1] + other.of[1], of[2] + other.of[2]}};
  }
};

// As many of the 16 lanes as let all three sums of all lanes stay in registers.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#else
constexpr int kDoubles = 4;
#endif
typedef double Doubles4 __attribute__((vector_size(32)));
typedef float Narrow __attribute__((vector_size(kDoubles * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));

FK_INLINE Doubles doubles(const float* x) {
  Narrow v;
  std::memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, Doubles);
}

// sum + x y. The product is exact, so that fusing it with the addition changes no bit.
FK_INLINE void add_product(Doubles& sum, const Doubles& x, const Doubles& y) {
#if defined(__AVX512F__)
  sum = (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
#elif defined(__FMA__)
  sum = (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
#else
  sum += x * y;
#endif
}

FK_INLINE void add_products(Doubles (&sums)[3], const float* a, const float* g) {
  const Doubles x = doubles(a), y = doubles(g);
  add_product(sums[0], x, x);
  add_product(sums[1], x, y);
  add_product(sums[2], y, y);
}

FK_INLINE double fold(const Doubles& lanes) {
  Doubles4 sum;
  std::memcpy(&sum, &lanes, sizeof sum);
  if constexpr (kDoubles == 8) {
    Doubles4 upper;
    std::memcpy(&upper, reinterpret_cast<const char*>(&lanes) + sizeof sum, sizeof upper);
    sum += upper;
  }
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Of one chunk, n <= kChunk: lane j of 16 adds the products of elements j, j + 16, ...; the lanes fold pairwise.
inline Products sum_products(const float* a, const float* g, int64_t n) {
  constexpr int kLanes = 16, kParts = kLanes / kDoubles;
  Doubles sums[kParts][3] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_next_chunk(a + i);
    fetch_next_chunk(g + i);
    for (int p = 0; p < kParts; ++p) add_products(sums[p], a + i + kDoubles * p, g + i + kDoubles * p);
  }
  if (i < n) {
    float last[2][kLanes] = {};  // the lanes beyond the end add a zero
    std::memcpy(last[0], a + i, (n - i) * sizeof(float));
    std::memcpy(last[1], g + i, (n - i) * sizeof(float));
    for (int p = 0; p < kParts; ++p) add_products(sums[p], last[0] + kDoubles * p, last[1] + kDoubles * p);
  }
  for (int half = kParts / 2; half > 0; half /= 2)
    for (int p = 0; p < half; ++p)
      for (int j = 0; j < 3; ++j) sums[p][j] += sums[p + half][j];
  return {{fold(sums[0][0]), fold(sums[0][1]), fold(sums[0][2])}};
}

// The halves of a list first, and so on: errors grow with the logarithm of its length. Zeros of an empty one.
inline Products sum_pairwise(const Products* partials, int64_t n) {
  if (n <= 1) return n == 1 ? partials[0] : Products{};
  return sum_pairwise(partials, n / 2) + sum_pairwise(partials + n / 2, n - n / 2);
}

}  // namespace flatkern::cpu::FK_ISA
