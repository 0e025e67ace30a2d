// CUDA's names for code that g++ compiles: with -DFK_EMULATION device.cuh includes this and not <cuda_runtime.h>, and
// the kernels run on the CPU, thread by thread (scheduler.h). Only what the kernels of csrc/cuda use is here.
//
// What it is for: indices, barriers, masks, shuffles, shared memory, the host's side of a launch. What it cannot show:
// anything below the source (registers, code generation, approximate functions), data races as such and missing fences
// (a schedule has to make one visible; ThreadSanitizer finds them, happens_before.h), two blocks at the same time (to
// wait for another block never ends), accesses outside of global memory (AddressSanitizer finds those), blocks larger
// than a kernel's __launch_bounds__.
//
// Kernels are called through launch(), declare shared memory by FK_SHARED and take their parameters by FK_PARAM.
#pragma once

#include <math.h>  // not <cmath>: sqrt(float) and its like are global and single precision, as in CUDA

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

// --- words -----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // libstdc++ writes __attribute__((__noinline__))
#define __launch_bounds__(...)

// --- types -----------------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// Of the thread that runs; the scheduler writes them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- barriers and warp operations ------------------------------------------------------------------------------------

// The place where the macro stands. An operation inside of a function is one place, wherever that is called from: two
// calls of one function on two sides of a branch are not told apart.
#define FK_SITE(what)                                                        \
  ([]() -> ::flatkern::cuda::emulation::Site& {                              \
    static ::flatkern::cuda::emulation::Site site{what, __FILE__, __LINE__}; \
    return site;                                                             \
  }())

#define __syncthreads() ::flatkern::cuda::emulation::sync_threads(FK_SITE("__syncthreads"))
#define __syncwarp(...) (::flatkern::cuda::emulation::WarpBarrier{FK_SITE("__syncwarp")}(__VA_ARGS__))
#define __shfl_sync(...) ::flatkern::cuda::emulation::shuffle_from(FK_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::flatkern::cuda::emulation::shuffle_xor(FK_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::flatkern::cuda::emulation::shuffle_up(FK_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::flatkern::cuda::emulation::shuffle_down(FK_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __ballot_sync(...) ::flatkern::cuda::emulation::ballot(FK_SITE("__ballot_sync"), __VA_ARGS__)
#define __any_sync(...) ::flatkern::cuda::emulation::any(FK_SITE("__any_sync"), __VA_ARGS__)
#define __all_sync(...) ::flatkern::cuda::emulation::all(FK_SITE("__all_sync"), __VA_ARGS__)

