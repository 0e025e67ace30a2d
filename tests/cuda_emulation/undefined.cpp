// Accesses at addresses that their type does not allow, and indices outside of an array: on a GPU the former end the
// launch and the latter damage something. g++ inserts the checks (-fsanitize=alignment,bounds) and calls these instead
// of a runtime library, so that they become faults with block and thread. Left out where UBSan's own runtime is wanted.
#include "scheduler.h"

using flatkern::cuda::emulation::fail;

namespace {

// The beginning of what the compiler passes, the same for all checks.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) {
  fail(data->location.file, static_cast<int>(data->location.line),
       "accesses 0x%zx, but the type needs an address that %u divides", static_cast<size_t>(address),
       1u << data->log_alignment);
}

void __ubsan_handle_out_of_bounds(const SourceLocation* location, intptr_t index) {
  fail(location->file, static_cast<int>(location->line), "uses index %td, which is outside of the array",
       static_cast<ptrdiff_t>(index));
}

}  // extern "C"
