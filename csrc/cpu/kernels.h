// The walks, declared once per instruction set that they are compiled for.
#pragma once

#include "streams.h"

namespace flatkern::cpu {

#define FK_DECLARE(Args, name) void name(const Args&);
#define FK_DECLARE_WALKS(isa)  \
  namespace isa {              \
  FK_FOR_EACH_WALK(FK_DECLARE) \
  }
FK_DECLARE_WALKS(baseline)
FK_DECLARE_WALKS(avx2)
FK_DECLARE_WALKS(avx512)
#undef FK_DECLARE_WALKS
#undef FK_DECLARE

}  // namespace flatkern::cpu
