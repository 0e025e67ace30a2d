// From an operation's arguments to those of its kernel: dtypes, numbers that are on the device or on the host, sizes.
#pragma once

#include <type_traits>

#include "../common/check.h"
#include "launch.cuh"
#include "noise.cuh"
#include "plan.h"

namespace flatkern::cuda {

// The two sizes of a launch's arguments: up to 4 KB every driver takes, and they are copied faster. CUDA takes 32,764
// bytes, but in the bank of constants they begin at 0x1a80 (sm_80; 0x210 and 0x380 later), and of what lies 32 KB from
// the bank's begin ptxas 13.0 computes a negative offset: an H200 read the dtypes of Adam's tensors elsewhere.
constexpr size_t kSmall = 4096, kLarge = 25 * 1024;
static_assert(kLarge + 0x1a80 <= 0x8000);

#ifdef FK_EMULATION
constexpr DeviceType kDevice = DeviceType::kCpu;
#else
constexpr DeviceType kDevice = DeviceType::kCuda;
#endif

#ifdef FK_EMULATION
// For tests, as everything is on the CPU: whether the words of the noise count as on the device, and steps as on the
// host.
extern bool noise_is_on_device, steps_are_on_host;
#else
constexpr bool noise_is_on_device = true, steps_are_on_host = false;
#endif

inline bool is_on_device(const View& t) { return t.device.type == kDevice; }

inline Scalar scalar_of(const Table& t, float absent) {
  if (!t) return {nullptr, absent};
  return is_on_device(t[0]) ? Scalar{t[0].as<float>(), absent} : Scalar{nullptr, *t[0].as<float>()};
}

inline DeviceNumbers numbers_of(const Table& t, int64_t first) {
  if (!t) return {nullptr, 0};
  return {t[0].as<double>() + first * t[0].strides[0], t[0].strides[0]};
}

inline Key key_of(const Table& noise) {
  if (!noise) return {nullptr, 0, 0, 0};
  const auto* words = noise[0].as<int64_t>();
  if (is_on_device(noise[0]) && noise_is_on_device) return {words, 0, 0, 0};
  return {nullptr, static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[2])};
}

inline uint16_t code_of(DType dtype) {
  return dtype == DType::kFloat16 ? kIsHalf : dtype == DType::kBFloat16 ? kIsBFloat16 : kIsFloat32;
}

// Whether all tensors of some lists have one dtype; absent lists have any.
inline bool all_are(DType dtype, std::initializer_list<const Table*> lists) {
  for (const Table* list : lists)
    for (int64_t k = 0; *list && k < list->size(); ++k)
      if ((*list)[k].dtype != dtype) return false;
  return true;
}

// Entry k of a list that may be absent.
template <class T>
T* pointer(const Table* list, int64_t k) {
  return list != nullptr && *list ? (*list)[k].as<T>() : nullptr;
}

// An operation's walk, as far as the arguments of its kernels decide.
template <template <size_t> class Arguments>
constexpr Walk walk_of(const char* op, int eights, int64_t resident, unsigned needs = 0, int words = 0) {
  return {op, Arguments<kSmall>::kTensors, Arguments<kLarge>::kTensors, eights, resident, needs, words};
}

// Calls body with a size of arguments that has room for `count` tensors: body(std::integral_constant<size_t, bytes>()).
template <template <size_t> class Arguments, class Body>
void with_size([[maybe_unused]] int64_t count, const Body& body) {
#ifndef FK_LARGE_ONLY  // where machine code is looked at, and half of it is enough
  if (count <= Arguments<kSmall>::kTensors) return body(std::integral_constant<size_t, kSmall>());
#endif
  body(std::integral_constant<size_t, kLarge>());
}

// Calls body(launch, args) for each launch, with arguments that have room for its tensors.
template <template <size_t> class Arguments, class Body>
void for_each_launch(const std::vector<Launch>& launches, const Body& body) {
  for (const Launch& launch : launches) {
    with_size<Arguments>(launch.end - launch.begin, [&](auto bytes) {
      Arguments<decltype(bytes)::value> args;
      body(launch, args);
    });
  }
}

// Calls body with the type of the elements of all lists: those that have kernels of their own, else AnyFloat.
template <class T>
struct TypeOf {
  using Element = T;
};
template <class Body>
void with_dtype(std::initializer_list<const Table*> lists, const Body& body) {
  if (all_are(DType::kFloat32, lists)) {
    body(TypeOf<float>());
  } else if (all_are(DType::kBFloat16, lists)) {
    body(TypeOf<BFloat16>());
  } else {
    body(TypeOf<AnyFloat>());
  }
}

}  // namespace flatkern::cuda
