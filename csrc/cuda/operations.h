// The operations of this backend, and what they share.
#pragma once

#include <vector>

#include "../common/arguments.h"
#include "plan.h"

namespace flatkern::cuda {

#define FK_DECLARE(Args, op) void op(const Args& a);
FK_FOR_EACH_OPERATION(FK_DECLARE)
#undef FK_DECLARE

// The lists of a perturbation: `clean` has the weights to start from, and the others may be null.
struct PerturbLists {
  const Table *params, *backups, *clean, *norms, *history;
  const Table &sigmas, &noise;
  const Floats &sigma, &eta;
  const Ints& index;
};

// Starts it. `measures`: norms of rows that are cut into segments are computed, and nothing is written yet.
void launch_perturb(const char* op, const PerturbLists& lists, const Plan& plan, const std::vector<Launch>& launches,
                    Stream stream, bool measures);

}  // namespace flatkern::cuda
