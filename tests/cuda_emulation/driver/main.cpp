// Calls operations of csrc/cuda from C++, with rows of every kind and in every way that has a kernel of its own, for a
// sanitizer to watch. A launch has few blocks, because ThreadSanitizer pays for each thread.
//
//   driver                 all operations
//   driver NAME ...        these
//   driver --list          their names
//   driver --kernels ...   launches nothing, and prints where in this file the kernels are that would have run
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <set>

#include "common/check.h"
#include "cuda/operations.h"
#include "operations.h"
#include "scheduler.h"

namespace flatkern::cuda {
extern bool noise_is_on_device;
}

namespace driver {
namespace {

const Way kWays[] = {
    {"float32", Way::kFloat32, ""},
    {"float32 rolling", Way::kFloat32, "backups noise momentum"},
    {"float32 general", Way::kFloat32, "backups noise history masks clean_grads scalars momentum"},
    {"bfloat16", Way::kBFloat16, "norms momentum"},
    {"bfloat16 rolling", Way::kBFloat16, "backups noise momentum"},
    {"bfloat16 masters", Way::kBFloat16, "masters momentum"},
    {"bfloat16 masters rolling", Way::kBFloat16, "masters noise momentum"},
    {"bfloat16 masters general", Way::kBFloat16, "masters noise history masks clean_grads scalars momentum"},
    {"mixed", Way::kMixed, "backups clean_grads momentum"},
    {"mixed general", Way::kMixed, "masters noise history masks clean_grads scalars momentum"},
};

const std::vector<Shape> kRows[] = {
    {{9, 9}, {40}},         // several rows a warp, and a vector
    {{5, 64}, {64}},        // the same of whole eights
    {{3, 257}, {2, 1032}},  // a warp a row, and several
    {{2, 6144}},            // a block a row
    {{9000}, {1, 9000}},    // a block that is as large as its row needs
    {{1, 36000}},           // segments in several blocks
};

template <class Args>
void call(void (*operation)(const Args&), const Way& way, const std::vector<Shape>& shapes) {
  Tensors tensors(way, shapes);
  Args args = {};
  fill(args, tensors);
  check(args, DeviceType::kCpu);
  flatkern::cuda::noise_is_on_device = way.has("scalars");
  for (int times = 0; times < 2; ++times) operation(args);
}

struct Operation {
  const char* name;
  void (*call)(const Way& way, const std::vector<Shape>& shapes);
};

#define FK_ROW(Args, name) \
  {#name, [](const Way& way, const std::vector<Shape>& shapes) { call<Args>(flatkern::cuda::name, way, shapes); }},
const Operation kOperations[] = {FK_FOR_EACH_OPERATION(FK_ROW)};

int run(const Operation& operation) {
  for (const Way& way : kWays)
    for (const std::vector<Shape>& shapes : kRows) {
      try {
        operation.call(way, shapes);
      } catch (const std::exception& error) {
        std::printf("%s, %s, columns %d: %s\n", operation.name, way.name, static_cast<int>(shapes[0].back()),
                    error.what());
        return 1;
      }
    }
  return 0;
}

}  // namespace
}  // namespace driver

int main(int count, char** words) {
  using namespace driver;
  std::set<std::string> wanted(words + 1, words + count);
  const bool list = wanted.erase("--list") > 0, kernels = wanted.erase("--kernels") > 0, all = wanted.empty();
  flatkern::cuda::emulation::launch_nothing(kernels);
  std::set<uintptr_t> ran;
  flatkern::cuda::emulation::watch([&](const auto& launch) { ran.insert(reinterpret_cast<uintptr_t>(launch.kernel)); });
  int failed = 0;
  for (const Operation& operation : kOperations) {
    if (!all && wanted.erase(operation.name) == 0) continue;
    if (list) std::printf("%s\n", operation.name);
    if (!list) failed += run(operation);
  }
  for (const std::string& name : wanted) std::printf("no such operation: %s\n", name.c_str());
  Dl_info file;
  dladdr(reinterpret_cast<void*>(main), &file);
  if (kernels)
    for (const uintptr_t kernel : ran) std::printf("%zx\n", kernel - reinterpret_cast<uintptr_t>(file.dli_fbase));
  std::fflush(stdout);
  // Fibers of a launch that has failed never end, which ThreadSanitizer would wait for.
  if (failed > 0 || !wanted.empty()) _exit(1);
  return 0;
}
