// Memory for rows that are cut into segments.
#pragma once

#include <cstdint>

#include "tile.h"

namespace flatkern::cuda {

struct LongRows {
  const LongRow* rows;
  double* partials;   // of the first sum, then `segments` further on those of the second
  uint32_t* tickets;  // how many segments of a row are there; 0 between launches
  float* norms;
  uint32_t segments;
};

}  // namespace flatkern::cuda
