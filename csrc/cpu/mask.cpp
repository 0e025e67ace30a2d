// The mask family on the CPU: count_magnitudes_, pack_mask_, amplify_.
#include "../math/mask.h"

#include "bits.h"

namespace flatkern::cpu::FK_ISA {
namespace {

FK_INLINE int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

FK_INLINE int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Digits, `width` bits from `shift` on, of those magnitudes whose higher bits are `higher`; returns how many.
inline int64_t matching_digits(const float* g, int64_t n, uint32_t higher, int shift, int width, uint32_t* out) {
  const uint32_t low = (1u << width) - 1;
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_and_epi32(_mm512_loadu_si512(g + i), _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 match =
        _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(bits, shift + width), _mm512_set1_epi32(static_cast<int>(higher)));
    const __m512i digit = _mm512_and_epi32(_mm512_srli_epi32(bits, shift), _mm512_set1_epi32(static_cast<int>(low)));
    _mm512_mask_compressstoreu_epi32(out + count, match, digit);
    count += __builtin_popcount(match);
  }
#endif
  for (; i < n; ++i) {
    const uint32_t bits = math::magnitude_bits(g[i]);
    out[count] = (bits >> shift) & low;
    count += (bits >> (shift + width)) == higher;
  }
  return count;
}

struct PackMaskWalk {
  const PackMask& a;
  float threshold;

  Squares prepare(const Block& b, Scratch& scratch) const {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) scratch.flags[i] = math::is_small(g[i], threshold);
    pack(a.masks[b.k], a.grads[b.k], b, scratch.flags);
    return {};
  }
  float settle(int64_t, int64_t, const double*) const { return 0.0f; }
  void finish(const Block&, const float*, Scratch&) const {}
};

struct AmplifyWalk {
  const Amplify& a;

  Squares prepare(const Block& b, Scratch& scratch) const {
    const View& param = a.params[b.k];
    const float* w = load(param, b.begin, b.n, scratch.w);
    const float* previous = load(a.previous[b.k], b.begin, b.n, scratch.g);
    const uint8_t* flags = unpack(a.masks[b.k], param, b, scratch);
    const float kappa = static_cast<float>(a.kappa[b.k]);
    float* p = target(param, b.begin, scratch.v);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) p[i] = flags[i] ? math::amplified(w[i], previous[i], kappa) : w[i];
    store(param, b.begin, b.n, p);
    return {};
  }
  float settle(int64_t, int64_t, const double*) const { return 0.0f; }
  void finish(const Block&, const float*, Scratch&) const {}
};

}  // namespace

void count_magnitudes_(const CountMagnitudes& a) {
  const int64_t level = a.prefix[0].numel;
  const int shift = math::kDigitShift[level], width = math::kDigitWidth[level];
  uint32_t higher = 0;
  for (int64_t j = 0; j < level; ++j)
    higher = higher << math::kDigitWidth[j] | static_cast<uint32_t>(a.prefix[0].as<int64_t>()[j]);

  // Every thread has counters of its own, two of each: equal digits in a row would wait for one another.
  const int64_t values = int64_t{1} << width;
  Array<int64_t> counters(2 * values * threads());
  for (int64_t i = 0; i < counters.size(); ++i) counters[i] = 0;
  for_each_block(a.grads, [&](const Block& b, Scratch& scratch) {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    int64_t* count = &counters[2 * values * thread()];
    uint32_t* digits = reinterpret_cast<uint32_t*>(scratch.v);
    int64_t n = b.n;
    if (level == 0) {
      FK_SIMD
      for (int64_t i = 0; i < n; ++i) digits[i] = math::magnitude_bits(g[i]) >> shift;
    } else {
      n = matching_digits(g, n, higher, shift, width, digits);
    }
    for (int64_t i = 0; i + 2 <= n; i += 2) {
      ++count[2 * digits[i]];
      ++count[2 * digits[i + 1] + 1];
    }
    if (n % 2) ++count[2 * digits[n - 1]];
  });
  int64_t* out = a.counts[0].as<int64_t>();
  for (int64_t d = 0; d < values; ++d) {
    out[d] = 0;
    for (int t = 0; t < threads(); ++t) out[d] += counters[2 * (values * t + d)] + counters[2 * (values * t + d) + 1];
  }
}

void pack_mask_(const PackMask& a) { for_each_row(a.grads, PackMaskWalk{a, *a.threshold[0].as<float>()}); }

void amplify_(const Amplify& a) { for_each_row(a.params, AmplifyWalk{a}); }

}  // namespace flatkern::cpu::FK_ISA
