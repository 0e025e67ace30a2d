// The CUDA runtime: devices, the driver, which kernels are loaded, errors.
#include <utility>

#include "launch.cuh"

namespace flatkern::cuda {
namespace {

thread_local int64_t count = 0;  // the GIL is released while kernels are started
Kernel* kernels = nullptr;       // the list of all, complete when the module is there

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

[[noreturn]] void fail(const char* op, const char* error) {
  throw LaunchError(std::string(op) + ": the launch failed: " + error +
                    "; an earlier kernel may have caused it, and FLATKERN_CUDA_SYNC=1 names its operation; "
                    "`python -m flatkern doctor` tells what was compiled and which driver there is");
}

struct Words {
  uint32_t* at;
  uint32_t count;
};
constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads) clear_kernel(FK_PARAM(Words) words) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < words.count) words.at[i] = 0;
}

}  // namespace

Kernel::Kernel(const void* function) : function_(function), next_(std::exchange(kernels, this)) {}

void Kernel::load([[maybe_unused]] const char* op) {
  if (is_loaded(current_device())) return;
#ifndef FK_EMULATION
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function_);
  if (error != cudaSuccess) fail(op, cudaGetErrorString(error));
#endif
  devices_ |= bit(current_device());
}

void Kernel::load_unless_captured(const char* op, Stream stream) {
  if (is_capturing(stream))
    throw LaunchError(std::string(op) + ": a CUDA graph captures a kernel that is not loaded on device " +
                      std::to_string(current_device()) +
                      " yet; run the same steps before the capture, or call flatkern.warm_up(optimizer)");
  load(op);
}

int load_kernels() {
  int found = 0;
  for (Kernel* k = kernels; k != nullptr; k = k->next()) {
    k->load("warm_up");
    ++found;
  }
  return found;
}

int loaded_kernels() {
  int found = 0;
  for (const Kernel* k = kernels; k != nullptr; k = k->next()) found += k->is_loaded(current_device());
  return found;
}

void forget_kernels() {
  for (Kernel* k = kernels; k != nullptr; k = k->next()) k->forget();
}

void prepare_clear(const char* op) { kernel<clear_kernel>.load(op); }

void clear(const char* op, uint32_t* words, uint32_t count, Stream stream) {
  start(op, kernel<clear_kernel>, (count + kThreads - 1) / kThreads, kThreads, stream, Words{words, count});
}

void launched(const char* op, const char* error) {
  if (error != nullptr) fail(op, error);
  ++count;
}

int64_t launch_count() { return count; }

#ifdef FK_EMULATION
int current_device() { return emulation::current_device(); }

bool capture_is_under_way = false;
bool is_capturing(Stream) { return capture_is_under_way; }

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
