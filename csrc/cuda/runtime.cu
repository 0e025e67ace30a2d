// The CUDA runtime: devices, the driver, errors.
#include "launch.cuh"

namespace flatkern::cuda {
namespace {
int64_t count = 0;
}

void launched(const char* op, const char* error) {
  if (error != nullptr)
    throw LaunchError(std::string(op) + ": the launch failed: " + error +
                      "; `python -m flatkern doctor` tells what was compiled and which driver there is");
  ++count;
}

int64_t launch_count() { return count; }

#ifdef FK_EMULATION
int current_device() { return emulation::current_device(); }

bool is_capturing(Stream) { return false; }

Driver driver() { return {0, 0, 1, ""}; }
#else
int current_device() {
  int device = -1;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) throw LaunchError(std::string("the current device is unknown: ") + cudaGetErrorString(error));
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
