#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FK_EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if FK_EMULATION_ASSEMBLY
// Save what a function has to preserve and the stack pointer, load those of another fiber, continue there. A jump and
// not `ret`: the processor would predict the caller of this call as where it returns to, and that is always wrong.
asm(R"(
.text
.p2align 4
.local flatkern_emulation_change
.type flatkern_emulation_change, @function
flatkern_emulation_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size flatkern_emulation_change, .-flatkern_emulation_change
)");
extern "C" void flatkern_emulation_change(void** saved, void* next);
#endif

namespace flatkern::cuda::emulation {

Stack::Stack(size_t index) : colour_(index % 64 * 64) {
  void* mapping =
      mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kGuard, PROT_NONE);
}

Stack::~Stack() { munmap(mapping_, kGuard + kSize); }

Stack* StackPool::take() {
  if (free_.empty()) {
    all_.push_back(std::make_unique<Stack>(all_.size()));
    free_.reserve(all_.size());
    return all_.back().get();
  }
  Stack* stack = free_.back();
  free_.pop_back();
  return stack;
}

void StackPool::take_all_back() {
  free_.clear();
  for (const auto& stack : all_) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack->bottom(), stack->size());
#endif
    free_.push_back(stack.get());
  }
}

void Fiber::prepare(const Stack& stack, [[maybe_unused]] void* watched, void (*entry)()) {
#if defined(FK_EMULATION_TSAN)
  watched_ = watched;
#endif
#if defined(__SANITIZE_ADDRESS__)
  // What the last fiber here has left: the frames that it did not return from, which are few.
  constexpr size_t kLeft = 4096;
  ASAN_UNPOISON_MEMORY_REGION(stack.bottom() + stack.size() - kLeft, kLeft);
  stack_bottom_ = stack.bottom();
  stack_size_ = stack.size();
#endif
#if FK_EMULATION_ASSEMBLY
  void** top = reinterpret_cast<void**>(stack.bottom() + stack.size());
  *--top = nullptr;  // where `entry` would return to: a backtrace ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.bottom();
  context_.uc_stack.ss_size = stack.size();
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::adopt_os_thread() {
#if defined(__SANITIZE_ADDRESS__)
  struct Bounds {
    void* bottom = nullptr;
    size_t size = 0;
    Bounds() {
      pthread_attr_t attributes;
      pthread_getattr_np(pthread_self(), &attributes);
      pthread_attr_getstack(&attributes, &bottom, &size);
      pthread_attr_destroy(&attributes);
    }
  };
  static thread_local const Bounds bounds;  // to ask reads the list of all mappings
  stack_bottom_ = bounds.bottom;
  stack_size_ = bounds.size;
#endif
#if defined(FK_EMULATION_TSAN)
  watched_ = __tsan_get_current_fiber();
#endif
}

void Fiber::change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack_bottom_, to.stack_size_);
#endif
#if defined(FK_EMULATION_TSAN)
  __tsan_switch_to_fiber(to.watched_, __tsan_switch_to_fiber_no_sync);
#endif
#if FK_EMULATION_ASSEMBLY
  flatkern_emulation_change(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace flatkern::cuda::emulation
