// Blocks of float16 and bfloat16 to float32 and back, bit for bit as torch rounds: to nearest even, NaN stays NaN.
#pragma once

#include <cstring>

#include "../common/table.h"
#include "../math/arithmetic.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Elements of the loops below are independent, which the compiler cannot know of two pointers.
#define FK_SIMD _Pragma("omp simd")

namespace flatkern::cpu::FK_ISA {

inline void bfloat16_to_float32(const uint16_t* x, int64_t n, float* out) {
  FK_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = math::float_of(static_cast<uint32_t>(x[i]) << 16);
}

inline void float32_to_bfloat16(const float* x, int64_t n, uint16_t* out) {
  FK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = math::bits_of(x[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>(x[i] != x[i] ? 0x7FC0u : rounded);
  }
}

#if defined(__F16C__)

inline void float16_to_float32(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#endif
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(x[i]);
}

inline void float32_to_float16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

#else

inline void float16_to_float32(const uint16_t* x, int64_t n, float* out) {
  FK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(x[i] & 0x7FFF) << 13;
    const uint32_t sign = static_cast<uint32_t>(x[i] & 0x8000) << 16;
    // Multiplying by 2^112 moves the exponent and makes subnormals normal; infinity and NaN need all its bits set.
    const uint32_t scaled = math::bits_of(math::float_of(magnitude) * 0x1p112f);
    out[i] = math::float_of(sign | (magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : scaled));
  }
}

inline void float32_to_float16(const float* x, int64_t n, uint16_t* out) {
  FK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = math::bits_of(x[i]), magnitude = bits & 0x7FFFFFFFu;
    // Normal results: rebias the exponent, then round to nearest even in the bits that are dropped.
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 aligns them, so that the float32 addition does the rounding.
    const uint32_t subnormal = math::bits_of(math::float_of(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    out[i] = static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude >= 0x477FF000u ? special : finite));
  }
}

#endif

FK_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t); }

FK_INLINE void prefetch(const char* begin, const char* end) {
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 2);
}

// Elements [i, i + n) as float32: in place if they are float32, else converted into `scratch`.
// The next block is prefetched. Of float32 its first lines: a block is about a page, and hardware prefetchers stop at
// the end of a page; but nothing of a step that is no longer than these lines, by which updates of ResNet-50's weights
// lose 1 to 4 % (AMD EPYC, 2026-11-28). Of others all: converting takes about as long as the memory does.
inline float* load(const View& view, int64_t i, int64_t n, float* scratch) {
  constexpr int64_t kFirstLines = 512;
  const int64_t size = size_of(view.dtype);
  const char* next = view.as<char>() + (i + n) * size;
  if (view.dtype == DType::kFloat32) {
    if (n * size > kFirstLines) prefetch(next, next + kFirstLines);
    return view.as<float>() + i;
  }
  prefetch(next, next + n * size);
  (view.dtype == DType::kBFloat16 ? bfloat16_to_float32 : float16_to_float32)(view.as<uint16_t>() + i, n, scratch);
  return scratch;
}

// Where to compute elements [i, i + n) that `store` then rounds into the tensor: in place for float32, else `scratch`.
inline float* target(const View& view, int64_t i, float* scratch) {
  return view.dtype == DType::kFloat32 ? view.as<float>() + i : scratch;
}

// Rounds x into elements [i, i + n); nothing where x is already in place.
inline void store(const View& view, int64_t i, int64_t n, const float* x) {
  if (view.dtype == DType::kFloat32) {
    float* out = view.as<float>() + i;
    if (out != x) std::memcpy(out, x, n * sizeof(float));
    return;
  }
  (view.dtype == DType::kBFloat16 ? float32_to_bfloat16 : float32_to_float16)(x, n, view.as<uint16_t>() + i);
}

#if defined(__SSE2__)
// One cache line, in as few stores as possible: parts of several lines compete for the write-combining buffers.
FK_INLINE void copy_line_non_temporal(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
  for (int64_t j = 0; j < 64; j += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
#endif
}
#endif

// Stores that bypass the caches: lines are not read before they are written, and evict nothing that is in use.
inline void copy_non_temporal(char* to, const char* from, int64_t size) {
#if defined(__SSE2__)
  int64_t at = -reinterpret_cast<intptr_t>(to) & 63;
  if (at > size) at = size;
  std::memcpy(to, from, at);
  for (; at + 64 <= size; at += 64) copy_line_non_temporal(to + at, from + at);
  std::memcpy(to + at, from + at, size - at);
#else
  std::memcpy(to, from, size);
#endif
}

// Orders non-temporal stores before everything that follows; another thread may read what they wrote.
FK_INLINE void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// to[i, i + n) <- from[i, i + n): the same bits where the dtypes agree, else rounded once.
// `non_temporal` is for lists larger than any cache, whose tensors are not read again soon.
inline void copy(const View& to, const View& from, int64_t i, int64_t n, float* scratch, bool non_temporal) {
  if (to.dtype == from.dtype) {
    const int64_t size = size_of(to.dtype);
    char* out = to.as<char>() + i * size;
    const char* in = from.as<char>() + i * size;
    non_temporal ? copy_non_temporal(out, in, n * size) : static_cast<void>(std::memcpy(out, in, n * size));
  } else {
    store(to, i, n, load(from, i, n, scratch));
  }
}

}  // namespace flatkern::cpu::FK_ISA
