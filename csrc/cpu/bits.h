// Masks: a bit per element, eight columns of a row to a byte; a byte per element of tensors of rank <= 1.
#pragma once

#include <cstring>

#include "../math/mask.h"
#include "apply.h"

namespace flatkern::cpu::FK_ISA {

FK_INLINE int64_t mask_stride(const View& like) { return ceil_div(like.cols, 8); }

// Nonzero in scratch.flags[i] where the mask of element i of the block is set.
inline const uint8_t* unpack(const View& mask, const View& like, const Block& b, Scratch& scratch) {
  const uint8_t* bytes = mask.as<uint8_t>();
  if (like.ndim < 2) return bytes + b.begin;
  const int64_t cols = b.rows > 1 ? b.n / b.rows : b.n, stride = mask_stride(like);
  for (int64_t r = 0; r < b.rows; ++r) {
    const uint8_t* from = bytes + (b.row + r) * stride + b.col / 8;
    uint8_t* flags = scratch.flags + r * cols;
    // Whole bytes: what is written beyond a row's last column, the next row overwrites.
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 64 <= cols; i += 64) {
      uint64_t bits;
      std::memcpy(&bits, from + i / 8, sizeof bits);
      _mm512_storeu_si512(flags + i, _mm512_movm_epi8(bits));
    }
#endif
    for (; i < cols; i += 8) {
      const uint64_t each = (from[i / 8] * 0x0101010101010101ull) & 0x8040201008040201ull;
      std::memcpy(flags + i, &each, sizeof each);
    }
  }
  return scratch.flags;
}

// Which of eight magnitudes, n of which exist, are not above the threshold: a bit each.
inline uint8_t small_bits(const float* g, int64_t n, float threshold) {
  uint8_t bits = 0;
  for (int64_t j = 0; j < n; ++j) bits |= static_cast<uint8_t>(math::is_small(g[j], threshold) << j);
  return bits;
}

// The mask of a block: where the gradient's magnitude is not above the threshold.
inline void pack_small(const View& mask, const View& like, const Block& b, const float* g, float threshold) {
  uint8_t* bytes = mask.as<uint8_t>();
  if (like.ndim < 2) {
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) bytes[b.begin + i] = math::is_small(g[i], threshold);
    return;
  }
  const int64_t cols = b.rows > 1 ? b.n / b.rows : b.n, stride = mask_stride(like);
  for (int64_t r = 0; r < b.rows; ++r, g += cols) {
    uint8_t* to = bytes + (b.row + r) * stride + b.col / 8;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= cols; i += 16) {
      const __mmask16 bits =
          _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(g + i)), _mm512_set1_ps(threshold), _CMP_LE_OQ);
      std::memcpy(to + i / 8, &bits, sizeof bits);
    }
#elif defined(__AVX2__)
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    for (; i + 8 <= cols; i += 8) {
      const __m256 small =
          _mm256_cmp_ps(_mm256_and_ps(_mm256_loadu_ps(g + i), magnitude), _mm256_set1_ps(threshold), _CMP_LE_OQ);
      to[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(small));
    }
#endif
    for (; i < cols; i += 8) to[i / 8] = small_bits(g + i, min(8, cols - i), threshold);
  }
}

}  // namespace flatkern::cpu::FK_ISA
