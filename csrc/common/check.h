// What every operation refuses before it writes anything: one function per argument struct of arguments.h.
#pragma once

#include <stdexcept>

#include "arguments.h"

namespace flatkern {

// Arguments that do not fit each other; the text says `op: arg[k] ...`.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Mismatch. `on` is where tensors must be: on the CPU, or all on one CUDA device. Beside that device these may
// be on the CPU: `noise`, every tensor of `steps`, and grad_scale, clip and found_inf. No value on a device is read.
//
// What a call keeps (backups, masters, state) may not share memory with the tensor it belongs to: it would be lost.
// Other overlaps, such as a parameter given twice, are not looked for. No write then leaves the tensors that were
// passed, but which of two writes to one element is the last one is open.
#define FK_DECLARE(Args, name) void check(const Args& a, DeviceType on);
FK_FOR_EACH_OPERATION(FK_DECLARE)
#undef FK_DECLARE

}  // namespace flatkern
