// Chooses among the compiled instruction sets by what the processor reports, or by FLATKERN_CPU_ISA.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

#if defined(FK_X86)
#include <cpuid.h>
#endif

namespace flatkern::cpu {

// The walks of one instruction set.
struct Kernels {
#define FK_MEMBER(Args, name) void (*name)(const Args&);
  FK_FOR_EACH_WALK(FK_MEMBER)
#undef FK_MEMBER
};

#define FK_ADDRESS(Args, name) name,
#define FK_DEFINE_TABLE(isa)                                   \
  namespace isa {                                              \
  constexpr Kernels kKernels = {FK_FOR_EACH_WALK(FK_ADDRESS)}; \
  }
FK_DEFINE_TABLE(baseline)
#if defined(FK_X86)
FK_DEFINE_TABLE(avx2)
FK_DEFINE_TABLE(avx512)
#endif
#undef FK_DEFINE_TABLE
#undef FK_ADDRESS

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

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
    {"baseline", always, &baseline::kKernels},
#if defined(FK_X86)
    {"avx2", has_avx2, &avx2::kKernels},
    {"avx512", has_avx512, &avx512::kKernels},
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

#define FK_RUN(Args, name) \
  void run(const Args& a) { chosen->kernels->name(a); }
FK_FOR_EACH_WALK(FK_RUN)
#undef FK_RUN

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
