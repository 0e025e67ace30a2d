// What kernels know of CUDA. The only header of CUDA's that they include; with FK_EMULATION it is an emulation that
// executes the same sources on the CPU (tests/cuda_emulation).
#pragma once

#include <cstdint>

#ifdef FK_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// A kernel's arguments, by value: up to 32,764 bytes, read from the constant bank.
#define FK_PARAM(T) const __grid_constant__ T
// Memory of a block. In the emulation every block has its own, with red zones.
#define FK_SHARED(T, name)               \
  using name##_type = T;                 \
  __shared__ name##_type name##_storage; \
  name##_type& name = name##_storage
#endif

#define FK_DEVICE static __device__ __forceinline__
#define FK_DEVICE_MEMBER __device__ __forceinline__

namespace flatkern::cuda {

// Blocks of a kernel that a multiprocessor should hold, so that it is compiled with as few registers as they leave.
// Some need a few more than five blocks of 256 threads leave: all that are compiled for sm_100, and `large` ones for
// sm_80.
constexpr int blocks_here(int wanted, [[maybe_unused]] bool large) {
#if !defined(__CUDA_ARCH__)
  return wanted;
#elif __CUDA_ARCH__ >= 1000
  return wanted < 4 ? wanted : 4;
#elif __CUDA_ARCH__ < 900
  return wanted > 4 && large ? 4 : wanted;
#else
  return wanted;
#endif
}

// float16 and bfloat16 as they lie in memory. Two of them are a word, the first one low; rounded to nearest even.
struct Half {
  uint16_t bits;
  FK_DEVICE_MEMBER static uint32_t pack(float first, float second);
  FK_DEVICE_MEMBER static float2 unpack(uint32_t word);
};
struct BFloat16 {
  uint16_t bits;
  FK_DEVICE_MEMBER static uint32_t pack(float first, float second);
  FK_DEVICE_MEMBER static float2 unpack(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
  }
};

#ifdef FK_EMULATION
FK_DEVICE uint32_t half_bits(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
FK_DEVICE float half_value(uint32_t word) {
  const uint16_t bits = static_cast<uint16_t>(word);
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
FK_DEVICE uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
}
FK_DEVICE_MEMBER uint32_t Half::pack(float first, float second) { return half_bits(first) | half_bits(second) << 16; }
FK_DEVICE_MEMBER float2 Half::unpack(uint32_t word) { return make_float2(half_value(word), half_value(word >> 16)); }
FK_DEVICE_MEMBER uint32_t BFloat16::pack(float first, float second) {
  return bfloat16_bits(first) | bfloat16_bits(second) << 16;
}
#else
FK_DEVICE_MEMBER uint32_t Half::pack(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(both);
}
FK_DEVICE_MEMBER float2 Half::unpack(uint32_t word) { return __half22float2(reinterpret_cast<const __half2&>(word)); }
FK_DEVICE_MEMBER uint32_t BFloat16::pack(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(both);
}
#endif

// The same number, of which the compiler knows nothing any more: what follows from it is computed again where it is
// needed, instead of being kept in registers that are short.
FK_DEVICE int forget(int x) {
#ifndef FK_EMULATION
  asm volatile("" : "+r"(x));
#endif
  return x;
}
FK_DEVICE float forget(float x) {
#ifndef FK_EMULATION
  asm volatile("" : "+f"(x));
#endif
  return x;
}
FK_DEVICE int64_t forget(int64_t x) {
#ifndef FK_EMULATION
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Keeps the compiler from loading early what is needed later, for the same reason.
FK_DEVICE void in_order() {
#ifndef FK_EMULATION
  asm volatile("" ::: "memory");
#endif
}

// A vector of memory that is not read again soon, or was not: it should not push out what the next forward reads.
#ifdef FK_NO_HINTS
template <class T>
FK_DEVICE T load_once(const T* p) {
  return *p;
}
template <class T>
FK_DEVICE void store_once(T* p, T x) {
  *p = x;
}
#else
template <class T>
FK_DEVICE T load_once(const T* p) {
  return __ldcs(p);
}
template <class T>
FK_DEVICE void store_once(T* p, T x) {
  __stcs(p, x);
}
#endif

}  // namespace flatkern::cuda
