#include "scheduler.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "emulation.h"
#include "fibers.h"
#include "happens_before.h"
#include "schedule.h"
#include "shared.h"
#include "switched_off.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace flatkern::cuda::emulation {
namespace {

struct Thread {
  Fiber fiber;
  Stack* stack;          // null before it runs for the first time
  const Site* waits_at;  // of a thread that neither runs nor can run
};

// A warp operation that some lanes of its mask have reached and others have not. As masks of one warp may be disjoint,
// several can be open.
struct Meeting {
  const Site* site;
  unsigned mask, arrived;
  HappensBefore::Meeting* meeting;  // of a barrier
};

struct Warp {
  unsigned ready;   // lanes that can run and do not
  unsigned inside;  // lanes that have not returned from the kernel
  unsigned open;
  Meeting meetings[kWarpSize];
  uint64_t given[kWarpSize];
  unsigned source[kWarpSize];
  // Each lane's result stays until its own next operation, so that lanes may collect it at different times.
  uint64_t result[kWarpSize];
};

enum class Kind { kBarrier, kShuffle, kBallot };

class Machine {
 public:
  void run(const Launch& launch);
  void sync_threads(Site& site);
  uint64_t meet(Kind kind, Site& site, unsigned mask, unsigned source, uint64_t given);
  void* shared_memory(SharedSite& site) {
    const Unseen unseen;
    return shared_.find(site, block_serial_);
  }
  void fence() { before_.fence(current_); }
  void atomic(const void* address) { before_.atomic(current_, address); }
  [[noreturn]] void fail(const char* file, int line, const char* format, va_list values);

  // Settings, and what tests ask for.
  SwitchedOff switched_off;
  std::string wanted_schedule;
  bool launch_nothing = false;
  std::function<void(const Launch&)> see;
  int device = 0;
  std::atomic<int64_t> launches{0};

  // Whether a launch is under way, and on which OS thread.
  std::atomic<bool> running{false};
  std::atomic<std::thread::id> owner{};

 private:
  void run_block(unsigned index);
  void thread_main();
  unsigned pick();
  void change(Fiber& from, unsigned next);
  void wait(const Site& site);
  void leave();
  Meeting& join(Warp& warp, Site& site, unsigned mask);
  void check_lanes(const Warp& warp, const Site& site, unsigned mask);
  static void complete(Kind kind, Warp& warp, unsigned mask);
  [[gnu::format(printf, 2, 3)]] void say(const char* format, ...);
  void say(const char* format, va_list values);
  void describe_deadlock();
  [[noreturn]] void deadlock();
  [[noreturn]] void give_up();
  bool is_inside(unsigned thread) const { return warps_[thread / kWarpSize].inside >> thread % kWarpSize & 1; }
  unsigned first_that_returned() const;

  Thread threads_[kMaxBlock];
  Warp warps_[kMaxBlock / kWarpSize];
  unsigned ready_warps_ = 0;  // those with a lane that is ready
  unsigned current_ = 0;      // the thread that runs
  unsigned warp_ = 0;         // the warp that has priority
  unsigned inside_ = 0;       // threads that have not returned
  Site* barrier_ = nullptr;   // where threads wait for the block
  HappensBefore::Meeting* barrier_meeting_ = nullptr;
  unsigned at_barrier_ = 0;
  unsigned first_at_barrier_ = 0;

