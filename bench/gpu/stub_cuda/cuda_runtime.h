// Takes the part of CUDA's runtime in a dry run, for parameters.cu: memory is the host's, and so are the threads, one
// after the other. Times mean nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define FK_STUB
#define __global__
#define __launch_bounds__(n)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaMemcpyDeviceToHost, cudaStreamNonBlocking, cudaStreamCaptureModeThreadLocal };
using cudaStream_t = void*;
using cudaEvent_t = void*;
using Nodes = std::vector<std::function<void()>>;
using cudaGraph_t = Nodes*;
using cudaGraphExec_t = Nodes*;
struct float4 {
  float x, y, z, w;
};
static struct {
  unsigned x;
} blockIdx, threadIdx;
static Nodes* captured = nullptr;

inline long long clock64() {
  static long long now = 0;
  return now += 1LL << 40;
}
template <class Kernel, class Args>
cudaError_t launch_on_host(Kernel kernel, int grid, int block, const Args& args) {
  const auto run = [=] {
    for (int b = 0; b < grid; ++b)
      for (int t = 0; t < block; ++t) {
        blockIdx.x = b;
        threadIdx.x = t;
        kernel(args);
      }
  };
  if (captured != nullptr)
    captured->push_back(run);
  else
    run();
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaMalloc(void** p, size_t bytes) { return *p = malloc(bytes), cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) { return memset(p, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, int) { return memcpy(to, from, n), cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) { return captured = new Nodes, cudaSuccess; }
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = captured;
  captured = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, int) {
  return *made = new Nodes(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const auto& node : *graph) node();
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }
