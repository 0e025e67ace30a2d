// Memory moved as an operation moves it, and nothing computed.
#include "streams.h"

#include "apply.h"

// A vector as the operand of an instruction that is not there, so that no load is left out.
#if defined(__x86_64__)
#define FK_REGISTER "v"
#elif defined(__aarch64__)
#define FK_REGISTER "w"
#else
#define FK_REGISTER "m"
#endif

namespace flatkern::cpu::FK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVector = 64;
#elif defined(__AVX2__)
constexpr int64_t kVector = 32;
#else
constexpr int64_t kVector = 16;
#endif
typedef uint8_t Vector __attribute__((vector_size(kVector), aligned(1), may_alias));

// What a mask has in place of a vector, and what is left behind words. Structures, because a template that is given an
// unaligned integer takes it for an aligned one.
struct __attribute__((packed, may_alias)) Word {
  uint64_t x;
};
struct __attribute__((packed, may_alias)) Byte {
  uint8_t x;
};

FK_INLINE Vector& vector_at(char* p) { return *reinterpret_cast<Vector*>(p); }

// each(T*) for the words, then the bytes, of the n bytes at p.
template <class Each>
FK_INLINE void for_each_word(char* p, int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) each(reinterpret_cast<volatile Word*>(p + i));
  for (; i < n; ++i) each(reinterpret_cast<volatile Byte*>(p + i));
}

FK_INLINE void read(char* p, int64_t n) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) {
    const Vector x = vector_at(p + i);
    asm volatile("" : : FK_REGISTER(x));
  }
  for_each_word(p + i, n - i, [](const auto* at) { static_cast<void>(at->x); });
}

FK_INLINE void update(char* p, int64_t n) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) {
    Vector x = vector_at(p + i);
    asm volatile("" : "+" FK_REGISTER(x));
    vector_at(p + i) = x;
  }
  for_each_word(p + i, n - i, [](auto* at) { at->x = at->x; });
}

// Around the caches, where the processor can. To a multiple of a vector's size.
FK_INLINE void write_vector(char* p) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_setzero_si512());
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_setzero_si256());
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_setzero_si128());
#else
  vector_at(p) = Vector{};
#endif
}

FK_INLINE void write(char* p, int64_t n) {
  const auto zero = [](auto* at) { at->x = 0; };
  int64_t i = min(-reinterpret_cast<intptr_t>(p) & (kVector - 1), n);
  for_each_word(p, i, zero);
  for (; i + kVector <= n; i += kVector) write_vector(p + i);
  for_each_word(p + i, n - i, zero);
}

// A stream's part of the tensor that is walked.
struct Cursor {
  char* data;
  int64_t bits;  // of an element
  Access access;

  FK_INLINE void move(int64_t i, int64_t n) const {
    char* p = data + i * bits / 8;
    const int64_t bytes = ceil_div(n * bits, 8);
    if (access == Access::kRead) return read(p, bytes);
    if (access == Access::kUpdate) return update(p, bytes);
    write(p, bytes);
  }
};

struct Cursors {
  Cursor of[kMostStreams];
  int64_t count;

  FK_INLINE Cursors(const Streams& a, int64_t k) : count(a.streams.size()) {
    for (int64_t s = 0; s < count; ++s) {
      const View& t = (*a.streams[s].tensors)[k];
      of[s] = {t.as<char>(), t.dtype == DType::kUInt8 ? 1 : 8 * size_of(t.dtype), a.streams[s].access};
    }
  }

  // Elements [begin, end) of every stream. Places are whole blocks apart, so that no two share a byte of a mask.
  FK_INLINE void move(int64_t begin, int64_t end, const StreamVariant& how) const {
    const int64_t part = ceil_div(ceil_div(end - begin, how.places), kBlock) * kBlock;
    for (int64_t i = begin; i < min(begin + part, end); i += how.step)
      for (int64_t at = i; at < end; at += part)
        for (int64_t s = 0; s < count; ++s) of[s].move(at, min(end - at, how.step));
  }
};

}  // namespace

void stream(const Streams& a) {
  const Table& weights = *a.weights;
  const StreamVariant how = kStreamVariants[a.variant];
  const int64_t elements = numel(weights), tile = tile_size(elements, kMaxPlainTile);
  const Plan plan(weights, tile, [&](const View& t) { return ceil_div(t.numel, tile); });
#pragma omp parallel for schedule(dynamic) if (elements > kSerial)
  for (int64_t t = 0; t < plan.tiles; ++t) {
    plan.visit(t, [&](int64_t k, int64_t piece) {
      Cursors(a, k).move(piece * tile, min(weights[k].numel, (piece + 1) * tile), how);
    });
    store_fence();
  }
}

}  // namespace flatkern::cpu::FK_ISA
