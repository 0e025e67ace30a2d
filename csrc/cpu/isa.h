// The instruction sets the walks are compiled for, and which of them runs.
#pragma once

#include <string>
#include <vector>

#include "streams.h"

namespace flatkern::cpu {

// One operation, or what is measured beside them, on the instruction set that was chosen.
#define FK_DECLARE(Args, name) void run(const Args& a);
FK_FOR_EACH_WALK(FK_DECLARE)
#undef FK_DECLARE

// Compiled and supported by this processor, the best last.
std::vector<std::string> isas();

// The name of the one that runs.
std::string isa();

// Throws std::invalid_argument for a name that is not among isas(). Returns the previous name.
std::string set_isa(const std::string& name);

// The best one, or what FLATKERN_CPU_ISA names.
void choose_isa();

}  // namespace flatkern::cpu
