// The part of DLPack 1.x's C exchange interface that reads a tensor's pointer, shape and strides. The layout is fixed
// by the DLPack specification (github.com/dmlc/dlpack, include/dlpack/dlpack.h), under names of our own.
#pragma once

#include <cstdint>

namespace flatkern::dlpack {

constexpr int32_t kDeviceCpu = 1, kDeviceCuda = 2, kDeviceCudaHost = 3;
constexpr uint8_t kCodeInt = 0, kCodeUInt = 1, kCodeFloat = 2, kCodeBfloat = 4;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t version_major, version_minor;
  ExchangeApi* previous;  // an older version, for consumers that do not know this one
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // Borrows shape and strides from the object: valid while it lives. 0, or -1 with a Python error set; may be null.
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);
  void (*current_work_stream)();
};

constexpr char kCapsuleName[] = "dlpack_exchange_api";

}  // namespace flatkern::dlpack
