// What is squared and summed in a norm, one element at a time. Mirrors flatkern/reference/norm.py.
#pragma once

#include "arithmetic.h"

namespace flatkern::math {

FK_HD float square(float x) { return x * x; }

// The square root of a sum that is kept in float64, rounded once.
FK_HD float norm(double sum) { return static_cast<float>(sqrt(sum)); }

// T_w g of ASAM's norm, T_w = |w| + eta.
FK_HD float ascent_term(float p, float g, float eta) { return (fabsf(p) + eta) * g; }

}  // namespace flatkern::math
