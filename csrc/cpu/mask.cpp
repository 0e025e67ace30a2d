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

// What a later digit's pass counts beside matching digits: magnitudes below them, infinities and NaN.
struct Others {
  int64_t below, infinite;
};

// Digits, `width` bits from `shift` on, of those magnitudes whose higher bits are `higher`; returns how many.
inline int64_t matching_digits(const float* g, int64_t n, uint32_t higher, int shift, int width, uint32_t* out,
                               Others& others) {
  const uint32_t low = (1u << width) - 1;
  const uint32_t first = higher << (shift + width), last = first + ((1u << (shift + width)) - 1);
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  // Magnitudes have no sign bit, so signed comparisons, which are cheaper here, are right.
  const __m512i abs = _mm512_set1_epi32(0x7FFFFFFF), infinity = _mm512_set1_epi32(math::kInfinityBits);
  const __m512i from = _mm512_set1_epi32(static_cast<int>(first)), to = _mm512_set1_epi32(static_cast<int>(last));
  __m512i below = _mm512_setzero_si512(), infinite = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi32(1);
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_and_epi32(_mm512_loadu_si512(g + i), abs);
    const __mmask16 less = _mm512_cmplt_epi32_mask(bits, from);
    const __mmask16 match = _mm512_mask_cmple_epi32_mask(static_cast<__mmask16>(~less), bits, to);
    below = _mm512_mask_add_epi32(below, less, below, one);
    infinite = _mm512_mask_add_epi32(infinite, _mm512_cmpge_epi32_mask(bits, infinity), infinite, one);
    if (!match) continue;  // with one digit known about one magnitude in thirty matches, with two hardly any
    const __m512i digit = _mm512_and_epi32(_mm512_srli_epi32(bits, shift), _mm512_set1_epi32(static_cast<int>(low)));
    // Whole vectors: the next store overwrites what is too much, and count <= i, so the last one ends inside `out`.
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(match, digit));
    count += __builtin_popcount(match);
  }
  others.below += _mm512_reduce_add_epi32(below);
  others.infinite += _mm512_reduce_add_epi32(infinite);
#endif
  for (; i < n; ++i) {
    const uint32_t bits = math::magnitude_bits(g[i]);
    others.below += bits < first;
    others.infinite += bits >= math::kInfinityBits;
    out[count] = (bits >> shift) & low;
    count += first <= bits && bits <= last;
  }
  return count;
}

// Every thread counts in kLanes arrays of its own: with one, an increment would wait for the previous one whenever two
// neighbours have equal digits.
constexpr int64_t kLanes = 4;

template <class Counter>
void count_magnitudes(const CountMagnitudes& a, int shift, int width, uint32_t higher) {
  const int64_t values = int64_t{1} << width;
  Array<Counter> counters(kLanes * values * threads());
  for (int64_t i = 0; i < counters.size(); ++i) counters[i] = 0;
  struct PerThread : Others {
    char padding[64 - sizeof(Others)];  // a cache line for each thread
  };
  Array<PerThread> others(threads());
  for (int64_t i = 0; i < others.size(); ++i) others[i] = {};
  for_each_block(a.grads, kBlocks, [&](const Block& b, Scratch& scratch) {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    Counter* count = &counters[kLanes * values * thread()];
    uint32_t* digits = reinterpret_cast<uint32_t*>(scratch.v);
    int64_t n = b.n;
    if (shift + width == 31) {
      FK_SIMD
      for (int64_t i = 0; i < n; ++i) digits[i] = math::magnitude_bits(g[i]) >> shift;
    } else {
      Others found = {};
      n = matching_digits(g, n, higher, shift, width, digits, found);
      others[thread()].below += found.below;
      others[thread()].infinite += found.infinite;
    }
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) ++count[lane * values + digits[i + lane]];
    for (; i < n; ++i) ++count[digits[i]];
  });
  int64_t* out = a.counts[0].as<int64_t>();
  for (int64_t d = 0; d < values; ++d) {
    out[d] = 0;
    for (int64_t i = d; i < counters.size(); i += values) out[d] += static_cast<int64_t>(counters[i]);
  }
  int64_t &below = out[values], &infinite = out[values + 1];
  below = infinite = 0;
  for (int64_t i = 0; i < others.size(); ++i) {
    below += others[i].below;
    infinite += others[i].infinite;
  }
  if (shift + width == 31)
    for (int64_t d = math::kInfinityBits >> shift; d < values; ++d) infinite += out[d];
}

}  // namespace

void count_magnitudes_(const CountMagnitudes& a) {
  const View& prefix = a.prefix[0];
  const int64_t level = prefix.numel;
  uint32_t higher = 0;
  for (int64_t j = 0; j < level; ++j)
    higher = higher << math::kDigitWidth[j] | static_cast<uint32_t>(prefix.as<int64_t>()[j * prefix.strides[0]]);
  // 32-bit counters fit the first-level cache; they serve as long as they cannot overflow.
  const auto count = numel(a.grads) <= UINT32_MAX ? count_magnitudes<uint32_t> : count_magnitudes<int64_t>;
  count(a, math::kDigitShift[level], math::kDigitWidth[level], higher);
}

void pack_mask_(const PackMask& a) {
  const float threshold = *a.threshold[0].as<float>();
  for_each_row_block(a.grads, [&](const Block& b, Scratch& scratch) {
    const float* g = load(a.grads[b.k], b.begin, b.n, scratch.g);
    pack_small(a.masks[b.k], a.grads[b.k], b, g, threshold);
  });
}

void amplify_(const Amplify& a) {
  for_each_row_block(a.params, [&](const Block& b, Scratch& scratch) {
    const View& param = a.params[b.k];
    const float* w = load(param, b.begin, b.n, scratch.w);
    const float* previous = load(a.previous[b.k], b.begin, b.n, scratch.g);
    const uint8_t* flags = unpack(a.masks[b.k], param, b, scratch);
    const float kappa = static_cast<float>(a.kappa[b.k]);
    float* p = target(param, b.begin, scratch.v);
    FK_SIMD
    for (int64_t i = 0; i < b.n; ++i) p[i] = flags[i] ? math::amplified(w[i], previous[i], kappa) : w[i];
    store(param, b.begin, b.n, p);
  });
}

}  // namespace flatkern::cpu::FK_ISA
