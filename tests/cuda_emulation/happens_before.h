// What happens before what in a launch, as CUDA promises it, for ThreadSanitizer: two accesses that nothing here orders
// are a race, whichever came first. With FK_EMULATION_TSAN, which the kernels' own -fsanitize=thread goes with; the
// scheduler is compiled without that, so that only kernels are watched. Without it nothing here does anything.
//
//   launches of a stream   one after the other
//   __syncthreads          all threads of a block; blocks are not ordered
//   __syncwarp             the lanes of its mask
//   shuffles, ballots      nothing: what they exchange goes through the scheduler, unseen
//   atomics                nothing by themselves
//   __threadfence          a fence comes before another one, of any thread, if an atomic behind the first is seen by
//   one in
//                          front of the second. They are fence.sc: the other way round, the atomics would contradict
//                          them. "Behind" and "in front" are by what is listed here, barriers included
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FK_EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>

#include <algorithm>
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
  // What a fence has left: its address stands for what its thread knew.
  struct Left {
    uint64_t nothing;
  };
  using Fences = std::vector<Left*>;

  struct Known {
    Fences behind;  // fences that a thread is behind
    Fences found;   // those that its atomics have seen, and it is not behind
  };

 public:
  static constexpr bool kIsWatched = true;
  static constexpr uint64_t kMostThreads = 6000;  // of a launch; gcc 12's runtime ends the process at 8,128

  // A barrier's meeting: its address stands for what those knew who have arrived.
  struct Meeting {
    Known known;
    bool is_complete = false;
  };

  // On the host: a launch of so many threads comes behind everything before it, and in front of what comes behind it.
  void begin_launch(uint64_t threads) {
    const Unseen unseen;
    lefts_.clear();
    meetings_.clear();
    words_.clear();
    // A fiber knows what the one that makes it knows, so that the host makes them.
    while (fibers_.size() < threads) fibers_.push_back(__tsan_create_fiber(0));
    host_ = __tsan_get_current_fiber();
    next_fiber_ = next_scribe_ = 0;
    __tsan_release(&begin_);
  }
  void end_launch() { __tsan_acquire(&end_); }

  void* next_fiber() { return fibers_[next_fiber_++]; }
  void begin_thread(unsigned thread) {
    __tsan_acquire(&begin_);
    const Unseen unseen;
    threads_[thread] = {};
  }
  void end_thread() { __tsan_release(&end_); }

  // Who leaves a meeting knows what those did who had arrived.
  Meeting* meeting() {
    const Unseen unseen;
    return &meetings_.emplace_back();
  }
  void arrive(unsigned thread, Meeting* meeting) {
    __tsan_release(meeting);
    const Unseen unseen;
    add(meeting->known.behind, threads_[thread].behind);
    add(meeting->known.found, threads_[thread].found);
  }
  void leave(unsigned thread, Meeting* meeting) {
    __tsan_acquire(meeting);
    const Unseen unseen;
    if (!meeting->is_complete) complete(*meeting);
    threads_[thread] = meeting->known;
  }

  void fence(unsigned thread) {
    for (Left* left : threads_[thread].found) __tsan_acquire(left);
    Left* const left = new_left();
    __tsan_release(left);
    const Unseen unseen;
    threads_[thread] = {{left}, {}};
  }
  void atomic(unsigned thread, const void* address) {
    const Unseen unseen;
    Fences& word = words_[address];
    add(threads_[thread].found, word);
    add(word, threads_[thread].behind);
  }

 private:
  static void add(Fences& to, const Fences& from) {
    for (Left* left : from)
      if (to.empty() || to.back() != left) to.push_back(left);
  }

  Left* new_left() {
    const Unseen unseen;
    return &lefts_.emplace_back();
  }

  void complete(Meeting& meeting) {
    meeting.is_complete = true;
    for (Fences* fences : {&meeting.known.behind, &meeting.known.found}) {
      std::sort(fences->begin(), fences->end());
      fences->erase(std::unique(fences->begin(), fences->end()), fences->end());
    }
    if (meeting.known.behind.size() > 1) meeting.known.behind = {merged(meeting.known.behind)};
  }

  // One in place of several, so that not everybody has to look at those of everybody: a fiber that knows nothing else
  // passes them on.
  Left* merged(const Fences& several) {
    Left* const all = new_left();
    void* const self = __tsan_get_current_fiber();
    if (next_scribe_ == scribes_.size()) {
      change_to(host_);
      scribes_.push_back(__tsan_create_fiber(0));
    }
    change_to(scribes_[next_scribe_++]);
    for (Left* left : several) __tsan_acquire(left);
    __tsan_release(all);
    change_to(self);
    return all;
  }
  static void change_to(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }

  // Of all launches.
  std::vector<void*> fibers_, scribes_;
  void* host_ = nullptr;
  uint64_t begin_ = 0, end_ = 0;
  // Of this launch.
  size_t next_fiber_ = 0, next_scribe_ = 0;
  std::deque<Left> lefts_;
  std::deque<Meeting> meetings_;
  std::unordered_map<const void*, Fences> words_;
  Known threads_[1024];  // of the block
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

  struct Meeting;
  void begin_launch(uint64_t) {}
  void end_launch() {}
  void* next_fiber() { return nullptr; }
  void begin_thread(unsigned) {}
  void end_thread() {}
  Meeting* meeting() { return nullptr; }
  void arrive(unsigned, Meeting*) {}
  void leave(unsigned, Meeting*) {}
  void fence(unsigned) {}
  void atomic(unsigned, const void*) {}
};

}  // namespace flatkern::cuda::emulation

#endif