  Launch launch_{};
  Schedule schedule_{};
  Random random_{0};
  uint64_t block_serial_ = 0;
  SharedMemory shared_;
  StackPool stacks_;
  HappensBefore before_;
  Fiber host_;
  char fault_[1024] = "";
};

Machine machine;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// --- launches ----------------------------------------------------------------------------------------------------

void check(const Launch& launch) {
  const auto refuse = [](const std::string& what) { throw Fault("emulation: launch: " + what); };
  if (launch.grid == 0 || launch.grid > kMaxGrid)
    refuse("the grid has " + std::to_string(launch.grid) + " blocks, but should have 1 to 2^31 - 1");
  if (launch.block == 0 || launch.block > kMaxBlock)
    refuse("a block has " + std::to_string(launch.block) + " threads, but should have 1 to 1024");
  if (launch.size > kMaxParameters)
    refuse("the parameters have " + std::to_string(launch.size) + " bytes, but at most 32764 are possible");
  if (uint64_t{launch.grid} * launch.block > HappensBefore::kMostThreads)
    refuse("it has more threads than ThreadSanitizer can tell apart, " + std::to_string(HappensBefore::kMostThreads));
}

// One launch at a time: there is one threadIdx.
class Turn {
 public:
  Turn() {
    if (machine.running.exchange(true))
      throw Fault("emulation: launch: another OS thread's kernel is running; the emulation serves one at a time");
    machine.owner = std::this_thread::get_id();
  }
  ~Turn() {
    machine.owner = std::thread::id();
    machine.running = false;
  }
};

void Machine::run(const Launch& launch) {
  check(launch);
  schedule_ =
      schedule_of(wanted_schedule.empty() ? environment("FLATKERN_EMULATION_SCHEDULE") : wanted_schedule, launches);
  random_ = Random(schedule_.seed);
  switched_off.read(environment("FLATKERN_EMULATION_WITHOUT"));
  ++launches;
  if (see) see(launch);
  if (launch_nothing) return;
  launch_ = launch;
  blockDim = dim3(launch.block);
  gridDim = dim3(launch.grid);
  host_.adopt_os_thread();
  before_.begin_launch(uint64_t{launch.grid} * launch.block);
  const BlockOrder order(schedule_.order, launch.grid, random_);
  for (uint64_t i = 0; i < launch.grid && fault_[0] == '\0'; ++i) run_block(order[i]);
  before_.end_launch();
  shared_.release();
  if (HappensBefore::kIsWatched || fault_[0] != '\0') stacks_.take_all_back();
  if (fault_[0] != '\0') {
    const std::string text = fault_;
    fault_[0] = '\0';
    throw Fault("emulation: " + text + " [schedule " + schedule_.text() + "]");
  }
}

void Machine::run_block(unsigned index) {
  blockIdx.x = index;
  ++block_serial_;
  inside_ = launch_.block;
  at_barrier_ = 0;
  ready_warps_ = 0;
  for (unsigned first = 0; first < launch_.block; first += kWarpSize) {
    Warp& warp = warps_[first / kWarpSize];
    const unsigned lanes = std::min(kWarpSize, launch_.block - first);
    warp.ready = warp.inside = ~0u >> (kWarpSize - lanes);
    warp.open = 0;
    ready_warps_ |= 1u << first / kWarpSize;
  }
  for (unsigned i = 0; i < launch_.block; ++i) threads_[i].stack = nullptr;
  warp_ = any_bit(ready_warps_, random_);
  change(host_, pick());
  const Unseen unseen;
  if (fault_[0] == '\0') shared_.end_block(index, fault_, sizeof fault_);
}

// --- who runs next -----------------------------------------------------------------------------------------------

// Takes one out of those that are ready.
unsigned Machine::pick() {
  unsigned lane = 0;
  switch (schedule_.order) {
    case Order::kForward:
      warp_ = static_cast<unsigned>(__builtin_ctz(ready_warps_));
      lane = static_cast<unsigned>(__builtin_ctz(warps_[warp_].ready));
      break;
    case Order::kReverse:
      warp_ = 31 - static_cast<unsigned>(__builtin_clz(ready_warps_));
      lane = 31 - static_cast<unsigned>(__builtin_clz(warps_[warp_].ready));
      break;
    case Order::kRandom:
      warp_ = any_bit(ready_warps_, random_);
      lane = any_bit(warps_[warp_].ready, random_);
      break;
    case Order::kWarps:
      if ((ready_warps_ >> warp_ & 1) == 0) warp_ = any_bit(ready_warps_, random_);
      lane = any_bit(warps_[warp_].ready, random_);
  }
  unsigned& ready = warps_[warp_].ready;
  ready &= ~(1u << lane);
  if (ready == 0) ready_warps_ &= ~(1u << warp_);
  return warp_ * kWarpSize + lane;
}

// Leaves the fiber that runs and continues the thread `next`, or begins it.
void Machine::change(Fiber& from, unsigned next) {
  Thread& thread = threads_[next];
  if (thread.stack == nullptr) {
    const Unseen unseen;
    thread.stack = stacks_.take();
    thread.fiber.prepare(*thread.stack, before_.next_fiber(), [] { machine.thread_main(); });
  }
  current_ = next;
  threadIdx.x = next;
  Fiber::change(from, thread.fiber);
}

// The running thread waits at `site`, unless it has just been made ready, until it is picked.
void Machine::wait(const Site& site) {
  threads_[current_].waits_at = &site;
  if (ready_warps_ == 0) deadlock();
  const unsigned next = pick();
  if (next != current_) change(threads_[current_].fiber, next);
}

// What runs on every stack: one thread from its beginning to its end, and then another. If the next thread has not run
// yet, it takes this stack over, which costs no change.
void Machine::thread_main() {
  Fiber::entered();
  for (;;) {
    before_.begin_thread(current_);
    launch_.call(launch_.kernel, launch_.arguments);
    before_.end_thread();
    leave();
    Stack* stack = threads_[current_].stack;
    if (inside_ == 0) {
      stacks_.give_back(stack);
      Fiber::change(threads_[current_].fiber, host_);
    }
    if (ready_warps_ == 0) deadlock();
    const unsigned next = pick();
    if (HappensBefore::kIsWatched || threads_[next].stack != nullptr) {
      stacks_.give_back(stack);
      change(threads_[current_].fiber, next);
    }
    threads_[next].stack = stack;
    current_ = next;
    threadIdx.x = next;
  }
}

// The running thread has returned from the kernel.
void Machine::leave() {
  Warp& warp = warps_[current_ / kWarpSize];
  warp.inside &= ~(1u << current_ % kWarpSize);
  --inside_;
  if (at_barrier_ > 0)
    emulation::fail(barrier_->file, barrier_->line, "returns from the kernel while thread %u waits for it at %s",
                    first_at_barrier_, barrier_->what);
  for (unsigned i = 0; i < warp.open; ++i) {
    const Meeting& meeting = warp.meetings[i];
    if (meeting.mask & 1u << current_ % kWarpSize)
      emulation::fail(meeting.site->file, meeting.site->line,
                      "returns from the kernel while lane %d of its warp waits for it at %s",
                      __builtin_ctz(meeting.arrived), meeting.site->what);
  }
}

// --- barriers and warp operations ----------------------------------------------------------------------------------

unsigned Machine::first_that_returned() const {
  for (unsigned i = 0; i < launch_.block; ++i)
    if (!is_inside(i)) return i;
  return launch_.block;
}

void Machine::sync_threads(Site& site) {
  if (inside_ < launch_.block)
    emulation::fail(site.file, site.line, "waits for the block at %s, but thread %u has returned from the kernel",
                    site.what, first_that_returned());
  if (at_barrier_ == 0) {
    barrier_ = &site;
    barrier_meeting_ = before_.meeting();
    first_at_barrier_ = current_;
  } else if (barrier_ != &site) {
    emulation::fail(site.file, site.line, "is at this %s, but thread %u waits at the %s of %s:%d", site.what,
                    first_at_barrier_, barrier_->what, barrier_->file, barrier_->line);
  }
  HappensBefore::Meeting* const meeting = barrier_meeting_;
  before_.arrive(current_, meeting);
  if (++at_barrier_ == launch_.block) {
    at_barrier_ = 0;
    for (unsigned w = 0; w * kWarpSize < launch_.block; ++w) {
      warps_[w].ready = warps_[w].inside;
      ready_warps_ |= 1u << w;
    }
  }
  wait(site);
  before_.leave(current_, meeting);
}

void Machine::check_lanes(const Warp& warp, const Site& site, unsigned mask) {
  const unsigned lane = current_ % kWarpSize;
  if ((mask >> lane & 1) == 0)
    emulation::fail(site.file, site.line, "calls %s with the mask 0x%08x, which lacks its own lane %u", site.what, mask,
                    lane);
  const unsigned missing = mask & ~warp.inside;
  if (missing != 0) {
    const unsigned absent = current_ - lane + static_cast<unsigned>(__builtin_ctz(missing));
    emulation::fail(site.file, site.line, "calls %s with the mask 0x%08x, which names thread %u, but that %s",
                    site.what, mask, absent,
                    absent < launch_.block ? "has returned from the kernel" : "is not in the block");
  }
}

// The meeting that the running lane comes to.
Meeting& Machine::join(Warp& warp, Site& site, unsigned mask) {
  for (unsigned i = 0; i < warp.open; ++i) {
    Meeting& meeting = warp.meetings[i];
    if (meeting.site == &site && meeting.mask == mask) return meeting;
    if ((meeting.mask & mask) == 0) continue;
    emulation::fail(site.file, site.line,
                    "calls %s with the mask 0x%08x, but lane %d waits at the %s of %s:%d with 0x%08x", site.what, mask,
                    __builtin_ctz(meeting.arrived), meeting.site->what, meeting.site->file, meeting.site->line,
                    meeting.mask);
  }
  Meeting& meeting = warp.meetings[warp.open++];
  meeting = {&site, mask, 0, before_.meeting()};
  return meeting;
}

void Machine::complete(Kind kind, Warp& warp, unsigned mask) {
  if (kind == Kind::kBarrier) return;
  if (kind == Kind::kShuffle && mask == ~0u) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) warp.result[lane] = warp.given[warp.source[lane]];
    return;
  }
  uint64_t votes = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) votes |= uint64_t{warp.given[lane] != 0} << lane;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) warp.result[lane] = kind == Kind::kBallot ? votes : warp.given[warp.source[lane]];
}

