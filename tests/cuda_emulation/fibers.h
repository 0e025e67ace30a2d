// Fibers: flows of control that take turns on one OS thread, each on a stack of its own. What runs next is decided by
// scheduler.cpp; here is only how to change from one to another.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__ELF__) && !defined(FK_EMULATION_UCONTEXT)
#define FK_EMULATION_ASSEMBLY 1
#else
#define FK_EMULATION_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace flatkern::cuda::emulation {

// Memory of one fiber's stack; below it lies a page that must not be touched, so that an overflow ends the process.
class Stack {
 public:
  explicit Stack(size_t index);
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return mapping_ + kGuard; }
  size_t size() const { return kSize - colour_; }

 private:
  friend class StackPool;
#if defined(__SANITIZE_ADDRESS__) || defined(FK_EMULATION_TSAN)
  static constexpr size_t kSize = 256 << 10;  // the sanitizers' frames are larger
#else
  static constexpr size_t kSize = 64 << 10;
#endif
  static constexpr size_t kGuard = 64 << 10;  // a multiple of every page size

  char* mapping_;
  size_t colour_;  // bytes left unused at the top, so that the stacks in use do not share the same cache sets
};

// Stacks are reused, the one that was last given back first: it is still in the cache.
class StackPool {
 public:
  Stack* take();
  void give_back([[maybe_unused]] Stack* stack) {
#if !defined(FK_EMULATION_TSAN)  // Threads that nothing orders must not be seen to write the same memory.
    free_.push_back(stack);
#endif
  }
  void take_all_back();  // after a launch: whatever is left of its fibers will never continue

 private:
  std::vector<std::unique_ptr<Stack>> all_;
  std::vector<Stack*> free_;
};

class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which must not return. `watched` is what ThreadSanitizer calls it.
  void prepare(const Stack& stack, void* watched, void (*entry)());
  // This fiber is the stack of the OS thread that calls.
  void adopt_os_thread();
  // `from` is the fiber that runs; the call returns when somebody switches back to it.
  static void change(Fiber& from, Fiber& to);
  // To be called first of all in `entry`.
  static void entered();

 private:
#if FK_EMULATION_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_bottom_ = nullptr;
  size_t stack_size_ = 0;
#endif
#if defined(FK_EMULATION_TSAN)
  void* watched_ = nullptr;
#endif
};

}  // namespace flatkern::cuda::emulation
