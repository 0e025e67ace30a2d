// Chooses among the compiled instruction sets by what the processor reports, or by FLATKERN_CPU_ISA.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FK_X86)
#include <cpuid.h>
#endif

namespace flatkern::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  Kernels kernels;
};

#define FK_KERNELS(isa)                                                                                          \
  {isa::fill_normal_,      isa::filter_norms_, isa::ascent_norm_,   isa::gradient_norm_, isa::perturb_gaussian_, \
   isa::perturb_ascent_,   isa::restore_,      isa::mix_gradients_, isa::sgd_update_,    isa::adam_update_,      \
   isa::count_magnitudes_, isa::pack_mask_,    isa::amplify_}

bool always() { return true; }

#if defined(FK_X86)
bool has_avx2() {
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa kIsas[] = {
    {"baseline", always, FK_KERNELS(baseline)},
#if defined(FK_X86)
    {"avx2", has_avx2, FK_KERNELS(avx2)},
    {"avx512", has_avx512, FK_KERNELS(avx512)},
#endif
};

const Isa* chosen = &kIsas[0];

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& candidate : kIsas)
    if (candidate.supported()) names.push_back(candidate.name);
  return names;
}

const Kernels& kernels() { return chosen->kernels; }

std::string isa() { return chosen->name; }

std::string set_isa(const std::string& name) {
  const std::string previous = isa();
  for (const Isa& candidate : kIsas) {
    if (candidate.name == name && candidate.supported()) {
      chosen = &candidate;
      return previous;
    }
  }
  std::string message = "'" + name + "' is no instruction set that was compiled and that this CPU has; these are:";
  for (const std::string& known : isas()) message += " " + known;
  throw std::invalid_argument(message);
}

void choose_isa() {
  const char* wanted = std::getenv("FLATKERN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    set_isa(isas().back());
    return;
  }
  try {
    set_isa(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("FLATKERN_CPU_ISA: ") + error.what());
  }
}

}  // namespace flatkern::cpu
