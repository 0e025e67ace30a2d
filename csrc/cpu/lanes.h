// Vectors of Philox words for one instruction set: a 64-bit lane per counter, because Philox needs 64-bit products.
#pragma once

#include "../common/table.h"
#include "../math/noise.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flatkern::cpu::FK_ISA {

// `load` spreads kCount counters over the lanes in the order that lets `store` write each counter's four words next
// to each other, counter after counter, with nothing but interleaving inside 128 bits.
#if defined(__AVX512F__)

struct Lanes {
  static constexpr int64_t kCount = 8;
  __m512i x;

  static FK_INLINE Lanes load(const uint32_t* p, uint32_t base) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i sum = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                         _mm256_set1_epi32(static_cast<int>(base)));
    return {_mm512_cvtepu32_epi64(_mm256_permutevar8x32_epi32(sum, order))};
  }
  static FK_INLINE Lanes all(uint32_t value) { return {_mm512_set1_epi64(value)}; }
};

FK_INLINE Lanes multiply(Lanes a, uint32_t b) { return {_mm512_mul_epu32(a.x, _mm512_set1_epi64(b))}; }
FK_INLINE Lanes high(Lanes a) { return {_mm512_srli_epi64(a.x, 32)}; }
FK_INLINE Lanes exclusive_or(Lanes a, Lanes b, uint32_t c) {
  return {_mm512_ternarylogic_epi64(a.x, b.x, _mm512_set1_epi64(c), 0x96)};
}

FK_INLINE void store(const Lanes (&c)[4], uint32_t* out) {
  const __m512i a = _mm512_mask_shuffle_epi32(c[0].x, 0xAAAA, c[1].x, _MM_PERM_CCAA);
  const __m512i b = _mm512_mask_shuffle_epi32(c[2].x, 0xAAAA, c[3].x, _MM_PERM_CCAA);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
}

#elif defined(__AVX2__)

struct Lanes {
  static constexpr int64_t kCount = 4;
  __m256i x;

  static FK_INLINE Lanes load(const uint32_t* p, uint32_t base) {
    const __m128i sum =
        _mm_add_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi32(static_cast<int>(base)));
    return {_mm256_cvtepu32_epi64(_mm_shuffle_epi32(sum, _MM_SHUFFLE(3, 1, 2, 0)))};
  }
  static FK_INLINE Lanes all(uint32_t value) { return {_mm256_set1_epi64x(value)}; }
};

FK_INLINE Lanes multiply(Lanes a, uint32_t b) { return {_mm256_mul_epu32(a.x, _mm256_set1_epi64x(b))}; }
FK_INLINE Lanes high(Lanes a) { return {_mm256_srli_epi64(a.x, 32)}; }
FK_INLINE Lanes exclusive_or(Lanes a, Lanes b, uint32_t c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.x, b.x), _mm256_set1_epi64x(c))};
}

FK_INLINE void store(const Lanes (&c)[4], uint32_t* out) {
  const __m256i a = _mm256_blend_epi32(c[0].x, _mm256_slli_epi64(c[1].x, 32), 0xAA);
  const __m256i b = _mm256_blend_epi32(c[2].x, _mm256_slli_epi64(c[3].x, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(a, b));
}

#elif defined(__x86_64__)

struct Lanes {
  static constexpr int64_t kCount = 2;
  __m128i x;

  static FK_INLINE Lanes load(const uint32_t* p, uint32_t base) {
    return {_mm_set_epi64x(static_cast<uint32_t>(p[1] + base), static_cast<uint32_t>(p[0] + base))};
  }
  static FK_INLINE Lanes all(uint32_t value) { return {_mm_set1_epi64x(value)}; }
};

FK_INLINE Lanes multiply(Lanes a, uint32_t b) { return {_mm_mul_epu32(a.x, _mm_set1_epi64x(b))}; }
FK_INLINE Lanes high(Lanes a) { return {_mm_srli_epi64(a.x, 32)}; }
FK_INLINE Lanes exclusive_or(Lanes a, Lanes b, uint32_t c) {
  return {_mm_xor_si128(_mm_xor_si128(a.x, b.x), _mm_set1_epi64x(c))};
}

FK_INLINE void store(const Lanes (&c)[4], uint32_t* out) {
  const __m128i low = _mm_set1_epi64x(0xFFFFFFFF);
  const __m128i a = _mm_or_si128(_mm_and_si128(c[0].x, low), _mm_slli_epi64(c[1].x, 32));
  const __m128i b = _mm_or_si128(_mm_and_si128(c[2].x, low), _mm_slli_epi64(c[3].x, 32));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(a, b));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm_unpackhi_epi64(a, b));
}

#else

struct Lanes : math::Word {
  static constexpr int64_t kCount = 1;
  static FK_INLINE Lanes load(const uint32_t* p, uint32_t base) { return {{static_cast<uint32_t>(*p + base)}}; }
  static FK_INLINE Lanes all(uint32_t value) { return {{value}}; }
};

FK_INLINE Lanes multiply(Lanes a, uint32_t b) { return {math::multiply(static_cast<math::Word>(a), b)}; }
FK_INLINE Lanes high(Lanes a) { return {math::high(static_cast<math::Word>(a))}; }
FK_INLINE Lanes exclusive_or(Lanes a, Lanes b, uint32_t c) {
  return {math::exclusive_or(static_cast<math::Word>(a), static_cast<math::Word>(b), c)};
}

FK_INLINE void store(const Lanes (&c)[4], uint32_t* out) {
  for (int j = 0; j < 4; ++j) out[j] = static_cast<uint32_t>(c[j].x);
}

#endif

// Four vectors: a round of Philox is a chain of operations that wait for each other, and four chains fill the waits.
struct LanesTimes4 {
  static constexpr int64_t kCount = 4 * Lanes::kCount;
  Lanes of[4];

  static FK_INLINE LanesTimes4 load(const uint32_t* p, uint32_t base) {
    LanesTimes4 result;
    for (int j = 0; j < 4; ++j) result.of[j] = Lanes::load(p + j * Lanes::kCount, base);
    return result;
  }
  static FK_INLINE LanesTimes4 all(uint32_t value) {
    const Lanes lanes = Lanes::all(value);
    return {{lanes, lanes, lanes, lanes}};
  }
};

FK_INLINE LanesTimes4 multiply(const LanesTimes4& a, uint32_t b) {
  return {{multiply(a.of[0], b), multiply(a.of[1], b), multiply(a.of[2], b), multiply(a.of[3], b)}};
}
FK_INLINE LanesTimes4 high(const LanesTimes4& a) {
  return {{high(a.of[0]), high(a.of[1]), high(a.of[2]), high(a.of[3])}};
}
FK_INLINE LanesTimes4 exclusive_or(const LanesTimes4& a, const LanesTimes4& b, uint32_t c) {
  LanesTimes4 result;
  for (int j = 0; j < 4; ++j) result.of[j] = exclusive_or(a.of[j], b.of[j], c);
  return result;
}

FK_INLINE void store(const LanesTimes4 (&c)[4], uint32_t* out) {
  for (int j = 0; j < 4; ++j) {
    const Lanes lanes[4] = {c[0].of[j], c[1].of[j], c[2].of[j], c[3].of[j]};
    store(lanes, out + 4 * j * Lanes::kCount);
  }
}

}  // namespace flatkern::cpu::FK_ISA
