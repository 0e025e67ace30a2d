// The CUDA runtime: devices, the driver, errors.
#include "launch.cuh"

namespace flatkern::cuda {
namespace {

thread_local int64_t count = 0;  // the GIL is released while kernels are started

#ifndef FK_EMULATION
// A function of the driver; null without one.
void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // forgets it
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}
#endif

}  // namespace

void launched(const char* op, const char* error) {
  if (error != nullptr)
    throw LaunchError(std::string(op) + ": the launch failed: " + error +
                      "; an earlier kernel may have caused it, and FLATKERN_CUDA_SYNC=1 names its operation; "
                      "`python -m flatkern doctor` tells what was compiled and which driver there is");
  ++count;
}

int64_t launch_count() { return count; }

#ifdef FK_EMULATION
int current_device() { return emulation::current_device(); }

bool is_capturing(Stream) { return false; }

Driver driver() { return {0, 0, 1, ""}; }
#else
// The device of the driver's current context, which torch sets and a launch goes to. The runtime that is linked into
// this module has a device of its own, which nobody sets.
int current_device() {
  using GetDevice = int (*)(int*);
  static const auto get_device = reinterpret_cast<GetDevice>(driver_function("cuCtxGetDevice"));
  int device = -1;
  if (get_device != nullptr && get_device(&device) == 0) return device;
  // No context is current yet: a launch would make one on this device.
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    throw LaunchError(std::string("the current device is unknown: ") + cudaGetErrorString(error));
  return device;
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess)
    throw LaunchError(std::string("the current stream cannot be asked whether it is captured: ") +
                      cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

Driver driver() {
  Driver found = {};
  cudaDriverGetVersion(&found.version);
  cudaRuntimeGetVersion(&found.needed);
  const cudaError_t error = cudaGetDeviceCount(&found.devices);
  if (error != cudaSuccess) {
    found.error = cudaGetErrorString(error);
    found.devices = 0;
    cudaGetLastError();  // forgets it
  }
  return found;
}
#endif

}  // namespace flatkern::cuda
