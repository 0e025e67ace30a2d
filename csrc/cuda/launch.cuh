// Starting kernels.
#pragma once

#include <string>

#include "device.cuh"
#include "runtime.h"

namespace flatkern::cuda {

// Counts launches; `error` is what the runtime said, null where it said nothing.
void launched(const char* op, const char* error);

#ifdef FK_EMULATION
template <class Args>
void start(const char* op, void (*kernel)(FK_PARAM(Args)), unsigned grid, unsigned block, Stream stream, const Args& args) {
  launch(kernel, grid, block, stream, args);
  launched(op, nullptr);
}
#else
template <class Args>
void start(const char* op, void (*kernel)(FK_PARAM(Args)), unsigned grid, unsigned block, Stream stream, const Args& args) {
  void* parameters[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, parameters, 0,
                                             static_cast<cudaStream_t>(stream));
  launched(op, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}
#endif

}  // namespace flatkern::cuda
