// What every operation refuses before it writes anything: one function per argument struct of ops.h.
#pragma once

#include <stdexcept>

#include "ops.h"

namespace flatkern::cpu {

// Arguments that do not fit each other; the text says `op: arg[k] ...`.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(const FillNormal& a);
void check(const FilterNorms& a);
void check(const AscentNorm& a);
void check(const GradientNorm& a);
void check(const PerturbGaussian& a);
void check(const PerturbAscent& a);
void check(const Restore& a);
void check(const MixGradients& a);
void check(const SgdUpdate& a);
void check(const AdamUpdate& a);
void check(const CountMagnitudes& a);
void check(const PackMask& a);
void check(const Amplify& a);

}  // namespace flatkern::cpu
