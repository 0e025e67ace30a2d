// Starting kernels.
#pragma once

#include <string>

#include "device.cuh"
#include "runtime.h"

namespace flatkern::cuda {

// Counts launches; `error` is what the runtime said, null where it said nothing.
void launched(const char* op, const char* error);

template <class Args>
struct KernelOf : Kernel {
  using Function = void (*)(FK_PARAM(Args));
  explicit KernelOf(Function f) : Kernel(reinterpret_cast<const void*>(f)), function(f) {}
  const Function function;
};
template <class Args>
KernelOf<Args> kernel_of(void (*function)(FK_PARAM(Args))) {
  return KernelOf<Args>(function);
}
// kernel<fill_kernel<T, Args>>: a kernel in the list of all, for `start`.
template <auto kFunction>
inline auto kernel = kernel_of(kFunction);

template <class Args>
void start(const char* op, KernelOf<Args>& kernel, unsigned grid, unsigned block, Stream stream, const Args& args) {
  if (!kernel.is_loaded(current_device())) kernel.load_unless_captured(op, stream);
#ifdef FK_EMULATION
  launch(kernel.function, grid, block, stream, args);
  launched(op, nullptr);
#else
  void* parameters[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel.function), grid, block, parameters, 0,
                                             static_cast<cudaStream_t>(stream));
  launched(op, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
#endif
}

}  // namespace flatkern::cuda
