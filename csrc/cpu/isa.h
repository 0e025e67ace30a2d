// The instruction sets the walks are compiled for, and which of them runs.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace flatkern::cpu {

// Compiled and supported by this processor, the best last.
std::vector<std::string> isas();

// The kernels that run, and their name.
const Kernels& kernels();
std::string isa();

// Throws std::invalid_argument for a name that is not among isas(). Returns the previous name.
std::string set_isa(const std::string& name);

// The best one, or what FLATKERN_CPU_ISA names.
void choose_isa();

}  // namespace flatkern::cpu