uint64_t Machine::meet(Kind kind, Site& site, unsigned mask, unsigned source, uint64_t given) {
  const unsigned lane = current_ % kWarpSize, index = current_ / kWarpSize;
  Warp& warp = warps_[index];
  check_lanes(warp, site, mask);
  Meeting& meeting = join(warp, site, mask);
  warp.given[lane] = given;
  warp.source[lane] = source;
  meeting.arrived |= 1u << lane;
  HappensBefore::Meeting* const known = meeting.meeting;
  if (kind == Kind::kBarrier) before_.arrive(current_, known);
  if (meeting.arrived == mask) {
    meeting = warp.meetings[--warp.open];
    complete(kind, warp, mask);
    warp.ready |= mask;
    ready_warps_ |= 1u << index;
  }
  wait(site);
  if (kind == Kind::kBarrier) before_.leave(current_, known);
  return warp.result[lane];
}

// --- faults --------------------------------------------------------------------------------------------------------

// Appends to the fault's text; what does not fit is cut off.
void Machine::say(const char* format, ...) {
  va_list values;
  va_start(values, format);
  say(format, values);
  va_end(values);
}

void Machine::say(const char* format, va_list values) {
  const size_t used = std::strlen(fault_);
  std::vsnprintf(fault_ + used, sizeof fault_ - used, format, values);
}

