// Runs the cases: all of them, or those that are named; --list names them, --costs measures what the emulation takes.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "cases.h"

namespace {

using flatkern::cuda::launch;
namespace emulation = flatkern::cuda::emulation;

struct Repeat {
  float* out;
  int times;
};

__global__ void only_start(FK_PARAM(Repeat) a) { a.out[threadIdx.x] = 1.0f; }

__global__ void barriers(FK_PARAM(Repeat) a) {
  for (int i = 0; i < a.times; ++i) __syncthreads();
  a.out[threadIdx.x] = 1.0f;
}

__global__ void shuffles(FK_PARAM(Repeat) a) {
  float x = static_cast<float>(threadIdx.x);
  for (int i = 0; i < a.times; ++i) x += __shfl_xor_sync(~0u, x, 1);
  a.out[threadIdx.x] = x;
}

// Nanoseconds of one launch, the best of five.
double cost(void (*kernel)(FK_PARAM(Repeat)), unsigned grid, unsigned block, int times) {
  static float out[emulation::kMaxBlock];
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    launch(kernel, grid, block, nullptr, Repeat{out, times});
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, took.count());
  }
  return best;
}

void print_costs() {
  std::printf("%-10s %8s %18s %18s %12s %10s\n", "schedule", "threads", "start+end, bare", "start+end, 1 sync",
              "syncthreads", "shuffle");
  for (const char* schedule : {"forward", "reverse", "random", "warps"})
    for (const unsigned block : {256u, 1024u}) {
      emulation::set_schedule(schedule);
      const unsigned grid = 65536 / block;
      const double bare = cost(only_start, grid, block, 0), once = cost(barriers, grid, block, 1);
      const double more = cost(barriers, grid, block, 33), shuffled = cost(shuffles, grid, block, 33);
      const double one = cost(shuffles, grid, block, 1);
      std::printf("%-10s %8u %15.0f ns %15.0f ns %9.0f ns %7.0f ns\n", schedule, block, bare / 65536, once / 65536,
                  (more - once) / 32 / 65536, (shuffled - one) / 32 / 65536);
    }
}

int run(const cases::Case& test) {
  try {
    test.run();
    emulation::set_schedule("");
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", test.name, error.what());
    return 1;
  }
}

}  // namespace

int main(int count, char** names) {
  if (count == 2 && std::strcmp(names[1], "--costs") == 0) return print_costs(), 0;
  const bool list = count == 2 && std::strcmp(names[1], "--list") == 0;
  int failed = 0, found = 0;
  for (const cases::Case& test : cases::all()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(names[i], test.name) == 0;
    if (list) std::printf("%s\n", test.name);
    if (list || !wanted) continue;
    ++found;
    failed += run(test);
  }
  if (!list && found < count - 1) std::printf("no such case; --list names them\n");
  return list ? 0 : failed > 0 || found < count - 1;
}
