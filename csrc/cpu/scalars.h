// Numbers that a call brings as tensors, read on the host.
#pragma once

#include "../common/table.h"

namespace flatkern::cpu {

// The value of a 0-dim float32 tensor that may be absent.
FK_INLINE float value_or(const Table& scalar, float absent) { return scalar ? *scalar[0].as<float>() : absent; }

// A number per tensor: of `given`, a float64 vector, where that is present, else of the list.
struct Numbers {
  const Floats& list;
  const Table& given;

  FK_INLINE double operator[](int64_t k) const {
    return given ? given[0].as<double>()[k * given[0].strides[0]] : list[k];
  }
};

}  // namespace flatkern::cpu
