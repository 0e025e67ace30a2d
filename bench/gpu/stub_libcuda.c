// A libcuda that does nothing, for Triton's own launcher: whatever it asks of the driver succeeds at once. So a launch
// costs what it costs the host outside of the driver, and what it would pass to the GPU can be read.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define EXPORT __attribute__((visibility("default")))

// Of the last launch, for tests: as many parameters as are wanted, eight bytes from where each one begins.
enum { MOST = 64 };
EXPORT uint64_t flatkern_parameters[MOST];
EXPORT int64_t flatkern_wanted = 0;
EXPORT int64_t flatkern_launches = 0;

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  (void)config, (void)f, (void)extra;
  ++flatkern_launches;
  for (int64_t i = 0; i < flatkern_wanted && i < MOST; ++i) memcpy(&flatkern_parameters[i], parameters[i], 8);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  memcpy(data, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;  // as where torch has made one
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 132;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  (void)image;
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static uintptr_t functions = 0;
  (void)module, (void)name;
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = "no error";
  return CUDA_SUCCESS;
}

// What is linked to, but not called for a launch. cuda.h declares these with parameters, under names that it may change.
#define NOT_CALLED(name) \
  EXPORT int name##_not_called(void) __asm__(#name); \
  EXPORT int name##_not_called(void) { return CUDA_ERROR_NOT_SUPPORTED; }
NOT_CALLED(cuCtxGetDevice)
NOT_CALLED(cuCtxGetLimit)
NOT_CALLED(cuCtxSetCurrent)
NOT_CALLED(cuCtxSetLimit)
NOT_CALLED(cuDevicePrimaryCtxRetain)
NOT_CALLED(cuDriverGetVersion)
NOT_CALLED(cuFuncSetAttribute)
NOT_CALLED(cuFuncSetCacheConfig)
NOT_CALLED(cuModuleUnload)
NOT_CALLED(cuStreamIsCapturing)
