// What it costs to pass a kernel its arguments by value, in blocks of several sizes: for parameters.py, by ctypes.
//
// A pass adds 1 to each of some tensors, of 4 KB each, by as many launches as their addresses need.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <vector>

#ifndef FK_STUB
#define FK_PARAM(T) const __grid_constant__ T
#else
#define FK_PARAM(T) const T&
#endif

namespace {

constexpr int kFloats = 1024, kThreads = 256;  // of a tensor, and of the block that adds to it
constexpr int kMost = 8192;                    // tensors
constexpr double kSlack = 50e-6;               // seconds that the device is busy beyond what the host needs

template <int kBytes>
struct Addresses {
  static constexpr int kTensors = (kBytes - 8) / 8;
  uint64_t count;
  float* at[kTensors];
};
static_assert(sizeof(Addresses<32760>) == 32760, "the most that a kernel takes is 32,764");

template <int kBytes>
__global__ void __launch_bounds__(kThreads) add_one(FK_PARAM(Addresses<kBytes>) tensors) {
  float4* p = reinterpret_cast<float4*>(tensors.at[blockIdx.x]) + threadIdx.x;
  float4 x = *p;
  x.x += 1, x.y += 1, x.z += 1, x.w += 1;
  *p = x;
}

// Keeps the device busy, so that launches are queued and their own time is what is measured.
__global__ void keep_busy(FK_PARAM(int64_t) nanoseconds) {
  const uint64_t begin = clock64();
  while (static_cast<int64_t>(clock64() - begin) < 2 * nanoseconds) {
  }
}

float* memory = nullptr;
cudaStream_t stream = nullptr;
cudaEvent_t begun = nullptr, ended = nullptr;
int passes_made = 0;

struct Failed {
  cudaError_t error;
};
void check(cudaError_t error) {
  if (error != cudaSuccess) throw Failed{error};
}

template <class Args>
void launch(void (*kernel)(FK_PARAM(Args)), int grid, int block, const Args& args) {
#ifdef FK_STUB
  check(launch_on_host(kernel, grid, block, args));
#else
  void* parameters[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, parameters, 0, stream));
#endif
}

// Returns how many launches it took.
template <int kBytes>
int pass(int tensors) {
  constexpr int kRoom = Addresses<kBytes>::kTensors;
  static Addresses<kBytes> args;
  int launches = 0;
  for (int first = 0; first < tensors; first += kRoom, ++launches) {
    args.count = tensors - first < kRoom ? tensors - first : kRoom;
    for (uint64_t k = 0; k < args.count; ++k) args.at[k] = memory + (first + k) * kFloats;
    launch(add_one<kBytes>, static_cast<int>(args.count), kThreads, args);
  }
  return launches;
}

int pass_of(int bytes, int tensors) {
  switch (bytes) {
    case 128:
      return pass<128>(tensors);
    case 4096:
      return pass<4096>(tensors);
    case 16384:
      return pass<16384>(tensors);
    case 32760:
      return pass<32760>(tensors);
  }
  throw Failed{cudaErrorInvalidValue};
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Host and device microseconds of one `work()` of `count`, where the host took `ahead` seconds for all before.
template <class Work>
double timed(int count, double ahead, double* host_us, double* device_us, const Work& work) {
  check(cudaStreamSynchronize(stream));
  launch(keep_busy, 1, 1, static_cast<int64_t>(1e9 * (1.5 * ahead + kSlack)));
  check(cudaEventRecord(begun, stream));
  const double start = seconds();
  for (int k = 0; k < count; ++k) work();
  const double took = seconds() - start;
  check(cudaEventRecord(ended, stream));
  check(cudaEventSynchronize(ended));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begun, ended));
  *host_us = 1e6 * took / count;
  *device_us = 1e3 * milliseconds / count;
  passes_made += count;
  return took;
}

template <class Body>
const char* guarded(const Body& body) {
  try {
    body();
  } catch (const Failed& failed) {
    return cudaGetErrorString(failed.error);
  }
  return nullptr;
}

}  // namespace

// Each returns null, or what CUDA says.
extern "C" {

const char* prepare(int tensors) {
  return guarded([&] {
    if (tensors > kMost) throw Failed{cudaErrorInvalidValue};
    check(cudaMalloc(reinterpret_cast<void**>(&memory), sizeof(float) * kFloats * tensors));
    check(cudaMemset(memory, 0, sizeof(float) * kFloats * tensors));
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaEventCreate(&begun));
    check(cudaEventCreate(&ended));
    check(cudaDeviceSynchronize());
  });
}

// A pass by launches: microseconds of the host and of the device, and how many launches it is.
const char* by_launches(int bytes, int tensors, int count, double* host_us, double* device_us, int* launches) {
  return guarded([&] {
    const double ahead = timed(count, 0, host_us, device_us, [&] { *launches = pass_of(bytes, tensors); });
    timed(count, ahead, host_us, device_us, [&] { pass_of(bytes, tensors); });
  });
}

// The same as a graph that is replayed.
const char* by_graph(int bytes, int tensors, int count, double* host_us, double* device_us, int* launches) {
  return guarded([&] {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    pass_of(bytes, tensors);  // loads the kernel
    ++passes_made;
    check(cudaStreamSynchronize(stream));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    *launches = pass_of(bytes, tensors);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    check(cudaGraphUpload(executable, stream));
    const auto replay = [&] { check(cudaGraphLaunch(executable, stream)); };
    const double ahead = timed(count, 0, host_us, device_us, replay);
    timed(count, ahead, host_us, device_us, replay);
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
  });
}

// How many elements of `tensors` tensors are not as often added to as there were passes.
const char* count_wrong(int tensors, int* wrong) {
  return guarded([&] {
    std::vector<float> found(static_cast<size_t>(kFloats) * tensors);
    check(cudaStreamSynchronize(stream));
    check(cudaMemcpy(found.data(), memory, sizeof(float) * found.size(), cudaMemcpyDeviceToHost));
    *wrong = 0;
    for (const float x : found) *wrong += x != static_cast<float>(passes_made);
  });
}
}
