// The CUDA runtime, as code that knows no CUDA sees it.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "stream.h"

namespace flatkern::cuda {

// Another device is current than the one that the tensors are on. Nothing was done.
struct WrongDevice : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The driver has refused a launch, or reports that an earlier one failed.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int current_device();
bool is_capturing(Stream stream);
int64_t launch_count();  // of this thread

// A kernel of this module. All there are stand in a list, from before the first call.
class Kernel {
 public:
  explicit Kernel(const void* function);
  Kernel(const Kernel&) = delete;

  // Loads it on the current device. In a capture nothing can be loaded, and the other one throws LaunchError.
  void load(const char* op);
  void load_unless_captured(const char* op, Stream stream);
  bool is_loaded(int device) const { return (devices_.load(std::memory_order_relaxed) & bit(device)) != 0; }
  void forget() { devices_ = 0; }
  Kernel* next() const { return next_; }

 private:
  // Of more than 64 devices some share a bit, so that a capture on one of them may load after all.
  static uint64_t bit(int device) { return uint64_t{1} << device % 64; }

  const void* function_;
  std::atomic<uint64_t> devices_{0};
  Kernel* next_;
};
int load_kernels();    // all, on the current device; returns how many there are
int loaded_kernels();  // how many are loaded there
void forget_kernels();

// Starts a kernel that writes zeros. It has to be loaded before a capture, which the other one does.
void clear(const char* op, uint32_t* words, uint32_t count, Stream stream);
void prepare_clear(const char* op);

#ifdef FK_EMULATION
extern bool capture_is_under_way;  // for tests
#endif

struct Driver {
  int version, needed, devices;  // as CUDA counts versions: 13000 is 13.0
  std::string error;             // why devices cannot be counted; empty where they can
};
Driver driver();

}  // namespace flatkern::cuda