void Machine::fail(const char* file, int line, const char* format, va_list values) {
  if (file != nullptr) say("%s:%d: ", file, line);
  say("block %u, thread %u ", blockIdx.x, current_);
  say(format, values);
  give_up();
}

// Back to the host, for good.
void Machine::give_up() {
  Fiber::change(threads_[current_].fiber, host_);
  std::abort();
}

// Says who waits where, those of one place together.
void Machine::describe_deadlock() {
  say("deadlock in block %u:", blockIdx.x);
  std::vector<const Site*> told;
  for (unsigned i = 0; i < launch_.block; ++i) {
    const Site* site = threads_[i].waits_at;
    if (!is_inside(i) || std::find(told.begin(), told.end(), site) != told.end()) continue;
    unsigned count = 0;
    for (unsigned j = i; j < launch_.block; ++j) count += is_inside(j) && threads_[j].waits_at == site;
    say("%s %u of its threads, thread %u the first, wait at %s (%s:%d)", told.empty() ? "" : ";", count, i, site->what,
        site->file, site->line);
    told.push_back(site);
  }
}

// The vector of the description is gone before the stack that it is on is left for good.
void Machine::deadlock() {
  describe_deadlock();
  give_up();
}

}  // namespace

void set_schedule(const std::string& text) {
  schedule_of(text, 0);  // refuses what is none
  machine.wanted_schedule = text;
}
void launch_nothing(bool on) { machine.launch_nothing = on; }
void watch(std::function<void(const Launch&)> see) { machine.see = std::move(see); }
int64_t launches() { return machine.launches; }
int current_device() { return machine.device; }
void set_current_device(int index) {
  if (index < 0 || index >= kDevices)
    throw std::invalid_argument("emulation: device " + std::to_string(index) + " is not one of the two, 0 and 1");
  machine.device = index;
}

void sync_threads(Site& site) {
  if (!machine.switched_off.contains(site)) machine.sync_threads(site);
}
void sync_warp(Site& site, unsigned mask) {
  if (!machine.switched_off.contains(site)) machine.meet(Kind::kBarrier, site, mask, 0, 0);
}
uint64_t shuffle(Site& site, unsigned mask, unsigned source, uint64_t bits) {
  if ((mask >> source & 1) == 0)
    fail(site.file, site.line, "reads lane %u by %s, which its mask 0x%08x does not name", source, site.what, mask);
  return machine.meet(Kind::kShuffle, site, mask, source, bits);
}
unsigned ballot(Site& site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(machine.meet(Kind::kBallot, site, mask, 0, predicate));
}

void fence(Site& site) {
  if (!machine.switched_off.contains(site)) machine.fence();
}
void atomic_access(const void* address) { machine.atomic(address); }

void misaligned(const Site& site, const void* pointer, size_t alignment) {
  fail(site.file, site.line, "accesses %p by %s, but its type needs an address that %zu divides", pointer, site.what,
       alignment);
}

void* shared_memory(SharedSite& site) { return machine.shared_memory(site); }

void fail(const char* file, int line, const char* format, ...) {
  va_list values;
  va_start(values, format);
  if (machine.owner.load() == std::this_thread::get_id()) machine.fail(file, line, format, values);
  std::fprintf(stderr, "emulation: %s:%d: outside of a kernel, the host ", file, line);
  std::vfprintf(stderr, format, values);
  std::abort();
}

void run(const Launch& launch) {
  if (machine.owner.load() == std::this_thread::get_id())
    fail(nullptr, 0, "launches a kernel, which only the host can");
  const Turn turn;
  machine.run(launch);
}

}  // namespace flatkern::cuda::emulation