namespace flatkern::cuda::emulation {

struct WarpBarrier {
  Site& site;
  void operator()(unsigned mask = ~0u) const { sync_warp(site, mask); }
};

inline bool any(Site& site, unsigned mask, bool predicate) { return ballot(site, mask, predicate) != 0; }
inline bool all(Site& site, unsigned mask, bool predicate) { return ballot(site, mask, predicate) == mask; }

// Which bits of a lane's number say where it is in its segment of `width` lanes.
inline unsigned segment(const Site& site, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(site.file, site.line, "calls %s with the width %d, but it should be 1, 2, 4, 8, 16 or 32", site.what, width);
  return static_cast<unsigned>(width) - 1;
}

template <class T>
T shuffle_bits(Site& site, unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(site, mask, source, bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The four sources, as PTX defines them for shfl.sync: a warp is cut into segments of `width` lanes, and where the
// source would be beyond the lane's own segment (for xor: behind it), the lane gets its own value.
template <class T>
T shuffle_from(Site& site, unsigned mask, T value, int source, int width = 32) {
  const unsigned inside = segment(site, width), lane = threadIdx.x % 32;
  return shuffle_bits(site, mask, value, (lane & ~inside) | (static_cast<unsigned>(source) & inside));
}
template <class T>
T shuffle_xor(Site& site, unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned inside = segment(site, width), lane = threadIdx.x % 32;
  const unsigned source = lane ^ (static_cast<unsigned>(lane_mask) & 31);
  return shuffle_bits(site, mask, value, source <= (lane | inside) ? source : lane);
}
template <class T>
T shuffle_up(Site& site, unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned inside = segment(site, width), lane = threadIdx.x % 32;
  return shuffle_bits(site, mask, value, (lane & inside) >= (delta & 31) ? lane - (delta & 31) : lane);
}
template <class T>
T shuffle_down(Site& site, unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned inside = segment(site, width), lane = threadIdx.x % 32;
  return shuffle_bits(site, mask, value, (lane & inside) + (delta & 31) <= inside ? lane + (delta & 31) : lane);
}

}  // namespace flatkern::cuda::emulation

// --- memory ----------------------------------------------------------------------------------------------------------

// FK_SHARED(float[32], red): `red` is the block's array; the type is trivial, as nothing constructs it.
#define FK_SHARED(type, name)                                                                                          \
  auto& name = *static_cast<std::add_pointer_t<type>>(                                                                 \
      ::flatkern::cuda::emulation::shared_memory([]() -> ::flatkern::cuda::emulation::SharedSite& {                    \
        static_assert(std::is_trivial_v<type>, "shared memory is not initialised");                                    \
        static ::flatkern::cuda::emulation::SharedSite site{{#name, __FILE__, __LINE__}, sizeof(type), alignof(type)}; \
        return site;                                                                                                   \
      }()))

#define __ldg(pointer) ::flatkern::cuda::emulation::load(FK_SITE("__ldg"), pointer)
#define __ldcs(pointer) ::flatkern::cuda::emulation::load(FK_SITE("__ldcs"), pointer)
#define __ldcg(pointer) ::flatkern::cuda::emulation::load(FK_SITE("__ldcg"), pointer)
#define __stcs(pointer, value) ::flatkern::cuda::emulation::store(FK_SITE("__stcs"), pointer, value)
#define __stcg(pointer, value) ::flatkern::cuda::emulation::store(FK_SITE("__stcg"), pointer, value)

namespace flatkern::cuda::emulation {

inline void check_alignment(const Site& site, const void* pointer, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) misaligned(site, pointer, alignment);
}

template <class T>
T load(const Site& site, const T* pointer) {
  check_alignment(site, pointer, alignof(T));
  return *pointer;
}

template <class T>
void store(const Site& site, T* pointer, const std::common_type_t<T>& value) {
  check_alignment(site, pointer, alignof(T));
  *pointer = value;
}

}  // namespace flatkern::cuda::emulation

namespace flatkern::cuda::emulation {

// Fibers change only where they wait, so that a load and a store are one operation. Relaxed: it orders nothing.
template <class T, class Change>
T atomically(T* address, const Change& change) {
#if defined(FK_EMULATION_TSAN)
  atomic_access(address);
#endif
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, change(old), __ATOMIC_RELAXED);
  return old;
}

}  // namespace flatkern::cuda::emulation

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>, "CUDA adds these");
  return flatkern::cuda::emulation::atomically(address, [=](T old) { return old + value; });
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return flatkern::cuda::emulation::atomically(address, [=](unsigned old) { return std::max(old, value); });
}
// Counts to `limit` and begins again at 0.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return flatkern::cuda::emulation::atomically(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
#define __threadfence() ::flatkern::cuda::emulation::fence(FK_SITE("__threadfence"))

// --- arithmetic ------------------------------------------------------------------------------------------------------

// g++ rounds each operation to nearest and contracts none under -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }

inline unsigned __float_as_uint(float a) {
  unsigned bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// Of two integers in their common type; of two numbers, one of them a NaN, the other.
template <class A, class B, class T = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, T> min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return std::min(static_cast<T>(a), static_cast<T>(b));
}
template <class A, class B, class T = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, T> max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return std::max(static_cast<T>(a), static_cast<T>(b));
}

// --- launches --------------------------------------------------------------------------------------------------------

#define FK_PARAM(T) const T&

namespace flatkern::cuda {

using Stream = void*;

// Runs all threads and returns when they are done; throws emulation::Fault. `args` may change as soon as it returns.
template <class Args>
void launch(void (*kernel)(FK_PARAM(Args)), unsigned grid, unsigned block, Stream, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args>, "the driver copies the parameters byte by byte");
  const Args copy = args;
  const auto call = [](void (*any_kernel)(), const void* parameters) {
    reinterpret_cast<void (*)(FK_PARAM(Args))>(any_kernel)(*static_cast<const Args*>(parameters));
  };
  emulation::run({call, reinterpret_cast<void (*)()>(kernel), &copy, sizeof copy, grid, block});
}

}  // namespace flatkern::cuda
