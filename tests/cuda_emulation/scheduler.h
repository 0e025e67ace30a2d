// The machine that runs kernels on the CPU, as the primitives of emulation.h and the bindings see it.
//
// A block's threads are fibers. One runs until it has to wait for others, at a barrier or at a warp operation; then the
// scheduler picks another that can run. The order in which it picks is the schedule, and a kernel has to give the same
// result under every schedule. Blocks run one after the other. There is one machine, and one OS thread uses it at a
// time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace flatkern::cuda::emulation {

// --- what bindings and tests call --------------------------------------------------------------------------------

// A kernel or a launch has done what CUDA forbids. The text names file:line, block, thread and the schedule. What the
// kernel had written until then stays written.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "forward", "reverse", "random" or "warps", each with ":seed" where the launches shall repeat; "" is the beginning's:
// FLATKERN_EMULATION_SCHEDULE if that is set, else the four in turn, with a new seed in every launch.
//   forward, reverse  of the threads that can run, always the first or the last; blocks likewise
//   random            any of them; blocks are permuted
//   warps             one warp, picked at random, runs as far as it can before another does; blocks are permuted
void set_schedule(const std::string& text);

// From now on launches are checked and counted, and run nothing.
void launch_nothing(bool on);

// From now on `see`, unless it is empty, is told of every launch before it runs.
struct Launch;
void watch(std::function<void(const Launch&)> see);

// Launches since the library was loaded, those of launch_nothing() among them, refused ones not.
int64_t launches();

constexpr int kDevices = 2;
int current_device();
void set_current_device(int index);

// --- what emulation.h is made of ---------------------------------------------------------------------------------

// One place in a kernel's source. Two places are the same if they are the same object, so that two operations on one
// line are told apart, and two instances of one template are, too.
struct Site {
  const char* what;
  const char* file;
  int line;
  unsigned reading = 0;  // of FLATKERN_EMULATION_WITHOUT, in which it was last looked up
  bool switched_off = false;
};

struct SharedSite {
  Site site;
  size_t size, alignment;
  uint64_t block = 0;  // for which block `data` was allocated
  void* data = nullptr;
};

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxBlock = 1024;
constexpr unsigned kMaxGrid = 0x7FFFFFFF;
constexpr size_t kMaxParameters = 32764;
constexpr size_t kMaxShared = 48 << 10;

// Barriers of a block and of a warp, and fences: FLATKERN_EMULATION_WITHOUT="update.cu:123,..." switches them off.
void sync_threads(Site& site);
void sync_warp(Site& site, unsigned mask);
void fence(Site& site);
// An atomic operation at this address is about to be done: for ThreadSanitizer.
void atomic_access(const void* address);
// `bits` of the lane `source`, when all lanes of `mask` have come here.
uint64_t shuffle(Site& site, unsigned mask, unsigned source, uint64_t bits);
// The lanes of `mask` whose `predicate` holds.
unsigned ballot(Site& site, unsigned mask, bool predicate);
// The calling block's memory for `site`.
void* shared_memory(SharedSite& site);

// Ends the launch with a Fault of the thread that runs, at `file`:`line` unless `file` is null. Outside of a kernel it
// ends the process.
[[noreturn, gnu::format(printf, 3, 4)]] void fail(const char* file, int line, const char* format, ...);

[[noreturn]] void misaligned(const Site& site, const void* pointer, size_t alignment);

// Runs `call(kernel, arguments)` as every thread of every block.
struct Launch {
  void (*call)(void (*kernel)(), const void* arguments);
  void (*kernel)();
  const void* arguments;
  size_t size;
  unsigned grid, block;
};
void run(const Launch& launch);

}  // namespace flatkern::cuda::emulation
