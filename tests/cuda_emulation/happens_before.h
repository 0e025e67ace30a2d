// What happens before what in a launch, as CUDA promises it, for ThreadSanitizer: two accesses that nothing here orders
// are a race, whichever came first. With FK_EMULATION_TSAN, which the kernels' own -fsanitize=thread goes with; the
// scheduler is compiled without that, so that only kernels are watched. Without it nothing here does anything.
//
//   launches of a stream   one after the other
//   __syncthreads          all threads of a block; blocks are not ordered
//   __syncwarp             the lanes of its mask
//   shuffles, ballots      nothing: what they exchange goes through the scheduler, unseen
//   atomics                nothing by themselves. A fence publishes what its thread knows to those that reach the
//   atomic's
//                          word later; they know it behind a fence of their own
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FK_EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>

#include <deque>
#include <unordered_map>
#include <vector>

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}

namespace flatkern::cuda::emulation {

// While one lives, what the scheduler allocates, frees and copies is no access of the fiber that runs.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
  Unseen(const Unseen&) = delete;
};

class HappensBefore {
 public:
  static constexpr bool kIsWatched = true;
  static constexpr uint64_t kMostThreads = 6000;  // of a launch; gcc 12's runtime ends the process at 8,128

  // On the host: a launch of so many threads comes behind everything before it.
  void begin_launch(uint64_t threads) {
    const Unseen unseen;
    places_.clear();
    words_.clear();
    // A fiber knows what the one that makes it knows, so that they are made here.
    while (fibers_.size() < threads) fibers_.push_back(__tsan_create_fiber(0));
    next_fiber_ = 0;
    begin_ = place();
    arrive(begin_);
  }
  void begin_block() {
    const Unseen unseen;
    end_ = place();
  }
  void end_block() { leave(end_); }

  // On a thread's own stack, except for the first, which chooses its fiber.
  void* fiber() { return fibers_[next_fiber_++]; }
  void begin_thread(unsigned thread) {
    leave(begin_);
    const Unseen unseen;
    threads_[thread] = {};
  }
  void end_thread() { arrive(end_); }

  // Who leaves a place knows what those did who had arrived there.
  void* place() {
    const Unseen unseen;
    return &places_.emplace_back();
  }
  static void arrive(void* place) { __tsan_release(place); }
  static void leave(void* place) { __tsan_acquire(place); }

  void fence(unsigned thread) {
    Thread& t = threads_[thread];
    for (void* published : t.found) leave(published);
    t.published = place();
    arrive(t.published);
    const Unseen unseen;
    t.found.clear();
  }
  void atomic(unsigned thread, const void* address) {
    const Unseen unseen;
    Thread& t = threads_[thread];
    std::vector<void*>& word = words_[address];
    t.found.insert(t.found.end(), word.begin(), word.end());
    if (t.published != nullptr) word.push_back(t.published);
  }

 private:
  struct Thread {
    void* published = nullptr;  // by its last fence
    std::vector<void*> found;   // by its atomics since then
  };

  std::vector<void*> fibers_;
  size_t next_fiber_ = 0;
  std::deque<uint64_t> places_;  // of this launch; a new one for each meeting
  std::unordered_map<const void*, std::vector<void*>> words_;
  Thread threads_[1024];
  void *begin_ = nullptr, *end_ = nullptr;
};

}  // namespace flatkern::cuda::emulation

#else

namespace flatkern::cuda::emulation {

struct Unseen {
  Unseen() {}
  ~Unseen() {}
};

class HappensBefore {
 public:
  static constexpr bool kIsWatched = false;
  static constexpr uint64_t kMostThreads = ~uint64_t{0};

  void begin_launch(uint64_t) {}
  void begin_block() {}
  void end_block() {}
  void* fiber() { return nullptr; }
  void begin_thread(unsigned) {}
  void end_thread() {}
  void* place() { return nullptr; }
  static void arrive(void*) {}
  static void leave(void*) {}
  void fence(unsigned) {}
  void atomic(unsigned, const void*) {}
};

}  // namespace flatkern::cuda::emulation

#endif
